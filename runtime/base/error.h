#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

namespace passel {

// What went wrong, by who can mend it. The value is the process's exit code.
enum class ErrorClass : int {
  kBug = 1,      // a broken invariant of ours
  kUsage = 2,    // command line or config
  kModel = 3,    // model or tokenizer files
  kIo = 4,       // input or output files
  kCluster = 5,  // a rank, a link, too few ranks
  kMemory = 6,   // a budget does not suffice
};

// The one exception type of the project. The message says what, where and what was expected, and is
// shown to the user as it is. Set-up code throws it; hot paths return a status instead.
class Error : public std::runtime_error {
 public:
  // A message is one printable line below 1 KiB, whatever it quotes: see Printable, which the parts
  // from files and users go through for themselves. A longer one is cut in its middle.
  Error(ErrorClass error_class, const std::string& message);

  ErrorClass error_class() const { return class_; }
  int exit_code() const { return static_cast<int>(class_); }

 private:
  ErrorClass class_;
};

[[noreturn]] void ThrowBug(std::string_view what, std::source_location where);

// Guards an invariant of our own code, never user input. Throws Error{kBug} naming the place.
inline void Check(bool condition, std::string_view what,
                  std::source_location where = std::source_location::current()) {
  if (!condition) [[unlikely]] {
    ThrowBug(what, where);
  }
}

}  // namespace passel
