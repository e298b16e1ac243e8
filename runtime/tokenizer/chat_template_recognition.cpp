// Which of the known formats a template writes: by all of its statements and outputs.

#include <fmt/format.h>

#include <algorithm>

#include "runtime/tokenizer/chat_template.h"
#include "runtime/tokenizer/template_pieces.h"
#include "runtime/tokenizer/template_reader.h"

namespace passel {

using namespace template_pieces;

namespace {

constexpr size_t kLongest = size_t{64} << 10;

}  // namespace

void ChatTemplate::Recognise(std::string_view jinja) {
  // Published ones have some 10,000 bytes; what is done below is not linear.
  if (jinja.size() > kLongest) return;
  const std::vector<std::string> pieces = TemplatePieces(jinja);
  if (jinja.find("eos_token") != std::string_view::npos && eos_.empty()) return;
  if (RecogniseQwen3(pieces) || RecogniseZephyr(pieces) || RecogniseChatMl(pieces) ||
      RecogniseLlama3(pieces)) {
    format_ = Format::kTurns;
  } else if (!bos_.empty() && RecogniseLlama2(pieces)) {
    format_ = Format::kLlama2;
  } else if (!bos_.empty() && RecogniseMistral(pieces)) {
    format_ = system_turn_.open.empty() ? Format::kMistral : Format::kTurns;
  }
}

// Each turn for itself, behind the system message that is written where the first is none: in the
// loop, or before it, with the first system message too.
bool ChatTemplate::RecogniseChatMl(std::span<const std::string> pieces) {
  static constexpr std::string_view kTurn =
      R"({{'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>\n'}})";
  // Qwen 1.5: closes and opens turns by conditions that hold unless the assistant's is the last.
  static constexpr std::string_view kOpenTurn =
      R"({{'<|im_start|>'+message['role']+'\n'+message['content']}})";
  static constexpr std::string_view kUnlessLast =
      "{%if(loop.last and add_generation_prompt)or not loop.last%}";
  static constexpr std::string_view kClose = R"({{'<|im_end|>\n'}})";
  static constexpr std::string_view kOpen = R"({{'<|im_start|>assistant\n'}})";
  static constexpr std::string_view kButFirstSystem =
      "{%if(message['role']=='user')or(message['role']=='system'and not loop.first)or"
      "(message['role']=='assistant'and not message.tool_calls)%}";
  static constexpr std::string_view kSystem = R"({{'<|im_start|>system\n)";
  static constexpr std::string_view kEndSystem = R"(<|im_end|>\n'}})";
  TemplateReader in(pieces);
  std::string system;
  in.Take(
      {"{%if not add_generation_prompt is defined%}", "{%set add_generation_prompt=false%}", kEnd});
  in.Take({"{{bos_token}}"});
  const bool before = in.Take(
      {kSystemFirst, R"({{'<|im_start|>system\n'+messages[0]['content']+'<|im_end|>\n'}})"});
  if (before && in.Take({kElse})) {
    system = in.TakeLiteral(kSystem, kEndSystem);
    if (system.empty()) return false;
  }
  if ((before && !in.Take({kEnd})) || !in.Take({kLoop})) return false;
  if (!before && in.Take({"{%if loop.first and messages[0]['role']!='system'%}"})) {
    system = in.TakeLiteral(kSystem, kEndSystem);
    if (system.empty() || !in.Take({kEnd})) return false;
  }
  if (before && !in.Take({kButFirstSystem})) return false;
  if (!in.Take({kTurn}) && !in.Take({kOpenTurn, kUnlessLast, kClose, kEnd})) return false;
  if ((before && !in.Take({kEnd})) || !in.Take({kEndLoop})) return false;
  const bool any_last = in.Take({kGenerate});
  if (!any_last &&
      !in.Take({"{%if add_generation_prompt and messages[-1]['role']!='assistant'%}"})) {
    return false;
  }
  if (!in.Take({kOpen, kEnd}) || !in.done()) return false;
  WriteChatMl();
  assistant_last_ = any_last;
  default_system_ = system;
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

bool ChatTemplate::RecogniseLlama3(std::span<const std::string> pieces) {
  static constexpr std::string_view kTurn =
      R"('<|start_header_id|>'+message['role']+'<|end_header_id|>\n\n'+message['content']|trim+'<|eot_id|>')";
  static constexpr std::string_view kDate = "{%set date_string='26 Jul 2024'%}";
  TemplateReader in(pieces);
  std::string dates;
  in.Take({"{{bos_token}}"});
  in.Take(
      {"{%if not tools_in_user_message is defined%}", "{%set tools_in_user_message=true%}", kEnd});
  if (in.Take({"{%if not date_string is defined%}"})) {
    // The date is the one the template falls back to, so that a prompt is the same every day.
    const bool today = in.Take(
        {"{%if strftime_now is defined%}", "{%set date_string=strftime_now('%d %b %Y')%}", kElse});
    if (!in.Take({kDate, kEnd}) || (today && !in.Take({kEnd}))) return false;
    in.Take({"{%if not tools is defined%}", "{%set tools=none%}", kEnd});
    if (!in.Take({kSystemFirst, "{%set system_message=messages[0]['content']|trim%}",
                  "{%set messages=messages[1:]%}", kElse, "{%set system_message=''%}", kEnd,
                  R"({{'<|start_header_id|>system<|end_header_id|>\n\n'}})",
                  R"({{'Cutting Knowledge Date: December 2023\n'}})",
                  R"({{'Today Date: '+date_string+'\n\n'}})", "{{system_message}}",
                  "{{'<|eot_id|>'}}"})) {
      return false;
    }
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
  }
  const bool named = in.Take({kAll});
  if (!in.Take({named ? kRestLoop : kLoop})) return false;
  // Llama 3 puts the turn into a variable, and bos before the first.
  if (in.Take({fmt::format("{{%set content={}%}}", kTurn)})) {
    if (in.Take({"{%if loop.index0==0%}"})) {
      if (!in.Take({"{%set content=bos_token+content%}", kEnd})) return false;
    }
    if (!in.Take({"{{content}}"})) return false;
  } else if (!in.Take({fmt::format("{{{{{}}}}}", kTurn)})) {
    return false;
  }
  static constexpr std::string_view kOpen =
      R"({{'<|start_header_id|>assistant<|end_header_id|>\n\n'}})";
  if (!in.Take({kEndLoop})) return false;
  if (!in.Take({kOpen}) && !in.Take({kGenerate, kOpen, kEnd})) return false;
  if (!in.done()) return false;
  dates_ = dates;
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

// The line breaks behind its outputs are written.
bool ChatTemplate::RecogniseZephyr(std::span<const std::string> pieces) {
  TemplateReader in(pieces);
  if (!in.Take({kLoop})) return false;
  bool first = true;
  for (const char* role : {"user", "system", "assistant"}) {
    if (!in.Take({fmt::format("{{%{} message['role']=='{}'%}}", first ? "if" : "elif", role),
                  fmt::format(R"({{{{'<|{}|>\n'+message['content']+eos_token}}}})", role),
                  "text\n"})) {
      return false;
    }
    first = false;
  }
  if (!in.Take({kEnd, "{%if loop.last and add_generation_prompt%}", "{{'<|assistant|>'}}", "text\n",
                kEnd, kEndLoop}) ||
      !in.done()) {
    return false;
  }
  const auto turn = [&](std::string_view role) {
    return Turn{fmt::format("<|{}|>\n", role), eos_ + "\n"};
  };
  system_turn_ = turn("system");
  user_turn_ = turn("user");
  assistant_turn_ = turn("assistant");
  generation_ = "<|assistant|>\n";
  return true;
}

}  // namespace passel
