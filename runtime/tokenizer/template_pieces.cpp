#include "runtime/tokenizer/template_pieces.h"

#include <algorithm>
#include <array>

namespace passel {
namespace {

constexpr std::string_view kSpace = " \t\r\n";

bool InWord(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
         static_cast<signed char>(c) < 0;
}

// Whether space between the two is all that makes them two words or operators.
bool SpaceParts(char before, char behind) {
  return (InWord(before) && InWord(behind)) || (behind == '=' && (before == '=' || before == '!'));
}

// message.role as message['role'], in what is not quoted, from `from` on.
void IndexByName(std::string& out, size_t from) {
  for (const std::string message : {"message", "messages[0]"}) {
    for (const std::string item : {"role", "content"}) {
      const std::string name = message + "." + item, index = message + "['" + item + "']";
      for (size_t at = from; (at = out.find(name, at)) != std::string::npos;) {
        const char next = at + name.size() < out.size() ? out[at + name.size()] : '\0';
        if (InWord(next)) {
          at += name.size();
        } else {
          out.replace(at, name.size() + (next == ' ' ? 1 : 0), index);
          at += index.size();
        }
      }
    }
  }
}

std::string Canonical(std::string_view jinja) {
  std::string out;
  char quote = 0;
  size_t behind_quote = 0;
  bool space = false;
  for (size_t i = 0; i < jinja.size(); ++i) {
    const char c = jinja[i];
    if (quote == 0) {
      if (kSpace.find(c) != std::string_view::npos) {
        space = !out.empty();
        continue;
      }
      if (space && SpaceParts(out.back(), c)) out.push_back(' ');
      space = false;
      if (c == '\'' || c == '"') {
        IndexByName(out, behind_quote);
        quote = c;
        out.push_back('\'');
      } else {
        out.push_back(c);
      }
    } else if (c == quote) {
      quote = 0;
      out.push_back('\'');
      behind_quote = out.size();
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\'') {
      out += "\\'";
    } else {
      out.push_back(c);
      if (c == '\\' && i + 1 < jinja.size()) out.push_back(jinja[++i]);
    }
  }
  if (quote == 0) IndexByName(out, behind_quote);
  for (size_t at = 0; (at = out.find("'+'", at)) != std::string::npos;) out.erase(at, 3);
  return out;
}

// Where the tag that begins at `at` ends, behind its "}}" or "%}"; npos where it does not.
size_t TagEnd(std::string_view jinja, size_t at) {
  const std::string_view close = jinja[at + 1] == '{' ? "}}" : jinja[at + 1] == '%' ? "%}" : "#}";
  char quote = 0;
  size_t braces = 0;
  for (size_t i = at + 2; i + 1 < jinja.size(); ++i) {
    if (quote != 0) {
      if (jinja[i] == '\\')
        ++i;
      else if (jinja[i] == quote)
        quote = 0;
    } else if (close != "#}" && jinja[i] == '{') {
      ++braces;
    } else if (braces > 0 && jinja[i] == '}') {
      --braces;
    } else if (jinja.substr(i, 2) == close) {
      return i + 2;
    } else if (close != "#}" && (jinja[i] == '\'' || jinja[i] == '"')) {
      quote = jinja[i];
    }
  }
  return std::string_view::npos;
}

// The text between two tags as it is written.
std::string_view Written(std::string_view text, bool behind_block, bool strip_left,
                         bool before_block, bool strip_right, bool at_begin) {
  if (behind_block && text.starts_with('\n')) {
    text.remove_prefix(1);
    at_begin = true;
  }
  if (strip_left) text.remove_prefix(std::min(text.find_first_not_of(kSpace), text.size()));
  const size_t last = text.find_last_not_of(strip_right ? kSpace : " \t");
  const size_t end = last == std::string_view::npos ? 0 : last + 1;
  const bool line_begins = end == 0 ? at_begin && !strip_left : text[end - 1] == '\n';
  if (strip_right || (before_block && line_begins)) text = text.substr(0, end);
  return text;
}

std::vector<std::string> AllPieces(std::string_view jinja) {
  if (jinja.ends_with('\n')) jinja.remove_suffix(1);
  std::vector<std::string> pieces;
  bool behind_block = false, strip_left = false, at_begin = true;
  while (true) {
    size_t at = jinja.find('{');
    while (at != std::string_view::npos &&
           (at + 2 >= jinja.size() ||
            std::string_view("{%#").find(jinja[at + 1]) == std::string_view::npos)) {
      at = jinja.find('{', at + 1);
    }
    const bool tag = at != std::string_view::npos;
    const std::string_view text =
        Written(jinja.substr(0, at), behind_block, strip_left, tag && jinja[at + 1] != '{',
                tag && jinja[at + 2] == '-', at_begin);
    if (!text.empty()) pieces.push_back("text" + std::string(text));
    if (!tag) return pieces;
    const size_t end = TagEnd(jinja, at);
    if (end == std::string_view::npos) return {};
    const std::string_view open = jinja.substr(at, 2), close = jinja.substr(end - 2, 2);
    std::string_view inside = jinja.substr(at + 2, end - at - 4);
    // A '+' keeps white space that is else left out.
    if (inside.starts_with('+') || inside.ends_with('+')) return {};
    if (inside.starts_with('-')) inside.remove_prefix(1);
    strip_left = inside.ends_with('-');
    if (strip_left) inside.remove_suffix(1);
    behind_block = open != "{{";
    at_begin = false;
    if (open != "{#") {
      pieces.push_back(std::string(open) + Canonical(inside) + std::string(close));
    }
    jinja.remove_prefix(end);
  }
}

// Conditions that hold for no message with a role and a content alone, and where no tools are
// given.
constexpr std::array kNever = {
    std::string_view("tools"),
    std::string_view("tools is not none"),
    std::string_view("custom_tools is defined"),
    std::string_view("builtin_tools is defined"),
    std::string_view("builtin_tools is defined or tools is not none"),
    std::string_view("tools is not none and not tools_in_user_message"),
    std::string_view("tools_in_user_message and not tools is none"),
    std::string_view("tools is not none and(message==user_messages[-1])"),
    std::string_view("message.tool_calls is defined and message.tool_calls is not none"),
    std::string_view("message['tool_calls']is defined and message['tool_calls']is not none"),
    std::string_view("message['role']=='tool_results'or message['role']=='tool'"),
    std::string_view("message.tool_calls"),
    std::string_view("'tool_calls'in message"),
    std::string_view("message['role']=='tool'"),
    std::string_view("message['role']=='tool'or message['role']=='ipython'"),
    std::string_view("message.reasoning_content is string"),
    std::string_view(
        "message.reasoning_content is defined and message.reasoning_content is not none"),
};
// What conditions on the loop's message have.
constexpr auto kOfMessage =
    std::to_array<std::string_view>({"message.", "message[", "in message", "(message=="});
// Such as hold for all of them.
constexpr std::array kAlways = {
    std::string_view(
        "not(message['role']=='ipython'or message['role']=='tool'or'tool_calls'in message)"),
    std::string_view("not(message['role']=='tool'or message['role']=='tool_results'or"
                     "(message.tool_calls is defined and message.tool_calls is not none))"),
    std::string_view("message['content']is string"),
};
// Such as hold for all but a first system message.
constexpr std::array kAllButFirstSystem = {
    std::string_view("(message['role']=='user')or(message['role']=='system'and not loop.first)or"
                     "(message['role']=='assistant'and not message.tool_calls)"),
};

bool IsOneOf(const auto& list, std::string_view condition) {
  if (condition.starts_with(' ')) condition.remove_prefix(1);
  // Parentheses around the whole, which therefore has no others.
  if (condition.starts_with('(') && condition.find_first_of("()", 1) == condition.size() - 1) {
    condition = condition.substr(1, condition.size() - 2);
  }
  return std::find(list.begin(), list.end(), condition) != list.end();
}

// What the walk is in: an if's branch, or a loop.
struct If {
  bool loop = false;
  bool last = false;        // its else is reached
  bool written = false;     // the if itself, by a branch kept before or now
  bool decided = false;     // a branch that holds always is over or open
  bool but_system = false;  // one for all but a first system message is
  bool skipping = false;
};

std::vector<std::string> WithoutTools(const std::vector<std::string>& all) {
  std::vector<std::string> kept;
  std::vector<If> open;
  const auto skipping = [&] {
    return std::any_of(open.begin(), open.end(), [](const If& i) { return i.skipping; });
  };
  for (const std::string& piece : all) {
    const auto is = [&](std::string_view word) {
      return piece.starts_with(word) && !InWord(piece[word.size()]);
    };
    const bool first = is("{%if"), other = is("{%elif"), last = piece == "{%else%}",
               end = piece == "{%endif%}";
    if (!first && open.empty() && (other || last || end)) return {};
    const bool loop = is("{%for"), loop_end = piece == "{%endfor%}";
    // Others (raw, macro, …) change what is around them, dropped or not.
    const bool set = is("{%set") && piece.find('=') != std::string::npos;
    if (piece.starts_with("{%") && !(first || other || last || end || loop || loop_end || set)) {
      return {};
    }
    if (!(first || other || last || end)) {
      if (!skipping()) kept.push_back(piece);
      if (loop) open.push_back({.loop = true});
      if (loop_end && (open.empty() || !open.back().loop)) return {};
      if (loop_end) open.pop_back();
      continue;
    }
    if (first) open.emplace_back();
    If& now = open.back();
    if (now.loop) return {};  // an else of a loop is no known template's
    if (now.last && !end) return {};
    now.last = last;
    now.skipping = false;
    const bool dead = skipping();  // by one around it
    if (end) {
      if (now.written && !dead) kept.push_back(piece);
      open.pop_back();
      continue;
    }
    const size_t from = first ? 4 : 6;
    const std::string condition = last ? "" : piece.substr(from, piece.size() - from - 2);
    // A message's conditions hold, or not, where there is one.
    const bool of_message = std::ranges::any_of(kOfMessage, [&](std::string_view part) {
      return condition.find(part) != std::string::npos;
    });
    const bool decidable =
        !of_message || std::ranges::any_of(open, [](const If& i) { return i.loop; });
    if (now.decided || (!last && decidable && IsOneOf(kNever, condition)) ||
        (now.but_system && condition == " message['role']=='assistant'")) {
      now.skipping = true;
      continue;
    }
    const bool always = last || (decidable && IsOneOf(kAlways, condition));
    now.decided = always;
    now.but_system = IsOneOf(kAllButFirstSystem, condition);
    if (dead) continue;
    if (now.written) {
      kept.push_back(always ? "{%else%}" : "{%elif" + condition + "%}");
    } else if (!always) {
      kept.push_back("{%if" + condition + "%}");
      now.written = true;
    }
  }
  return open.empty() ? kept : std::vector<std::string>{};
}

}  // namespace

std::vector<std::string> TemplatePieces(std::string_view jinja) {
  return WithoutTools(AllPieces(jinja));
}

}  // namespace passel
