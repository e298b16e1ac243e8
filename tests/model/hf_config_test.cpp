// What config.json leaves unsaid, or says of models that are not served: see hf_model_test.cpp.

#include <gtest/gtest.h>

#include "runtime/base/error.h"
#include "runtime/model/hf_model.h"
#include "tests/model/tiny_model.h"

namespace passel::model {
namespace {

using nlohmann::json;

ModelConfig Read(const json& config) {
  const TempPath directory;
  std::filesystem::create_directory(directory.str());
  std::ofstream(directory.str() + "/config.json") << config.dump();
  return HfConfig(directory.str());
}

void ExpectRefused(const json& config, const std::string& part) {
  try {
    Read(config);
    FAIL() << "expected an error about " << part;
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kModel);
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(HfConfig, SlidingWindowThatIsNotSaidIsTransformers) {
  json config = TinyModel::Config();
  EXPECT_EQ(Read(config).sliding_window, 32);
  config.erase("sliding_window");
  EXPECT_EQ(Read(config).sliding_window, 4096);
  config["sliding_window"] = nullptr;
  EXPECT_EQ(Read(config).sliding_window, 0);
  config["model_type"] = "llama";
  config["sliding_window"] = 32;
  EXPECT_EQ(Read(config).sliding_window, 0);

  json qwen = TinyModel::QwenConfig("qwen2");
  EXPECT_EQ(Read(qwen).sliding_window, 32);
  qwen.erase("sliding_window");
  EXPECT_EQ(Read(qwen).sliding_window, 4096);
  qwen["sliding_window"] = nullptr;
  EXPECT_EQ(Read(qwen).sliding_window, 0);
}

TEST(HfConfig, KvHeadsThatAreNotSaidAreTransformers) {
  json config = TinyModel::Config();
  config["num_attention_heads"] = 64;
  config["head_dim"] = 16;
  for (const auto& [architecture, unsaid] :
       {std::pair{"llama", 64}, {"mistral", 8}, {"qwen2", 32}, {"qwen3", 32}}) {
    config["model_type"] = architecture;
    config.erase("num_key_value_heads");
    EXPECT_EQ(Read(config).kv_heads, unsaid) << architecture;
    config["num_key_value_heads"] = nullptr;
    EXPECT_EQ(Read(config).kv_heads, 64) << architecture;
  }
}

TEST(HfConfig, HeadsRotateAsAWhole) {
  json config = TinyModel::Config();
  config["partial_rotary_factor"] = 1.0;
  Read(config);
  config["partial_rotary_factor"] = 0.5;
  ExpectRefused(config, "partial_rotary_factor: is 0.5; expected 1");
  config.erase("rope_scaling");
  ExpectRefused(config, "partial_rotary_factor: is 0.5; expected 1");
  config.erase("partial_rotary_factor");
  config["rope_parameters"] = {{"rope_type", "default"}, {"partial_rotary_factor", 0.25}};
  ExpectRefused(config, "rope_parameters: partial_rotary_factor: is 0.25; expected 1");
}

TEST(HfConfig, OriginalContextOfLlama3Scaling) {
  const char* key = "original_max_position_embeddings";
  json config = TinyModel::Config();
  EXPECT_EQ(Read(config).rope_scaling->original_context, 16);
  config["rope_scaling"].erase(key);
  EXPECT_EQ(Read(config).rope_scaling->original_context, 64);  // the model's
  config["rope_scaling"][key] = 16;
  config[key] = 32;
  EXPECT_EQ(Read(config).rope_scaling->original_context, 32);
  for (const char* needed : {"factor", "low_freq_factor", "high_freq_factor"}) {
    json without = config;
    without["rope_scaling"].erase(needed);
    ExpectRefused(without, "RoPE scaling");
  }
}

}  // namespace
}  // namespace passel::model
