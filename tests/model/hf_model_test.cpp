// Hugging Face directories: config.json, safetensors, tokenizer.json.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"
#include "runtime/model/model_file.h"
#include "tests/model/gguf_writer.h"

namespace passel::model {
namespace {

using nlohmann::json;

constexpr int kHidden = 24, kHeads = 3, kKvHeads = 1, kDim = 16, kFfn = 40, kVocab = 11;

float Value(int64_t r, int64_t c) { return static_cast<float>((r * 5 + c) % 120); }

struct Matrix {
  std::string name;
  int64_t rows, cols;
};

std::vector<Matrix> Weights() {
  const std::string l = "model.layers.0.";
  return {{"model.embed_tokens.weight", kVocab, kHidden},
          {"model.norm.weight", 1, kHidden},
          {"lm_head.weight", kVocab, kHidden},
          {l + "input_layernorm.weight", 1, kHidden},
          {l + "self_attn.q_proj.weight", kHeads * kDim, kHidden},
          {l + "self_attn.k_proj.weight", kKvHeads * kDim, kHidden},
          {l + "self_attn.v_proj.weight", kKvHeads * kDim, kHidden},
          {l + "self_attn.o_proj.weight", kHidden, kHeads * kDim},
          {l + "post_attention_layernorm.weight", 1, kHidden},
          {l + "mlp.gate_proj.weight", kFfn, kHidden},
          {l + "mlp.up_proj.weight", kFfn, kHidden},
          {l + "mlp.down_proj.weight", kHidden, kFfn}};
}

json Config() {
  return {{"model_type", "llama"},
          {"hidden_size", kHidden},
          {"intermediate_size", kFfn},
          {"num_hidden_layers", 1},
          {"num_attention_heads", kHeads},
          {"num_key_value_heads", kKvHeads},
          {"head_dim", kDim},  // not hidden / heads
          {"max_position_embeddings", 256},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 1e6},
          {"vocab_size", kVocab},
          {"eos_token_id", 2},
          {"tie_word_embeddings", false}};
}

std::string WithHeader(const std::string& header, const std::string& data) {
  return Bytes().Text(header).str() + data;
}

// BF16, vectors as one dimension.
std::string Safetensors(const std::vector<Matrix>& weights) {
  json header = json::object();
  std::string data;
  for (const Matrix& w : weights) {
    const size_t begin = data.size();
    for (int64_t i = 0; i < w.rows * w.cols; ++i) {
      const bf16 x = ToBf16(Value(i / w.cols, i % w.cols));
      data.append(reinterpret_cast<const char*>(&x), sizeof(x));
    }
    const json shape = w.rows == 1 ? json{w.cols} : json{w.rows, w.cols};
    header[w.name] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }
  return WithHeader(header.dump(), data);
}

class HfModelTest : public testing::Test {
 protected:
  HfModelTest() { std::filesystem::create_directory(dir_.str()); }
  void Write(const std::string& name, const std::string& content) const {
    std::ofstream(dir_.str() + "/" + name, std::ios::binary) << content;
  }
  void WriteModel() const {
    Write("config.json", Config().dump());
    Write("model.safetensors", Safetensors(Weights()));
  }
  std::unique_ptr<ModelFile> Open() const { return ModelFile::Open(dir_.str()); }
  void ExpectRefused(const std::string& part) const {
    try {
      Open()->tokenizer();
      FAIL() << "expected an error with \"" << part << "\"";
    } catch (const Error& e) {
      const std::string what = e.what();
      EXPECT_EQ(e.error_class(), ErrorClass::kModel);
      EXPECT_EQ(what.find(dir_.str()), 0u) << what;
      EXPECT_NE(what.find(part), std::string::npos) << what;
    }
  }
  static float At(const ModelFile& file, WeightKind kind, int64_t row, int64_t col) {
    float value = -1;
    file.Read({kind, 0}, row, 1, col, 1, &value);
    return value;
  }

  TempPath dir_;
};

TEST_F(HfModelTest, ReadsConfigAndWeights) {
  WriteModel();
  const auto file = Open();
  const ModelConfig& c = file->config();
  EXPECT_EQ(c.head_dim, kDim);
  EXPECT_EQ(c.kv_heads, kKvHeads);
  EXPECT_EQ(c.rope_theta, 1e6);
  EXPECT_FALSE(c.tied_embeddings);
  EXPECT_FALSE(c.rope_scaling);
  // No reordering of rows here: the format has Hugging Face's order already.
  EXPECT_EQ(At(*file, WeightKind::kQ, 17, 3), Value(17, 3));
  EXPECT_EQ(At(*file, WeightKind::kDown, 23, 39), Value(23, 39));
  EXPECT_EQ(At(*file, WeightKind::kOutput, 10, 23), Value(10, 23));
  EXPECT_EQ(At(*file, WeightKind::kFfnNorm, 0, 7), Value(0, 7));
  EXPECT_TRUE(file->tokenizer().tokens.empty());
}

TEST_F(HfModelTest, ReadsShards) {
  std::vector<Matrix> weights = Weights();
  const std::vector<Matrix> first(weights.begin(), weights.begin() + 5);
  const std::vector<Matrix> second(weights.begin() + 5, weights.end());
  Write("config.json", Config().dump());
  Write("a.safetensors", Safetensors(first));
  Write("b.safetensors", Safetensors(second));
  json map;
  for (const Matrix& w : first) map[w.name] = "a.safetensors";
  for (const Matrix& w : second) map[w.name] = "b.safetensors";
  Write("model.safetensors.index.json", json{{"weight_map", map}}.dump());
  EXPECT_EQ(At(*Open(), WeightKind::kDown, 2, 3), Value(2, 3));
  Write("b.safetensors", Safetensors(weights));
  ExpectRefused("in two files");
  Write("b.safetensors", Safetensors(second));
  map["x"] = "../b.safetensors";
  Write("model.safetensors.index.json", json{{"weight_map", map}}.dump());
  ExpectRefused("a file beside it");
  map["x"] = "missing.safetensors";
  Write("model.safetensors.index.json", json{{"weight_map", map}}.dump());
  ExpectRefused("missing.safetensors");
}

TEST_F(HfModelTest, TiedEmbeddingsAndScaledRope) {
  json config = Config();
  config["tie_word_embeddings"] = true;
  config["model_type"] = "mistral";
  config["sliding_window"] = 64;
  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8},
                            {"low_freq_factor", 1},
                            {"high_freq_factor", 4},
                            {"original_max_position_embeddings", 8192}};
  Write("config.json", config.dump());
  std::vector<Matrix> weights = Weights();
  weights.erase(weights.begin() + 2);
  Write("model.safetensors", Safetensors(weights));
  const auto file = Open();
  EXPECT_EQ(file->config().sliding_window, 64);
  ASSERT_TRUE(file->config().rope_scaling);
  EXPECT_EQ(file->config().rope_scaling->factor, 8);
  EXPECT_EQ(At(*file, WeightKind::kOutput, 4, 5), Value(4, 5));
}

TEST_F(HfModelTest, ReadsQwen) {
  const std::string attention = "model.layers.0.self_attn.";
  std::vector<Matrix> biases = Weights(), norms = Weights();
  biases.push_back({attention + "q_proj.bias", 1, kHeads * kDim});
  biases.push_back({attention + "k_proj.bias", 1, kKvHeads * kDim});
  biases.push_back({attention + "v_proj.bias", 1, kKvHeads * kDim});
  norms.push_back({attention + "q_norm.weight", 1, kDim});
  norms.push_back({attention + "k_norm.weight", 1, kDim});
  json config = Config();
  config["sliding_window"] = 64;  // not used unless the config says so
  config["model_type"] = "qwen2";
  Write("config.json", config.dump());
  Write("model.safetensors", Safetensors(biases));
  auto file = Open();
  EXPECT_TRUE(file->config().qkv_bias && !file->config().qk_norm);
  EXPECT_EQ(file->config().sliding_window, 0);
  EXPECT_EQ(At(*file, WeightKind::kQBias, 0, 47), Value(0, 47));
  EXPECT_EQ(At(*file, WeightKind::kVBias, 0, 15), Value(0, 15));
  EXPECT_THROW(At(*file, WeightKind::kQNorm, 0, 0), Error);
  Write("model.safetensors", Safetensors(norms));
  ExpectRefused("self_attn.q_proj.bias': is missing; expected [1, 48]");
  biases.back().cols = 17;
  Write("model.safetensors", Safetensors(biases));
  ExpectRefused("self_attn.v_proj.bias': is [1, 17]; expected [1, 16]");

  config["model_type"] = "qwen3";
  Write("config.json", config.dump());
  ExpectRefused("self_attn.q_norm.weight': is missing; expected [1, 16]");
  Write("model.safetensors", Safetensors(norms));
  file = Open();
  EXPECT_TRUE(file->config().qk_norm && !file->config().qkv_bias);
  EXPECT_EQ(At(*file, WeightKind::kKNorm, 0, 15), Value(0, 15));
  norms.push_back({attention + "q_proj.bias", 1, kHeads * kDim});
  Write("model.safetensors", Safetensors(norms));
  ExpectRefused("q_proj.bias': is not part of a dense qwen3 model");
  config.erase("head_dim");
  Write("config.json", config.dump());
  ExpectRefused("expected [384, 24]");  // the architecture's 128
}

TEST_F(HfModelTest, QwenLayersSlideAllOrNone) {
  std::vector<Matrix> weights = Weights();
  for (const char* name : {"q_norm", "k_norm"}) {
    weights.push_back({std::string("model.layers.0.self_attn.") + name + ".weight", 1, kDim});
  }
  Write("model.safetensors", Safetensors(weights));
  json config = Config();
  config["model_type"] = "qwen3";
  config["use_sliding_window"] = true;
  const auto window = [&](const char* key, const json& value) {
    config[key] = value;
    Write("config.json", config.dump());
    return Open()->config().sliding_window;
  };
  EXPECT_EQ(window("max_window_layers", 0), 4096);
  EXPECT_EQ(window("sliding_window", 48), 48);
  EXPECT_EQ(window("max_window_layers", -5), 48);
  EXPECT_EQ(window("max_window_layers", 1), 0);
  EXPECT_EQ(window("max_window_layers", INT64_MAX), 0);
  EXPECT_EQ(window("layer_types", {"sliding_attention"}), 48);
  EXPECT_EQ(window("layer_types", {"full_attention"}), 0);
  EXPECT_EQ(window("use_sliding_window", false), 0);
  config["use_sliding_window"] = true;
  const auto refused = [&](const char* key, const json& value, const std::string& part) {
    config[key] = value;
    Write("config.json", config.dump());
    ExpectRefused(part);
  };
  refused("layer_types", json{"linear_attention"}, "layer_types");
  refused("layer_types", json{"full_attention", "full_attention"}, "an array of 1 names");
  refused("layer_types", 7, "layer_types");
  config["num_hidden_layers"] = 2;
  refused("layer_types", json{"full_attention", "sliding_attention"}, "lets 1 of 2 layers slide");
  config.erase("layer_types");
  refused("max_window_layers", 1, "lets 1 of 2 layers slide");
}

TEST_F(HfModelTest, RefusesConfigsItCannotServe) {
  Write("model.safetensors", Safetensors(Weights()));
  ExpectRefused("config.json");
  const auto with = [&](const char* key, const json& value, const std::string& part) {
    json config = Config();
    config[key] = value;
    Write("config.json", config.dump());
    ExpectRefused(part);
  };
  with("model_type", "gpt_neox", "model_type");
  with("hidden_size", -1, "hidden size");
  with("hidden_size", "24", "hidden_size");
  with("num_hidden_layers", uint64_t{1} << 40, "num_hidden_layers");
  with("num_hidden_layers", ~uint64_t{0}, "num_hidden_layers");
  with("num_hidden_layers", 2, "model.layers.1.input_layernorm.weight");
  with("num_key_value_heads", 2, "attention heads");
  with("head_dim", 24, "multiple of 16");
  with("head_dim", 32, "expected [96, 24]");
  with("attention_bias", true, "attention_bias");
  with("hidden_act", "gelu", "hidden_act");
  with("rope_scaling", json{{"rope_type", "yarn"}, {"factor", 2}}, "yarn");
  with("rms_norm_eps", 0, "norm epsilon");
  Write("config.json", "{\"model_type\": \"llama\", \"model_type\": \"llama\"}");
  ExpectRefused("given twice");
  Write("config.json", "{\"a\": \"\xff\"}");
  ExpectRefused("expected JSON");
  Write("config.json", std::string(10000, '[') + std::string(10000, ']'));
  ExpectRefused("nests deeper");
  Write("config.json", "[]");
  ExpectRefused("JSON object");
}

TEST_F(HfModelTest, RefusesWeightsThatDoNotFit) {
  Write("config.json", Config().dump());
  ExpectRefused("model.safetensors");
  std::vector<Matrix> weights = Weights();
  weights.pop_back();
  Write("model.safetensors", Safetensors(weights));
  ExpectRefused("'model.layers.0.mlp.down_proj.weight': is missing");
  weights = Weights();
  weights.push_back({"model.layers.0.self_attn.q_proj.bias", 1, kHeads * kDim});
  Write("model.safetensors", Safetensors(weights));
  ExpectRefused("q_proj.bias");
}

json TokenizerJson() {
  json vocab;
  const char* tokens[] = {"a", "b", "ab", "c", "1", "2", "\u0120"};
  for (size_t i = 0; i < std::size(tokens); ++i) vocab[tokens[i]] = i + 3;
  return {
      {"added_tokens",
       {{{"id", 0}, {"content", "<pad>"}, {"special", true}},
        {{"id", 1}, {"content", "<s>"}, {"special", true}},
        {{"id", 2}, {"content", "<|im_end|>"}, {"special", true}}}},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Digits"}, {"individual_digits", true}},
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}}}}},
      {"model",
       {{"type", "BPE"}, {"vocab", vocab}, {"merges", json::array({json::array({"a", "b"})})}}}};
}

TEST_F(HfModelTest, ReadsTheTokenizer) {
  WriteModel();
  Write("tokenizer.json", TokenizerJson().dump());
  Write("tokenizer_config.json",
        json{{"bos_token", {{"content", "<s>"}}}, {"eos_token", "<pad>"}, {"chat_template", "T"}}
            .dump());
  Write("generation_config.json", json{{"eos_token_id", {0, 9}}}.dump());
  TokenizerData data = Open()->tokenizer();
  EXPECT_EQ(data.bos, 1);
  EXPECT_EQ(data.eos, 0);
  EXPECT_FALSE(data.add_bos);
  EXPECT_EQ(data.stop, (std::vector<int32_t>{0, 9, 2}));
  EXPECT_EQ(data.chat_template, "T");
  EXPECT_EQ(Tokenizer::Make(data)->Encode("ab 12<s>", true), (std::vector<int32_t>{5, 9, 7, 8, 1}));

  json changed = TokenizerJson();
  changed["pre_tokenizer"]["pretokenizers"][0] = {
      {"type", "Split"}, {"pattern", {{"Regex", "[a-z]|."}}}, {"behavior", "Isolated"}};
  changed["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = false;
  changed["post_processor"] = {
      {"type", "TemplateProcessing"},
      {"single", {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, {{"Sequence", {}}}}}};
  Write("tokenizer.json", changed.dump());
  data = Open()->tokenizer();
  EXPECT_TRUE(data.add_bos);
  EXPECT_EQ(Tokenizer::Make(data)->Encode("ab", true), (std::vector<int32_t>{1, 3, 4}));
}

TEST_F(HfModelTest, TokensBeyondTheEmbeddingAreLeftToWhoUsesThem) {
  WriteModel();
  json tokenizer = TokenizerJson();
  tokenizer["added_tokens"].push_back({{"id", kVocab}, {"content", "[PAD]"}, {"special", true}});
  Write("tokenizer.json", tokenizer.dump());
  const auto made = Tokenizer::Make(Open()->tokenizer());
  EXPECT_EQ(made->vocab_size(), kVocab);
  EXPECT_EQ(made->Encode("ab[PAD]", true), (std::vector<int32_t>{5, kVocab}));
  EXPECT_EQ(made->TokenBytes(kVocab, true), "[PAD]");
}

TEST_F(HfModelTest, RefusesTokenizersItCannotServe) {
  WriteModel();
  const auto with = [&](const std::function<void(json&)>& change, const std::string& part) {
    json tokenizer = TokenizerJson();
    change(tokenizer);
    Write("tokenizer.json", tokenizer.dump());
    ExpectRefused(part);
  };
  with([](json& t) { t["model"]["type"] = "Unigram"; }, "Unigram");
  with([](json& t) { t["model"]["vocab"]["zz"] = 2000; }, "id 2000");
  with([](json& t) { t["model"]["vocab"]["zz"] = -1; }, "expected an id");
  with([](json& t) { t["model"]["vocab"]["zz"] = ~uint64_t{0}; }, "model.vocab");
  with([](json& t) { t["model"]["vocab"]["zz"] = 3; }, "id 3 is both");
  with([](json& t) { t["model"]["merges"] = {1}; }, "merges");
  with([](json& t) { t["normalizer"] = {{"type", "NFKC"}}; }, "normalizer");
  with([](json& t) { t["pre_tokenizer"] = {{"type", "Metaspace"}}; }, "pre_tokenizer");
  with([](json& t) { t["pre_tokenizer"] = nullptr; }, "pre_tokenizer");
  with([](json& t) { t["added_tokens"][0]["id"] = int64_t{1} << 40; }, "added_tokens");
  with([](json& t) { t["added_tokens"][0]["lstrip"] = 1; }, "lstrip");
}

// Ids that are no token's do not end a text.
TEST_F(HfModelTest, IgnoresStopsThatAreNoTokens) {
  WriteModel();
  Write("tokenizer.json", TokenizerJson().dump());
  for (const char* eos : {"[-1, 9]", "[99, 9]", "[1e30, 9, \"x\"]"}) {
    Write("generation_config.json", std::string(R"({"eos_token_id": )") + eos + "}");
    EXPECT_EQ(Open()->tokenizer().stop, (std::vector<int32_t>{9, 2})) << eos;
  }
}

TEST_F(HfModelTest, BosWhereTheConfigNamesNone) {
  WriteModel();
  json tokenizer = TokenizerJson();
  tokenizer["post_processor"] = {
      {"type", "TemplateProcessing"},
      {"single", {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, {{"Sequence", {}}}}}};
  Write("tokenizer.json", tokenizer.dump());
  EXPECT_EQ(Tokenizer::Make(Open()->tokenizer())->Encode("ab", true), (std::vector<int32_t>{1, 5}));
  Write("tokenizer_config.json", R"({"eos_token": "<pad>"})");
  EXPECT_EQ(Tokenizer::Make(Open()->tokenizer())->Encode("ab", true), (std::vector<int32_t>{1, 5}));
  Write("tokenizer.json", TokenizerJson().dump());
  Write("tokenizer_config.json", "{}");
  Write("special_tokens_map.json", R"({"bos_token": {"content": "<s>"}, "eos_token": "<pad>"})");
  const TokenizerData data = Open()->tokenizer();
  EXPECT_EQ(data.bos, 1);
  EXPECT_EQ(data.eos, 0);
  EXPECT_FALSE(data.add_bos);
}

// Prompts work; messages get an error of their own.
TEST_F(HfModelTest, ChatTemplateOfAnotherForm) {
  WriteModel();
  Write("tokenizer.json", TokenizerJson().dump());
  const auto expect_unknown = [&](const std::string& what) {
    const auto tokenizer = Tokenizer::Make(Open()->tokenizer());
    EXPECT_EQ(tokenizer->Encode("ab", true), (std::vector<int32_t>{5}));
    try {
      tokenizer->EncodeMessages(std::vector<ChatMessage>{{"user", "a"}});
      FAIL() << what;
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kUsage) << what;
      EXPECT_NE(std::string(e.what()).find("not served"), std::string::npos) << e.what();
    }
  };
  for (const char* form : {R"([{"name": "rag", "template": "x"}])", R"({"default": "x"})", "[]",
                           "7", R"([{"name": "default", "template": 1}])"}) {
    Write("tokenizer_config.json", std::string(R"({"chat_template": )") + form + "}");
    expect_unknown(form);
  }
  Write("chat_template.jinja", "");
  expect_unknown("empty");
  Write("chat_template.jinja", std::string((1 << 20) + 1, 'x'));
  expect_unknown("too long");
}

}  // namespace
}  // namespace passel::model
