#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// Finds a model's added tokens in text: the leftmost, and of those at one place the longest.
class SpecialTokens {
 public:
  struct Entry {
    std::string text;
    int32_t id;
    bool special;
  };
  explicit SpecialTokens(const std::vector<Entry>& entries);
  // A model's special and added tokens but those that are found in normalised text.
  static SpecialTokens Of(const TokenizerData& data);

  struct Match {
    size_t at = 0, size = 0;
    int32_t id = -1;  // −1: nothing found; `at` is then the text's size
  };
  // Special tokens count only where `allow_special`; added tokens that are not special always do.
  Match Find(std::string_view text, bool allow_special) const;

 private:
  std::array<std::vector<Entry>, 256> by_first_byte_;  // longest first
};

}  // namespace passel
