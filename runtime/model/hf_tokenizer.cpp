#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "runtime/base/error.h"
#include "runtime/model/hf_model.h"
#include "runtime/model/json_file.h"
#include "runtime/model/mapped_file.h"
#include "runtime/model/stop_ids.h"

namespace passel::model {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxBytes = uint64_t{512} << 20;

bool Exists(const std::string& path) {
  std::error_code error;
  return std::filesystem::exists(path, error);
}

// tokenizer.json, as far as byte-level BPE goes.
class TokenizerJson {
 public:
  TokenizerJson(const std::string& path, int32_t vocab, TokenizerData& data)
      : path_(path),
        vocab_(vocab),
        data_(data),
        json_(ParseJsonFile(path, kMaxBytes)),
        root_(json_, path_) {}

  void Read() {
    const json* normalizer = root_.Find("normalizer");
    const json* model_json = root_.Find("model");
    if (model_json == nullptr) root_.Fail("model", "is missing; expected a BPE model");
    const std::string where = path_ + ": model";
    const JsonObject model(*model_json, where);
    if (const std::string type = model.StringOr("type", "BPE"); type != "BPE") {
      model.Fail("type", fmt::format("is \"{}\"; expected \"BPE\"", type));
    }
    ReadVocabulary(model);
    ReadAddedTokens();
    ReadMerges(model);
    data_.ignore_merges = model.BoolOr("ignore_merges", false);
    if (model.BoolOr("byte_fallback", false)) {
      data_.kind = TokenizerData::Kind::kSentencePieceBpe;
      return;
    }
    if (normalizer != nullptr) {
      root_.Fail("normalizer", "expected none (text is encoded as it is)");
    }
    ReadPreTokenizer();
  }

  // The id of a token's text, −1 where it has none.
  int32_t IdOf(const std::string& text) const {
    for (size_t id = 0; id < data_.tokens.size(); ++id) {
      if (data_.tokens[id] == text) return static_cast<int32_t>(id);
    }
    return -1;
  }

  // Whether the post-processor's template begins with the bos token.
  bool TemplateBeginsWith(const std::string& bos) const {
    const json* processor = root_.Find("post_processor");
    if (processor == nullptr || !processor->is_object()) return false;
    std::vector<const json*> candidates = {processor};
    if (const auto it = processor->find("processors"); it != processor->end() && it->is_array()) {
      for (const json& p : *it) candidates.push_back(&p);
    }
    const json first = {{"SpecialToken", {{"id", bos}, {"type_id", 0}}}};
    for (const json* p : candidates) {
      if (!p->is_object()) continue;
      const auto single = p->find("single");
      if (single != p->end() && single->is_array() && !single->empty() && (*single)[0] == first) {
        return true;
      }
    }
    return false;
  }

 private:
  // Sets a token, growing the list to at most the model's vocabulary.
  void SetToken(std::string_view field, int64_t id, const std::string& text,
                TokenizerData::TokenType type) {
    if (id < 0 || id >= vocab_) {
      root_.Fail(field, fmt::format("\"{}\" has id {}; expected one below the model's {} tokens",
                                    text, id, vocab_));
    }
    const auto index = static_cast<size_t>(id);
    if (index >= data_.tokens.size()) {
      data_.tokens.resize(index + 1);
      data_.types.resize(index + 1, TokenizerData::TokenType::kNormal);
    }
    std::string& token = data_.tokens[index];
    if (!token.empty() && token != text) {
      root_.Fail(field, fmt::format("id {} is both \"{}\" and \"{}\"; expected one token", id,
                                    token, text));
    }
    token = text;
    data_.types[index] = type;
  }

  void ReadVocabulary(const JsonObject& model) {
    const json* vocabulary = model.Find("vocab");
    if (vocabulary == nullptr || !vocabulary->is_object()) {
      model.Fail("vocab", "expected an object of tokens and ids");
    }
    for (const auto& [token, id] : vocabulary->items()) {
      if (!id.is_number_unsigned()) {
        model.Fail("vocab", fmt::format("\"{}\": expected an id", token));
      }
      const auto value = id.get<uint64_t>();
      SetToken("model.vocab", value > INT32_MAX ? -1 : static_cast<int64_t>(value), token,
               TokenizerData::TokenType::kNormal);
    }
  }

  void ReadAddedTokens() {
    const json* added = root_.Find("added_tokens");
    if (added == nullptr) return;
    if (!added->is_array()) root_.Fail("added_tokens", "expected an array");
    const std::string where = path_ + ": added_tokens";
    for (const json& entry : *added) {
      const JsonObject token(entry, where);
      if (token.BoolOr("lstrip", false) || token.BoolOr("rstrip", false) ||
          token.BoolOr("single_word", false)) {
        token.Fail("lstrip, rstrip, single_word", "expected false: text is encoded as it is");
      }
      SetToken("added_tokens", token.Int("id"), token.StringOr("content", ""),
               token.BoolOr("special", false) ? TokenizerData::TokenType::kSpecial
                                              : TokenizerData::TokenType::kAdded);
    }
  }

  void ReadMerges(const JsonObject& model) {
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

  // ByteLevel alone; Digits, then ByteLevel; or a Split by pattern, then ByteLevel without its own.
  void ReadPreTokenizer() {
    const json* outer = root_.Find("pre_tokenizer");
    if (outer == nullptr || !outer->is_object()) Unserved();
    std::vector<const json*> steps = {outer};
    if (const auto list = outer->find("pretokenizers"); list != outer->end()) {
      if (!list->is_array()) Unserved();
      steps.clear();
      for (const json& step : *list) steps.push_back(&step);
    }
    const std::string where = path_ + ": pre_tokenizer";
    bool byte_level = false;
    for (const json* step_json : steps) {
      const JsonObject step(*step_json, where);
      const std::string type = step.StringOr("type", "");
      if (byte_level) Unserved();  // ByteLevel comes last
      if (type == "Digits" && step.BoolOr("individual_digits", false) && data_.pattern.empty()) {
        data_.split_digits = true;
      } else if (type == "Split" && data_.pattern.empty()) {
        ReadSplit(step);
      } else if (type == "ByteLevel" && !step.BoolOr("add_prefix_space", false)) {
        byte_level = true;
        if (step.BoolOr("use_regex", true) != data_.pattern.empty()) Unserved();
      } else {
        Unserved();
      }
    }
    if (!byte_level) Unserved();
    if (data_.pattern.empty()) data_.pre_tokenizer = data_.split_digits ? "smollm" : "gpt-2";
  }

  void ReadSplit(const JsonObject& step) {
    const json* pattern = step.Find("pattern");
    if (pattern == nullptr || !pattern->is_object() || !pattern->contains("Regex") ||
        !(*pattern)["Regex"].is_string() || step.StringOr("behavior", "") != "Isolated" ||
        step.BoolOr("invert", false)) {
      Unserved();
    }
    data_.pattern = (*pattern)["Regex"].get<std::string>();
  }

  [[noreturn]] void Unserved() const {
    root_.Fail("pre_tokenizer",
               "is not served; expected ByteLevel, Digits and ByteLevel, or an isolating Split by "
               "a regular expression and ByteLevel");
  }

  const std::string path_;
  const int32_t vocab_;
  TokenizerData& data_;
  const json json_;
  const JsonObject root_;
};

// A token named by its text or by an object with its `content`; "" where the key is absent.
std::string TokenText(const JsonObject& object, const char* key) {
  const json* value = object.Find(key);
  if (value == nullptr) return "";
  if (value->is_object() && value->contains("content") && (*value)["content"].is_string()) {
    return (*value)["content"].get<std::string>();
  }
  return object.StringOr(key, "");
}

// `eos_token_id` of a config: a number or a list of them.
void ReadStops(const std::string& path, size_t tokens, std::vector<int32_t>& stops) {
  if (!Exists(path)) return;
  const json parsed = ParseJsonFile(path, 16 << 20);
  const JsonObject root(parsed, path);
  const json* eos = root.Find("eos_token_id");
  if (eos == nullptr) return;
  const json list = eos->is_array() ? *eos : json::array({*eos});
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= tokens) {
      root.Fail("eos_token_id", fmt::format("expected token ids below {}", tokens));
    }
    stops.push_back(static_cast<int32_t>(id.get<uint64_t>()));
  }
}

// The template's text, from a file of its own or from tokenizer_config.json, there as a string or
// as a list of named ones.
std::string ChatTemplateText(const std::string& directory, const JsonObject* config) {
  const std::string path = directory + "/chat_template.jinja";
  if (Exists(path)) {
    const MappedFile file(path);
    return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
  }
  const json* value = config == nullptr ? nullptr : config->Find("chat_template");
  if (value == nullptr) return "";
  if (value->is_string()) return value->get<std::string>();
  if (value->is_array()) {
    for (const json& named : *value) {
      if (named.is_object() && named.value("name", json()) == "default" &&
          named.value("template", json()).is_string()) {
        return named["template"].get<std::string>();
      }
    }
  }
  config->Fail("chat_template", "expected a string or a list with one named \"default\"");
}

}  // namespace

TokenizerData HfTokenizer(const std::string& directory, int32_t vocab) {
  TokenizerData data;
  const std::string path = directory + "/tokenizer.json";
  if (!Exists(path)) return data;
  TokenizerJson tokenizer(path, vocab, data);
  tokenizer.Read();

  const std::string config_path = directory + "/tokenizer_config.json";
  std::string bos, eos;
  std::optional<bool> add_bos;
  if (Exists(config_path)) {
    const json parsed = ParseJsonFile(config_path, kMaxBytes);
    const JsonObject config(parsed, config_path);
    bos = TokenText(config, "bos_token");
    eos = TokenText(config, "eos_token");
    if (config.Find("add_bos_token") != nullptr) add_bos = config.BoolOr("add_bos_token", false);
    data.chat_template = ChatTemplateText(directory, &config);
  } else {
    data.chat_template = ChatTemplateText(directory, nullptr);
  }
  data.bos = bos.empty() ? -1 : tokenizer.IdOf(bos);
  data.eos = eos.empty() ? -1 : tokenizer.IdOf(eos);
  data.add_bos = data.bos >= 0 && add_bos.value_or(tokenizer.TemplateBeginsWith(bos));

  std::vector<int32_t> stops;
  ReadStops(directory + "/generation_config.json", data.tokens.size(), stops);
  if (stops.empty()) ReadStops(directory + "/config.json", data.tokens.size(), stops);
  stops.push_back(data.eos);
  data.stop = StopIds(data, stops);
  return data;
}

}  // namespace passel::model
