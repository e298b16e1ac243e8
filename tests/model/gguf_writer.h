#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace passel {

// Little-endian bytes.
class Bytes {
 public:
  template <typename T>
  Bytes& Put(T value) {
    const auto* p = reinterpret_cast<const char*>(&value);
    bytes_.append(p, sizeof(T));
    return *this;
  }
  Bytes& Text(const std::string& text) {
    Put<uint64_t>(text.size());
    bytes_ += text;
    return *this;
  }
  Bytes& Raw(const std::string& raw) {
    bytes_ += raw;
    return *this;
  }
  const std::string& str() const { return bytes_; }

 private:
  std::string bytes_;
};

// Composes a GGUF file, well-formed or not: each part can be given as it should not be.
struct GgufWriter {
  struct Tensor {
    std::string name;
    std::vector<uint64_t> dims;  // GGUF's order, columns first
    uint32_t type = 0;
    uint64_t offset = 0;
    std::string data;
  };

  std::string magic = "GGUF";
  uint32_t version = 3;
  uint64_t extra_tensors = 0, extra_values = 0;  // claimed above what is there
  std::vector<std::string> values;               // encoded metadata entries
  std::vector<Tensor> tensors;

  void Uint32(const std::string& key, uint32_t value) {
    values.push_back(Bytes().Text(key).Put<uint32_t>(4).Put(value).str());
  }
  void Float(const std::string& key, float value) {
    values.push_back(Bytes().Text(key).Put<uint32_t>(6).Put(value).str());
  }
  void String(const std::string& key, const std::string& value) {
    values.push_back(Bytes().Text(key).Put<uint32_t>(8).Text(value).str());
  }
  void Strings(const std::string& key, const std::vector<std::string>& strings) {
    Bytes bytes;
    bytes.Text(key).Put<uint32_t>(9).Put<uint32_t>(8).Put<uint64_t>(strings.size());
    for (const std::string& s : strings) bytes.Text(s);
    values.push_back(bytes.str());
  }
  void Ints(const std::string& key, const std::vector<int32_t>& ints) {
    Bytes bytes;
    bytes.Text(key).Put<uint32_t>(9).Put<uint32_t>(5).Put<uint64_t>(ints.size());
    for (const int32_t i : ints) bytes.Put(i);
    values.push_back(bytes.str());
  }
  void Floats(const std::string& key, const std::vector<float>& floats) {
    Bytes bytes;
    bytes.Text(key).Put<uint32_t>(9).Put<uint32_t>(6).Put<uint64_t>(floats.size());
    for (const float f : floats) bytes.Put(f);
    values.push_back(bytes.str());
  }
  // Places the data behind that of the earlier tensors.
  void F32(const std::string& name, const std::vector<uint64_t>& dims,
           const std::vector<float>& data) {
    std::string raw(data.size() * sizeof(float), '\0');
    std::memcpy(raw.data(), data.data(), raw.size());
    uint64_t offset = 0;
    for (const Tensor& t : tensors) offset += (t.data.size() + 31) / 32 * 32;
    tensors.push_back({name, dims, 0, offset, raw});
  }

  std::string Encode() const {
    Bytes bytes;
    bytes.Raw(magic).Put(version);
    bytes.Put<uint64_t>(tensors.size() + extra_tensors);
    bytes.Put<uint64_t>(values.size() + extra_values);
    for (const std::string& v : values) bytes.Raw(v);
    for (const Tensor& t : tensors) {
      bytes.Text(t.name).Put(static_cast<uint32_t>(t.dims.size()));
      for (const uint64_t d : t.dims) bytes.Put(d);
      bytes.Put(t.type).Put(t.offset);
    }
    std::string out = bytes.str();
    const auto pad = [&] { out.resize((out.size() + 31) / 32 * 32, '\0'); };
    for (const Tensor& t : tensors) {
      pad();
      out += t.data;
    }
    return out;
  }
};

// A file or directory of the test's own, gone with the object.
class TempPath {
 public:
  explicit TempPath(const std::string& suffix = "") {
    static int counter = 0;
    path_ = (std::filesystem::temp_directory_path() /
             ("passel_model_test_" + std::to_string(::getpid()) + "_" + std::to_string(counter++) +
              suffix))
                .string();
  }
  TempPath(const std::string& suffix, const std::string& content) : TempPath(suffix) {
    std::ofstream(path_, std::ios::binary) << content;
  }
  ~TempPath() { std::filesystem::remove_all(path_); }
  TempPath(const TempPath&) = delete;
  TempPath& operator=(const TempPath&) = delete;

  const std::string& str() const { return path_; }

 private:
  std::string path_;
};

}  // namespace passel
