#include "runtime/cli/attend/npy.h"

#include <bit>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <optional>
#include <string_view>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"

namespace passel::cli {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr uint64_t kMaxHeader = 1 << 16;

[[noreturn]] void Refuse(const std::string& path, const std::string& what) {
  throw Error(ErrorClass::kIo, path + ": " + what);
}

// The header is a Python dictionary of a string, a boolean and a tuple of integers.
class HeaderParser {
 public:
  HeaderParser(const std::string& path, std::string_view text) : path_(path), text_(text) {}

  std::vector<uint64_t> Shape() {
    std::optional<std::vector<uint64_t>> shape;
    bool order = false, type = false;
    Take('{');
    while (!TryTake('}')) {
      const std::string_view key = String();
      Take(':');
      if (key == "descr" && !type) {
        const std::string_view descr = String();
        if (descr != "<f4") {
          Refuse(path_, "elements are '" + std::string(descr.substr(0, 16)) +
                            "'; expected '<f4' (little-endian float32)");
        }
        type = true;
      } else if (key == "fortran_order" && !order) {
        if (!TryWord("False")) Refuse(path_, "expected C order (fortran_order False)");
        order = true;
      } else if (key == "shape" && !shape) {
        shape = Tuple();
      } else {
        Refuse(path_, "the header has an unexpected key");
      }
      if (!TryTake(',')) {
        Take('}');
        break;
      }
    }
    Space();
    if (!shape || !order || !type || at_ != text_.size()) Refuse(path_, "the header is malformed");
    return *shape;
  }

 private:
  void Space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0) ++at_;
  }
  bool TryTake(char c) {
    Space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void Take(char c) {
    if (!TryTake(c)) Refuse(path_, std::string("the header is malformed: expected ") + c);
  }
  bool TryWord(std::string_view word) {
    Space();
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }
  std::string_view String() {
    Take('\'');
    const size_t end = text_.find('\'', at_);
    if (end == std::string_view::npos) Refuse(path_, "the header is malformed: open string");
    const std::string_view s = text_.substr(at_, end - at_);
    at_ = end + 1;
    return s;
  }
  std::vector<uint64_t> Tuple() {
    std::vector<uint64_t> shape;
    Take('(');
    while (!TryTake(')')) {
      Space();
      const size_t start = at_;
      uint64_t n = 0;
      while (at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_])) != 0) {
        const auto digit = static_cast<uint64_t>(text_[at_++] - '0');
        const auto ten = CheckedMul(n, 10);
        const auto next = ten ? CheckedAdd(*ten, digit) : std::nullopt;
        if (!next) Refuse(path_, "a dimension overflows");
        n = *next;
      }
      if (at_ == start || shape.size() >= 32) Refuse(path_, "the shape is malformed");
      shape.push_back(n);
      if (!TryTake(',')) {
        Take(')');
        break;
      }
    }
    return shape;
  }

  const std::string& path_;
  std::string_view text_;
  size_t at_ = 0;
};

template <typename T>
void Write(const std::string& path, const std::vector<uint64_t>& shape, std::span<const T> data,
           std::string_view descr) {
  std::string header = "{'descr': '" + std::string(descr) + "', 'fortran_order': False, 'shape': (";
  for (const uint64_t n : shape) header += std::to_string(n) + ", ";
  header += "), }";
  // Magic, version, length and header fill whole 64-byte lines.
  header.append(RoundUp(header.size() + 11, 64) - header.size() - 11, ' ');
  header += '\n';
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  const auto size = static_cast<uint16_t>(header.size());
  const char prefix[] = {'\x93',
                         'N',
                         'U',
                         'M',
                         'P',
                         'Y',
                         1,
                         0,
                         static_cast<char>(size & 0xff),
                         static_cast<char>(size >> 8)};
  out.write(prefix, sizeof(prefix));
  out.write(header.data(), static_cast<std::streamsize>(header.size()));
  out.write(reinterpret_cast<const char*>(data.data()),
            static_cast<std::streamsize>(data.size_bytes()));
  out.close();
  if (!out) Refuse(path, std::string("can't be written: ") + std::strerror(errno));
}

}  // namespace

NpyArray ReadNpy(const std::string& path, size_t dimensions) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) Refuse(path, std::string("can't be read: ") + std::strerror(errno));
  const std::streamoff end = in.tellg();
  if (end < 0) Refuse(path, "can't be read: not a regular file");
  const auto file_size = static_cast<uint64_t>(end);
  in.seekg(0);
  unsigned char start[12];
  in.read(reinterpret_cast<char*>(start), 10);
  if (!in || std::memcmp(start, "\x93NUMPY", 6) != 0) Refuse(path, "not a .npy file");
  const int version = start[6];
  if (version < 1 || version > 3) Refuse(path, "expected .npy format 1, 2 or 3");
  uint64_t header_size = start[8] | uint64_t{start[9]} << 8;
  uint64_t offset = 10;
  if (version >= 2) {
    in.read(reinterpret_cast<char*>(start + 10), 2);
    header_size |= uint64_t{start[10]} << 16 | uint64_t{start[11]} << 24;
    offset = 12;
  }
  if (!in || header_size > kMaxHeader || offset + header_size > file_size) {
    Refuse(path, "the header is truncated or too long");
  }
  std::string header(header_size, '\0');
  in.read(header.data(), static_cast<std::streamsize>(header_size));
  if (!in) Refuse(path, "the header is truncated");
  NpyArray array;
  array.shape = HeaderParser(path, header).Shape();
  if (array.shape.size() != dimensions) {
    Refuse(path, "has " + std::to_string(array.shape.size()) + " dimensions; expected " +
                     std::to_string(dimensions));
  }
  uint64_t elements = 1;
  for (const uint64_t n : array.shape) {
    const auto product = CheckedMul(elements, n);
    if (!product) Refuse(path, "the shape overflows");
    elements = *product;
  }
  const auto bytes = CheckedMul(elements, sizeof(float));
  if (!bytes || *bytes != file_size - offset - header_size) {
    Refuse(path, "has " + std::to_string(file_size - offset - header_size) +
                     " bytes of data; its shape asks for " + std::to_string(elements) +
                     " float32 values");
  }
  array.data.resize(elements);
  in.read(reinterpret_cast<char*>(array.data.data()), static_cast<std::streamsize>(*bytes));
  if (!in) Refuse(path, "the data is truncated");
  for (size_t i = 0; i < array.data.size(); ++i) {
    if (std::isfinite(array.data[i])) continue;
    Refuse(path, "value " + std::to_string(i) + " is not finite; expected finite numbers");
  }
  return array;
}

void WriteNpy(const std::string& path, const std::vector<uint64_t>& shape,
              std::span<const float> data) {
  Write(path, shape, data, "<f4");
}

void WriteNpy(const std::string& path, const std::vector<uint64_t>& shape,
              std::span<const int64_t> data) {
  Write(path, shape, data, "<i8");
}

}  // namespace passel::cli
