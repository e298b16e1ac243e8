#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <limits>

#include "runtime/base/printable.h"
#include "runtime/model/gguf_model.h"
#include "runtime/model/mapped_model.h"
#include "runtime/model/stop_ids.h"

namespace passel::model {
namespace {

// An integer of the metadata that has to fit int32_t; ValidateConfig narrows it further.
int32_t Int32(const GgufFile& file, const std::string& key, int64_t value) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
    file.Fail(key, fmt::format("is {}; expected 0 to 2^31 - 1", value));
  }
  return static_cast<int32_t>(value);
}

void ReadRope(const GgufFile& file, const std::string& arch, ModelConfig& config) {
  config.rope_theta = file.FloatOr(arch + ".rope.freq_base", 10000);
  // As llama.cpp has it: linear where nothing is said, by no factor where there is none or 0, and
  // the key of older files counts.
  const std::string type = file.StringOr(arch + ".rope.scaling.type", "linear");
  if (type == "linear") {
    const double factor =
        file.FloatOr(arch + ".rope.scaling.factor", file.FloatOr(arch + ".rope.scale_linear", 0));
    if (factor != 0) config.rope_scaling = RopeScaling{.type = type, .factor = factor};
  } else if (type != "none") {
    file.Fail(arch + ".rope.scaling.type",
              fmt::format("is \"{}\"; expected \"none\" or \"linear\"", Printable(type)));
  }
  const std::string dims = arch + ".rope.dimension_count";
  if (const int64_t value = file.IntOr(dims, config.head_dim); value != config.head_dim) {
    file.Fail(dims, fmt::format("is {}; expected the head dimension, {}", value, config.head_dim));
  }
  const auto factors = file.tensors().find("rope_freqs.weight");
  if (factors == file.tensors().end()) return;
  const GgufTensor& tensor = factors->second;
  if (tensor.type != ElementType::kF32 || tensor.rows != 1 || tensor.cols != config.head_dim / 2) {
    file.Fail("tensor 'rope_freqs.weight'",
              fmt::format("expected {} F32 elements", config.head_dim / 2));
  }
  config.rope_factors.resize(static_cast<size_t>(tensor.cols));
  Dequantize(tensor.type, tensor.data, tensor.cols, config.rope_factors.data());
}

TokenizerData::TokenType ToTokenType(const GgufFile& file, int64_t type) {
  using Type = TokenizerData::TokenType;
  switch (type) {
    case 1:  // normal
    case 5:
      return Type::kNormal;  // unused
    case 2:
      return Type::kUnknown;
    case 3:
      return Type::kSpecial;
    case 4:
      return Type::kAdded;
    case 6:
      return Type::kByte;
    default:
      file.Fail("tokenizer.ggml.token_type", fmt::format("has {}; expected 1 to 6", type));
  }
}

// `otherwise` where the key is absent or names no token, -1 if that is none either.
int32_t TokenId(const GgufFile& file, const std::string& key, size_t tokens,
                int32_t otherwise = -1) {
  if (static_cast<size_t>(otherwise) >= tokens) otherwise = -1;
  if (!file.Has(key)) return otherwise;
  const int64_t id = file.Int(key);
  if (id >= 0 && static_cast<uint64_t>(id) < tokens) return static_cast<int32_t>(id);
  spdlog::warn("{}: {}: is {}, no token id below {}; ignored", file.path(), key, id, tokens);
  return otherwise;
}

}  // namespace

ModelConfig GgufConfig(const GgufFile& file) {
  ModelConfig config;
  const std::string& arch = file.String("general.architecture");
  const bool qwen = arch == "qwen2" || arch == "qwen3";
  if (std::ranges::find(kGgufArchitectures, arch) == kGgufArchitectures.end()) {
    file.Fail("general.architecture",
              fmt::format("is \"{}\"; expected \"llama\" (llama and mistral models), \"qwen2\" or "
                          "\"qwen3\"",
                          Printable(arch)));
  }
  config.architecture = arch;
  config.qkv_bias = arch == "qwen2";
  config.qk_norm = arch == "qwen3";
  auto field = [&](const char* name) {
    const std::string key = arch + "." + name;
    return Int32(file, key, file.Int(key));
  };
  config.layers = field("block_count");
  config.hidden = field("embedding_length");
  config.heads = field("attention.head_count");
  config.kv_heads =
      file.Has(arch + ".attention.head_count_kv") ? field("attention.head_count_kv") : config.heads;
  config.ffn = field("feed_forward_length");
  config.context_length = file.Int(arch + ".context_length");
  // The format has no say in whether a qwen model uses its window, and none in circulation does.
  if (!qwen) config.sliding_window = file.IntOr(arch + ".attention.sliding_window", 0);
  config.norm_eps = static_cast<float>(file.Float(arch + ".attention.layer_norm_rms_epsilon"));
  if (file.Has(arch + ".attention.key_length")) {
    config.head_dim = field("attention.key_length");
  } else if (config.heads > 0 && config.hidden % config.heads == 0) {
    config.head_dim = config.hidden / config.heads;
  } else {
    file.Fail(arch + ".attention.head_count",
              fmt::format("is {}; expected a divisor of the hidden size, {}", config.heads,
                          config.hidden));
  }
  const std::string value_length = arch + ".attention.value_length";
  if (const int64_t length = file.IntOr(value_length, config.head_dim); length != config.head_dim) {
    file.Fail(value_length,
              fmt::format("is {}; expected the key length, {}", length, config.head_dim));
  }
  if (const int64_t experts = file.IntOr(arch + ".expert_count", 0); experts != 0) {
    file.Fail(arch + ".expert_count", fmt::format("is {}; expected a dense model", experts));
  }
  const auto embedding = file.tensors().find("token_embd.weight");
  if (embedding == file.tensors().end()) {
    file.Fail("tensor 'token_embd.weight'", "is missing; expected [vocabulary, hidden]");
  }
  config.vocab = Int32(file, "rows of tensor 'token_embd.weight'", embedding->second.rows);
  config.tied_embeddings = file.tensors().find("output.weight") == file.tensors().end();
  ReadRope(file, arch, config);
  ValidateConfig(config, file.path());
  return config;
}

TokenizerData GgufTokenizer(const GgufFile& file) {
  TokenizerData data;
  const std::string& model = file.String("tokenizer.ggml.model");
  const bool sentence_piece = model == "llama";
  if (!sentence_piece && model != "gpt2") {
    file.Fail("tokenizer.ggml.model",
              fmt::format("is \"{}\"; expected \"gpt2\" or \"llama\"", Printable(model)));
  }
  data.kind =
      sentence_piece ? TokenizerData::Kind::kSentencePieceBpe : TokenizerData::Kind::kByteLevelBpe;
  if (!sentence_piece) {
    data.pre_tokenizer = file.StringOr("tokenizer.ggml.pre", "default");
    if (data.pre_tokenizer == "default") {
      spdlog::warn(
          "{}: tokenizer.ggml.pre does not say how the model cuts text into words; taking "
          "llama.cpp's fallback, which may give other tokens than the model was trained on",
          file.path());
    }
  }
  data.tokens = file.Strings("tokenizer.ggml.tokens");
  const size_t count = data.tokens.size();
  if (count == 0 || count > (size_t{1} << 22)) {
    file.Fail("tokenizer.ggml.tokens", fmt::format("has {} tokens; expected 1 to 2^22", count));
  }
  auto same_length = [&](const char* key, size_t size) {
    if (size != count) file.Fail(key, fmt::format("has {} elements; expected {}", size, count));
  };
  data.types.assign(count, TokenizerData::TokenType::kNormal);
  if (file.Has("tokenizer.ggml.token_type")) {
    const std::vector<int64_t>& types = file.Ints("tokenizer.ggml.token_type");
    same_length("tokenizer.ggml.token_type", types.size());
    for (size_t i = 0; i < count; ++i) data.types[i] = ToTokenType(file, types[i]);
  }
  if (sentence_piece) {
    const std::vector<double>& scores = file.Floats("tokenizer.ggml.scores");
    same_length("tokenizer.ggml.scores", scores.size());
    for (const double score : scores) data.scores.push_back(static_cast<float>(score));
  } else {
    data.merges = file.Strings("tokenizer.ggml.merges");
  }
  // What files of SentencePiece's kind leave unsaid is what Llama's has.
  const auto special = [&](const char* name, int32_t llamas) {
    return TokenId(file, fmt::format("tokenizer.ggml.{}_token_id", name), count,
                   sentence_piece ? llamas : -1);
  };
  data.bos = special("bos", 1);
  data.eos = special("eos", 2);
  data.unknown = special("unknown", 0);
  std::vector<int32_t> stops = {data.eos};
  for (const char* name : {"eot", "eom"}) {
    stops.push_back(TokenId(file, fmt::format("tokenizer.ggml.{}_token_id", name), count));
  }
  data.stop = StopIds(data, stops);
  // These ask for BOS in their post-processors, which GGUF files often leave unsaid.
  static constexpr std::array kBegun = {"llama-bpe", "llama3", "llama-v3", "tekken"};
  data.add_bos = file.BoolOr("tokenizer.ggml.add_bos_token",
                             sentence_piece || std::find(kBegun.begin(), kBegun.end(),
                                                         data.pre_tokenizer) != kBegun.end());
  if (sentence_piece && file.BoolOr("tokenizer.ggml.add_space_prefix", true)) {
    data.spaces.prefix = TokenizerData::SpaceRules::Prefix::kAlways;
  }
  data.nfc = data.pre_tokenizer == "qwen2";
  data.chat_template = file.StringOr("tokenizer.chat_template", "");
  return data;
}

}  // namespace passel::model
