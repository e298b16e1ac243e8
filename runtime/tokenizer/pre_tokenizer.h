#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace passel {

// Cuts text into the words within which BPE merges, as the pre-tokenisers of known models do.
// Thread-safe.
class PreTokenizer {
 public:
  // `name` as GGUF has it: "gpt-2", "smollm", "llama-bpe", "qwen2" and their aliases. Throws
  // Error{kModel}. Qwen2's NFC normalisation is not part of it: see TokenizerData::nfc.
  static std::unique_ptr<PreTokenizer> Make(const std::string& name);
  // The same from a regular expression of tokenizer.json, pieces isolated, after an optional split
  // of numeric characters one by one. Throws Error{kModel}.
  static std::unique_ptr<PreTokenizer> FromPattern(const std::string& pattern, bool split_digits);
  ~PreTokenizer();

  // `text`: well-formed UTF-8; appends views of it that cover it without gaps.
  void Split(std::string_view text, std::vector<std::string_view>& words) const;

 private:
  struct Regex;
  PreTokenizer(const std::string& pattern, bool split_digits);

  std::unique_ptr<Regex> digits_;  // null: digits are not split
  std::unique_ptr<Regex> words_;
};

// Whether a model with that pre-tokeniser takes a word that is a token as it stands, without
// merging its bytes (tokenizer.json's `ignore_merges`).
bool IgnoresMerges(const std::string& pre_tokenizer);

}  // namespace passel
