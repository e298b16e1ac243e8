#include "runtime/base/printable.h"

#include "runtime/base/utf8.h"

namespace passel {
namespace {

bool IsShown(char32_t c) {
  const bool control = c < 0x20 || (c >= 0x7f && c < 0xa0);
  const bool mark = (c >= 0x200b && c <= 0x200f) || (c >= 0x2028 && c <= 0x202e) ||
                    (c >= 0x2060 && c <= 0x206f) || c == 0xfeff;
  return !control && !mark;
}

}  // namespace

std::string Printable(std::string_view text, size_t most) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Step step = NextUtf8(text.substr(at));
    if (at + step.size > most) return out + "\u2026";
    const std::string_view bytes = text.substr(at, step.size);
    at += step.size;
    if (step.kind == Utf8Step::Kind::kValid && IsShown(step.code_point)) {
      out += bytes;
      continue;
    }
    if (bytes == "\n") {
      out += "\\n";
      continue;
    }
    for (const char c : bytes) {
      const auto byte = static_cast<unsigned char>(c);
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out;
}

}  // namespace passel
