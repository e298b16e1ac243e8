#include "runtime/tokenizer/tokenizer.h"

#include <fmt/format.h>

#include <limits>

#include "runtime/base/error.h"
#include "runtime/tokenizer/byte_level_tokenizer.h"
#include "runtime/tokenizer/sentence_piece_tokenizer.h"

namespace passel {
namespace {

void Validate(const TokenizerData& data) {
  const auto fail = [](const std::string& what) {
    throw Error(ErrorClass::kModel, "tokenizer: " + what);
  };
  const size_t count = data.tokens.size();
  if (count == 0) fail("the model has no tokenizer; expected tokenizer.json or GGUF metadata");
  if (count > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    fail(fmt::format("has {} tokens; expected 1 to 2^31 - 1", count));
  }
  if (data.types.size() != count) {
    fail(fmt::format("has {} token types; expected {}", data.types.size(), count));
  }
  if (data.merges.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    fail(fmt::format("has {} merges; expected at most 2^31 - 1", data.merges.size()));
  }
  if (!data.scores.empty() && data.scores.size() != count) {
    fail(fmt::format("has {} scores; expected {}", data.scores.size(), count));
  }
  const auto check_id = [&](const char* name, int32_t id) {
    if (id < -1 || (id >= 0 && static_cast<size_t>(id) >= count)) {
      fail(fmt::format("{} id is {}; expected a token below {}", name, id, count));
    }
  };
  check_id("bos", data.bos);
  check_id("eos", data.eos);
  check_id("unknown", data.unknown);
  for (const int32_t id : data.stop) check_id("stop", id);
  if (data.add_bos && data.bos < 0) fail("asks for a bos token, but names none");
}

}  // namespace

std::unique_ptr<Tokenizer> Tokenizer::Make(const TokenizerData& data) {
  Validate(data);
  if (data.kind == TokenizerData::Kind::kSentencePieceBpe) return MakeSentencePieceTokenizer(data);
  return MakeByteLevelTokenizer(data);
}

}  // namespace passel
