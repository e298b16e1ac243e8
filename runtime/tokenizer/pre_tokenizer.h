#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/tokenizer/tokenizer.h"

namespace passel {

// Cuts text into the words within which BPE merges, as the pre-tokenisers of known models do.
// Thread-safe.
class PreTokenizer {
 public:
  // Regular expressions, each isolating its matches within the pieces that the one before makes.
  // Throws Error{kModel}.
  explicit PreTokenizer(const std::vector<TokenizerData::Pattern>& patterns);
  ~PreTokenizer();

  // The patterns of a name that GGUF has: "gpt-2", "smollm", "llama-bpe", "qwen2" and others.
  // Throws Error{kModel}. Qwen2's NFC normalisation is not part of them: see TokenizerData::nfc.
  static std::vector<TokenizerData::Pattern> Patterns(const std::string& name);
  // Their name, "own" for others.
  static std::string Name(const std::vector<TokenizerData::Pattern>& patterns);

  // `text`: well-formed UTF-8; appends views of it, in order, that cover it without gaps but for
  // what a pattern leaves out. Throws Error{kModel} where a pattern takes too much memory or work.
  void Split(std::string_view text, std::vector<std::string_view>& words) const;

 private:
  class Matcher;
  struct Regex;
  std::vector<std::unique_ptr<Regex>> steps_;
};

// Whether a model with that pre-tokeniser takes a word that is a token as it stands, without
// merging its bytes (tokenizer.json's `ignore_merges`).
bool IgnoresMerges(const std::string& pre_tokenizer);

}  // namespace passel
