#include "runtime/tokenizer/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "runtime/base/error.h"
#include "runtime/base/utf8.h"

namespace passel {
namespace {

// Appends the normalised form of well-formed text.
void AppendNfc(std::string_view text, std::string& out) {
  uint8_t* normalized = nullptr;
  const utf8proc_ssize_t size = utf8proc_map(
      reinterpret_cast<const uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
      &normalized, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<uint8_t, decltype(&std::free)> owner(normalized, &std::free);
  if (size == UTF8PROC_ERROR_NOMEM) {
    throw Error(ErrorClass::kMemory, "tokenizer: no memory to normalise text");
  }
  Check(size >= 0, "ToNfc: text is not well-formed UTF-8");
  out.append(reinterpret_cast<const char*>(normalized), static_cast<size_t>(size));
}

}  // namespace

std::string ToNfc(std::string_view text) {
  // ASCII is in every normalisation form.
  if (std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 128; })) {
    return std::string(text);
  }
  std::string out;
  while (!text.empty()) {
    const auto [run, bad] = WellFormedRun(text);
    if (run > 0) AppendNfc(text.substr(0, run), out);
    out += text.substr(run, bad);
    text.remove_prefix(run + bad);
  }
  return out;
}

bool IsWhiteSpace(char32_t c) {
  return (c >= 0x9 && c <= 0xd) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

bool IsWordCharacter(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    case UTF8PROC_CATEGORY_SO:  // letters in circles and squares are alphabetic
      return (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
             (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
    default:
      return c == 0x200c || c == 0x200d;
  }
}

}  // namespace passel
