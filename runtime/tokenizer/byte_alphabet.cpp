#include "runtime/tokenizer/byte_alphabet.h"

#include "runtime/base/utf8.h"

namespace passel {

ByteAlphabet::ByteAlphabet() {
  bytes_.fill(-1);
  char32_t next = 256;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 255 && b != 173);
    const char32_t c = printable ? static_cast<char32_t>(b) : next++;
    AppendUtf8(c, characters_[static_cast<size_t>(b)]);
    bytes_[c] = static_cast<int16_t>(b);
  }
}

std::optional<std::string> ByteAlphabet::ToBytes(std::string_view token) const {
  std::string out;
  while (!token.empty()) {
    const Utf8Step step = NextUtf8(token);
    if (step.kind != Utf8Step::Kind::kValid || step.code_point >= bytes_.size() ||
        bytes_[step.code_point] < 0) {
      return std::nullopt;
    }
    out.push_back(static_cast<char>(bytes_[step.code_point]));
    token.remove_prefix(step.size);
  }
  return out;
}

}  // namespace passel
