#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/error.h"

namespace passel {

// The input of a fuzz target as a file in memory, which readers open by its path.
class FuzzFile {
 public:
  FuzzFile(const uint8_t* data, size_t size) : fd_(::memfd_create("fuzz", 0)) {
    if (fd_ < 0) std::abort();
    for (size_t done = 0; done < size;) {
      const ssize_t n = ::write(fd_, data + done, size - done);
      if (n <= 0) std::abort();
      done += static_cast<size_t>(n);
    }
  }
  ~FuzzFile() { ::close(fd_); }
  FuzzFile(const FuzzFile&) = delete;
  FuzzFile& operator=(const FuzzFile&) = delete;

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

// The parts of an input, one for each file of a model: four bytes of length and so many bytes, as
// far as there are any.
inline std::vector<std::span<const uint8_t>> FuzzParts(const uint8_t* data, size_t size,
                                                       size_t count) {
  std::vector<std::span<const uint8_t>> parts(count);
  std::span<const uint8_t> rest(data, size);
  for (std::span<const uint8_t>& part : parts) {
    uint32_t length = 0;
    if (rest.size() < sizeof(length)) break;
    std::memcpy(&length, rest.data(), sizeof(length));
    rest = rest.subspan(sizeof(length));
    part = rest.first(std::min<size_t>(length, rest.size()));
    rest = rest.subspan(part.size());
  }
  return parts;
}

// A directory of links to parts of an input, by the names of files; an empty part is no file.
class FuzzDirectory {
 public:
  FuzzDirectory(const std::string& path, const std::vector<std::string>& names,
                const std::vector<std::span<const uint8_t>>& parts) {
    std::filesystem::create_directory(path);
    for (size_t i = 0; i < names.size(); ++i) {
      const std::string link = path + "/" + names[i];
      std::filesystem::remove(link);
      if (parts[i].empty()) continue;
      files_.push_back(std::make_unique<FuzzFile>(parts[i].data(), parts[i].size()));
      std::filesystem::create_symlink(files_.back()->path(), link);
    }
  }

 private:
  std::vector<std::unique_ptr<FuzzFile>> files_;
};

// A short text for a tokenizer: what the tokens of the corpus are found in, then the input's end.
inline std::string FuzzText(const uint8_t* data, size_t size) {
  const size_t tail = size < 64 ? size : 64;
  return "abc a<s> \u00e9\xff</s>  d" +
         std::string(reinterpret_cast<const char*>(data + size - tail), tail);
}

// Runs `parse`; an Error about the model is as good as success, whatever else it throws ends the
// process.
template <typename Parse>
void Survives(const Parse& parse) {
  try {
    parse();
  } catch (const Error& e) {
    if (e.error_class() != ErrorClass::kModel) std::abort();
  }
}

}  // namespace passel
