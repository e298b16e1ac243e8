#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// Finds a model's added tokens in text: the leftmost, and of those at one place the longest. Then
// what it asks for (TokenizerData::Added) decides whether it counts and how far it reaches.
class SpecialTokens {
 public:
  struct Entry {
    std::string text;
    int32_t id;
    bool special;
    TokenizerData::Added added = {};
  };
  // Of entries with one text the first counts.
  explicit SpecialTokens(std::vector<Entry> entries);

  using Normalize = std::function<std::string(std::string_view)>;
  // A model's special and added tokens that are found in the text as it stands, and those that are
  // found in normalised text, `normalize`d themselves.
  static SpecialTokens InText(const TokenizerData& data);
  static SpecialTokens InNormalized(const TokenizerData& data, const Normalize& normalize);

  // A stretch of the text: of a token, or (id −1) one between tokens, never empty.
  struct Match {
    size_t at = 0, size = 0;
    int32_t id = -1;
  };
  // The stretches of `text` in order; without overlap, but where a token begins in the space that
  // the one before took in, as Hugging Face's tokenizers have it. Special tokens count only where
  // `allow_special`; the text of one that does not count is not searched for others. Linear in the
  // text's length.
  std::vector<Match> Split(std::string_view text, bool allow_special) const;

 private:
  // The longest that `text` begins with, or null; O(its length · log of the number of tokens).
  const Entry* At(std::string_view text) const;

  std::vector<Entry> entries_;  // by text, each once
};

}  // namespace passel
