#include "runtime/tokenizer/chat_template.h"

#include <fmt/format.h>

#include <algorithm>
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

// Jinja without spaces outside its string literals, and these in single quotes: templates of one
// model differ in both.
std::string Canonical(std::string_view jinja) {
  std::string out;
  char quote = 0;
  for (const char c : jinja) {
    if (quote != 0) {
      out.push_back(c == quote ? '\'' : c);
      if (c == quote) quote = 0;
    } else if (c == '\'' || c == '"') {
      quote = c;
      out.push_back('\'');
    } else if (c != ' ' && c != '\n' && c != '\t' && c != '\r') {
      out.push_back(c);
    }
  }
  return out;
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
  } else if (Contains(jinja, "[INST]") && data.bos >= 0 && data.eos >= 0) {
    RecogniseInst(jinja);
  }
  if (Contains(jinja, "bos_token") && data.bos >= 0) {
    bos_ = data.tokens[static_cast<size_t>(data.bos)];
  }
  encoding_adds_bos_ = data.add_bos;
  if (data.eos >= 0) eos_ = data.tokens[static_cast<size_t>(data.eos)];
}

void ChatTemplate::RecogniseInst(std::string_view jinja) {
  const std::string text = Canonical(jinja);
  if (Contains(text, "bos_token+'[INST] '+content.strip()+' [/INST]'") &&
      Contains(text, "' '+content.strip()+' '+eos_token") &&
      Contains(text, R"('<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message['content'])")) {
    format_ = Format::kLlama2;
    return;
  }
  // Tools change what is written around the turns; without any, the templates below agree.
  struct Turn {
    std::string_view jinja, open, close;
  };
  static constexpr std::array kUser = {
      Turn{"' [INST] '+message['content']+' [/INST]'", " [INST] ", " [/INST]"},
      Turn{"'[INST] '+message['content']+' [/INST]'", "[INST] ", " [/INST]"},
      Turn{"'[INST] '+message['content']+'[/INST]'", "[INST] ", "[/INST]"},
  };
  static constexpr std::array kAssistant = {
      Turn{"' '+message['content']+eos_token", " ", ""},
      Turn{"message['content']+eos_token+' '", "", " "},
      Turn{"message['content']+eos_token", "", ""},
  };
  const auto* user = std::find_if(kUser.begin(), kUser.end(),
                                  [&](const Turn& t) { return Contains(text, t.jinja); });
  const auto* assistant = std::find_if(kAssistant.begin(), kAssistant.end(),
                                       [&](const Turn& t) { return Contains(text, t.jinja); });
  if (user == kUser.end() || assistant == kAssistant.end()) return;
  if (Contains(text, "system")) {
    // The message is written before the first user's or the last one's content.
    if (!Contains(text, R"(system_message+'\n\n'+message['content'])")) return;
    const bool first = Contains(text, "loop.firstandsystem_messageisdefined");
    if (!first && !Contains(text, "loop.lastandsystem_messageisdefined")) return;
    system_ = first ? System::kInFirstUser : System::kInLastUser;
  }
  format_ = Format::kMistral;
  user_open_ = user->open;
  user_close_ = user->close;
  assistant_open_ = assistant->open;
  assistant_close_ = assistant->close;
}

std::string ChatTemplate::Apply(std::span<const ChatMessage> messages) const {
  CheckServed();
  CheckRoles(messages);
  switch (format_) {
    case Format::kChatMl:
      return LeadingBos() + ChatMl(messages);
    case Format::kLlama3:
      return LeadingBos() + Llama3(messages);
    case Format::kLlama2:
      return Llama2(messages);
    default:
      return LeadingBos() + Mistral(messages);
  }
}

void ChatTemplate::CheckServed() const {
  if (format_ != Format::kNone && format_ != Format::kUnknown) return;
  throw Error(ErrorClass::kUsage,
              fmt::format("messages: the model {}; expected ChatML's, Llama 2's, Llama 3's or "
                          "Mistral's. Give `prompt` instead",
                          format_ == Format::kNone ? "has no chat template"
                                                   : "has a chat template that is not served"));
}

std::string ChatTemplate::LeadingBos() const { return encoding_adds_bos_ ? "" : bos_; }

std::string ChatTemplate::ChatMl(std::span<const ChatMessage> messages) const {
  std::string out;
  const auto turn = [&](std::string_view role, std::string_view content) {
    out += fmt::format("<|im_start|>{}\n{}<|im_end|>\n", role, content);
  };
  if (messages[0].role != "system" && !default_system_.empty()) turn("system", default_system_);
  for (const ChatMessage& m : messages) turn(m.role, m.content);
  return out + "<|im_start|>assistant\n";
}

std::string ChatTemplate::Llama3(std::span<const ChatMessage> messages) const {
  std::string out;
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
  return out + "<|start_header_id|>assistant<|end_header_id|>\n\n";
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
    if (i > 0 || !encoding_adds_bos_) out += bos_;
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
    if (i % 2 != 0) {
      out += assistant_open_ + messages[i].content + eos_ + assistant_close_;
      continue;
    }
    out += user_open_;
    if (i == with_system && system.data() != nullptr) out += fmt::format("{}\n\n", system);
    out += messages[i].content + user_close_;
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

}  // namespace passel
