// What GGUF metadata leaves unsaid, and the keys of older files: as llama.cpp reads them.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "runtime/model/gguf_model.h"
#include "tests/model/tiny_model.h"

namespace passel::model {
namespace {

// The tiny model without the keys that contain `without`, changed by `edit`.
GgufFile Written(const std::string& without, const std::function<void(GgufWriter&)>& edit = {},
                 bool sentence_piece = false) {
  GgufWriter writer = TinyModel::Gguf(sentence_piece);
  std::erase_if(writer.values,
                [&](const std::string& v) { return v.find(without) != std::string::npos; });
  if (edit) edit(writer);
  const TempPath path(".gguf", writer.Encode());
  return GgufFile(path.str());
}

TEST(GgufMetadata, RopeScaling) {
  const auto factor = [](const std::function<void(GgufWriter&)>& edit) {
    const auto scaling = GgufConfig(Written("rope.scaling", edit)).rope_scaling;
    EXPECT_TRUE(!scaling || scaling->type == "linear");
    return scaling ? scaling->factor : 1;
  };
  EXPECT_EQ(factor({}), 1);
  EXPECT_EQ(factor([](GgufWriter& w) { w.Float("llama.rope.scaling.factor", 4); }), 4);
  EXPECT_EQ(factor([](GgufWriter& w) { w.Float("llama.rope.scale_linear", 8); }), 8);
  EXPECT_EQ(factor([](GgufWriter& w) {
              w.Float("llama.rope.scaling.factor", 4);
              w.Float("llama.rope.scale_linear", 8);
            }),
            4);
  EXPECT_EQ(factor([](GgufWriter& w) {
              w.String("llama.rope.scaling.type", "none");
              w.Float("llama.rope.scaling.factor", 4);
            }),
            1);
  EXPECT_EQ(factor([](GgufWriter& w) { w.String("llama.rope.scaling.type", "linear"); }), 1);
  EXPECT_EQ(factor([](GgufWriter& w) { w.Float("llama.rope.scaling.factor", 0); }), 1);
}

// What converters write for Llama 3's scaling, and the frequencies that Hugging Face's
// implementation has for the same: factor 32, 1 and 4 turns of 8192 positions, 16 wide, base
// 500000.
TEST(GgufMetadata, RopeFactorsAreLlama3Scaling) {
  const std::vector<float> factors = {1, 1, 1, 1, 3.29226210f, 32, 32, 32};
  const std::vector<float> expected = {1,
                                       0.193922758f,
                                       0.0376060307f,
                                       0.00729266508f,
                                       0.000429556705f,
                                       8.57025589e-06f,
                                       1.66196764e-06f,
                                       3.22293289e-07f};
  const GgufFile file = Written("rope.", [&](GgufWriter& w) {
    w.Float("llama.rope.freq_base", 500000);
    w.F32("rope_freqs.weight", {8}, factors);
  });
  ModelConfig config = GgufConfig(file);
  EXPECT_EQ(config.rope_factors, factors);
  const std::vector<float> from_factors = RopeInverseFrequencies(config);
  config.rope_factors.clear();
  config.rope_scaling = RopeScaling{.type = "llama3",
                                    .factor = 32,
                                    .low_freq_factor = 1,
                                    .high_freq_factor = 4,
                                    .original_context = 8192};
  const std::vector<float> from_scaling = RopeInverseFrequencies(config);
  ASSERT_EQ(from_factors.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(from_factors[i], expected[i], 1e-6 * expected[i]) << i;
    EXPECT_NEAR(from_scaling[i], expected[i], 1e-6 * expected[i]) << i;
  }
}

TEST(GgufMetadata, PreTokenizerThatIsNotSaid) {
  const TokenizerData data = GgufTokenizer(Written("tokenizer.ggml.pre"));
  EXPECT_EQ(data.pre_tokenizer, "default");
  EXPECT_FALSE(data.add_bos);
  EXPECT_EQ(Tokenizer::Make(data)->pre_tokenizer(), "default");
  for (const char* name : {"llama-bpe", "llama3", "llama-v3", "tekken", "qwen2", "smaug-bpe"}) {
    const TokenizerData named = GgufTokenizer(Written(
        "tokenizer.ggml.pre", [&](GgufWriter& w) { w.String("tokenizer.ggml.pre", name); }));
    EXPECT_EQ(named.add_bos, name != std::string("qwen2") && name != std::string("smaug-bpe"));
    EXPECT_EQ(Tokenizer::Make(named)->pre_tokenizer(), name);
  }
}

TEST(GgufMetadata, SpecialTokensOfSentencePieceAreLlamasWhereNotSaid) {
  TokenizerData data = GgufTokenizer(Written("_token_id", {}, true));
  EXPECT_EQ(data.bos, 1);
  EXPECT_EQ(data.eos, 2);
  EXPECT_EQ(data.unknown, 0);
  EXPECT_EQ(Tokenizer::Make(data)->pre_tokenizer(), "");
  data = GgufTokenizer(Written("_token_id"));
  EXPECT_EQ(data.bos, -1);
  EXPECT_EQ(data.eos, -1);
}

TEST(GgufMetadata, SpecialIdsThatAreNoTokensAreIgnored) {
  for (const bool sentence_piece : {false, true}) {
    const TokenizerData data = GgufTokenizer(Written(
        "_token_id",
        [](GgufWriter& w) {
          w.Uint32("tokenizer.ggml.bos_token_id", 0xffffffff);
          w.Uint32("tokenizer.ggml.eos_token_id", 4000);
          w.Uint32("tokenizer.ggml.eot_token_id", 4000);
        },
        sentence_piece));
    EXPECT_EQ(data.bos, sentence_piece ? 1 : -1);
    EXPECT_EQ(data.eos, sentence_piece ? 2 : -1);
    for (const int32_t id : data.stop) EXPECT_LT(id, 4000);
  }
}

// "d" is a user-defined token: a space is put in front of what follows it, as behind special ones.
TEST(GgufMetadata, SpaceIsPutBehindUserDefinedTokens) {
  const auto tokenizer = Tokenizer::Make(GgufTokenizer(Written("_token_id", {}, true)));
  const int32_t space = 8;
  EXPECT_EQ(tokenizer->Encode("adb<s>c", true),
            (std::vector<int32_t>{1, space, 0, 9, space, 3, 1, space, 4}));
}

}  // namespace
}  // namespace passel::model
