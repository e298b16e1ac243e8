#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace passel {

// The first character of a byte string, as Unicode's table 3-7 (well-formed sequences) has it.
struct Utf8Step {
  enum class Kind {
    kValid,       // a whole character of `size` bytes
    kInvalid,     // a maximal ill-formed prefix of `size` bytes; stands for one U+FFFD
    kIncomplete,  // all `size` bytes left could begin a character that more bytes complete
  };
  Kind kind;
  size_t size;
  char32_t code_point = 0;  // of a valid character
};

// `text` must not be empty.
inline Utf8Step NextUtf8(std::string_view text) {
  using Kind = Utf8Step::Kind;
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {Kind::kValid, 1, lead};
  if (lead < 0xc2 || lead > 0xf4) return {Kind::kInvalid, 1};
  const size_t size = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  char32_t code_point = lead & (0x7fu >> size);
  // The second byte's range excludes overlong forms, surrogates and what lies above U+10FFFF.
  uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  for (size_t i = 1; i < size; ++i) {
    if (i == text.size()) return {Kind::kIncomplete, i};
    if (byte(i) < low || byte(i) > high) return {Kind::kInvalid, i};
    code_point = (code_point << 6) | (byte(i) & 0x3fu);
    low = 0x80;
    high = 0xbf;
  }
  return {Kind::kValid, size, code_point};
}

// The well-formed characters that a text begins with, and the ill-formed ones that follow: at least
// one byte together of text that is not empty.
struct Utf8Run {
  size_t good, bad;  // bytes
};
inline Utf8Run WellFormedRun(std::string_view text) {
  Utf8Run run{0, 0};
  while (run.good < text.size() && run.bad == 0) {
    const Utf8Step step = NextUtf8(text.substr(run.good));
    (step.kind == Utf8Step::Kind::kValid ? run.good : run.bad) += step.size;
  }
  return run;
}

inline void AppendUtf8(char32_t c, std::string& out) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | (c >> 6));
    put(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    put(0xe0 | (c >> 12));
    put(0x80 | ((c >> 6) & 0x3f));
    put(0x80 | (c & 0x3f));
  } else {
    put(0xf0 | (c >> 18));
    put(0x80 | ((c >> 12) & 0x3f));
    put(0x80 | ((c >> 6) & 0x3f));
    put(0x80 | (c & 0x3f));
  }
}

inline constexpr std::string_view kReplacement = "\xef\xbf\xbd";  // U+FFFD

}  // namespace passel
