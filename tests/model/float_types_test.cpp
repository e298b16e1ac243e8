// Safetensors of F32 and F16, as float32 and as bf16, bit by bit: tests/fixtures/README.md.

#include <gtest/gtest.h>

#include <bit>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "runtime/model/model_file.h"

namespace passel::model {
namespace {

template <typename Bits, typename T>
std::vector<Bits> BitsOf(const ModelFile& file, WeightId id, int64_t rows, int64_t cols) {
  std::vector<T> values(static_cast<size_t>(rows * cols));
  file.Read(id, 0, rows, 0, cols, values.data());
  std::vector<Bits> bits;
  for (const T value : values) bits.push_back(std::bit_cast<Bits>(value));
  return bits;
}

TEST(FloatTypes, AreReadBitByBit) {
  const std::string directory = PASSEL_SOURCE_DIR "/tests/fixtures/float_types";
  std::ifstream stream(directory + "/values.json");
  const auto expected = nlohmann::json::parse(stream);
  const auto file = ModelFile::Open(directory);
  const int64_t hidden = file->config().hidden, vocab = file->config().vocab;
  const std::string l = "model.layers.0.";
  const std::map<std::string, std::pair<WeightKind, int64_t>> rows = {
      {"model.embed_tokens.weight", {WeightKind::kTokenEmbedding, vocab}},
      {"model.norm.weight", {WeightKind::kOutputNorm, 1}},
      {l + "input_layernorm.weight", {WeightKind::kAttnNorm, 1}},
      {l + "post_attention_layernorm.weight", {WeightKind::kFfnNorm, 1}},
      {l + "self_attn.q_proj.weight", {WeightKind::kQ, hidden}},
      {l + "self_attn.k_proj.weight", {WeightKind::kK, hidden}},
      {l + "self_attn.v_proj.weight", {WeightKind::kV, hidden}},
      {l + "self_attn.o_proj.weight", {WeightKind::kO, hidden}},
      {l + "mlp.gate_proj.weight", {WeightKind::kGate, hidden}},
      {l + "mlp.up_proj.weight", {WeightKind::kUp, hidden}},
      {l + "mlp.down_proj.weight", {WeightKind::kDown, hidden}}};
  ASSERT_EQ(expected.size(), rows.size());
  std::map<std::string, int> types;
  for (const auto& [name, values] : expected.items()) {
    SCOPED_TRACE(name);
    ++types[values["dtype"]];
    const auto& [kind, count] = rows.at(name);
    EXPECT_EQ((BitsOf<uint32_t, float>(*file, {kind}, count, hidden)),
              values["f32"].get<std::vector<uint32_t>>());
    EXPECT_EQ((BitsOf<uint16_t, bf16>(*file, {kind}, count, hidden)),
              values["bf16"].get<std::vector<uint16_t>>());
  }
  EXPECT_EQ(types, (std::map<std::string, int>{{"F16", 5}, {"F32", 6}}));
}

}  // namespace
}  // namespace passel::model
