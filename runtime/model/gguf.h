#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "runtime/model/element_type.h"
#include "runtime/model/mapped_file.h"

namespace passel::model {

// A metadata value. Integers of every width are int64_t (an unsigned one beyond its range is
// refused), both float widths double.
using GgufValue = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string>>;

struct GgufTensor {
  ElementType type;
  // Row-major: cols is GGUF's first dimension; a vector has one row. Higher dimensions are folded
  // into rows.
  int64_t rows, cols;
  const uint8_t* data;
  uint64_t bytes;
};

// The container format, versions 2 and 3, little-endian: metadata and tensor directory, every field
// checked against the file's size. Knows nothing of architectures.
class GgufFile {
 public:
  // `any_type`: a tensor of an element type that is not served is no error; it has no bytes where
  // the type is unknown too. Throws
  // Error{kModel} naming the file, the field and what was expected.
  explicit GgufFile(const std::string& path, bool any_type = false);

  // Takes the tensors of another part of a split model, whose metadata is dropped. Throws
  // Error{kModel} where one is in both.
  void Append(GgufFile part);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, GgufTensor, std::less<>>& tensors() const { return tensors_; }
  uint64_t tensor_bytes() const { return tensor_bytes_; }

  bool Has(std::string_view key) const { return values_.find(key) != values_.end(); }
  // A value by key; throws Error{kModel} where it is absent or of another type.
  int64_t Int(std::string_view key) const;
  double Float(std::string_view key) const;
  bool Bool(std::string_view key) const;
  const std::string& String(std::string_view key) const;
  const std::vector<int64_t>& Ints(std::string_view key) const;
  const std::vector<double>& Floats(std::string_view key) const;
  const std::vector<std::string>& Strings(std::string_view key) const;
  // The same, with a value for an absent key.
  int64_t IntOr(std::string_view key, int64_t otherwise) const;
  double FloatOr(std::string_view key, double otherwise) const;
  bool BoolOr(std::string_view key, bool otherwise) const;
  std::string StringOr(std::string_view key, const std::string& otherwise) const;
  // An Error{kModel} about this file.
  [[noreturn]] void Fail(std::string_view field, const std::string& what) const;

 private:
  friend class GgufParser;
  template <typename T>
  const T& Get(std::string_view key, std::string_view type_name) const;

  MappedFile file_;
  std::vector<MappedFile> parts_;  // what appended tensors lie in
  std::map<std::string, GgufValue, std::less<>> values_;
  std::map<std::string, GgufTensor, std::less<>> tensors_;
  uint64_t tensor_bytes_ = 0;
};

}  // namespace passel::model
