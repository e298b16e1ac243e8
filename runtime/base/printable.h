#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace passel {

// Text from a file or a user as a message may show it: well-formed UTF-8 on one line, at most
// `most` bytes of the text and "…" for the rest. Bytes of control characters, of what changes the
// order or the place of others (line separators, bidirectional marks), and of no character come as
// \xHH.
std::string Printable(std::string_view text, size_t most = 80);

}  // namespace passel
