#pragma once

#include <cstdint>
#include <string>

#include "runtime/model/json_file.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel::model {

// A tokenizer.json: byte-level BPE, or SentencePiece's BPE as converters write it.
class TokenizerJson {
 public:
  // Reads the file into `data`, which must outlive this. Throws Error{kModel} for what is malformed
  // or would be encoded otherwise than here.
  TokenizerJson(const std::string& path, TokenizerData& data);

  // The id of a token's text, −1 where it has none.
  int32_t IdOf(const std::string& text) const;
  // The special token that the post-processor's template begins with, "" for none.
  std::string TemplateBegin() const;

 private:
  void SetToken(std::string_view field, int64_t id, const std::string& text,
                TokenizerData::TokenType type);
  void ReadVocabulary(const JsonObject& model);
  void ReadAddedTokens();
  void ReadMerges(const JsonObject& model);
  void ReadByteLevel();
  void ReadSplit(const JsonObject& step);
  void ReadSentencePiece(const JsonObject& model);
  void ReadSpaces();
  // The steps of a normaliser or pre-tokeniser, which may be a sequence of them under `list`.
  std::vector<const nlohmann::json*> Steps(const char* key, const char* list) const;
  [[noreturn]] void Unserved(const char* key) const;

  const std::string path_;
  uint64_t ids_ = 0;  // every id is below
  TokenizerData& data_;
  const nlohmann::json json_;
  const JsonObject root_;
};

}  // namespace passel::model
