#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace passel {

// What a tokenizer is made from, as found in a model file.
struct TokenizerData {
  enum class Kind { kByteLevelBpe, kSentencePieceBpe };
  enum class TokenType : uint8_t { kNormal, kSpecial, kAdded, kByte, kUnknown };
  // How SentencePiece's kind turns a stretch of text between special tokens into symbols: spaces
  // become "▁", and one more may be put in front.
  struct SpaceRules {
    enum class Prefix {
      kNever,
      kFirst,  // of the text's very beginning
      kAlways,
    };
    Prefix prefix = Prefix::kNever;
    bool unless_there = false;  // no prefix before a space
    bool split_words = false;   // no token spans the beginning of a word
    bool normalizes = false;    // done before normalised added tokens are looked for, not after
  };
  Kind kind = Kind::kByteLevelBpe;
  std::string pre_tokenizer;  // byte-level: "smollm", "llama-bpe", "gpt-2", "qwen2", …
  // A tokenizer.json's own patterns, each for the pieces that the one before makes (none: those
  // that pre_tokenizer names); with them, whether a word that is a token is taken without merging.
  struct Pattern {
    std::string regex;
    bool matches_only = false;  // what lies between matches is left out, not a piece of its own
    bool operator==(const Pattern&) const = default;
  };
  std::vector<Pattern> patterns;
  static constexpr const char* kGpt2Pattern =
      R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
  bool ignore_merges = false;
  bool fuse_unknown = true;  // SentencePiece: unknown characters in a row are one token
  std::vector<std::string> tokens;
  std::vector<TokenType> types;
  std::vector<std::string> merges;  // "left right", in rank order
  std::vector<float> scores;        // SentencePiece, instead of merges: the higher merges first
  SpaceRules spaces;                // SentencePiece
  bool nfc = false;                 // byte-level: text is normalised to NFC first
  // What a special or added token asks for beyond its text.
  struct Added {
    bool normalized = false;   // looked for, itself normalised, in normalised text
    bool lstrip = false;       // takes in the white space before it,
    bool rstrip = false;       // behind it
    bool single_word = false;  // does not count beside a letter or digit
  };
  std::map<int32_t, Added> added;  // by id; a token without an entry asks for nothing
  int32_t bos = -1, eos = -1, unknown = -1;
  // Ids from here on stand for tokens that the model cannot embed, as an added [PAD] may be.
  int32_t model_vocab = std::numeric_limits<int32_t>::max();
  std::vector<int32_t> stop;  // ids that end generation (eos, eot, …)
  bool add_bos = false;
  bool messages_add_bos =
      true;                   // add_bos holds for messages too, unless their text begins with bos
  std::string chat_template;  // Jinja text as in the file; recognised, not interpreted
};

struct ChatMessage {
  std::string role;
  std::string content;
};

class Tokenizer {
 public:
  // Throws Error{kModel} for data it cannot serve, naming what.
  static std::unique_ptr<Tokenizer> Make(const TokenizerData& data);
  virtual ~Tokenizer() = default;

  // Token ids of UTF-8 text; special tokens in the text are recognised where `allow_special`.
  // Invalid UTF-8 is encoded byte by byte. add_bos applies where the model asks for it. Ids may be
  // ones that the model cannot embed, of vocab_size() or above.
  virtual std::vector<int32_t> Encode(std::string_view text, bool allow_special) const = 0;
  // Token ids of ApplyChatTemplate's text as it stands, special tokens recognised; bos is put in
  // front where messages_add_bos asks for it.
  virtual std::vector<int32_t> EncodeMessages(std::span<const ChatMessage> messages) const = 0;
  // The bytes of one token; special tokens give "" unless `keep_special`.
  virtual std::string TokenBytes(int32_t id, bool keep_special) const = 0;
  // Ids below are tokens that the model can embed.
  virtual int32_t vocab_size() const = 0;
  virtual std::span<const int32_t> stop_ids() const = 0;
  // The name of the patterns that cut text into words: "gpt-2", "llama-bpe", …; "own" for those of
  // a tokenizer.json that have no name, "" where text is not cut (SentencePiece).
  virtual std::string pre_tokenizer() const = 0;
  // The text that the chat template makes of messages, with the assistant's turn opened. Throws
  // Error{kUsage} where the template is unknown or a role is not served.
  virtual std::string ApplyChatTemplate(std::span<const ChatMessage> messages) const = 0;
};

// Turns tokens to text as they come; never splits a UTF-8 character.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  // Bytes that became complete with this token; invalid sequences come out as U+FFFD.
  std::string Push(int32_t id);
  // What is left at the end (an incomplete character as U+FFFD).
  std::string Flush();

 private:
  const Tokenizer& tokenizer_;
  std::string pending_;
};

}  // namespace passel
