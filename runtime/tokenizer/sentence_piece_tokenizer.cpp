#include "runtime/tokenizer/sentence_piece_tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <numeric>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/base/utf8.h"
#include "runtime/tokenizer/bpe.h"
#include "runtime/tokenizer/chat_template.h"
#include "runtime/tokenizer/special_tokens.h"

namespace passel {
namespace {

using Prefix = TokenizerData::SpaceRules::Prefix;
using Type = TokenizerData::TokenType;

constexpr std::string_view kSpace = "\xe2\x96\x81";  // ▁, U+2581
// Every split of a scored token is looked up: a bound on what a hostile file can ask for.
constexpr size_t kLongestScored = 512;
constexpr size_t kMostScored = size_t{1} << 21;  // several times Gemma's

void ReplaceAll(std::string_view text, std::string_view from, std::string_view to,
                std::string& out) {
  while (true) {
    const size_t at = text.find(from);
    out += text.substr(0, at);
    if (at == std::string_view::npos) return;
    out += to;
    text.remove_prefix(at + from.size());
  }
}

// The byte that "<0xHH>" stands for, −1 for other text.
int ByteOf(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  int byte = -1;
  const auto [end, error] = std::from_chars(token.data() + 3, token.data() + 5, byte, 16);
  return error == std::errc() && end == token.data() + 5 ? byte : -1;
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  explicit SentencePieceTokenizer(const TokenizerData& data)
      : data_(data),
        added_(SpecialTokens::InText(data_)),
        normalized_(SpecialTokens::InNormalized(data_,
                                                [this](std::string_view token) {
                                                  return data_.spaces.normalizes
                                                             ? Normalize(token, true)
                                                             : std::string(token);
                                                })),
        chat_(data_) {
    byte_ids_.fill(-1);
    DecodeTokens();
    // Scored tokens merge where they are ordinary ones; a list of merges says itself what does.
    const TokenIds ids = IndexTokens(!data_.scores.empty());
    if (data_.scores.empty()) {
      merges_.AddAll(data_.merges, ids);
    } else {
      AddScored(ids);
    }
    for (const auto& [text, id] : ids) {
      if (text.empty()) continue;
      const Utf8Step step = NextUtf8(text);
      if (step.kind == Utf8Step::Kind::kValid && step.size == text.size()) {
        characters_.emplace(step.code_point, id);
      }
    }
    if (data_.ignore_merges) whole_words_ = ids;
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
    const Type type = data_.types[index];
    if ((type == Type::kSpecial || type == Type::kUnknown) && !keep_special) return "";
    return token_bytes_[index];
  }

  int32_t vocab_size() const override {
    return std::min(data_.model_vocab, static_cast<int32_t>(data_.tokens.size()));
  }
  std::span<const int32_t> stop_ids() const override { return data_.stop; }
  std::string pre_tokenizer() const override { return ""; }
  std::string ApplyChatTemplate(std::span<const ChatMessage> messages) const override {
    return chat_.Apply(messages);
  }

 private:
  void EncodeBehindBos(std::string_view text, bool allow_special, std::vector<int32_t>& ids) const {
    for (const SpecialTokens::Match& outer : added_.Split(text, allow_special)) {
      if (outer.id >= 0) {
        ids.push_back(outer.id);
        continue;
      }
      const bool first = outer.at == 0;
      std::string piece(text.substr(outer.at, outer.size));
      if (data_.spaces.normalizes) piece = Normalize(piece, first);
      for (const SpecialTokens::Match& inner : normalized_.Split(piece, allow_special)) {
        if (inner.id >= 0) {
          ids.push_back(inner.id);
          continue;
        }
        std::string words = piece.substr(inner.at, inner.size);
        if (!data_.spaces.normalizes) words = Normalize(words, first && inner.at == 0);
        EncodeWords(words, ids);
      }
    }
  }

  // Token text → id, of equal texts the first; tokens that stand for bytes are no text.
  TokenIds IndexTokens(bool ordinary_only) const {
    TokenIds ids;
    ids.reserve(data_.tokens.size());
    for (size_t i = 0; i < data_.tokens.size(); ++i) {
      const Type type = data_.types[i];
      if (type == Type::kByte || (ordinary_only && type != Type::kNormal)) continue;
      ids.emplace(data_.tokens[i], static_cast<int32_t>(i));
    }
    return ids;
  }

  // Two tokens merge where their union is a token, the highest score first.
  void AddScored(const TokenIds& ids) {
    std::vector<int32_t> order(data_.tokens.size());
    std::iota(order.begin(), order.end(), 0);
    const auto score = [&](int32_t id) { return data_.scores[static_cast<size_t>(id)]; };
    for (const int32_t id : order) {
      if (!std::isfinite(score(id))) {
        throw Error(ErrorClass::kModel,
                    fmt::format("tokenizer: token {} has the score {}; expected a finite one", id,
                                score(id)));
      }
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return score(a) > score(b); });
    int32_t rank = 0;  // equal scores have equal ranks: then the leftmost merges first
    for (size_t i = 0; i < order.size(); ++i) {
      const std::string_view token = data_.tokens[static_cast<size_t>(order[i])];
      if (i > 0 && score(order[i]) != score(order[i - 1])) ++rank;
      const auto own = ids.find(token);
      if (own == ids.end() || own->second != order[i]) continue;
      if (token.size() > kLongestScored) {
        throw Error(ErrorClass::kModel,
                    fmt::format("tokenizer: token {} has {} bytes; expected at most {}", order[i],
                                token.size(), kLongestScored));
      }
      for (size_t cut = 1; cut < token.size(); ++cut) {
        const auto left = ids.find(token.substr(0, cut));
        if (left == ids.end()) continue;
        const auto right = ids.find(token.substr(cut));
        if (right == ids.end()) continue;
        merges_.Add(left->second, right->second, {rank, order[i]});
        if (merges_.size() > kMostScored) {
          throw Error(ErrorClass::kModel,
                      fmt::format("tokenizer: the tokens split into two tokens in more than {} "
                                  "ways; expected a vocabulary with fewer",
                                  kMostScored));
        }
      }
    }
  }

  void DecodeTokens() {
    token_bytes_.reserve(data_.tokens.size());
    for (size_t i = 0; i < data_.tokens.size(); ++i) {
      const std::string& token = data_.tokens[i];
      std::string bytes;
      if (data_.types[i] == Type::kByte) {
        const int byte = ByteOf(token);
        if (byte < 0) {
          throw Error(ErrorClass::kModel,
                      fmt::format("tokenizer: byte token {} is \"{}\"; expected <0x00> to <0xFF>",
                                  i, Printable(token)));
        }
        byte_ids_[static_cast<size_t>(byte)] = static_cast<int32_t>(i);
        bytes.push_back(static_cast<char>(byte));
      } else if (data_.types[i] == Type::kNormal) {
        ReplaceAll(token, kSpace, " ", bytes);
      } else {
        bytes = token;
      }
      token_bytes_.push_back(std::move(bytes));
    }
  }

  std::string Normalize(std::string_view text, bool first) const {
    const TokenizerData::SpaceRules& rules = data_.spaces;
    const bool prefix =
        rules.prefix == Prefix::kAlways || (rules.prefix == Prefix::kFirst && first);
    const bool there = text.starts_with(' ') || text.starts_with(kSpace);
    std::string out(prefix && !(rules.unless_there && there) ? kSpace : "");
    ReplaceAll(text, " ", kSpace, out);
    return out;
  }

  void EncodeWords(std::string_view text, std::vector<int32_t>& ids) const {
    while (data_.spaces.split_words && !text.empty()) {
      const size_t next = std::min(text.find(kSpace, 1), text.size());
      EncodeWord(text.substr(0, next), ids);
      text.remove_prefix(next);
    }
    if (!text.empty()) EncodeWord(text, ids);
  }

  void EncodeWord(std::string_view word, std::vector<int32_t>& ids) const {
    if (const auto it = whole_words_.find(word); it != whole_words_.end()) {
      ids.push_back(it->second);
      return;
    }
    // What is no token never merges: the known characters between are merged for themselves.
    std::vector<int32_t> symbols;
    const auto flush = [&] {
      merges_.Apply(symbols);
      ids.insert(ids.end(), symbols.begin(), symbols.end());
      symbols.clear();
    };
    bool after_unknown = false;
    while (!word.empty()) {
      const Utf8Step step = NextUtf8(word);
      const auto known = step.kind == Utf8Step::Kind::kValid ? characters_.find(step.code_point)
                                                             : characters_.end();
      if (known != characters_.end()) {
        symbols.push_back(known->second);
        after_unknown = false;
      } else {
        flush();
        after_unknown = EncodeUnknown(word.substr(0, step.size), after_unknown, ids);
      }
      word.remove_prefix(step.size);
    }
    flush();
  }

  // The bytes of a character; where one of them is no token, the unknown token. Returns whether it
  // was that.
  bool EncodeUnknown(std::string_view character, bool after_unknown,
                     std::vector<int32_t>& ids) const {
    const auto id_of = [&](char c) { return byte_ids_[static_cast<uint8_t>(c)]; };
    if (std::all_of(character.begin(), character.end(), [&](char c) { return id_of(c) >= 0; })) {
      for (const char c : character) ids.push_back(id_of(c));
      return false;
    }
    if (data_.unknown >= 0 && !(after_unknown && data_.fuse_unknown)) ids.push_back(data_.unknown);
    return true;
  }

  TokenizerData data_;
  SpecialTokens added_;       // found in the text as it stands
  SpecialTokens normalized_;  // found in it after normalisation
  ChatTemplate chat_;
  std::array<int32_t, 256> byte_ids_;  // −1: none
  std::unordered_map<char32_t, int32_t> characters_;
  MergeTable merges_;
  std::vector<std::string> token_bytes_;
  TokenIds whole_words_;  // empty: words are always merged
};

}  // namespace

std::unique_ptr<Tokenizer> MakeSentencePieceTokenizer(const TokenizerData& data) {
  return std::make_unique<SentencePieceTokenizer>(data);
}

}  // namespace passel
