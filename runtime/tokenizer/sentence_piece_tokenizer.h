#pragma once

#include <memory>

#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// BPE over characters, with "▁" for spaces and the bytes of characters that are no token, as
// SentencePiece trains it. `data` was validated. Throws Error{kModel}.
std::unique_ptr<Tokenizer> MakeSentencePieceTokenizer(const TokenizerData& data);

}  // namespace passel
