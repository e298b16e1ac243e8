#include "runtime/tokenizer/special_tokens.h"

#include <algorithm>

namespace passel {

SpecialTokens::SpecialTokens(const TokenizerData& data) {
  using Type = TokenizerData::TokenType;
  for (size_t id = 0; id < data.tokens.size(); ++id) {
    const std::string& text = data.tokens[id];
    const Type type = data.types[id];
    if (text.empty() || (type != Type::kSpecial && type != Type::kAdded)) continue;
    by_first_byte_[static_cast<uint8_t>(text[0])].push_back(
        {text, static_cast<int32_t>(id), type == Type::kSpecial});
  }
  for (std::vector<Entry>& entries : by_first_byte_) {
    std::stable_sort(entries.begin(), entries.end(),
                     [](const Entry& a, const Entry& b) { return a.text.size() > b.text.size(); });
  }
}

SpecialTokens::Match SpecialTokens::Find(std::string_view text, bool allow_special) const {
  for (size_t at = 0; at < text.size(); ++at) {
    for (const Entry& entry : by_first_byte_[static_cast<uint8_t>(text[at])]) {
      if (entry.special && !allow_special) continue;
      if (text.compare(at, entry.text.size(), entry.text) == 0) {
        return {at, entry.text.size(), entry.id};
      }
    }
  }
  return {text.size(), 0, -1};
}

}  // namespace passel
