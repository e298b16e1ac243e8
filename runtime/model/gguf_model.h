#pragma once

#include <memory>
#include <string>

#include "runtime/model/gguf.h"
#include "runtime/model/model_file.h"

namespace passel::model {

// What the metadata says of the architecture, checked by ValidateConfig. Throws Error{kModel}.
ModelConfig GgufConfig(const GgufFile& file);
// The tokenizer's data; ids are within the token list. Throws Error{kModel}.
TokenizerData GgufTokenizer(const GgufFile& file);
// A llama-family model in one GGUF file. Throws Error{kModel}.
std::unique_ptr<ModelFile> OpenGgufModel(const std::string& path);

}  // namespace passel::model
