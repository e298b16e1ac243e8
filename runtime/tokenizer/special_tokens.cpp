#include "runtime/tokenizer/special_tokens.h"

#include <algorithm>

#include "runtime/base/utf8.h"
#include "runtime/tokenizer/unicode.h"

namespace passel {
namespace {

std::vector<SpecialTokens::Entry> Entries(const TokenizerData& data, bool normalized,
                                          const SpecialTokens::Normalize& normalize) {
  using Type = TokenizerData::TokenType;
  std::vector<SpecialTokens::Entry> entries;
  for (size_t i = 0; i < data.tokens.size(); ++i) {
    const Type type = data.types[i];
    const bool special = type == Type::kSpecial || type == Type::kUnknown;
    if (!special && type != Type::kAdded) continue;
    const auto id = static_cast<int32_t>(i);
    const auto it = data.added.find(id);
    const TokenizerData::Added added = it == data.added.end() ? TokenizerData::Added{} : it->second;
    if (added.normalized != normalized || data.tokens[i].empty()) continue;
    entries.push_back({normalize(data.tokens[i]), id, special, added});
  }
  return entries;
}

// The last character of a text that is not empty.
Utf8Step LastUtf8(std::string_view text) {
  const size_t longest = std::min<size_t>(text.size(), 4);
  for (size_t size = 1; size <= longest; ++size) {
    const Utf8Step step = NextUtf8(text.substr(text.size() - size));
    if (step.kind == Utf8Step::Kind::kValid && step.size == size) return step;
  }
  return {Utf8Step::Kind::kInvalid, 1};
}

bool IsSpace(const Utf8Step& step) {
  return step.kind == Utf8Step::Kind::kValid && IsWhiteSpace(step.code_point);
}
bool IsWord(const Utf8Step& step) {
  return step.kind == Utf8Step::Kind::kValid && IsWordCharacter(step.code_point);
}

}  // namespace

SpecialTokens SpecialTokens::InText(const TokenizerData& data) {
  return SpecialTokens(Entries(data, false, [](std::string_view t) { return std::string(t); }));
}

SpecialTokens SpecialTokens::InNormalized(const TokenizerData& data, const Normalize& normalize) {
  return SpecialTokens(Entries(data, true, normalize));
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

const SpecialTokens::Entry* SpecialTokens::At(std::string_view text) const {
  for (const Entry& entry : by_first_byte_[static_cast<uint8_t>(text[0])]) {
    if (text.starts_with(entry.text)) return &entry;
  }
  return nullptr;
}

std::vector<SpecialTokens::Match> SpecialTokens::Split(std::string_view text,
                                                       bool allow_special) const {
  std::vector<Match> matches;
  size_t done = 0;  // where the last token's stretch ends
  for (size_t at = 0; at < text.size();) {
    const Entry* entry = At(text.substr(at));
    if (entry == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + entry->text.size();
    at = end;
    if (entry->special && !allow_special) continue;
    if (entry->added.single_word && ((begin > 0 && IsWord(LastUtf8(text.substr(0, begin)))) ||
                                     (end < text.size() && IsWord(NextUtf8(text.substr(end)))))) {
      continue;
    }
    while (entry->added.lstrip && begin > done) {
      const Utf8Step step = LastUtf8(text.substr(0, begin));
      if (!IsSpace(step)) break;
      begin -= step.size;
    }
    while (entry->added.rstrip && end < text.size()) {
      const Utf8Step step = NextUtf8(text.substr(end));
      if (!IsSpace(step)) break;
      end += step.size;
    }
    if (begin > done) matches.push_back({done, begin - done, -1});
    matches.push_back({begin, end - begin, entry->id});
    done = end;
  }
  if (done < text.size()) matches.push_back({done, text.size() - done, -1});
  return matches;
}

}  // namespace passel
