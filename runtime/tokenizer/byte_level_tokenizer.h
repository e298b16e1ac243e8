#pragma once

#include <memory>

#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// GPT-2's scheme: words of the pre-tokeniser, BPE merges over their bytes. Throws Error{kModel}.
std::unique_ptr<Tokenizer> MakeByteLevelTokenizer(const TokenizerData& data);

}  // namespace passel
