// Which of the known formats a template writes: by the expressions in it.

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "runtime/tokenizer/chat_template.h"

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

}  // namespace

void ChatTemplate::Recognise(std::string_view jinja) {
  // Published ones have some 10,000 bytes; the search below is not linear.
  if (jinja.size() > kLongest) return;
  const std::string text = Canonical(jinja);
  if (!WritesSpace(jinja) && RecogniseQwen3(text)) {
    format_ = Format::kTurns;
    return;
  }
  // Other reasoning models rewrite earlier turns.
  if (Contains(jinja, "<think>") || Contains(jinja, "enable_thinking")) return;
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
  WriteChatMl();
  assistant_last_ = !Contains(text, "messages[-1]['role']!='assistant'");
  default_system_ = DefaultSystem(jinja);
  return true;
}

void ChatTemplate::WriteChatMl() {
  const auto turn = [](std::string_view role) {
    return Turn{fmt::format("<|im_start|>{}\n", role), "<|im_end|>\n"};
  };
  system_turn_ = turn("system");
  user_turn_ = turn("user");
  assistant_turn_ = turn("assistant");
  generation_ = assistant_turn_.open;
}

// ChatML, with the reasoning of turns before the last question left out.
bool ChatTemplate::RecogniseQwen3(std::string_view text) {
  const auto has = [&](std::string_view with, std::string_view content) {
    return Contains(text, fmt::format(fmt::runtime(with), content));
  };
  const auto writes_turns = [&](std::string_view content) {
    return has(R"('<|im_start|>'+message['role']+'\n'+{}+'<|im_end|>\n'}}}})", content) &&
           has(R"({{%-setcontent={}.split('</think>')[-1].lstrip('\n')%}})", content);
  };
  if (!(writes_turns("content") || writes_turns("message['content']")) ||
      !Contains(text, R"('<|im_start|>system\n'+messages[0].content+'<|im_end|>\n'}})") ||
      !Contains(text, R"(not(message['content'].startswith('<tool_response>')and)"
                      R"(message['content'].endswith('</tool_response>'))%})") ||
      !Contains(text, R"(ifloop.index0>ns.last_query_index%}{%-ifloop.lastor(notloop.last)"
                      R"(andreasoning_content)%})") ||
      !Contains(text, R"({%-else%}{{-'<|im_start|>'+message['role']+'\n'+content}}{%-endif%})") ||
      Contains(text, "system_message") || Contains(text, "bos_token")) {
    return false;
  }
  // How a turn begins where nobody says whether to think.
  struct Opening {
    std::string_view jinja, text;
  };
  static constexpr std::array kOpenings = {
      Opening{"", ""}, Opening{R"(<think>\n)", "<think>\n"},
      Opening{R"(<think>\n\n</think>\n\n)", "<think>\n\n</think>\n\n"}};
  const auto* opening = std::find_if(kOpenings.begin(), kOpenings.end(), [&](const Opening& o) {
    const std::string with = R"({{{{-'<|im_start|>assistant\n{}'}}}}{{%-)";
    return has(with + "endif%}}", o.jinja) ||
           has(with + "ifenable_thinkingisdefinedandenable_thinkingisfalse%}}", o.jinja);
  });
  if (opening == kOpenings.end()) return false;
  WriteChatMl();
  generation_ += opening->text;
  assistant_last_ = false;  // it would be taken for reasoning to go on with
  drops_reasoning_ = true;
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

}  // namespace passel
