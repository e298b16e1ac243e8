#include "runtime/tokenizer/chat_template.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"

namespace passel {
namespace {

constexpr size_t kLongest = size_t{64} << 10;

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

// Jinja with what templates of one model differ in made alike: no spaces outside of string
// literals, these in single quotes, line breaks in them as \\n, neighbours joined, items of a
// message by index.
std::string Canonical(std::string_view jinja) {
  std::string out;
  char quote = 0;
  for (size_t i = 0; i < jinja.size(); ++i) {
    const char c = jinja[i];
    if (quote == 0) {
      if (c == '\'' || c == '"') {
        quote = c;
        out.push_back('\'');
      } else if (c != ' ' && c != '\n' && c != '\t' && c != '\r') {
        out.push_back(c);
      }
    } else if (c == quote) {
      quote = 0;
      out.push_back('\'');
    } else if (c == '\n') {
      out += "\\n";
    } else {
      out.push_back(c);
      if (c == '\\' && i + 1 < jinja.size()) out.push_back(jinja[++i]);
    }
  }
  const auto replace = [&](std::string_view from, std::string_view to) {
    for (size_t at = 0; (at = out.find(from, at)) != std::string::npos; at += to.size()) {
      out.replace(at, from.size(), to);
    }
  };
  replace("message.role", "message['role']");
  replace("message.content", "message['content']");
  replace("'+'", "");
  return out;
}

// Whether the text writes line breaks or spaces that stand behind an expression (a line break
// behind a statement is not written).
bool WritesSpace(std::string_view jinja) {
  for (size_t at = 0; (at = jinja.find("}}", at)) != std::string_view::npos;) {
    const bool trims = at > 0 && jinja[at - 1] == '-';
    at += 2;
    const size_t next = jinja.find_first_not_of(" \t\r\n", at);
    if (trims || next == at || next == std::string_view::npos) continue;
    const std::string_view tag = jinja.substr(next, 3);
    if (tag != "{%-" && tag != "{{-" && tag != "{#-") return true;
  }
  return false;
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
      throw Error(ErrorClass::kUsage,
                  fmt::format("messages[{}].role: is \"{}\"; expected system, user or assistant", i,
                              Printable(role)));
    }
  }
}

}  // namespace

ChatTemplate::ChatTemplate(const TokenizerData& data) : encoding_adds_bos_(data.add_bos) {
  const std::string_view jinja = data.chat_template;
  if (data.eos >= 0) eos_ = data.tokens[static_cast<size_t>(data.eos)];
  if (Contains(jinja, "bos_token") && data.bos >= 0) {
    bos_ = data.tokens[static_cast<size_t>(data.bos)];
  }
  if (jinja.empty()) {
    format_ = Format::kNone;
  } else {
    Recognise(jinja);
  }
}

void ChatTemplate::Recognise(std::string_view jinja) {
  // Published ones have some 10,000 bytes; the search below is not linear.
  if (jinja.size() > kLongest) return;
  // Reasoning models rewrite earlier turns.
  if (Contains(jinja, "<think>") || Contains(jinja, "enable_thinking")) return;
  const std::string text = Canonical(jinja);
  if (Contains(text, "eos_token") && eos_.empty()) return;
  if (RecogniseZephyr(jinja, text)) {
    format_ = Format::kTurns;
  } else if (WritesSpace(jinja)) {
    return;
  } else if (RecogniseChatMl(jinja, text) || RecogniseLlama3(text)) {
    format_ = Format::kTurns;
  } else if (Contains(text, "bos_token") && !bos_.empty()) {
    if (RecogniseLlama2(text)) {
      format_ = Format::kLlama2;
    } else if (RecogniseMistral(text)) {
      format_ =
          generation_.empty() && !system_turn_.open.empty() ? Format::kTurns : Format::kMistral;
    }
  }
}

bool ChatTemplate::RecogniseChatMl(std::string_view jinja, std::string_view text) {
  static constexpr std::string_view kTurn =
      R"('<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>\n')";
  // Qwen 1.5: closes and opens turns by conditions that hold unless the assistant's is the last.
  static constexpr std::string_view kOpenEnd =
      R"('<|im_start|>'+message['role']+'\n'+message['content']}})"
      R"({%if(loop.lastandadd_generation_prompt)ornotloop.last%}{{'<|im_end|>\n'}})";
  if (!Contains(text, kTurn) && !Contains(text, kOpenEnd)) return false;
  // A system message that is put into a variable, or bos written under a condition.
  if (Contains(text, "system_message")) return false;
  if (Contains(text, "bos_token") && !text.starts_with("{{bos_token}}") &&
      !text.starts_with("{{-bos_token}}")) {
    return false;
  }
  const auto turn = [](std::string_view role) {
    return Turn{fmt::format("<|im_start|>{}\n", role), "<|im_end|>\n"};
  };
  system_turn_ = turn("system");
  user_turn_ = turn("user");
  assistant_turn_ = turn("assistant");
  generation_ = assistant_turn_.open;
  assistant_last_ = !Contains(text, "messages[-1]['role']!='assistant'");
  default_system_ = DefaultSystem(jinja);
  return true;
}

bool ChatTemplate::RecogniseLlama3(std::string_view text) {
  static constexpr std::string_view kTurn =
      R"('<|start_header_id|>'+message['role']+'<|end_header_id|>\n\n'+message['content']|trim+'<|eot_id|>')";
  if (!Contains(text, kTurn)) return false;
  if (Contains(text, "Cutting Knowledge Date: December 2023") &&
      Contains(text, "date_string='26 Jul 2024'")) {
    // The date is the one the template falls back to, so that a prompt is the same every day.
    dates_ = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
  } else if (Contains(text, "system_message") || Contains(text, "Knowledge Date")) {
    return false;
  }
  const auto turn = [](std::string_view role) {
    return Turn{fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n", role), "<|eot_id|>",
                true};
  };
  system_turn_ = turn("system");
  user_turn_ = turn("user");
  assistant_turn_ = turn("assistant");
  generation_ = assistant_turn_.open;
  return true;
}

bool ChatTemplate::RecogniseZephyr(std::string_view jinja, std::string_view text) {
  // Line breaks behind the expressions are written.
  if (!Contains(jinja, "eos_token }}\n{%") || !Contains(jinja, "{{ '<|assistant|>' }}\n{%") ||
      Contains(text, "bos_token")) {
    return false;
  }
  const auto turn = [&](std::string_view role) {
    return Turn{fmt::format("<|{}|>\n", role), eos_ + "\n"};
  };
  for (const char* role : {"system", "user", "assistant"}) {
    const std::string branch = fmt::format(
        R"(ifmessage['role']=='{0}'%}}{{{{'<|{0}|>\n'+message['content']+eos_token}}}})", role);
    if (!Contains(text, branch)) return false;
  }
  system_turn_ = turn("system");
  user_turn_ = turn("user");
  assistant_turn_ = turn("assistant");
  generation_ = "<|assistant|>\n";
  return true;
}

bool ChatTemplate::RecogniseLlama2(std::string_view text) {
  return Contains(text, "bos_token+'[INST] '+content.strip()+' [/INST]'") &&
         Contains(text, "' '+content.strip()+' '+eos_token") &&
         Contains(text, R"('<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message['content'])") &&
         Contains(text, "system_message=false") && !Contains(text, "true==true");
}

// Tools change what is written around the turns; without any, these are all.
bool ChatTemplate::RecogniseMistral(std::string_view text) {
  struct User {
    std::string_view jinja, open, close;
  };
  static constexpr std::array kUser = {
      User{"' [INST] '+message['content']+' [/INST]'", " [INST] ", " [/INST]"},
      User{"'[INST] '+message['content']+' [/INST]'", "[INST] ", " [/INST]"},
      User{"'[INST] '+message['content']+'[/INST]'", "[INST] ", "[/INST]"},
      User{"'[INST]'+message['content']+'[/INST]'", "[INST]", "[/INST]"},
  };
  struct Assistant {
    std::string_view jinja, open, before_eos, after_eos;
    bool trim = false;
  };
  static constexpr std::array kAssistant = {
      Assistant{"' '+message['content']+eos_token", " ", "", ""},
      Assistant{"' '+message['content']|trim+eos_token", " ", "", "", true},
      Assistant{"' '+message['content']+' '+eos_token", " ", " ", ""},
      Assistant{"message['content']+eos_token+' '", "", "", " "},
      Assistant{"message['content']+eos_token", "", "", ""},
  };
  const auto find = [&](const auto& known) {
    return std::find_if(known.begin(), known.end(),
                        [&](const auto& k) { return Contains(text, k.jinja); });
  };
  const auto user = find(kUser);
  const auto assistant = find(kAssistant);
  if (user == kUser.end() || assistant == kAssistant.end()) return false;
  user_turn_ = {std::string(user->open), std::string(user->close)};
  assistant_turn_ = {std::string(assistant->open),
                     fmt::format("{}{}{}", assistant->before_eos, eos_, assistant->after_eos),
                     assistant->trim};
  if (!Contains(text, "system")) return Contains(text, "raise_exception");
  const std::string space = user->open.ends_with(' ') ? " " : "";
  if (Contains(text,
               fmt::format("'[SYSTEM_PROMPT]{}'+message['content']+'[/SYSTEM_PROMPT]'", space))) {
    // A turn of its own, and roles come in any order.
    system_turn_ = {"[SYSTEM_PROMPT]" + space, "[/SYSTEM_PROMPT]"};
    return !Contains(text, "system_message");
  }
  // Written before the first user's or the last one's content.
  if (!Contains(text, fmt::format(R"('{}'+system_message+'\n\n'+message['content']+'{}')",
                                  user->open, user->close))) {
    return false;
  }
  const bool first = Contains(text, "loop.firstandsystem_messageisdefined");
  if (!first && !Contains(text, "loop.lastandsystem_messageisdefined")) return false;
  system_ = first ? System::kInFirstUser : System::kInLastUser;
  return true;
}

std::string ChatTemplate::Apply(std::span<const ChatMessage> messages) const {
  CheckServed();
  CheckRoles(messages);
  if (format_ == Format::kLlama2) return Llama2(messages);
  return LeadingBos() + (format_ == Format::kTurns ? Turns(messages) : Mistral(messages));
}

void ChatTemplate::CheckServed() const {
  if (format_ != Format::kNone && format_ != Format::kUnknown) return;
  throw Error(ErrorClass::kUsage,
              fmt::format("messages: the model {}; expected ChatML's, Llama 2's, Llama 3's, "
                          "Mistral's or Zephyr's. Give `prompt` instead",
                          format_ == Format::kNone ? "has no chat template"
                                                   : "has a chat template that is not served"));
}

std::string ChatTemplate::LeadingBos() const { return encoding_adds_bos_ ? "" : bos_; }

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
  for (const ChatMessage& m : messages) {
    const Turn& turn = m.role == "system" ? system_turn_
                       : m.role == "user" ? user_turn_
                                          : assistant_turn_;
    out += turn.Text(m.content);
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

}  // namespace passel
