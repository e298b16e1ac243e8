#include "runtime/tokenizer/special_tokens.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "runtime/base/error.h"
#include "runtime/base/utf8.h"
#include "runtime/tokenizer/unicode.h"

namespace passel {
namespace {

// Several times the longest known. Each place of a text is compared with as much.
constexpr size_t kLongest = 512;

std::vector<SpecialTokens::Entry> Entries(const TokenizerData& data, bool normalized,
                                          const SpecialTokens::Normalize& normalize) {
  using Type = TokenizerData::TokenType;
  std::vector<SpecialTokens::Entry> entries;
  for (size_t i = 0; i < data.tokens.size(); ++i) {
    const Type type = data.types[i];
    const bool special = type == Type::kSpecial || type == Type::kUnknown;
    if (!special && type != Type::kAdded) continue;
    const auto id = static_cast<int32_t>(i);
    if (data.tokens[i].size() > kLongest) {
      throw Error(ErrorClass::kModel,
                  fmt::format("tokenizer: added token {} has {} bytes; expected at most {}", id,
                              data.tokens[i].size(), kLongest));
    }
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

SpecialTokens::SpecialTokens(std::vector<Entry> entries) : entries_(std::move(entries)) {
  std::erase_if(entries_, [](const Entry& e) { return e.text.empty(); });
  std::stable_sort(entries_.begin(), entries_.end(),
                   [](const Entry& a, const Entry& b) { return a.text < b.text; });
  const auto last = std::unique(entries_.begin(), entries_.end(),
                                [](const Entry& a, const Entry& b) { return a.text == b.text; });
  entries_.erase(last, entries_.end());
}

const SpecialTokens::Entry* SpecialTokens::At(std::string_view text) const {
  const Entry* longest = nullptr;
  auto first = entries_.begin(), last = entries_.end();  // those that begin as the text does
  for (size_t depth = 0; first != last; ++depth) {
    if (first->text.size() == depth) longest = &*first++;
    if (depth == text.size()) break;
    const auto byte = [depth](std::string_view t) { return static_cast<uint8_t>(t[depth]); };
    first = std::partition_point(first, last,
                                 [&](const Entry& e) { return byte(e.text) < byte(text); });
    last = std::partition_point(first, last,
                                [&](const Entry& e) { return byte(e.text) == byte(text); });
  }
  return longest;
}

std::vector<SpecialTokens::Match> SpecialTokens::Split(std::string_view text,
                                                       bool allow_special) const {
  std::vector<Match> matches;
  size_t done = 0;        // where the last token's stretch ends
  size_t spaces_end = 0;  // and the white space that was last looked for
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
    if (entry->added.rstrip) {
      // Within white space that a token before has taken in, its end is known.
      for (spaces_end = std::max(spaces_end, end); spaces_end < text.size();) {
        const Utf8Step step = NextUtf8(text.substr(spaces_end));
        if (!IsSpace(step)) break;
        spaces_end += step.size;
      }
      end = spaces_end;
    }
    if (begin > done) matches.push_back({done, begin - done, -1});
    matches.push_back({begin, end - begin, entry->id});
    done = end;
  }
  if (done < text.size()) matches.push_back({done, text.size() - done, -1});
  return matches;
}

}  // namespace passel
