#include "runtime/tokenizer/nfc.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "runtime/base/error.h"

namespace passel {

std::string ToNfc(std::string_view text) {
  // ASCII is in every normalisation form.
  if (std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 128; })) {
    return std::string(text);
  }
  uint8_t* normalized = nullptr;
  const utf8proc_ssize_t size = utf8proc_map(
      reinterpret_cast<const uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
      &normalized, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<uint8_t, decltype(&std::free)> owner(normalized, &std::free);
  if (size == UTF8PROC_ERROR_NOMEM) {
    throw Error(ErrorClass::kMemory, "tokenizer: no memory to normalise text");
  }
  Check(size >= 0, "ToNfc: text is not well-formed UTF-8");
  return {reinterpret_cast<const char*>(normalized), static_cast<size_t>(size)};
}

}  // namespace passel
