#pragma once

#include <string>
#include <string_view>

namespace passel {

// Unicode's normalisation form C of the well-formed stretches of a text; other bytes stay as they
// are. Throws Error{kMemory}.
std::string ToNfc(std::string_view text);

// Unicode's White_Space.
bool IsWhiteSpace(char32_t c);

// What regular expressions mean by \w (Unicode's UTS 18): letters, marks, decimal digits,
// connecting punctuation and the zero-width joiners.
bool IsWordCharacter(char32_t c);

}  // namespace passel
