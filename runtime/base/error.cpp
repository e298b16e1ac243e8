#include "runtime/base/error.h"

namespace passel {

void ThrowBug(std::string_view what, std::source_location where) {
  throw Error(ErrorClass::kBug, std::string(where.file_name()) + ":" +
                                    std::to_string(where.line()) +
                                    ": internal error: " + std::string(what));
}

}  // namespace passel
