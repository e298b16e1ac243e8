#include "runtime/model/gguf.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"
#include "runtime/base/printable.h"

namespace passel::model {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place");

// The metadata and the tensor directory may take as much as this: several times what a vocabulary
// of 260,000 tokens needs, and a bound on the memory that a header can ask for.
constexpr uint64_t kMaxHeader = uint64_t{64} << 20;

// Reads the header from front to back; every read is checked against the end of the file and of
// what a header may take. Memory grows with what was read, never with what a count promises.
class GgufParser {
 public:
  GgufParser(GgufFile& out, bool any_type)
      : out_(out),
        file_(out.file_.bytes()),
        header_(file_.first(std::min<uint64_t>(file_.size(), kMaxHeader))),
        any_type_(any_type) {}

  void Parse() {
    uint64_t tensors = 0, values = 0;
    ReadPreamble(tensors, values);
    for (uint64_t i = 0; i < values; ++i) ReadKeyValue(i);
    for (uint64_t i = 0; i < tensors; ++i) ReadTensor(i);
    PlaceTensors();
  }

 private:
  enum Type : uint32_t {
    kUint8,
    kInt8,
    kUint16,
    kInt16,
    kUint32,
    kInt32,
    kFloat32,
    kBool,
    kString,
    kArray,
    kUint64,
    kInt64,
    kFloat64,
  };
  // A tensor of out_, and where it lies in the data section.
  struct Place {
    uint64_t offset;
    const std::string* name;
    GgufTensor* tensor;
  };

  uint64_t Left() const { return header_.size() - at_; }

  void Need(uint64_t size, std::string_view field) const {
    if (size > Left()) {
      out_.Fail(field, fmt::format("needs {} bytes at offset {}, but only {} are left; expected a "
                                   "complete file with a header of at most {} MiB",
                                   size, at_, Left(), kMaxHeader >> 20));
    }
  }

  template <typename T>
  T Read(std::string_view field) {
    Need(sizeof(T), field);
    T value;
    std::memcpy(&value, header_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

  std::string ReadString(std::string_view field) {
    const auto size = Read<uint64_t>(field);
    Need(size, field);
    std::string text(reinterpret_cast<const char*>(header_.data() + at_), size);
    at_ += size;
    return text;
  }

  void ReadPreamble(uint64_t& tensors, uint64_t& values) {
    Need(4, "magic");
    if (std::memcmp(header_.data(), "GGUF", 4) != 0) {
      out_.Fail("magic", "not a GGUF file; expected it to begin with \"GGUF\"");
    }
    at_ = 4;
    const auto version = Read<uint32_t>("version");
    if (version != 2 && version != 3) {
      const bool swapped = version == 0x02000000u || version == 0x03000000u;
      out_.Fail("version", fmt::format("is {}; expected 2 or 3{}", version,
                                       swapped ? " (this is a big-endian file)" : ""));
    }
    tensors = Read<uint64_t>("tensor count");
    values = Read<uint64_t>("metadata count");
    // The least a directory entry takes: name length, dimension count, one dimension, type, offset;
    // and a metadata entry: key length, type, one byte.
    CheckCount("tensor count", tensors, 8 + 4 + 8 + 4 + 8);
    CheckCount("metadata count", values, 8 + 4 + 1);
  }

  // Refuses counts that the rest of the file cannot hold, before anything is allocated.
  void CheckCount(std::string_view field, uint64_t count, uint64_t least_bytes) const {
    if (count > Left() / least_bytes) {
      out_.Fail(field, fmt::format("is {}, more than the remaining {} bytes of the header can hold",
                                   count, Left()));
    }
  }

  int64_t Narrow(uint64_t value, std::string_view field) const {
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      out_.Fail(field, fmt::format("is {}; expected at most 2^63 - 1", value));
    }
    return static_cast<int64_t>(value);
  }

  std::optional<int64_t> ReadInteger(uint32_t type, std::string_view field) {
    switch (type) {
      case kUint8:
        return Read<uint8_t>(field);
      case kInt8:
        return Read<int8_t>(field);
      case kUint16:
        return Read<uint16_t>(field);
      case kInt16:
        return Read<int16_t>(field);
      case kUint32:
        return Read<uint32_t>(field);
      case kInt32:
        return Read<int32_t>(field);
      case kInt64:
        return Read<int64_t>(field);
      case kUint64:
        return Narrow(Read<uint64_t>(field), field);
      default:
        return std::nullopt;
    }
  }

  GgufValue ReadValue(uint32_t type, std::string_view key) {
    if (const auto integer = ReadInteger(type, key)) return *integer;
    switch (type) {
      case kFloat32:
        return static_cast<double>(Read<float>(key));
      case kFloat64:
        return Read<double>(key);
      case kBool:
        return ReadBool(key);
      case kString:
        return ReadString(key);
      case kArray:
        return ReadArray(key);
      default:
        out_.Fail(key, fmt::format("has value type {}; expected 0 to 12", type));
    }
  }

  bool ReadBool(std::string_view key) {
    const auto value = Read<uint8_t>(key);
    if (value > 1) out_.Fail(key, fmt::format("is {}; expected a boolean, 0 or 1", value));
    return value != 0;
  }

  GgufValue ReadArray(std::string_view key) {
    const auto type = Read<uint32_t>(key);
    const auto count = Read<uint64_t>(key);
    if (type > kFloat64 || type == kArray) {
      out_.Fail(key,
                fmt::format("is an array of type {}; expected numbers, booleans or strings", type));
    }
    static constexpr uint64_t kLeast[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};
    CheckCount(key, count, kLeast[type]);
    if (type == kString) {
      std::vector<std::string> strings;
      for (uint64_t i = 0; i < count; ++i) strings.push_back(ReadString(key));
      return strings;
    }
    if (type == kFloat32 || type == kFloat64) {
      std::vector<double> numbers(count);
      for (double& x : numbers) {
        x = type == kFloat32 ? static_cast<double>(Read<float>(key)) : Read<double>(key);
      }
      return numbers;
    }
    std::vector<int64_t> integers(count);
    for (int64_t& x : integers) x = type == kBool ? ReadBool(key) : *ReadInteger(type, key);
    return integers;
  }

  void ReadKeyValue(uint64_t index) {
    const std::string key = ReadString(fmt::format("metadata key {}", index));
    const auto type = Read<uint32_t>(key);
    if (!out_.values_.emplace(key, ReadValue(type, key)).second) {
      out_.Fail(key, "is given twice; expected each metadata key once");
    }
  }

  void ReadTensor(uint64_t index) {
    const std::string name = ReadString(fmt::format("name of tensor {}", index));
    const std::string field = fmt::format("tensor '{}'", Printable(name));
    const GgufTensor tensor = ReadShape(field);
    const auto [it, is_new] = out_.tensors_.emplace(name, tensor);
    if (!is_new) out_.Fail(field, "is given twice; expected each tensor once");
    places_.push_back({Read<uint64_t>(field), &it->first, &it->second});
  }

  GgufTensor ReadShape(const std::string& field) {
    const auto dims = Read<uint32_t>(field);
    if (dims < 1 || dims > 4) {
      out_.Fail(field, fmt::format("has {} dimensions; expected 1 to 4", dims));
    }
    const auto cols = Read<uint64_t>(field);
    uint64_t rows = 1;
    std::optional<uint64_t> elements = cols;
    for (uint32_t d = 1; d < dims && elements; ++d) {
      const auto extent = Read<uint64_t>(field);
      elements = CheckedMul(*elements, extent);
      rows = CheckedMul(rows, extent).value_or(0);
    }
    if (!elements || *elements == 0 || *elements > (uint64_t{1} << 56)) {
      out_.Fail(field, "has a dimension of 0 or too many elements; expected 1 to 2^56");
    }
    const auto type = Read<uint32_t>(field);
    const ElementLayout* layout = FindKnownLayout(type);
    if (FindLayout(type) == nullptr && !any_type_) {
      out_.Fail(field, fmt::format("has element type {}; expected one of {}",
                                   layout != nullptr ? layout->name : std::to_string(type),
                                   ServedTypes()));
    }
    if (layout == nullptr) {
      return {static_cast<ElementType>(type), static_cast<int64_t>(rows),
              static_cast<int64_t>(cols), nullptr, 0};
    }
    if (cols % static_cast<uint64_t>(layout->block) != 0) {
      out_.Fail(field, fmt::format("has rows of {} elements; expected a multiple of {} for {}",
                                   cols, layout->block, layout->name));
    }
    // At most 2^56 elements of at most 8 bytes: no overflow.
    return {
        layout->type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), nullptr,
        *elements / static_cast<uint64_t>(layout->block) * static_cast<uint64_t>(layout->bytes)};
  }

  void PlaceTensors() {
    const int64_t alignment = out_.IntOr("general.alignment", 32);
    if (alignment < 1 || alignment > (1 << 20) ||
        !std::has_single_bit(static_cast<uint64_t>(alignment))) {
      out_.Fail("general.alignment",
                fmt::format("is {}; expected a power of two up to 2^20", alignment));
    }
    const auto align = static_cast<uint64_t>(alignment);
    const uint64_t start = std::min<uint64_t>(RoundUp(at_, align), file_.size());
    const uint64_t space = file_.size() - start;
    std::sort(places_.begin(), places_.end(),
              [](const Place& a, const Place& b) { return a.offset < b.offset; });
    const Place* before = nullptr;
    for (const Place& place : places_) {
      const uint64_t offset = place.offset, bytes = place.tensor->bytes;
      const auto fail = [&](const std::string& what) {
        out_.Fail(fmt::format("tensor '{}'", Printable(*place.name)), what);
      };
      if (offset % align != 0) {
        fail(fmt::format("has offset {}; expected a multiple of {}", offset, align));
      }
      if (bytes > space || offset > space - bytes) {
        fail(
            fmt::format("takes {} bytes at offset {}, but the file's data has only {}; expected a "
                        "complete file",
                        bytes, offset, space));
      }
      if (before != nullptr && before->offset + before->tensor->bytes > offset) {
        fail(fmt::format("overlaps tensor '{}'", Printable(*before->name)));
      }
      before = &place;
      place.tensor->data = file_.data() + start + offset;
      out_.tensor_bytes_ += bytes;  // bounded: there is no overlap
    }
  }

  GgufFile& out_;
  const std::span<const uint8_t> file_, header_;
  const bool any_type_;
  uint64_t at_ = 0;
  std::vector<Place> places_;
};

GgufFile::GgufFile(const std::string& path, bool any_type) : file_(path) {
  GgufParser(*this, any_type).Parse();
}

void GgufFile::Append(GgufFile part) {
  for (const auto& [name, tensor] : part.tensors_) {
    if (!tensors_.emplace(name, tensor).second) {
      part.Fail(fmt::format("tensor '{}'", name), "is in an earlier file too; expected it once");
    }
  }
  tensor_bytes_ += part.tensor_bytes_;
  parts_.push_back(std::move(part.file_));
}

void GgufFile::Fail(std::string_view field, const std::string& what) const {
  throw Error(ErrorClass::kModel, fmt::format("{}: {}: {}", path(), Printable(field, 400), what));
}

template <typename T>
const T& GgufFile::Get(std::string_view key, std::string_view type_name) const {
  const auto it = values_.find(key);
  if (it == values_.end()) Fail(key, fmt::format("is missing; expected {}", type_name));
  const T* value = std::get_if<T>(&it->second);
  if (value == nullptr) Fail(key, fmt::format("has another type; expected {}", type_name));
  return *value;
}

int64_t GgufFile::Int(std::string_view key) const { return Get<int64_t>(key, "an integer"); }
double GgufFile::Float(std::string_view key) const { return Get<double>(key, "a float"); }
bool GgufFile::Bool(std::string_view key) const { return Get<bool>(key, "a boolean"); }
const std::string& GgufFile::String(std::string_view key) const {
  return Get<std::string>(key, "a string");
}
const std::vector<int64_t>& GgufFile::Ints(std::string_view key) const {
  return Get<std::vector<int64_t>>(key, "an array of integers");
}
const std::vector<double>& GgufFile::Floats(std::string_view key) const {
  return Get<std::vector<double>>(key, "an array of floats");
}
const std::vector<std::string>& GgufFile::Strings(std::string_view key) const {
  return Get<std::vector<std::string>>(key, "an array of strings");
}
int64_t GgufFile::IntOr(std::string_view key, int64_t otherwise) const {
  return Has(key) ? Int(key) : otherwise;
}
double GgufFile::FloatOr(std::string_view key, double otherwise) const {
  return Has(key) ? Float(key) : otherwise;
}
bool GgufFile::BoolOr(std::string_view key, bool otherwise) const {
  return Has(key) ? Bool(key) : otherwise;
}
std::string GgufFile::StringOr(std::string_view key, const std::string& otherwise) const {
  return Has(key) ? String(key) : otherwise;
}

}  // namespace passel::model
