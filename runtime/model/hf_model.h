#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/model/json_file.h"
#include "runtime/model/model_file.h"
#include "runtime/model/safetensors.h"

namespace passel::model {

// What config.json may name as model_type.
inline constexpr std::array<std::string_view, 4> kHfArchitectures = {"llama", "mistral", "qwen2",
                                                                     "qwen3"};
// The RoPE fields of a config.json: base and scaling, of whatever type. `path`: the file's, for
// messages. Throws Error{kModel}.
void ReadHfRope(const JsonObject& root, const std::string& path, ModelConfig& config);
// What config.json says of the architecture, checked by ValidateConfig. Throws Error{kModel}.
ModelConfig HfConfig(const std::string& directory);
// tokenizer.json, tokenizer_config.json, generation_config.json; no tokens where the directory has
// no tokenizer.json. `vocab`: the ids that the model embeds; the tokenizer may have further ones.
// Throws Error{kModel}.
TokenizerData HfTokenizer(const std::string& directory, int32_t vocab);
// The files that hold weights: model.safetensors, or those that the index names. Throws
// Error{kModel}.
std::vector<SafetensorsFile> OpenShards(const std::string& directory);
// A llama-family model in a Hugging Face directory. Throws Error{kModel}.
std::unique_ptr<ModelFile> OpenHfModel(const std::string& directory);

}  // namespace passel::model
