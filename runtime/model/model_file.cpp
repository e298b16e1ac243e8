#include "runtime/model/model_file.h"

#include <filesystem>

#include "runtime/base/error.h"
#include "runtime/model/gguf_model.h"
#include "runtime/model/hf_model.h"

namespace passel::model {

std::unique_ptr<ModelFile> ModelFile::Open(const std::string& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) {
    throw Error(ErrorClass::kModel,
                path + ": no such file; expected a .gguf file or a Hugging Face directory");
  }
  if (std::filesystem::is_directory(status)) return OpenHfModel(path);
  return OpenGgufModel(path);
}

}  // namespace passel::model
