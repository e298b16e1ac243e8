#include <spdlog/spdlog.h>

#include <filesystem>
#include <optional>

#include "runtime/base/error.h"
#include "runtime/model/hf_model.h"
#include "runtime/model/json_file.h"
#include "runtime/model/stop_ids.h"
#include "runtime/model/tokenizer_json.h"

namespace passel::model {
namespace {

using nlohmann::json;

bool Exists(const std::string& path) {
  std::error_code error;
  return std::filesystem::exists(path, error);
}

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
  const json parsed = ParseJsonFile(path, 1 << 20);
  const JsonObject root(parsed, path);
  const json* eos = root.Find("eos_token_id");
  if (eos == nullptr) return;
  const json list = eos->is_array() ? *eos : json::array({*eos});
  for (const json& id : list) {
    if (id.is_number_unsigned() && id.get<uint64_t>() < tokens) {
      stops.push_back(static_cast<int32_t>(id.get<uint64_t>()));
    } else {
      spdlog::warn("{}: eos_token_id: has what is no token id below {}; ignored", path, tokens);
    }
  }
}

// The template's text, from a file of its own or from tokenizer_config.json, there as a string or
// as a list of named ones; of another form, or of one too long, a text that is no known template's.
std::string ChatTemplateText(const std::string& directory, const JsonObject* config) {
  static constexpr const char* kUnread = "(not read)";
  const std::string path = directory + "/chat_template.jinja";
  std::error_code error;
  if (const auto size = std::filesystem::file_size(path, error); !error) {
    return size == 0 || size > (1 << 20) ? kUnread : ReadTextFile(path, 1 << 20);
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
  return kUnread;
}

}  // namespace

TokenizerData HfTokenizer(const std::string& directory, int32_t vocab) {
  TokenizerData data;
  const std::string path = directory + "/tokenizer.json";
  if (!Exists(path)) return data;
  const TokenizerJson tokenizer(path, data);
  data.model_vocab = vocab;

  const std::string config_path = directory + "/tokenizer_config.json";
  std::string bos, eos;
  std::optional<bool> add_bos;
  if (Exists(config_path)) {
    const json parsed = ParseJsonFile(config_path, 16 << 20);
    const JsonObject config(parsed, config_path);
    bos = TokenText(config, "bos_token");
    eos = TokenText(config, "eos_token");
    if (config.Find("add_bos_token") != nullptr) add_bos = config.BoolOr("add_bos_token", false);
    data.chat_template = ChatTemplateText(directory, &config);
  } else {
    data.chat_template = ChatTemplateText(directory, nullptr);
  }
  const std::string map_path = directory + "/special_tokens_map.json";
  if ((bos.empty() || eos.empty()) && Exists(map_path)) {
    const json parsed = ParseJsonFile(map_path, 1 << 20);
    const JsonObject map(parsed, map_path);
    if (bos.empty()) bos = TokenText(map, "bos_token");
    if (eos.empty()) eos = TokenText(map, "eos_token");
  }
  const std::string first = tokenizer.TemplateBegin();
  if (bos.empty()) bos = first;
  data.bos = bos.empty() ? -1 : tokenizer.IdOf(bos);
  data.eos = eos.empty() ? -1 : tokenizer.IdOf(eos);
  data.add_bos = data.bos >= 0 && add_bos.value_or(first == bos);
  data.messages_add_bos = false;

  std::vector<int32_t> stops;
  ReadStops(directory + "/generation_config.json", data.tokens.size(), stops);
  if (stops.empty()) ReadStops(directory + "/config.json", data.tokens.size(), stops);
  stops.push_back(data.eos);
  data.stop = StopIds(data, stops);
  return data;
}

}  // namespace passel::model
