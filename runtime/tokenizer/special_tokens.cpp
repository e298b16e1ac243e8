#include "runtime/tokenizer/special_tokens.h"

#include <algorithm>

namespace passel {

SpecialTokens SpecialTokens::Of(const TokenizerData& data) {
  using Type = TokenizerData::TokenType;
  std::vector<Entry> entries;
  for (size_t id = 0; id < data.tokens.size(); ++id) {
    const Type type = data.types[id];
    const bool special = type == Type::kSpecial || type == Type::kUnknown;
    if (!special && type != Type::kAdded) continue;
    const auto token = static_cast<int32_t>(id);
    if (!std::binary_search(data.normalized_tokens.begin(), data.normalized_tokens.end(), token)) {
      entries.push_back({data.tokens[id], token, special});
    }
  }
  return SpecialTokens(entries);
}

SpecialTokens::SpecialTokens(const std::vector<Entry>& entries) {
  for (const Entry& entry : entries) {
    if (!entry.text.empty()) by_first_byte_[static_cast<uint8_t>(entry.text[0])].push_back(entry);
  }
  for (std::vector<Entry>& same : by_first_byte_) {
    std::stable_sort(same.begin(), same.end(),
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
