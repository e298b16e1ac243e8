// Which of the known formats a template writes: by its statements and outputs.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <initializer_list>

#include "runtime/tokenizer/chat_template.h"
#include "runtime/tokenizer/template_pieces.h"

namespace passel {
namespace {

constexpr size_t kLongest = size_t{64} << 10;

bool Contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// The pieces of a template, taken from the front where they are as expected.
class Reader {
 public:
  explicit Reader(std::span<const std::string> pieces) : left_(pieces) {}
  bool Take(std::initializer_list<std::string_view> expected) {
    if (left_.size() < expected.size() ||
        !std::equal(expected.begin(), expected.end(), left_.begin())) {
      return false;
    }
    left_ = left_.subspan(expected.size());
    return true;
  }
  // An output of ChatML's system message, written out literally; "" where it is none.
  std::string TakeLiteralSystem() {
    static constexpr std::string_view kOpen = R"({{'<|im_start|>system\n)";
    static constexpr std::string_view kClose = R"(<|im_end|>\n'}})";
    std::string_view text = left_.empty() ? std::string_view() : left_[0];
    if (!text.starts_with(kOpen) || !text.ends_with(kClose)) return "";
    if (text.size() <= kOpen.size() + kClose.size()) return "";
    text = text.substr(kOpen.size(), text.size() - kOpen.size() - kClose.size());
    // A quote: the literal ends before the message does, which is then a variable.
    if (text.find_first_of("'\"{}\\") != std::string_view::npos) return "";
    left_ = left_.subspan(1);
    return std::string(text);
  }
  bool done() const { return left_.empty(); }

 private:
  std::span<const std::string> left_;
};

constexpr std::string_view kLoop = "{%formessageinmessages%}";
constexpr std::string_view kEndLoop = "{%endfor%}", kElse = "{%else%}", kEnd = "{%endif%}";
constexpr std::string_view kGenerate = "{%ifadd_generation_prompt%}";
constexpr std::string_view kSystemFirst = "{%ifmessages[0]['role']=='system'%}";

// Whether all that the pieces write is among `outputs`, and their loops are over all messages.
bool WritesOnly(std::span<const std::string> pieces, std::span<const std::string> outputs) {
  static constexpr std::array<std::string_view, 4> kLoops = {
      kLoop, "{%formessageinloop_messages%}", "{%formessageinmessages[::-1]%}",
      "{%formessageinloop_messages|rejectattr('role','equalto','tool')|rejectattr('role',"
      "'equalto','tool_results')|selectattr('tool_calls','undefined')%}"};
  static constexpr std::string_view kSet = "{%setloop_messages=";
  return std::all_of(pieces.begin(), pieces.end(), [&](const std::string& piece) {
    if (piece.starts_with("{%for")) {
      return std::find(kLoops.begin(), kLoops.end(), piece) != kLoops.end();
    }
    if (piece.starts_with(kSet)) {
      const std::string_view of = std::string_view(piece).substr(kSet.size());
      return of == "messages%}" || of == "messages[1:]%}";
    }
    if (piece.starts_with("{%")) {
      // Neither what makes the messages others, or tools of none, nor what writes by itself.
      static constexpr std::array kStatements = {"{%if",      "{%elif",     "{%else%}",
                                                 "{%endif%}", "{%endfor%}", "{%set"};
      static constexpr std::array kOthers = {"{%setmessage=", "{%setmessages=", "{%settools="};
      const auto begins = [&](const char* with) { return piece.starts_with(with); };
      return piece == "{%settools=none%}" ||
             (std::any_of(kStatements.begin(), kStatements.end(), begins) &&
              std::none_of(kOthers.begin(), kOthers.end(), begins));
    }
    return piece.starts_with("{{raise_exception(") ||
           std::find(outputs.begin(), outputs.end(), piece) != outputs.end();
  });
}

}  // namespace

void ChatTemplate::Recognise(std::string_view jinja) {
  // Published ones have some 10,000 bytes; the search below is not linear.
  if (jinja.size() > kLongest) return;
  const std::vector<std::string> pieces = TemplatePieces(jinja);
  std::string text;
  for (const std::string& piece : pieces) text += piece;
  const bool writes_text = std::any_of(pieces.begin(), pieces.end(), [](const std::string& piece) {
    return piece.starts_with("text");
  });
  if (!writes_text && RecogniseQwen3(pieces, text)) {
    format_ = Format::kTurns;
    return;
  }
  // Other reasoning models rewrite earlier turns.
  if (Contains(jinja, "<think>") || Contains(jinja, "enable_thinking")) return;
  if (Contains(text, "eos_token") && eos_.empty()) return;
  if (RecogniseZephyr(pieces)) {
    format_ = Format::kTurns;
  } else if (writes_text) {
    return;
  } else if (RecogniseChatMl(pieces) || RecogniseLlama3(pieces)) {
    format_ = Format::kTurns;
  } else if (Contains(text, "bos_token") && !bos_.empty()) {
    if (RecogniseLlama2(pieces, text)) {
      format_ = Format::kLlama2;
    } else if (RecogniseMistral(pieces, text)) {
      format_ =
          generation_.empty() && !system_turn_.open.empty() ? Format::kTurns : Format::kMistral;
    }
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
      "{%if(loop.lastandadd_generation_prompt)ornotloop.last%}";
  static constexpr std::string_view kClose = R"({{'<|im_end|>\n'}})";
  static constexpr std::string_view kOpen = R"({{'<|im_start|>assistant\n'}})";
  static constexpr std::string_view kRest =
      "{%if(message['role']=='user')or(message['role']=='system'andnotloop.first)or"
      "(message['role']=='assistant'andnotmessage.tool_calls)%}";
  Reader in(pieces);
  std::string system;
  in.Take({"{%ifnotadd_generation_promptisdefined%}", "{%setadd_generation_prompt=false%}", kEnd});
  in.Take({"{{bos_token}}"});
  const bool before = in.Take(
      {kSystemFirst, R"({{'<|im_start|>system\n'+messages[0]['content']+'<|im_end|>\n'}})"});
  if (before && in.Take({kElse})) {
    system = in.TakeLiteralSystem();
    if (system.empty()) return false;
  }
  if ((before && !in.Take({kEnd})) || !in.Take({kLoop})) return false;
  if (!before && in.Take({"{%ifloop.firstandmessages[0]['role']!='system'%}"})) {
    system = in.TakeLiteralSystem();
    if (system.empty() || !in.Take({kEnd})) return false;
  }
  if (before && !in.Take({kRest})) return false;
  if (!in.Take({kTurn}) && !in.Take({kOpenTurn, kUnlessLast, kClose, kEnd})) return false;
  if ((before && !in.Take({kEnd})) || !in.Take({kEndLoop})) return false;
  const bool any_last = in.Take({kGenerate});
  if (!any_last && !in.Take({"{%ifadd_generation_promptandmessages[-1]['role']!='assistant'%}"})) {
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

// ChatML, with the reasoning of turns before the last question left out.
bool ChatTemplate::RecogniseQwen3(std::span<const std::string> pieces, std::string_view text) {
  const auto has = [&](std::string_view piece) {
    return std::find(pieces.begin(), pieces.end(), piece) != pieces.end();
  };
  if (!Contains(text, R"(not(message['content'].startswith('<tool_response>')and)"
                      R"(message['content'].endswith('</tool_response>'))%})") ||
      !Contains(text, R"(ifloop.index0>ns.last_query_index%}{%ifloop.lastor(notloop.last)"
                      R"(andreasoning_content)%})") ||
      !Contains(text, R"({%else%}{{'<|im_start|>'+message['role']+'\n'+content}}{%endif%})") ||
      !Contains(text, ",last_query_index=messages|length-1)%}") ||
      Contains(text, "system_message") || Contains(text, "bos_token")) {
    return false;
  }
  // The last question's index, of those counted from the back.
  static constexpr std::string_view kSet = "{%setns.last_query_index=";
  static constexpr std::string_view kIndex = "(messages|length-1)-loop.index0%}";
  for (const std::string& piece : pieces) {
    if (!piece.starts_with(kSet)) continue;
    const std::string_view value = std::string_view(piece).substr(kSet.size());
    const bool named = value == "index%}" && has(fmt::format("{{%setindex={}", kIndex));
    if (!named && value != kIndex && value != "messages|length-1-loop.index0%}") return false;
  }
  // How a turn begins where nobody says whether to think.
  struct Opening {
    std::string_view jinja, text;
  };
  static constexpr std::array kOpenings = {
      Opening{"", ""}, Opening{R"(<think>\n)", "<think>\n"},
      Opening{R"(<think>\n\n</think>\n\n)", "<think>\n\n</think>\n\n"}};
  const auto open = [](const Opening& o) {
    return fmt::format(R"({{{{'<|im_start|>assistant\n{}'}}}})", o.jinja);
  };
  const auto* opening = std::find_if(kOpenings.begin(), kOpenings.end(), [&](const Opening& o) {
    return Contains(text, open(o) + "{%endif%}") ||
           Contains(text, open(o) + "{%ifenable_thinkingisdefinedandenable_thinkingisfalse%}");
  });
  if (opening == kOpenings.end()) return false;
  std::vector<std::string> outputs = {
      R"({{'<|im_start|>system\n'+messages[0]['content']+'<|im_end|>\n'}})",
      R"({{'<|im_start|>'+message['role']+'\n'+content}})",
      R"({{'<|im_start|>'+message['role']+'\n<think>\n'+reasoning_content.strip('\n')+)"
      R"('\n</think>\n\n'+content.lstrip('\n')}})",
      R"({{'<|im_end|>\n'}})", open(*opening)};
  if (Contains(text, "enable_thinking")) {
    outputs.emplace_back(R"({{'<think>\n\n</think>\n\n'}})");
  }
  bool turns = false;
  for (const std::string_view content : {"content", "message['content']"}) {
    const std::string turn =
        fmt::format(R"({{{{'<|im_start|>'+message['role']+'\n'+{}+'<|im_end|>\n'}}}})", content);
    turns |= has(turn) &&
             has(fmt::format(R"({{%setcontent={}.split('</think>')[-1].lstrip('\n')%}})", content));
    outputs.push_back(turn);
  }
  if (!turns || !has(outputs[0]) || !WritesOnly(pieces, outputs)) return false;
  WriteChatMl();
  generation_ += opening->text;
  assistant_last_ = false;  // it would be taken for reasoning to go on with
  drops_reasoning_ = true;
  return true;
}

bool ChatTemplate::RecogniseLlama3(std::span<const std::string> pieces) {
  static constexpr std::string_view kTurn =
      R"('<|start_header_id|>'+message['role']+'<|end_header_id|>\n\n'+message['content']|trim+'<|eot_id|>')";
  static constexpr std::string_view kDate = "{%setdate_string='26 Jul 2024'%}";
  Reader in(pieces);
  in.Take({"{{bos_token}}"});
  in.Take({"{%ifnottools_in_user_messageisdefined%}", "{%settools_in_user_message=true%}", kEnd});
  if (in.Take({"{%ifnotdate_stringisdefined%}"})) {
    // The date is the one the template falls back to, so that a prompt is the same every day.
    const bool today = in.Take(
        {"{%ifstrftime_nowisdefined%}", "{%setdate_string=strftime_now('%d %b %Y')%}", kElse});
    if (!in.Take({kDate, kEnd}) || (today && !in.Take({kEnd}))) return false;
    in.Take({"{%ifnottoolsisdefined%}", "{%settools=none%}", kEnd});
    if (!in.Take({kSystemFirst, "{%setsystem_message=messages[0]['content']|trim%}",
                  "{%setmessages=messages[1:]%}", kElse, "{%setsystem_message=''%}", kEnd,
                  R"({{'<|start_header_id|>system<|end_header_id|>\n\n'}})",
                  R"({{'Cutting Knowledge Date: December 2023\n'}})",
                  R"({{'Today Date: '+date_string+'\n\n'}})", "{{system_message}}",
                  "{{'<|eot_id|>'}}"})) {
      return false;
    }
    dates_ = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
  }
  in.Take({"{%setloop_messages=messages%}"});
  if (!in.Take({kLoop}) && !in.Take({"{%formessageinloop_messages%}"})) return false;
  // Llama 3 puts the turn into a variable, and bos before the first.
  if (in.Take({fmt::format("{{%setcontent={}%}}", kTurn)})) {
    if (in.Take({"{%ifloop.index0==0%}"})) {
      if (!in.Take({"{%setcontent=bos_token+content%}", kEnd})) return false;
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
  Reader in(pieces);
  if (!in.Take({kLoop})) return false;
  bool first = true;
  for (const char* role : {"user", "system", "assistant"}) {
    if (!in.Take({fmt::format("{{%{}message['role']=='{}'%}}", first ? "if" : "elif", role),
                  fmt::format(R"({{{{'<|{}|>\n'+message['content']+eos_token}}}})", role),
                  "text\n"})) {
      return false;
    }
    first = false;
  }
  if (!in.Take({kEnd, "{%ifloop.lastandadd_generation_prompt%}", "{{'<|assistant|>'}}", "text\n",
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

bool ChatTemplate::RecogniseLlama2(std::span<const std::string> pieces, std::string_view text) {
  static const std::vector<std::string> kOutputs = {
      "{{bos_token+'[INST] '+content.strip()+' [/INST]'}}", "{{' '+content.strip()+' '+eos_token}}",
      R"({{'<<SYS>>\n'+content.strip()+'\n<</SYS>>\n\n'}})"};  // of a system message elsewhere
  return WritesOnly(pieces, kOutputs) && Contains(text, kOutputs[0]) &&
         Contains(text, kOutputs[1]) &&
         Contains(text, R"('<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message['content'])") &&
         Contains(text, "system_message=false") && !Contains(text, "true==true");
}

// Tools change what is written around the turns; without any, these are all.
bool ChatTemplate::RecogniseMistral(std::span<const std::string> pieces, std::string_view text) {
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
  const std::string space = user->open.ends_with(' ') ? " " : "";
  const std::string own_system =
      fmt::format("'[SYSTEM_PROMPT]{}'+message['content']+'[/SYSTEM_PROMPT]'", space);
  const std::string in_user =
      fmt::format(R"('{}'+system_message+'\n\n'+message['content']+'{}')", user->open, user->close);
  std::vector<std::string> outputs = {"{{bos_token}}"};
  for (const std::string_view part :
       {user->jinja, assistant->jinja, std::string_view(own_system), std::string_view(in_user)}) {
    outputs.push_back(fmt::format("{{{{{}}}}}", part));
  }
  if (!WritesOnly(pieces, outputs)) return false;
  user_turn_ = {std::string(user->open), std::string(user->close)};
  assistant_turn_ = {std::string(assistant->open),
                     fmt::format("{}{}{}", assistant->before_eos, eos_, assistant->after_eos),
                     assistant->trim};
  if (!Contains(text, "system")) return Contains(text, "raise_exception");
  if (Contains(text, own_system)) {
    // A turn of its own, and roles come in any order.
    system_turn_ = {"[SYSTEM_PROMPT]" + space, "[/SYSTEM_PROMPT]"};
    return !Contains(text, "system_message");
  }
  // Written before the first user's or the last one's content.
  if (!Contains(text, in_user)) return false;
  const bool first = Contains(text, "loop.firstandsystem_messageisdefined");
  if (!first && !Contains(text, "loop.lastandsystem_messageisdefined")) return false;
  system_ = first ? System::kInFirstUser : System::kInLastUser;
  return true;
}

}  // namespace passel
