#include "runtime/base/utf8.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel {

std::string Detokenizer::Push(int32_t id) {
  pending_ += tokenizer_.TokenBytes(id, /*keep_special=*/false);
  std::string out;
  std::string_view left = pending_;
  while (!left.empty()) {
    const Utf8Step step = NextUtf8(left);
    if (step.kind == Utf8Step::Kind::kIncomplete) break;
    out += step.kind == Utf8Step::Kind::kValid ? left.substr(0, step.size) : kReplacement;
    left.remove_prefix(step.size);
  }
  pending_ = std::string(left);
  return out;
}

std::string Detokenizer::Flush() {
  const std::string out(pending_.empty() ? std::string_view{} : kReplacement);
  pending_.clear();
  return out;
}

}  // namespace passel
