#pragma once

#include <span>
#include <string>
#include <string_view>

#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// A known chat format, recognised by the statements and outputs of its Jinja text; Jinja is not
// interpreted. Where a text might write anything else than what is written here, it is not known.
class ChatTemplate {
 public:
  // Never throws: a template that is not known is reported when it is used.
  explicit ChatTemplate(const TokenizerData& data);

  // The text of the messages with the assistant's turn opened. Throws Error{kUsage} where the
  // template is unknown, no message is given, or a role is not served where it stands.
  std::string Apply(std::span<const ChatMessage> messages) const;

 private:
  enum class Format {
    kUnknown,
    kNone,
    kTurns,  // each message for itself, in any order
    kLlama2,
    kMistral,
  };
  enum class System { kRefused, kInFirstUser, kInLastUser };
  // What stands around a message's content.
  struct Turn {
    std::string open, close;
    bool trim = false;
    std::string Text(std::string_view content) const;
  };

  void Recognise(std::string_view jinja);
  // `pieces` as TemplatePieces makes them. Each leaves its members alone where it returns false.
  bool RecogniseChatMl(std::span<const std::string> pieces);
  void WriteChatMl();
  bool RecogniseQwen3(std::span<const std::string> pieces);
  bool RecogniseLlama3(std::span<const std::string> pieces);
  bool RecogniseZephyr(std::span<const std::string> pieces);
  bool RecogniseLlama2(std::span<const std::string> pieces);
  bool RecogniseMistral(std::span<const std::string> pieces);

  void CheckServed() const;
  std::string Turns(std::span<const ChatMessage> messages) const;
  std::string Llama2(std::span<const ChatMessage> messages) const;
  std::string Mistral(std::span<const ChatMessage> messages) const;
  // Takes a system message off the front, null where there is none, and checks that user and
  // assistant take turns in the rest, the user last.
  static std::string_view TakeSystem(std::span<const ChatMessage>& messages, bool served);

  Format format_ = Format::kUnknown;
  std::string bos_, eos_;  // as the template writes them; bos_ may be empty
  Turn system_turn_, user_turn_, assistant_turn_;
  System system_ = System::kRefused;  // Mistral
  std::string generation_;            // opens the assistant's turn
  bool drops_reasoning_ = false;      // of the assistant's messages
  bool assistant_last_ = true;        // whether that may follow an assistant's message
  std::string default_system_;        // the system message where the first is none; may be empty
  std::string dates_;                 // Llama 3.1: the lines every first system message begins with
};

// Puts bos in front of the ids of messages' text where `data` asks for it and they lack it.
void BeginMessages(const TokenizerData& data, std::vector<int32_t>& ids);

}  // namespace passel
