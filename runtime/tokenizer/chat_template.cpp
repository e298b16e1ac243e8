#include "runtime/tokenizer/chat_template.h"

#include <fmt/format.h>

#include <array>

#include "runtime/base/error.h"

namespace passel {
namespace {

bool Contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// The system message that a ChatML template writes out literally, "" where it has none. Jinja
// string literals hold the line break as it is or as \n.
std::string DefaultSystem(std::string_view jinja) {
  static constexpr std::string_view kOpen = "<|im_start|>system", kClose = "<|im_end|>";
  for (size_t at = jinja.find(kOpen); at != std::string_view::npos;
       at = jinja.find(kOpen, at + 1)) {
    std::string_view rest = jinja.substr(at + kOpen.size());
    const size_t skip = rest.substr(0, 1) == "\n" ? 1 : rest.substr(0, 2) == "\\n" ? 2 : 0;
    if (skip == 0) continue;
    rest.remove_prefix(skip);
    const std::string_view text = rest.substr(0, rest.find(kClose));
    // A quote or brace: the literal ends before the message does, which is then a variable.
    if (text.size() < rest.size() && !text.empty() &&
        text.find_first_of("'\"{}\\") == std::string_view::npos) {
      return std::string(text);
    }
  }
  return "";
}

std::string_view Trim(std::string_view text) {
  static constexpr std::string_view kSpace = " \t\n\r\f\v";
  const size_t first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

void CheckRoles(std::span<const ChatMessage> messages) {
  if (messages.empty()) {
    throw Error(ErrorClass::kUsage, "messages: is empty; expected at least one message");
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant") {
      throw Error(
          ErrorClass::kUsage,
          fmt::format("messages[{}].role: is \"{}\"; expected system, user or assistant", i, role));
    }
  }
}

}  // namespace

ChatTemplate::ChatTemplate(const TokenizerData& data) {
  const std::string_view jinja = data.chat_template;
  if (jinja.empty()) {
    format_ = Format::kNone;
  } else if (Contains(jinja, "<think>") || Contains(jinja, "enable_thinking")) {
    format_ = Format::kUnknown;  // reasoning models rewrite earlier turns
  } else if (Contains(jinja, "<|im_start|>") && Contains(jinja, "<|im_end|>")) {
    format_ = Format::kChatMl;
    default_system_ = DefaultSystem(jinja);
  } else if (Contains(jinja, "<|start_header_id|>") && Contains(jinja, "<|eot_id|>")) {
    format_ = Format::kLlama3;
    if (Contains(jinja, "Cutting Knowledge Date: December 2023")) {
      // The date is the one the template falls back to, so that a prompt is the same every day.
      dates_ = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
    }
  }
  if (Contains(jinja, "bos_token") && !data.add_bos && data.bos >= 0) {
    bos_ = data.tokens[static_cast<size_t>(data.bos)];
  }
}

std::string ChatTemplate::Apply(std::span<const ChatMessage> messages) const {
  if (format_ == Format::kNone || format_ == Format::kUnknown) {
    throw Error(ErrorClass::kUsage,
                fmt::format("messages: the model {}; expected ChatML's or Llama 3's. Give `prompt` "
                            "instead",
                            format_ == Format::kNone ? "has no chat template"
                                                     : "has a chat template that is not served"));
  }
  CheckRoles(messages);
  std::string out = bos_;
  if (format_ == Format::kChatMl) {
    const auto turn = [&](std::string_view role, std::string_view content) {
      out += fmt::format("<|im_start|>{}\n{}<|im_end|>\n", role, content);
    };
    if (messages[0].role != "system" && !default_system_.empty()) turn("system", default_system_);
    for (const ChatMessage& m : messages) turn(m.role, m.content);
    out += "<|im_start|>assistant\n";
    return out;
  }
  const auto turn = [&](std::string_view role, std::string_view prefix, std::string_view content) {
    out += fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n{}{}<|eot_id|>", role, prefix,
                       Trim(content));
  };
  if (!dates_.empty()) {
    const bool system = messages[0].role == "system";
    turn("system", dates_, system ? std::string_view(messages[0].content) : std::string_view{});
    if (system) messages = messages.subspan(1);
  }
  for (const ChatMessage& m : messages) turn(m.role, "", m.content);
  out += "<|start_header_id|>assistant<|end_header_id|>\n\n";
  return out;
}

}  // namespace passel
