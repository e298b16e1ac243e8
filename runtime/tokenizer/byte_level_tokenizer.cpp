#include "runtime/tokenizer/byte_level_tokenizer.h"

#include <algorithm>
#include <array>

#include "runtime/base/utf8.h"
#include "runtime/tokenizer/bpe.h"
#include "runtime/tokenizer/byte_alphabet.h"
#include "runtime/tokenizer/chat_template.h"
#include "runtime/tokenizer/pre_tokenizer.h"
#include "runtime/tokenizer/special_tokens.h"
#include "runtime/tokenizer/unicode.h"

namespace passel {
namespace {

class ByteLevelTokenizer final : public Tokenizer {
 public:
  explicit ByteLevelTokenizer(const TokenizerData& data)
      : data_(data),
        words_(data_.patterns.empty() ? PreTokenizer::Patterns(data_.pre_tokenizer)
                                      : data_.patterns),
        added_(SpecialTokens::InText(data_)),
        normalized_(SpecialTokens::InNormalized(
            data_, [this](std::string_view token) { return Normalize(token); })),
        chat_(data_) {
    const TokenIds ids = IndexTokens();
    for (int b = 0; b < 256; ++b) {
      const auto it = ids.find(alphabet_.Character(static_cast<uint8_t>(b)));
      byte_ids_[static_cast<size_t>(b)] = it == ids.end() ? -1 : it->second;
    }
    merges_.AddAll(data_.merges, ids);
    DecodeTokens();
    data_.merges.clear();
  }

  std::vector<int32_t> Encode(std::string_view text, bool allow_special) const override {
    std::vector<int32_t> ids;
    if (data_.add_bos && data_.bos >= 0) ids.push_back(data_.bos);
    EncodeBehindBos(text, allow_special, ids);
    return ids;
  }

  std::vector<int32_t> EncodeMessages(std::span<const ChatMessage> messages) const override {
    std::vector<int32_t> ids;
    EncodeBehindBos(chat_.Apply(messages), true, ids);
    BeginMessages(data_, ids);
    return ids;
  }

  std::string TokenBytes(int32_t id, bool keep_special) const override {
    const auto index = static_cast<size_t>(id);
    if (id < 0 || index >= token_bytes_.size()) return "";
    if (data_.types[index] == TokenizerData::TokenType::kSpecial && !keep_special) return "";
    return token_bytes_[index];
  }

  int32_t vocab_size() const override {
    return std::min(data_.model_vocab, static_cast<int32_t>(data_.tokens.size()));
  }
  std::span<const int32_t> stop_ids() const override { return data_.stop; }
  std::string pre_tokenizer() const override {
    return data_.patterns.empty() ? data_.pre_tokenizer : PreTokenizer::Name(data_.patterns);
  }
  std::string ApplyChatTemplate(std::span<const ChatMessage> messages) const override {
    return chat_.Apply(messages);
  }

 private:
  void EncodeBehindBos(std::string_view text, bool allow_special, std::vector<int32_t>& ids) const {
    std::vector<std::string_view> words;
    std::vector<int32_t> symbols;
    for (const SpecialTokens::Match& outer : added_.Split(text, allow_special)) {
      if (outer.id >= 0) {
        ids.push_back(outer.id);
        continue;
      }
      const std::string normalized = Normalize(text.substr(outer.at, outer.size));
      for (const SpecialTokens::Match& inner : normalized_.Split(normalized, allow_special)) {
        if (inner.id >= 0) {
          ids.push_back(inner.id);
        } else {
          EncodeText(std::string_view(normalized).substr(inner.at, inner.size), words, symbols,
                     ids);
        }
      }
    }
  }

  std::string Normalize(std::string_view text) const {
    return data_.nfc ? ToNfc(text) : std::string(text);
  }

  // Token text → id; of equal texts the first.
  TokenIds IndexTokens() const {
    TokenIds ids;
    ids.reserve(data_.tokens.size());
    for (size_t i = 0; i < data_.tokens.size(); ++i) {
      ids.emplace(data_.tokens[i], static_cast<int32_t>(i));
    }
    return ids;
  }

  void DecodeTokens() {
    token_bytes_.reserve(data_.tokens.size());
    const bool whole_words = data_.ignore_merges || IgnoresMerges(data_.pre_tokenizer);
    for (size_t i = 0; i < data_.tokens.size(); ++i) {
      const TokenizerData::TokenType type = data_.types[i];
      const bool literal =
          type == TokenizerData::TokenType::kSpecial || type == TokenizerData::TokenType::kAdded;
      // A token with a character outside the alphabet stands for its own text.
      token_bytes_.push_back(
          literal ? data_.tokens[i] : alphabet_.ToBytes(data_.tokens[i]).value_or(data_.tokens[i]));
    }
    if (!whole_words) return;
    for (size_t i = 0; i < token_bytes_.size(); ++i) {
      if (data_.types[i] == TokenizerData::TokenType::kNormal) {
        whole_words_.emplace(token_bytes_[i], static_cast<int32_t>(i));
      }
    }
  }

  // Text without special tokens. Well-formed runs are cut into words; a byte that is not part of
  // a well-formed character is a word of its own.
  void EncodeText(std::string_view text, std::vector<std::string_view>& words,
                  std::vector<int32_t>& symbols, std::vector<int32_t>& ids) const {
    while (!text.empty()) {
      const auto [good, bad] = WellFormedRun(text);
      words.clear();
      words_.Split(text.substr(0, good), words);
      for (const std::string_view word : words) EncodeWord(word, symbols, ids);
      for (size_t i = 0; i < bad; ++i) EncodeWord(text.substr(good + i, 1), symbols, ids);
      text.remove_prefix(good + bad);
    }
  }

  void EncodeWord(std::string_view word, std::vector<int32_t>& symbols,
                  std::vector<int32_t>& ids) const {
    if (!whole_words_.empty()) {
      if (const auto it = whole_words_.find(word); it != whole_words_.end()) {
        ids.push_back(it->second);
        return;
      }
    }
    symbols.clear();
    for (const char c : word) {
      // A byte that the vocabulary lacks is left out, as Hugging Face's BPE without an unknown
      // token does.
      if (const int32_t id = byte_ids_[static_cast<uint8_t>(c)]; id >= 0) symbols.push_back(id);
    }
    merges_.Apply(symbols);
    ids.insert(ids.end(), symbols.begin(), symbols.end());
  }

  TokenizerData data_;
  ByteAlphabet alphabet_;
  PreTokenizer words_;
  SpecialTokens added_;       // found in the text as it stands
  SpecialTokens normalized_;  // found in it after normalisation
  ChatTemplate chat_;
  std::array<int32_t, 256> byte_ids_{};
  MergeTable merges_;
  std::vector<std::string> token_bytes_;
  TokenIds whole_words_;  // empty: words are always merged
};

}  // namespace

std::unique_ptr<Tokenizer> MakeByteLevelTokenizer(const TokenizerData& data) {
  return std::make_unique<ByteLevelTokenizer>(data);
}

}  // namespace passel
