#pragma once

#include <string>
#include <string_view>

namespace passel {

// Unicode's normalisation form C of well-formed UTF-8. Throws Error{kMemory}.
std::string ToNfc(std::string_view text);

}  // namespace passel
