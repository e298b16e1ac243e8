#pragma once

#include <memory>
#include <span>
#include <string>

#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// A known chat format, recognised by the marks its Jinja text contains; Jinja is not interpreted.
class ChatTemplate {
 public:
  // Never throws: a template that is not known is reported when it is used.
  explicit ChatTemplate(const TokenizerData& data);
  // The text of the messages with the assistant's turn opened. Throws Error{kUsage} where the
  // template is unknown, no message is given, or a role is not served where it stands.
  std::string Apply(std::span<const ChatMessage> messages) const;

 private:
  enum class Format { kUnknown, kNone, kChatMl, kLlama2, kLlama3, kMistral };
  enum class System { kRefused, kInFirstUser, kInLastUser };

  void RecogniseInst(std::string_view jinja);
  void CheckServed() const;
  std::string LeadingBos() const;  // "" where encoding adds it
  std::string ChatMl(std::span<const ChatMessage> messages) const;
  std::string Llama2(std::span<const ChatMessage> messages) const;
  std::string Llama3(std::span<const ChatMessage> messages) const;
  std::string Mistral(std::span<const ChatMessage> messages) const;
  // Takes a system message off the front, null where there is none, and checks that user and
  // assistant take turns in the rest, the user last.
  static std::string_view TakeSystem(std::span<const ChatMessage>& messages, bool served);

  Format format_ = Format::kUnknown;
  std::string default_system_;  // ChatML: the system message where the first is none; may be empty
  std::string dates_;           // Llama 3.1: the lines every system message begins with
  std::string bos_, eos_;       // as the template writes them; bos_ may be empty
  bool encoding_adds_bos_ = false;
  // Mistral: what stands around a turn; eos comes before assistant_close_.
  std::string user_open_, user_close_, assistant_open_, assistant_close_;
  System system_ = System::kRefused;
};

}  // namespace passel
