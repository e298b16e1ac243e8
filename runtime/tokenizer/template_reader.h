#pragma once

#include <algorithm>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

namespace passel {

// Pieces that templates of several models have, as TemplatePieces writes them.
namespace template_pieces {
inline constexpr std::string_view kLoop = "{%for message in messages%}";
inline constexpr std::string_view kRestLoop = "{%for message in loop_messages%}";
inline constexpr std::string_view kEndLoop = "{%endfor%}", kElse = "{%else%}", kEnd = "{%endif%}";
inline constexpr std::string_view kGenerate = "{%if add_generation_prompt%}";
inline constexpr std::string_view kSystemFirst = "{%if messages[0]['role']=='system'%}";
inline constexpr std::string_view kIfUser = "{%if message['role']=='user'%}";
inline constexpr std::string_view kElifSystem = "{%elif message['role']=='system'%}";
inline constexpr std::string_view kElifAssistant = "{%elif message['role']=='assistant'%}";
inline constexpr std::string_view kRest = "{%set loop_messages=messages[1:]%}";
inline constexpr std::string_view kAll = "{%set loop_messages=messages%}";
}  // namespace template_pieces

// The pieces of a template, taken from the front where they are as expected.
class TemplateReader {
 public:
  explicit TemplateReader(std::span<const std::string> pieces) : left_(pieces) {}

  // All of these, one after another, or none.
  bool Take(std::initializer_list<std::string_view> expected) {
    if (left_.size() < expected.size() ||
        !std::equal(expected.begin(), expected.end(), left_.begin())) {
      return false;
    }
    left_ = left_.subspan(expected.size());
    return true;
  }
  // One of these.
  bool TakeAny(std::initializer_list<std::string_view> expected) {
    return std::any_of(expected.begin(), expected.end(),
                       [&](std::string_view piece) { return Take({piece}); });
  }
  // What stands between `open` and `close` in a piece, as long as it needs no escaping and ends no
  // string; "" where the next is no such piece.
  std::string TakeLiteral(std::string_view open, std::string_view close) {
    std::string_view text = left_.empty() ? std::string_view() : left_[0];
    if (!text.starts_with(open) || !text.ends_with(close) ||
        text.size() <= open.size() + close.size()) {
      return "";
    }
    text = text.substr(open.size(), text.size() - open.size() - close.size());
    // A quote: the literal ends before the text does, which is then an expression. Jinja reads
    // a carriage return as a line break.
    if (text.find_first_of("'\"{}\\\r") != std::string_view::npos) return "";
    left_ = left_.subspan(1);
    return std::string(text);
  }
  // A refusal, whatever it says.
  bool TakeRaise() { return !TakeLiteral("{{raise_exception('", "')}}").empty(); }
  bool done() const { return left_.empty(); }

 private:
  std::span<const std::string> left_;
};

}  // namespace passel
