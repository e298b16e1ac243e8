#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace passel {

// GPT-2's bijection between the 256 bytes and printable code points, in which byte-level
// vocabularies are written: printable Latin-1 bytes stand for themselves, the others for
// U+0100, U+0101, … in byte order.
class ByteAlphabet {
 public:
  ByteAlphabet();
  // The character (UTF-8) of a byte.
  const std::string& Character(uint8_t byte) const { return characters_[byte]; }
  // The bytes that a token's text stands for; nullopt where a character is outside the alphabet.
  std::optional<std::string> ToBytes(std::string_view token) const;

 private:
  std::array<std::string, 256> characters_;
  std::array<int16_t, 512> bytes_;  // code point → byte, −1: none
};

}  // namespace passel
