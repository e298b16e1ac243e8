#include "runtime/model/tokenizer_json.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "runtime/base/printable.h"

namespace passel::model {
namespace {

using nlohmann::json;
using Prefix = TokenizerData::SpaceRules::Prefix;

constexpr uint64_t kMaxBytes = uint64_t{128} << 20;
constexpr size_t kMostPatterns = 16;            // each is compiled
constexpr const char* kSpace = "\xe2\x96\x81";  // ▁, U+2581

bool IsByteToken(const std::string& text) {
  static constexpr const char* kHex = "0123456789ABCDEFabcdef";
  return text.size() == 6 && text.starts_with("<0x") && text[5] == '>' &&
         text.find_first_not_of(kHex, 3) == 5;
}

}  // namespace

TokenizerJson::TokenizerJson(const std::string& path, TokenizerData& data)
    : path_(path), data_(data), json_(ParseJsonFile(path, kMaxBytes)), root_(json_, path_) {
  const json* model_json = root_.Find("model");
  if (model_json == nullptr) root_.Fail("model", "is missing; expected a BPE model");
  const std::string where = path_ + ": model";
  const JsonObject model(*model_json, where);
  if (const std::string type = model.StringOr("type", "BPE"); type != "BPE") {
    model.Fail("type", fmt::format("is \"{}\"; expected \"BPE\"", Printable(type)));
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.StringOr(key, "").empty()) model.Fail(key, "expected none");
  }
  ReadVocabulary(model);
  ReadAddedTokens();
  ReadMerges(model);
  data_.ignore_merges = model.BoolOr("ignore_merges", false);
  if (model.BoolOr("byte_fallback", false)) {
    ReadSentencePiece(model);
  } else {
    ReadByteLevel();
  }
}

int32_t TokenizerJson::IdOf(const std::string& text) const {
  const auto it = std::find(data_.tokens.begin(), data_.tokens.end(), text);
  return it == data_.tokens.end() ? -1 : static_cast<int32_t>(it - data_.tokens.begin());
}

std::string TokenizerJson::TemplateBegin() const {
  const json* processor = root_.Find("post_processor");
  if (processor == nullptr || !processor->is_object()) return "";
  std::vector<const json*> candidates = {processor};
  if (const auto it = processor->find("processors"); it != processor->end() && it->is_array()) {
    for (const json& p : *it) candidates.push_back(&p);
  }
  static const json::json_pointer kId("/SpecialToken/id");
  for (const json* p : candidates) {
    if (!p->is_object()) continue;
    const auto single = p->find("single");
    if (single == p->end() || !single->is_array() || single->empty()) continue;
    const json& first = (*single)[0];
    if (first.contains(kId) && first[kId].is_string()) return first[kId].get<std::string>();
  }
  return "";
}

// Sets a token, growing the list as far as its id.
void TokenizerJson::SetToken(std::string_view field, int64_t id, const std::string& text,
                             TokenizerData::TokenType type) {
  if (id < 0 || static_cast<uint64_t>(id) >= ids_) {
    root_.Fail(field, fmt::format("\"{}\" has id {}; expected one below {}, twice as many as there "
                                  "are tokens",
                                  Printable(text), id, ids_));
  }
  const auto index = static_cast<size_t>(id);
  if (index >= data_.tokens.size()) {
    data_.tokens.resize(index + 1);
    data_.types.resize(index + 1, TokenizerData::TokenType::kNormal);
  }
  std::string& token = data_.tokens[index];
  if (!token.empty() && token != text) {
    root_.Fail(field, fmt::format("id {} is both \"{}\" and \"{}\"; expected one token", id,
                                  Printable(token), Printable(text)));
  }
  token = text;
  data_.types[index] = type;
}

void TokenizerJson::ReadVocabulary(const JsonObject& model) {
  const json* vocabulary = model.Find("vocab");
  if (vocabulary == nullptr || !vocabulary->is_object()) {
    model.Fail("vocab", "expected an object of tokens and ids");
  }
  const json* added = root_.Find("added_tokens");
  // Some vocabularies have gaps; a single id must not ask for a list of any length.
  ids_ = 2 * (vocabulary->size() + (added == nullptr ? 0 : added->size())) + 1024;
  for (const auto& [token, id] : vocabulary->items()) {
    if (!id.is_number_unsigned())
      model.Fail("vocab", fmt::format("\"{}\": expected an id", Printable(token)));
    const auto value = id.get<uint64_t>();
    SetToken("model.vocab", value > INT32_MAX ? -1 : static_cast<int64_t>(value), token,
             TokenizerData::TokenType::kNormal);
  }
}

void TokenizerJson::ReadAddedTokens() {
  const json* added = root_.Find("added_tokens");
  if (added == nullptr) return;
  if (!added->is_array()) root_.Fail("added_tokens", "expected an array");
  const std::string where = path_ + ": added_tokens";
  for (const json& entry : *added) {
    const JsonObject token(entry, where);
    SetToken("added_tokens", token.Int("id"), token.StringOr("content", ""),
             token.BoolOr("special", false) ? TokenizerData::TokenType::kSpecial
                                            : TokenizerData::TokenType::kAdded);
    data_.added[token.Int32("id")] = {.normalized = token.BoolOr("normalized", false),
                                      .lstrip = token.BoolOr("lstrip", false),
                                      .rstrip = token.BoolOr("rstrip", false),
                                      .single_word = token.BoolOr("single_word", false)};
  }
}

void TokenizerJson::ReadMerges(const JsonObject& model) {
  const json* merges = model.Find("merges");
  if (merges == nullptr || !merges->is_array()) model.Fail("merges", "expected an array");
  for (const json& merge : *merges) {
    if (merge.is_string()) {
      data_.merges.push_back(merge.get<std::string>());
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      data_.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
    } else {
      model.Fail("merges", "expected strings or pairs of strings");
    }
  }
}

std::vector<const json*> TokenizerJson::Steps(const char* key, const char* list) const {
  const json* outer = root_.Find(key);
  if (outer == nullptr) return {};
  if (!outer->is_object()) Unserved(key);
  const auto inner = outer->find(list);
  if (inner == outer->end()) return {outer};
  if (!inner->is_array()) Unserved(key);
  std::vector<const json*> steps;
  for (const json& step : *inner) steps.push_back(&step);
  return steps;
}

// Digits and Splits by patterns, in any order and number, or none; then ByteLevel, with its own
// pattern or without; all after NFC or nothing.
void TokenizerJson::ReadByteLevel() {
  const std::string normalizer_where = path_ + ": normalizer";
  for (const json* step_json : Steps("normalizer", "normalizers")) {
    if (JsonObject(*step_json, normalizer_where).StringOr("type", "") != "NFC") {
      Unserved("normalizer");
    }
    data_.nfc = true;
  }
  const char* const key = "pre_tokenizer";
  const std::string where = path_ + ": " + key;
  bool byte_level = false;
  for (const json* step_json : Steps(key, "pretokenizers")) {
    const JsonObject step(*step_json, where);
    const std::string type = step.StringOr("type", "");
    if (byte_level || data_.patterns.size() == kMostPatterns) Unserved(key);  // ByteLevel is last
    if (type == "Digits") {
      data_.patterns.push_back(
          {step.BoolOr("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)"});
    } else if (type == "Split") {
      ReadSplit(step);
    } else if (type == "ByteLevel" && !step.BoolOr("add_prefix_space", false)) {
      byte_level = true;
      if (step.BoolOr("use_regex", true)) data_.patterns.push_back({TokenizerData::kGpt2Pattern});
    } else {
      Unserved(key);
    }
  }
  // Without any pattern, a whole text would be one word.
  if (!byte_level || data_.patterns.empty()) Unserved(key);
}

void TokenizerJson::ReadSplit(const JsonObject& step) {
  const json* pattern = step.Find("pattern");
  const std::string behavior = step.StringOr("behavior", "");
  const bool invert = step.BoolOr("invert", false);
  // Inverted, what lies between the matches is removed.
  if (pattern == nullptr || !pattern->is_object() || !pattern->contains("Regex") ||
      !(*pattern)["Regex"].is_string() || behavior != (invert ? "Removed" : "Isolated")) {
    Unserved("pre_tokenizer");
  }
  data_.patterns.push_back({(*pattern)["Regex"].get<std::string>(), invert});
}

void TokenizerJson::ReadSentencePiece(const JsonObject& model) {
  data_.kind = TokenizerData::Kind::kSentencePieceBpe;
  data_.fuse_unknown = model.BoolOr("fuse_unk", false);
  if (const std::string unknown = model.StringOr("unk_token", ""); !unknown.empty()) {
    data_.unknown = IdOf(unknown);
    if (data_.unknown < 0) model.Fail("unk_token", "expected a token of the vocabulary");
  }
  for (size_t id = 0; id < data_.tokens.size(); ++id) {
    if (data_.types[id] == TokenizerData::TokenType::kNormal && IsByteToken(data_.tokens[id])) {
      data_.types[id] = TokenizerData::TokenType::kByte;
    }
  }
  ReadSpaces();
}

// Older files normalise: Prepend "▁", Replace " " by "▁". Newer ones pre-tokenise: Metaspace.
void TokenizerJson::ReadSpaces() {
  bool replaces = false;
  const std::string where = path_ + ": normalizer";
  for (const json* step_json : Steps("normalizer", "normalizers")) {
    const JsonObject step(*step_json, where);
    const std::string type = step.StringOr("type", "");
    const json* pattern = step.Find("pattern");
    if (type == "Prepend" && step.StringOr("prepend", "") == kSpace && !replaces) {
      data_.spaces.prefix = Prefix::kAlways;
    } else if (type == "Replace" && pattern != nullptr && *pattern == json{{"String", " "}} &&
               step.StringOr("content", "") == kSpace) {
      replaces = true;
    } else {
      Unserved("normalizer");
    }
  }
  const std::vector<const json*> steps = Steps("pre_tokenizer", "pretokenizers");
  if (steps.empty()) {
    if (!replaces) Unserved("normalizer");
    data_.spaces.normalizes = true;
    return;
  }
  const std::string pre_where = path_ + ": pre_tokenizer";
  const JsonObject step(*steps[0], pre_where);
  if (steps.size() != 1 || replaces || data_.spaces.prefix != Prefix::kNever ||
      step.StringOr("type", "") != "Metaspace" || step.StringOr("replacement", "") != kSpace) {
    Unserved("pre_tokenizer");
  }
  const bool prefix = step.BoolOr("add_prefix_space", true);
  const std::string scheme = step.StringOr("prepend_scheme", prefix ? "always" : "never");
  if (scheme == "always" || scheme == "first") {
    data_.spaces.prefix = scheme == "first" ? Prefix::kFirst : Prefix::kAlways;
  } else if (scheme != "never") {
    Unserved("pre_tokenizer");
  }
  data_.spaces.unless_there = true;
  data_.spaces.split_words = step.BoolOr("split", true);
}

void TokenizerJson::Unserved(const char* key) const {
  const bool sentence_piece = data_.kind == TokenizerData::Kind::kSentencePieceBpe;
  const std::string_view expected =
      key == std::string_view("normalizer")
          ? (sentence_piece ? "Prepend and Replace of spaces by \"\xe2\x96\x81\", or Metaspace as "
                              "the pre_tokenizer"
                            : "NFC or none")
          : (sentence_piece
                 ? "Metaspace, or none after a normalizer that replaces spaces"
                 : "ByteLevel, after Digits and Splits by regular expressions, Isolated or "
                   "inverted and Removed");
  root_.Fail(key, fmt::format("is not served; expected {}", expected));
}

}  // namespace passel::model
