#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace passel {

// Text from a file or a user as a message may show it: well-formed UTF-8 on one line, at most
// `most` bytes of the text and "…" for the rest. A line break comes as \n; the bytes of other
// control characters, of what changes the order or place of others (line separators, bidirectional
// marks), and of no character come as \xHH.
std::string Printable(std::string_view text, size_t most = 80);

}  // namespace passel
