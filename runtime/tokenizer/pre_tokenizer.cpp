#define PCRE2_CODE_UNIT_WIDTH 8
#include "runtime/tokenizer/pre_tokenizer.h"

#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <functional>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"

namespace passel {
namespace {

using Pattern = TokenizerData::Pattern;

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
// Memory that one match may take: a group that repeats takes some for each time.
constexpr size_t kMostMatchMemory = size_t{512} << 20;

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

std::vector<Pattern> PatternsOf(const Known& known) {
  std::vector<Pattern> patterns;
  for (const std::string_view pattern : known.patterns) {
    if (!pattern.empty()) patterns.push_back({std::string(pattern)});
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

// What matching needs beside the code, which threads share.
class PreTokenizer::Matcher {
 public:
  Matcher()
      : data_(pcre2_match_data_create(1, nullptr), &pcre2_match_data_free),
        context_(pcre2_match_context_create(nullptr), &pcre2_match_context_free),
        stack_(nullptr, &pcre2_jit_stack_free) {
    if (data_ == nullptr || context_ == nullptr) {
      throw Error(ErrorClass::kMemory, "tokenizer: no memory to match text");
    }
    pcre2_set_heap_limit(context_.get(), kMostMatchMemory >> 10);
  }

  // Where the first match from `at` on begins and ends; none: both at the text's end.
  std::array<size_t, 2> Find(const pcre2_code* code, std::string_view text, size_t at) {
    int rc = Match(code, text, at);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT && stack_ == nullptr) {
      // The stack that it has without is small, and enough for nearly every text.
      stack_.reset(pcre2_jit_stack_create(32 << 10, kMostMatchMemory, nullptr));
      pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
      rc = Match(code, text, at);
    }
    if (rc == PCRE2_ERROR_NOMATCH) return {text.size(), text.size()};
    if (rc < 0) {
      throw Error(ErrorClass::kModel,
                  fmt::format("tokenizer: pre-tokeniser pattern failed (PCRE2 error {})", rc));
    }
    const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(data_.get());
    return {offsets[0], offsets[1]};
  }

 private:
  int Match(const pcre2_code* code, std::string_view text, size_t at) {
    return pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                       PCRE2_NO_UTF_CHECK, data_.get(), context_.get());
  }

  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data_;
  std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context_;
  std::unique_ptr<pcre2_jit_stack, decltype(&pcre2_jit_stack_free)> stack_;
};

// A compiled pattern.
struct PreTokenizer::Regex {
  explicit Regex(const Pattern& pattern) : matches_only(pattern.matches_only) {
    if (pattern.regex.size() > kLongestPattern) {
      throw Error(
          ErrorClass::kModel,
          fmt::format("tokenizer: a pre-tokeniser pattern has {} bytes; expected at most {}",
                      pattern.regex.size(), kLongestPattern));
    }
    const std::string text = WithUnicodeSpace(pattern.regex);
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

  // Calls piece(view) for every match and, where they count, every gap between matches, in order.
  template <typename Piece>
  void Split(std::string_view text, Matcher& matcher, Piece piece) const {
    size_t at = 0, gap = 0;
    while (at < text.size()) {
      const auto [begin, end] = matcher.Find(code, text, at);
      if (end <= begin) {  // an empty match: go on behind the next character
        at = begin + 1;
        while (at < text.size() && (static_cast<uint8_t>(text[at]) & 0xc0) == 0x80) ++at;
        continue;
      }
      if (begin > gap && !matches_only) piece(text.substr(gap, begin - gap));
      piece(text.substr(begin, end - begin));
      at = gap = end;
    }
    if (gap < text.size() && !matches_only) piece(text.substr(gap));
  }

  pcre2_code* code;
  const bool matches_only;
};

PreTokenizer::PreTokenizer(const std::vector<Pattern>& patterns) {
  for (const Pattern& pattern : patterns) steps_.push_back(std::make_unique<Regex>(pattern));
}

PreTokenizer::~PreTokenizer() = default;

std::vector<Pattern> PreTokenizer::Patterns(const std::string& name) {
  const Known* known = Find(name);
  if (known == nullptr) {
    throw Error(ErrorClass::kModel,
                fmt::format("tokenizer: pre-tokeniser \"{}\" is not served; expected gpt-2, "
                            "smollm, llama-bpe, qwen2, tekken or default",
                            Printable(name)));
  }
  return PatternsOf(*known);
}

std::string PreTokenizer::Name(const std::vector<Pattern>& patterns) {
  const auto* it = std::find_if(kKnown.begin(), kKnown.end(),
                                [&](const Known& k) { return PatternsOf(k) == patterns; });
  return it == kKnown.end() ? "own" : std::string(it->name);
}

void PreTokenizer::Split(std::string_view text, std::vector<std::string_view>& words) const {
  Matcher matcher;
  // The pieces are texts of their own: look-ahead does not see past their end.
  const std::function<void(size_t, std::string_view)> split = [&](size_t step,
                                                                  std::string_view piece) {
    if (step == steps_.size()) {
      words.push_back(piece);
    } else {
      steps_[step]->Split(piece, matcher, [&](std::string_view p) { split(step + 1, p); });
    }
  };
  split(0, text);
}

bool IgnoresMerges(const std::string& pre_tokenizer) {
  const Known* known = Find(pre_tokenizer);
  return known != nullptr && known->ignores_merges;
}

}  // namespace passel
