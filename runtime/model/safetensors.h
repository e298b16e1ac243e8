#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "runtime/model/element_type.h"
#include "runtime/model/mapped_file.h"

namespace passel::model {

struct Safetensor {
  std::optional<ElementType> type;  // nullopt: a dtype that no weight may have (integers, float8)
  std::string dtype;
  int64_t rows, cols;  // row-major; a vector has one row; higher dimensions are folded into rows
  const uint8_t* data;
};

// One .safetensors file. The header must account for every byte of the data, in order of offsets,
// without gap, overlap or trailing bytes, as the format demands.
class SafetensorsFile {
 public:
  // Throws Error{kModel} naming the file, the tensor and what was expected.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, Safetensor>& tensors() const { return tensors_; }
  uint64_t tensor_bytes() const { return tensor_bytes_; }

 private:
  MappedFile file_;
  std::map<std::string, Safetensor> tensors_;
  uint64_t tensor_bytes_ = 0;
};

}  // namespace passel::model
