// Recognises the formats whose templates branch: Llama 2's, Mistral's, Qwen 3's.

#include <fmt/format.h>

#include <array>

#include "runtime/tokenizer/chat_template.h"
#include "runtime/tokenizer/template_reader.h"

namespace passel {

using namespace template_pieces;

namespace {

// User and assistant take turns.
constexpr std::string_view kOutOfTurn = "{%if(message['role']=='user')!=(loop.index0%2==0)%}";
constexpr std::string_view kSystemMessage = "{%set system_message=messages[0]['content']%}";

bool TakeTurnCheck(TemplateReader& in, std::string_view condition) {
  return in.Take({condition}) && in.TakeRaise() && in.Take({kEnd});
}

// The loop of Mistral's newer templates that only checks whose turn it is; true where there is
// none.
bool TakeCheckLoop(TemplateReader& in, bool* checked) {
  static constexpr std::string_view kWithoutTools =
      "{%for message in "
      "loop_messages|rejectattr('role','equalto','tool')|rejectattr('role','equalto',"
      "'tool_results')|selectattr('tool_calls','undefined')%}";
  if (in.Take({kWithoutTools})) {
    *checked = true;
    return TakeTurnCheck(in, kOutOfTurn) && in.Take({kEndLoop});
  }
  if (in.Take({"{%set ns=namespace()%}", "{%set ns.index=0%}", kRestLoop})) {
    *checked = true;
    return TakeTurnCheck(in, "{%if(message['role']=='user')!=(ns.index%2==0)%}") &&
           in.Take({"{%set ns.index=ns.index+1%}", kEndLoop});
  }
  return true;
}

std::string Output(std::string_view expression) { return fmt::format("{{{{{}}}}}", expression); }

}  // namespace

bool ChatTemplate::RecogniseLlama2(std::span<const std::string> pieces) {
  TemplateReader in(pieces);
  if (!in.Take({kSystemFirst, kRest, kSystemMessage})) return false;
  // A default that is switched off.
  if (in.Take({"{%elif false==true and not'<<SYS>>'in messages[0]['content']%}", kAll}) &&
      in.TakeLiteral("{%set system_message='", "'%}").empty()) {
    return false;
  }
  if (!in.Take({kElse, kAll, "{%set system_message=false%}", kEnd, kRestLoop}) ||
      !TakeTurnCheck(in, kOutOfTurn) ||
      !in.Take({"{%if loop.index0==0 and system_message!=false%}",
                R"({%set content='<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message['content']%})",
                kElse, "{%set content=message['content']%}", kEnd, kIfUser,
                "{{bos_token+'[INST] '+content.strip()+' [/INST]'}}"})) {
    return false;
  }
  // Never reached: such a message is out of turn, or not served.
  in.Take({kElifSystem, R"({{'<<SYS>>\n'+content.strip()+'\n<</SYS>>\n\n'}})"});
  return in.Take({kElifAssistant, "{{' '+content.strip()+' '+eos_token}}", kEnd, kEndLoop}) &&
         in.done();
}

// Tools change what is written around the turns; without any, these are all.
bool ChatTemplate::RecogniseMistral(std::span<const std::string> pieces) {
  struct User {
    std::string_view open, close;
  };
  static constexpr std::array kUsers = {User{" [INST] ", " [/INST]"}, User{"[INST] ", " [/INST]"},
                                        User{"[INST] ", "[/INST]"}, User{"[INST]", "[/INST]"}};
  struct Assistant {
    std::string_view jinja, open, before_eos, after_eos;
    bool trim = false;
  };
  static constexpr std::array kAssistants = {
      Assistant{"' '+message['content']+eos_token", " ", "", ""},
      Assistant{"' '+message['content']|trim+eos_token", " ", "", "", true},
      Assistant{"' '+message['content']+' '+eos_token", " ", " ", ""},
      Assistant{"message['content']+eos_token+' '", "", "", " "},
      Assistant{"message['content']+eos_token", "", "", ""},
  };
  TemplateReader in(pieces);
  const bool system = in.Take({kSystemFirst, kSystemMessage, kRest, kElse, kAll, kEnd});
  in.Take({"{%if not tools is defined%}", "{%set tools=none%}", kEnd});
  in.Take({"{%set user_messages=loop_messages|selectattr('role','equalto','user')|list%}"});
  bool checked = false;
  if (!TakeCheckLoop(in, &checked) || !in.Take({"{{bos_token}}", system ? kRestLoop : kLoop})) {
    return false;
  }
  if (TakeTurnCheck(in, kOutOfTurn)) checked = true;
  if (!in.Take({kIfUser})) return false;
  const bool in_first = system && in.Take({"{%if loop.first and system_message is defined%}"});
  if (system && !in_first && !in.Take({"{%if loop.last and system_message is defined%}"}))
    return false;
  const auto user = std::find_if(kUsers.begin(), kUsers.end(), [&](const User& u) {
    const std::string alone = Output(fmt::format("'{}'+message['content']+'{}'", u.open, u.close));
    if (!system) return in.Take({alone});
    return in.Take({Output(fmt::format(R"('{}'+system_message+'\n\n'+message['content']+'{}')",
                                       u.open, u.close)),
                    kElse, alone, kEnd});
  });
  if (user == kUsers.end()) return false;
  // A turn of its own, and roles come in any order.
  const std::string space = user->open.ends_with(' ') ? " " : "";
  const bool own_system =
      !system && !checked &&
      in.Take(
          {kElifSystem, Output(fmt::format(
                            "'[SYSTEM_PROMPT]{}'+message['content']+'[/SYSTEM_PROMPT]'", space))});
  if ((!own_system && !checked) || !in.Take({kElifAssistant})) return false;
  const auto assistant =
      std::find_if(kAssistants.begin(), kAssistants.end(),
                   [&](const Assistant& a) { return in.Take({Output(a.jinja)}); });
  if (assistant == kAssistants.end()) return false;
  if (in.Take({kElse}) && !in.TakeRaise()) return false;
  if (!in.Take({kEnd, kEndLoop}) || !in.done()) return false;

  user_turn_ = {std::string(user->open), std::string(user->close)};
  assistant_turn_ = {std::string(assistant->open),
                     fmt::format("{}{}{}", assistant->before_eos, eos_, assistant->after_eos),
                     assistant->trim};
  if (own_system) system_turn_ = {"[SYSTEM_PROMPT]" + space, "[/SYSTEM_PROMPT]"};
  if (system) system_ = in_first ? System::kInFirstUser : System::kInLastUser;
  return true;
}

// ChatML, with the reasoning of turns before the last question left out.
bool ChatTemplate::RecogniseQwen3(std::span<const std::string> pieces) {
  TemplateReader in(pieces);
  if (!in.Take({kSystemFirst, R"({{'<|im_start|>system\n'+messages[0]['content']+'<|im_end|>\n'}})",
                kEnd})) {
    return false;
  }
  // The last question's index, of those counted from the back.
  const std::string seeking =
      in.TakeLiteral("{%set ns=namespace(", "=true,last_query_index=messages|length-1)%}");
  if (seeking.empty() || seeking == "last_query_index" ||
      !in.Take({"{%for message in messages[::-1]%}"})) {
    return false;
  }
  const bool named = in.Take({"{%set index=(messages|length-1)-loop.index0%}"});
  static constexpr std::string_view kNoToolsAnswer =
      "not(message['content'].startswith('<tool_response>')and "
      "message['content'].endswith('</tool_response>'))%}";
  const std::string if_question =
      fmt::format("{{%if ns.{} and message['role']=='user'and ", seeking);
  if (!in.TakeAny(
          {fmt::format("{}{}", if_question, kNoToolsAnswer),
           fmt::format("{}message['content']is string and {}", if_question, kNoToolsAnswer)}) ||
      !in.Take({fmt::format("{{%set ns.{}=false%}}", seeking)})) {
    return false;
  }
  if (named ? !in.Take({"{%set ns.last_query_index=index%}"})
            : !in.TakeAny({"{%set ns.last_query_index=messages|length-1-loop.index0%}",
                           "{%set ns.last_query_index=(messages|length-1)-loop.index0%}"})) {
    return false;
  }
  if (!in.Take({kEnd, kEndLoop, kLoop})) return false;
  static constexpr std::string_view kContent = "{%set content=message['content']%}";
  const bool content = in.Take({kContent});
  static constexpr std::string_view kTurn = R"({{'<|im_start|>'+message['role']+'\n'+content}})";
  if (!in.TakeAny(
          {"{%if message['role']=='user'or(message['role']=='system'and not loop.first)%}",
           "{%if(message['role']=='user')or(message['role']=='system'and not loop.first)%}"}) ||
      !(in.Take({R"({{'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>\n'}})"}) ||
        (content &&
         in.Take({R"({{'<|im_start|>'+message['role']+'\n'+content+'<|im_end|>\n'}})"}))) ||
      !in.Take({kElifAssistant}) || (!content && !in.Take({kContent})) ||
      !in.Take({"{%set reasoning_content=''%}"})) {
    return false;
  }
  // `content` is what the message holds until it is set, last or by that alone.
  const auto take_split = [&](std::string_view of) {
    const std::string reasoning = fmt::format(
        R"({{%set reasoning_content={}.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n')%}})",
        of);
    const std::string rest =
        fmt::format(R"({{%set content={}.split('</think>')[-1].lstrip('\n')%}})", of);
    return in.Take({fmt::format("{{%if'</think>'in {}%}}", of)}) &&
           (in.Take({reasoning, rest}) || (of != "content" && in.Take({rest, reasoning}))) &&
           in.Take({kEnd});
  };
  if (!take_split("content") && !take_split("message['content']")) return false;
  if (!in.Take({"{%if loop.index0>ns.last_query_index%}",
                "{%if loop.last or(not loop.last and reasoning_content)%}",
                R"({{'<|im_start|>'+message['role']+'\n<think>\n'+reasoning_content.strip('\n')+)"
                R"('\n</think>\n\n'+content.lstrip('\n')}})",
                kElse, kTurn, kEnd, kElse, kTurn, kEnd, R"({{'<|im_end|>\n'}})", kEnd, kEndLoop,
                kGenerate})) {
    return false;
  }
  // How a turn begins where nobody says whether to think.
  struct Opening {
    std::string_view jinja, text;
  };
  static constexpr std::array kOpenings = {
      Opening{"", ""}, Opening{R"(<think>\n)", "<think>\n"},
      Opening{R"(<think>\n\n</think>\n\n)", "<think>\n\n</think>\n\n"}};
  const auto opening = std::find_if(kOpenings.begin(), kOpenings.end(), [&](const Opening& o) {
    return in.Take({Output(fmt::format(R"('<|im_start|>assistant\n{}')", o.jinja))});
  });
  if (opening == kOpenings.end()) return false;
  in.Take({"{%if enable_thinking is defined and enable_thinking is false%}",
           R"({{'<think>\n\n</think>\n\n'}})", kEnd});
  if (!in.Take({kEnd}) || !in.done()) return false;
  WriteChatMl();
  generation_ += opening->text;
  assistant_last_ = false;  // it would be taken for reasoning to go on with
  drops_reasoning_ = true;
  return true;
}

}  // namespace passel
