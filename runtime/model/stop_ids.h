#pragma once

#include <cstdint>
#include <vector>

#include "runtime/tokenizer/tokenizer.h"

namespace passel::model {

// `named` (−1 skipped) and the turn ends known by their text, each once.
std::vector<int32_t> StopIds(const TokenizerData& data, const std::vector<int32_t>& named);

}  // namespace passel::model
