#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "runtime/tokenizer/byte_alphabet.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// A token's text in the byte alphabet.
inline std::string Alphabet(std::string_view bytes) {
  const ByteAlphabet alphabet;
  std::string out;
  for (const char c : bytes) out += alphabet.Character(static_cast<uint8_t>(c));
  return out;
}

// Ids 0…255 are the bytes, then the union of each merge's two sides, in order.
inline TokenizerData ByteVocabulary(
    const std::vector<std::pair<std::string, std::string>>& merges) {
  TokenizerData data;
  data.pre_tokenizer = "gpt-2";
  for (int b = 0; b < 256; ++b) {
    data.tokens.push_back(Alphabet(std::string(1, static_cast<char>(b))));
  }
  for (const auto& [left, right] : merges) {
    data.merges.push_back(Alphabet(left) + " " + Alphabet(right));
    data.tokens.push_back(Alphabet(left + right));
  }
  data.types.assign(data.tokens.size(), TokenizerData::TokenType::kNormal);
  return data;
}

inline int32_t AddToken(TokenizerData& data, const std::string& text,
                        TokenizerData::TokenType type) {
  data.tokens.push_back(text);
  data.types.push_back(type);
  return static_cast<int32_t>(data.tokens.size()) - 1;
}

}  // namespace passel
