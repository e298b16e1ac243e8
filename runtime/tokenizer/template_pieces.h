#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace passel {

// What a Jinja template is made of, in order: its statements "{%…%}" and outputs "{{…}}", written
// alike where templates of one model differ (no spaces outside of string literals, these in single
// quotes, line breaks in them as \n, neighbours joined, items of a message by index), and the text
// outside of them, as far as trim_blocks and lstrip_blocks leave any, as "text…". Comments and
// branches that only tools reach are left out. Empty for what is not well-formed.
std::vector<std::string> TemplatePieces(std::string_view jinja);

}  // namespace passel
