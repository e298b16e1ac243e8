#include <fmt/format.h>

#include <algorithm>

#include "runtime/base/printable.h"
#include "runtime/model/hf_model.h"
#include "runtime/model/mapped_model.h"

namespace passel::model {
namespace {

void CheckRotatesAll(const JsonObject& object) {
  const char* key = "partial_rotary_factor";
  if (const double part = object.NumberOr(key, 1); part != 1) {
    object.Fail(key, fmt::format("is {}; expected 1: heads that RoPE rotates as a whole", part));
  }
}

// transformers' default where nothing is said; null is none.
int64_t SlidingWindow(const JsonObject& root) {
  return root.IntOr("sliding_window", root.Has("sliding_window") ? 0 : 4096);
}

// As above; null is as many as there are heads.
int32_t KvHeads(const JsonObject& root, const ModelConfig& config) {
  const char* key = "num_key_value_heads";
  const bool llama = config.architecture == "llama", mistral = config.architecture == "mistral";
  const int32_t unsaid = llama || root.Has(key) ? config.heads : mistral ? 8 : 32;
  return root.Int32Or(key, unsaid);
}

// A qwen config may let some of its layers slide: those it lists, or those from max_window_layers
// on.
int64_t QwenSlidingWindow(const JsonObject& root, int32_t layers) {
  if (!root.BoolOr("use_sliding_window", false)) return 0;
  const int64_t window = SlidingWindow(root);
  if (window == 0) return 0;
  int64_t sliding = 0;
  if (const nlohmann::json* types = root.Find("layer_types"); types != nullptr) {
    if (!types->is_array() || types->size() != static_cast<size_t>(layers)) {
      root.Fail("layer_types", fmt::format("expected an array of {} names", layers));
    }
    for (const nlohmann::json& type : *types) {
      if (type == "sliding_attention") {
        ++sliding;
      } else if (type != "full_attention") {
        root.Fail("layer_types", "expected \"full_attention\" and \"sliding_attention\" alone");
      }
    }
  } else {
    const int64_t first = root.IntOr("max_window_layers", 28);
    sliding = layers - std::clamp<int64_t>(first, 0, layers);
  }
  if (sliding == 0) return 0;
  if (sliding != layers) {
    root.Fail("use_sliding_window",
              fmt::format("lets {} of {} layers slide; expected all or none", sliding, layers));
  }
  return window;
}

}  // namespace

// `rope_scaling` of a config, or the `rope_parameters` that newer ones have in its place.
void ReadHfRope(const JsonObject& root, const std::string& path, ModelConfig& config) {
  config.rope_theta = root.NumberOr("rope_theta", 10000);
  const char* key = root.Find("rope_parameters") != nullptr ? "rope_parameters" : "rope_scaling";
  const nlohmann::json* json = root.Find(key);
  CheckRotatesAll(root);
  if (json == nullptr) return;
  const std::string where = path + ": " + key;
  const JsonObject rope(*json, where);
  CheckRotatesAll(rope);
  config.rope_theta = rope.NumberOr("rope_theta", config.rope_theta);
  const std::string type = rope.StringOr("rope_type", rope.StringOr("type", "default"));
  if (type == "default") return;
  RopeScaling scaling;
  scaling.type = type;
  scaling.factor = rope.NumberOr("factor", 0);
  scaling.low_freq_factor = rope.NumberOr("low_freq_factor", 0);
  scaling.high_freq_factor = rope.NumberOr("high_freq_factor", 0);
  // As transformers has it: the config's own key comes first, the whole context last.
  const char* original = "original_max_position_embeddings";
  scaling.original_context = root.IntOr(original, rope.IntOr(original, config.context_length));
  config.rope_scaling = scaling;
}

ModelConfig HfConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  const nlohmann::json json = ParseJsonFile(path, 1 << 20);
  const JsonObject root(json, path);
  ModelConfig config;
  config.architecture = root.StringOr("model_type", "");
  const bool qwen2 = config.architecture == "qwen2", qwen3 = config.architecture == "qwen3";
  if (std::ranges::find(kHfArchitectures, config.architecture) == kHfArchitectures.end()) {
    root.Fail("model_type",
              fmt::format("is \"{}\"; expected \"llama\", \"mistral\", \"qwen2\" or \"qwen3\"",
                          Printable(config.architecture)));
  }
  config.qkv_bias = qwen2;
  config.qk_norm = qwen3;
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (root.BoolOr(key, false)) root.Fail(key, "is true; expected a model without such biases");
  }
  if (const std::string act = root.StringOr("hidden_act", "silu"); act != "silu") {
    root.Fail("hidden_act", fmt::format("is \"{}\"; expected \"silu\"", Printable(act)));
  }
  config.layers = root.Int32("num_hidden_layers");
  config.hidden = root.Int32("hidden_size");
  config.heads = root.Int32("num_attention_heads");
  config.kv_heads = KvHeads(root, config);
  config.ffn = root.Int32("intermediate_size");
  config.vocab = root.Int32("vocab_size");
  config.context_length = root.Int("max_position_embeddings");
  config.norm_eps = static_cast<float>(root.NumberOr("rms_norm_eps", 1e-6));
  config.tied_embeddings = root.BoolOr("tie_word_embeddings", false);
  if (config.architecture == "mistral") config.sliding_window = SlidingWindow(root);
  if (qwen2 || qwen3) config.sliding_window = QwenSlidingWindow(root, config.layers);
  if (root.Find("head_dim") != nullptr) {
    config.head_dim = root.Int32("head_dim");
  } else if (qwen3) {
    config.head_dim = 128;  // what the architecture has where nothing is said
  } else if (config.heads > 0 && config.hidden % config.heads == 0) {
    config.head_dim = config.hidden / config.heads;
  } else {
    root.Fail("num_attention_heads", fmt::format("is {}; expected a divisor of the hidden size, {}",
                                                 config.heads, config.hidden));
  }
  ReadHfRope(root, path, config);
  ValidateConfig(config, path);
  return config;
}

}  // namespace passel::model
