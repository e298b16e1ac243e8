#define PCRE2_CODE_UNIT_WIDTH 8
#include "runtime/tokenizer/pre_tokenizer.h"

#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <functional>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel {
namespace {

constexpr std::string_view kGpt2 = TokenizerData::kGpt2Pattern;
constexpr std::string_view kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
    R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// More than any known pattern takes; PCRE2 compiles no larger ones.
constexpr size_t kLongestPattern = size_t{64} << 10;

struct Known {
  std::string_view name;
  std::array<std::string_view, 4> patterns;  // in order, "" at the end
  bool ignores_merges = false;
};
// An alias follows the name that a pattern is known by.
constexpr std::array kKnown = {
    Known{"gpt-2", {kGpt2}},
    Known{"smollm", {R"(\p{N})", kGpt2}},
    Known{"llama-bpe", {kLlama3}, true},
    Known{"llama3", {kLlama3}, true},
    Known{"llama-v3", {kLlama3}, true},
    Known{"smaug-bpe", {kLlama3}},
    Known{"qwen2", {kQwen2}},
    Known{"deepseek-r1-qwen", {kQwen2}},
    Known{"tekken", {kTekken}, true},
    // What llama.cpp falls back to.
    Known{"default", {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2, R"(\p{N}+)", "[0-9][0-9][0-9]"}},
};

const Known* Find(std::string_view name) {
  const auto* it =
      std::find_if(kKnown.begin(), kKnown.end(), [&](const Known& k) { return k.name == name; });
  return it == kKnown.end() ? nullptr : it;
}

std::vector<std::string> PatternsOf(const Known& known) {
  std::vector<std::string> patterns;
  for (const std::string_view pattern : known.patterns) {
    if (!pattern.empty()) patterns.emplace_back(pattern);
  }
  return patterns;
}

// Unicode's White_Space, which the patterns' authors mean by \s. PCRE2's own \s adds U+180E.
std::string WithUnicodeSpace(std::string_view pattern) {
  static constexpr std::string_view kSpace =
      R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c != '\\' || i + 1 == pattern.size()) {
      in_class = c == '[' || (in_class && c != ']');
      out.push_back(c);
      continue;
    }
    const char escaped = pattern[++i];
    if (escaped == 's') {
      out += in_class ? std::string(kSpace) : fmt::format("[{}]", kSpace);
    } else if (escaped == 'S' && !in_class) {
      out += fmt::format("[^{}]", kSpace);
    } else {
      out += {c, escaped};
    }
  }
  return out;
}

}  // namespace

// A compiled pattern. Match data is made per call, so that threads share the code alone.
struct PreTokenizer::Regex {
  explicit Regex(std::string_view pattern) {
    if (pattern.size() > kLongestPattern) {
      throw Error(
          ErrorClass::kModel,
          fmt::format("tokenizer: a pre-tokeniser pattern has {} bytes; expected at most {}",
                      pattern.size(), kLongestPattern));
    }
    const std::string text = WithUnicodeSpace(pattern);
    int error = 0;
    PCRE2_SIZE offset = 0;
    code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                         PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
    if (code == nullptr) {
      std::array<PCRE2_UCHAR, 256> message{};
      pcre2_get_error_message(error, message.data(), message.size());
      throw Error(ErrorClass::kModel,
                  fmt::format("tokenizer: pre-tokeniser pattern \"{}\": {} at {}", Printable(text),
                              reinterpret_cast<const char*>(message.data()), offset));
    }
    // Where the machine has no JIT, the interpreter matches the same.
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  }
  ~Regex() { pcre2_code_free(code); }
  Regex(const Regex&) = delete;
  Regex& operator=(const Regex&) = delete;

  // Calls piece(view) for every match and every gap between matches, in order.
  template <typename Piece>
  void Split(std::string_view text, pcre2_match_data* match, Piece piece) const {
    size_t at = 0, gap = 0;
    while (at < text.size()) {
      const int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                 PCRE2_NO_UTF_CHECK, match, nullptr);
      if (rc == PCRE2_ERROR_NOMATCH) break;
      if (rc < 0) {
        throw Error(ErrorClass::kModel,
                    fmt::format("tokenizer: pre-tokeniser pattern failed (PCRE2 error {})", rc));
      }
      // Copied: `piece` may match with the same match data.
      const size_t begin = pcre2_get_ovector_pointer(match)[0];
      const size_t end = pcre2_get_ovector_pointer(match)[1];
      if (end <= begin) {  // an empty match: go on behind the next character
        at = begin + 1;
        while (at < text.size() && (static_cast<uint8_t>(text[at]) & 0xc0) == 0x80) ++at;
        continue;
      }
      if (begin > gap) piece(text.substr(gap, begin - gap));
      piece(text.substr(begin, end - begin));
      at = gap = end;
    }
    if (gap < text.size()) piece(text.substr(gap));
  }

  pcre2_code* code;
};

PreTokenizer::PreTokenizer(const std::vector<std::string>& patterns) {
  for (const std::string& pattern : patterns) steps_.push_back(std::make_unique<Regex>(pattern));
}

PreTokenizer::~PreTokenizer() = default;

std::vector<std::string> PreTokenizer::Patterns(const std::string& name) {
  const Known* known = Find(name);
  if (known == nullptr) {
    throw Error(ErrorClass::kModel,
                fmt::format("tokenizer: pre-tokeniser \"{}\" is not served; expected gpt-2, "
                            "smollm, llama-bpe, qwen2, tekken or default",
                            Printable(name)));
  }
  return PatternsOf(*known);
}

std::string PreTokenizer::Name(const std::vector<std::string>& patterns) {
  const auto* it = std::find_if(kKnown.begin(), kKnown.end(),
                                [&](const Known& k) { return PatternsOf(k) == patterns; });
  return it == kKnown.end() ? "own" : std::string(it->name);
}

void PreTokenizer::Split(std::string_view text, std::vector<std::string_view>& words) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create(1, nullptr), &pcre2_match_data_free);
  if (match == nullptr) throw Error(ErrorClass::kMemory, "tokenizer: no memory to match text");
  // The pieces are texts of their own: look-ahead does not see past their end.
  const std::function<void(size_t, std::string_view)> split = [&](size_t step,
                                                                  std::string_view piece) {
    if (step == steps_.size()) {
      words.push_back(piece);
    } else {
      steps_[step]->Split(piece, match.get(), [&](std::string_view p) { split(step + 1, p); });
    }
  };
  split(0, text);
}

bool IgnoresMerges(const std::string& pre_tokenizer) {
  const Known* known = Find(pre_tokenizer);
  return known != nullptr && known->ignores_merges;
}

}  // namespace passel
