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
  // template is unknown, no message is given, or a role is not system, user or assistant.
  std::string Apply(std::span<const ChatMessage> messages) const;

 private:
  enum class Format { kUnknown, kNone, kChatMl, kLlama3 };
  Format format_ = Format::kUnknown;
  std::string default_system_;  // ChatML: the system message where the first is none; may be empty
  std::string dates_;           // Llama 3.1: the lines every system message begins with
  std::string bos_;             // what the template writes first, unless encoding adds it
};

}  // namespace passel
