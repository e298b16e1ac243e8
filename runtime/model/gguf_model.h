#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>

#include "runtime/model/gguf.h"
#include "runtime/model/model_file.h"

namespace passel::model {

// What general.architecture may be; mistral models are "llama".
inline constexpr std::array<std::string_view, 3> kGgufArchitectures = {"llama", "qwen2", "qwen3"};
// A file, with the others of a split model where it is the first of one. Throws Error{kModel}.
GgufFile OpenGgufParts(const std::string& path, bool any_type = false);
// What the metadata says of the architecture, checked by ValidateConfig. Throws Error{kModel}.
ModelConfig GgufConfig(const GgufFile& file);
// The tokenizer's data; ids are within the token list. Throws Error{kModel}.
TokenizerData GgufTokenizer(const GgufFile& file);
// A llama-family model in one GGUF file. Throws Error{kModel}.
std::unique_ptr<ModelFile> OpenGgufModel(const std::string& path);

}  // namespace passel::model
