#include "runtime/tokenizer/chat_template.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"

namespace passel {
namespace {

// As Jinja's trim and Python's strip() do.
std::string_view Trim(std::string_view text) {
  static constexpr auto kSpaces = std::to_array<std::string_view>(
      {" ",      "\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",   "\x1d",
       "\x1e",   "\x1f",   "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002",
       "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a",
       "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"});
  const auto strip = [&](auto found, auto remove) {
    for (const auto* space = std::ranges::find_if(kSpaces, found); space != kSpaces.end();
         space = std::ranges::find_if(kSpaces, found)) {
      remove(space->size());
    }
  };
  strip([&](std::string_view space) { return text.starts_with(space); },
        [&](size_t n) { text.remove_prefix(n); });
  strip([&](std::string_view space) { return text.ends_with(space); },
        [&](size_t n) { text.remove_suffix(n); });
  return text;
}

// A user's message that is no answer of a tool.
bool IsQuestion(const ChatMessage& m) {
  return m.role == "user" &&
         !(m.content.starts_with("<tool_response>") && m.content.ends_with("</tool_response>"));
}

// What an assistant's message says behind its reasoning.
std::string_view WithoutReasoning(const ChatMessage& m) {
  static constexpr std::string_view kEnd = "</think>";
  const std::string_view content = m.content;
  const size_t end = content.rfind(kEnd);
  if (m.role != "assistant" || end == std::string_view::npos) return content;
  return content.substr(
      std::min(content.find_first_not_of('\n', end + kEnd.size()), content.size()));
}

void CheckRoles(std::span<const ChatMessage> messages) {
  if (messages.empty()) {
    throw Error(ErrorClass::kUsage, "messages: is empty; expected at least one message");
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant") {
      throw Error(ErrorClass::kUsage,
                  fmt::format("messages[{}].role: is \"{}\"; expected system, user or assistant", i,
                              Printable(role)));
    }
  }
}

}  // namespace

ChatTemplate::ChatTemplate(const TokenizerData& data) {
  const std::string_view jinja = data.chat_template;
  if (data.eos >= 0) eos_ = data.tokens[static_cast<size_t>(data.eos)];
  if (jinja.find("bos_token") != std::string_view::npos && data.bos >= 0) {
    bos_ = data.tokens[static_cast<size_t>(data.bos)];
  }
  if (jinja.empty()) {
    format_ = Format::kNone;
  } else {
    Recognise(jinja);
  }
}

std::string ChatTemplate::Apply(std::span<const ChatMessage> messages) const {
  CheckServed();
  CheckRoles(messages);
  if (format_ == Format::kLlama2) return Llama2(messages);
  return bos_ + (format_ == Format::kTurns ? Turns(messages) : Mistral(messages));
}

void ChatTemplate::CheckServed() const {
  if (format_ != Format::kNone && format_ != Format::kUnknown) return;
  throw Error(ErrorClass::kUsage,
              fmt::format("messages: the model {}; expected ChatML's, Llama 2's, Llama 3's, "
                          "Mistral's, Qwen's or Zephyr's. Give `prompt` instead",
                          format_ == Format::kNone ? "has no chat template"
                                                   : "has a chat template that is not served"));
}

std::string ChatTemplate::Turn::Text(std::string_view content) const {
  return fmt::format("{}{}{}", open, trim ? Trim(content) : content, close);
}

std::string ChatTemplate::Turns(std::span<const ChatMessage> messages) const {
  if (!assistant_last_ && messages.back().role == "assistant") {
    throw Error(ErrorClass::kUsage, "messages: end with the assistant's; expected another's last");
  }
  std::string out;
  const bool system = messages[0].role == "system";
  if (!dates_.empty()) {
    const std::string_view content = system ? std::string_view(messages[0].content) : "";
    out += system_turn_.open + dates_ + std::string(Trim(content)) + system_turn_.close;
    if (system) messages = messages.subspan(1);
  } else if (!system && !default_system_.empty()) {
    out += system_turn_.Text(default_system_);
  }
  // Behind the last question it is kept, and written anew.
  for (size_t i = messages.size(); drops_reasoning_ && i-- > 0 && !IsQuestion(messages[i]);) {
    if (WithoutReasoning(messages[i]).size() == messages[i].content.size()) continue;
    throw Error(ErrorClass::kUsage,
                fmt::format("messages[{}]: has reasoning; expected a user's message behind it", i));
  }
  for (const ChatMessage& m : messages) {
    const Turn& turn = m.role == "system" ? system_turn_
                       : m.role == "user" ? user_turn_
                                          : assistant_turn_;
    out += turn.Text(drops_reasoning_ ? WithoutReasoning(m) : m.content);
  }
  return out + generation_;
}

std::string ChatTemplate::Llama2(std::span<const ChatMessage> messages) const {
  const std::string_view system = TakeSystem(messages, true);
  std::string out;
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& content = messages[i].content;
    if (i % 2 != 0) {
      out += fmt::format(" {} {}", Trim(content), eos_);
      continue;
    }
    out += bos_;
    const bool with_system = i == 0 && system.data() != nullptr;
    const std::string whole =
        with_system ? fmt::format("<<SYS>>\n{}\n<</SYS>>\n\n{}", system, content) : content;
    out += fmt::format("[INST] {} [/INST]", Trim(whole));
  }
  return out;
}

std::string ChatTemplate::Mistral(std::span<const ChatMessage> messages) const {
  const std::string_view system = TakeSystem(messages, system_ != System::kRefused);
  const size_t with_system = system_ == System::kInFirstUser ? 0 : messages.size() - 1;
  std::string out;
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& content = messages[i].content;
    if (i % 2 != 0) {
      out += assistant_turn_.Text(content);
    } else if (i == with_system && system.data() != nullptr) {
      out += user_turn_.Text(fmt::format("{}\n\n{}", system, content));
    } else {
      out += user_turn_.Text(content);
    }
  }
  return out;
}

std::string_view ChatTemplate::TakeSystem(std::span<const ChatMessage>& messages, bool served) {
  std::string_view system;
  size_t index = 0;
  if (served && messages[0].role == "system") {
    system = messages[0].content;
    messages = messages.subspan(1);
    index = 1;
  }
  for (size_t i = 0; i < std::max<size_t>(messages.size(), 1); ++i) {
    const std::string_view expected = i % 2 == 0 ? "user" : "assistant";
    const std::string_view role = i < messages.size() ? messages[i].role : std::string_view("none");
    if (role != expected) {
      throw Error(ErrorClass::kUsage,
                  fmt::format("messages[{}].role: is \"{}\"; the model's chat template expects "
                              "\"{}\" there",
                              index + i, role, expected));
    }
  }
  if (messages.size() % 2 == 0) {
    throw Error(ErrorClass::kUsage, "messages: end with the assistant's; expected the user's last");
  }
  return system;
}

void BeginMessages(const TokenizerData& data, std::vector<int32_t>& ids) {
  if (!data.messages_add_bos || !data.add_bos || data.bos < 0) return;
  if (ids.empty() || ids[0] != data.bos) ids.insert(ids.begin(), data.bos);
}

}  // namespace passel
