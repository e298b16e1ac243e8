#pragma once

#include <memory>
#include <string>

#include "runtime/model/model_file.h"

namespace passel::model {

// What config.json says of the architecture, checked by ValidateConfig. Throws Error{kModel}.
ModelConfig HfConfig(const std::string& directory);
// tokenizer.json, tokenizer_config.json, generation_config.json; no tokens where the directory has
// no tokenizer.json. Ids are below `vocab`. Throws Error{kModel}.
TokenizerData HfTokenizer(const std::string& directory, int32_t vocab);
// A llama-family model in a Hugging Face directory. Throws Error{kModel}.
std::unique_ptr<ModelFile> OpenHfModel(const std::string& directory);

}  // namespace passel::model
