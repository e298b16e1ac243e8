#include "runtime/base/error.h"

#include "runtime/base/printable.h"

namespace passel {
namespace {

// What a file quoted in a message can add to it is bounded: at most kHead + kTail bytes are kept.
constexpr size_t kHead = 700, kTail = 300;

bool ContinuesCharacter(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

std::string Shortened(std::string message) {
  message = Printable(message, message.size());
  if (message.size() <= kHead + kTail) return message;
  size_t head = kHead, tail = message.size() - kTail;
  while (head > 0 && ContinuesCharacter(message[head])) --head;
  while (tail < message.size() && ContinuesCharacter(message[tail])) ++tail;
  return message.substr(0, head) + " […] " + message.substr(tail);
}

}  // namespace

Error::Error(ErrorClass error_class, const std::string& message)
    : std::runtime_error(Shortened(message)), class_(error_class) {}

void ThrowBug(std::string_view what, std::source_location where) {
  throw Error(ErrorClass::kBug, std::string(where.file_name()) + ":" +
                                    std::to_string(where.line()) +
                                    ": internal error: " + std::string(what));
}

}  // namespace passel
