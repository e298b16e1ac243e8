#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "runtime/model/model_file.h"

namespace passel::model {

// What the files of a model say of it, and what stands against serving it.
struct Outline {
  struct Type {
    uint64_t tensors = 0, elements = 0;
    bool served = true;
  };

  // A number that the files do not give, or not as one, is 0 here; of a model that is served, what
  // ModelFile has.
  ModelConfig config;
  std::map<std::string, Type> types;  // of the tensors, by the element type's name
  uint64_t weight_bytes = 0;          // GGUF: of the tensors whose type is served
  TokenizerData tokenizer;            // empty where tokenizer_error says why
  // Messages; "" where nothing is wrong. `error`: ModelFile's, the first of the config and weights.
  std::string architecture_error, rope_error, tokenizer_error, error;
};

// `path` as ModelFile::Open takes it. Throws Open's Error{kModel} where not even config.json, or
// the GGUF container, can be read.
Outline ReadOutline(const std::string& path);

}  // namespace passel::model
