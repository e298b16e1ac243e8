// The transformer on random weights of odd shapes, against float64.

#include "runtime/model/transformer.h"

#include <gtest/gtest.h>

#include <cstring>

#include "runtime/base/error.h"
#include "runtime/base/single_rank.h"
#include "tests/gpu/device_matrix.h"
#include "tests/model/random_model.h"
#include "tests/model/reference_loop.h"
#include "tests/model/thread_ranks.h"

namespace passel::model {
namespace {

ModelConfig Shape(int32_t heads, int32_t kv_heads, int32_t head_dim, bool tied) {
  ModelConfig c;
  c.architecture = "llama";
  c.layers = 2;
  c.hidden = 72;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.ffn = 200;
  c.vocab = 333;
  c.tied_embeddings = tied;
  c.context_length = 512;
  return c;
}

double RelativeError(const std::vector<float>& got, const std::vector<double>& exact) {
  EXPECT_EQ(got.size(), exact.size());
  double difference = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double d = static_cast<double>(got[i]) - exact[i];
    difference += d * d;
    size += exact[i] * exact[i];
  }
  return std::sqrt(difference / size);
}

const std::vector<int32_t> kPrompt = {5, 332, 0, 77, 200, 64, 63, 128, 9, 31, 250};
constexpr size_t kPrefilled = 7;  // the rest is decoded

// (heads, KV heads, head_dim, tied, ranks, architecture)
class RandomWeights
    : public testing::TestWithParam<std::tuple<int32_t, int32_t, int32_t, bool, int, const char*>> {
};

TEST_P(RandomWeights, LogitsEqualFloat64OnEveryRank) {
  const auto [heads, kv_heads, head_dim, tied, ranks, architecture] = GetParam();
  ModelConfig config = Shape(heads, kv_heads, head_dim, tied);
  config.architecture = architecture;
  config.qkv_bias = config.architecture == "qwen2";
  config.qk_norm = config.architecture == "qwen3";
  const RandomModel model(config, 5);
  const auto exact_prefill = model.Forward(std::span(kPrompt).first(kPrefilled));
  const auto exact = model.Forward(kPrompt);
  std::vector<std::vector<float>> logits(static_cast<size_t>(ranks));
  ThreadRanks(ranks).Run([&](Collectives& host) {
    const auto device = gpu::MakeTestDevice({.threads = 1});
    const auto collectives = device->MakeCollectives(std::make_unique<BorrowedCollectives>(host));
    const Transformer transformer(model, *device, *collectives, nullptr);
    ReferenceLoop loop(*device, transformer, 1, 64);
    const double tolerance = device->activation_type() == gpu::DType::kBf16 ? 2e-2 : 4e-3;
    EXPECT_LE(RelativeError(loop.Prefill(0, std::span(kPrompt).first(kPrefilled)), exact_prefill),
              tolerance);
    std::vector<float> last;
    for (size_t i = kPrefilled; i < kPrompt.size(); ++i) last = loop.DecodeOne(0, kPrompt[i]);
    EXPECT_LE(RelativeError(last, exact), tolerance);
    logits[static_cast<size_t>(host.rank())] = last;
  });
  for (const auto& of_rank : logits) EXPECT_EQ(of_rank, logits[0]);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, RandomWeights,
    testing::Values(std::tuple(9, 3, 16, true, 1, "llama"), std::tuple(9, 3, 16, false, 2, "llama"),
                    std::tuple(9, 3, 48, true, 3, "llama"), std::tuple(9, 3, 32, true, 4, "llama"),
                    std::tuple(8, 2, 80, false, 5, "llama"), std::tuple(4, 1, 64, true, 4, "llama"),
                    std::tuple(2, 2, 16, false, 1, "llama"), std::tuple(9, 3, 16, true, 2, "qwen2"),
                    std::tuple(8, 2, 48, false, 5, "qwen2"), std::tuple(9, 3, 48, true, 1, "qwen3"),
                    std::tuple(9, 3, 32, false, 4, "qwen3")));

TEST(Transformer, DeterministicBitsDependOnNeitherBatchNorThreads) {
  const RandomModel model(Shape(9, 3, 32, true), 6);
  SingleRank alone;
  std::vector<float> first;  // of sequence 2
  for (const auto& [batch, threads] : {std::pair(1, 1), std::pair(4, 1), std::pair(4, 2)}) {
    const auto device = gpu::MakeTestDevice({.threads = threads, .deterministic = true});
    const Transformer transformer(model, *device, alone, nullptr);
    ReferenceLoop loop(*device, transformer, 4, 64);
    std::vector<float> logits;
    for (size_t s = 0; s < 4; ++s) loop.Prefill(s, std::span(kPrompt).subspan(s));
    if (batch == 1) {
      logits = loop.DecodeOne(2, 11);
    } else {
      const std::vector<size_t> sequences = {0, 1, 2, 3};
      const std::vector<int32_t> ids = {7, 8, 11, 300};
      const auto all = loop.Decode(sequences, ids);
      logits.assign(all.begin() + 2 * 333, all.begin() + 3 * 333);
    }
    if (first.empty()) first = logits;
    ASSERT_EQ(logits.size(), 333u);
    EXPECT_EQ(std::memcmp(logits.data(), first.data(), 333 * sizeof(float)), 0)
        << batch << " sequences, " << threads << " threads";
  }
}

TEST(Transformer, WeightsAreHeldOnceAndReported) {
  for (const bool tied : {false, true}) {
    ModelConfig config = Shape(8, 2, 32, tied);
    config.hidden = 128;
    config.ffn = 256;
    config.vocab = 640;
    const RandomModel model(config, 7);
    SingleRank alone;
    const auto device = gpu::MakeTestDevice({.threads = 2});
    uint64_t reported = 0;
    const Transformer transformer(model, *device, alone,
                                  [&](int32_t, uint64_t bytes) { reported = bytes; });
    const uint64_t layer = 128 * (8 + 2 + 2) * 32 + 8 * 32 * 128 + 3 * 256 * 128;
    const uint64_t matrices = (tied ? 1 : 2) * 640 * 128 + 2 * layer;
    const uint64_t norms = (2 * 2 + 1) * 128;
    EXPECT_EQ(reported, 2 * (matrices + norms));
    // Matrices as bf16, whatever the activations are.
    EXPECT_EQ(device->allocated_bytes(), 2 * matrices + 4 * norms);
  }
}

TEST(Transformer, RefusesHeadsThatTheDeviceDoesNotServe) {
  const auto device = gpu::MakeTestDevice({.threads = 1});
  const int32_t most = device->info().max_head_dim;
  if (most == 0) GTEST_SKIP() << "this device serves heads of any size";
  SingleRank alone;
  const RandomModel model(Shape(2, 1, most + 16, true), 8);
  try {
    const Transformer refused(model, *device, alone, nullptr);
    FAIL() << "heads of " << most + 16 << " were served";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kModel);
    EXPECT_EQ(std::string(e.what()), "head dimension: is " + std::to_string(most + 16) +
                                         "; expected at most " + std::to_string(most) + " on CUDA");
  }
}

TEST(Transformer, RefusesWhatDoesNotFit) {
  const RandomModel model(Shape(4, 2, 16, true), 8);
  SingleRank alone;
  const auto device = gpu::MakeTestDevice({.threads = 1});
  const Transformer transformer(model, *device, alone, nullptr);
  const auto a = transformer.MakeActivations(4, true, 1);
  EXPECT_THROW(transformer.Embed(*a, std::vector<int32_t>{1, 2, 3, 4, 5}), Error);
  EXPECT_THROW(transformer.Embed(*a, std::vector<int32_t>{333}), Error);
  EXPECT_THROW(transformer.Embed(*a, std::vector<int32_t>{-1}), Error);
  transformer.Embed(*a, std::vector<int32_t>{1, 2});
  EXPECT_THROW(transformer.SetPositions(*a, std::vector<int64_t>{0}), Error);
  EXPECT_THROW(transformer.BeforeAttention(2, *a), Error);
  EXPECT_THROW(transformer.Between(3, *a), Error);
  EXPECT_THROW(transformer.Logits(*a, 0, 2), Error);
  EXPECT_THROW(transformer.Logits(*a, 2, 1), Error);
  const auto small = gpu::MakeTestDevice({.memory_limit_bytes = 10000, .threads = 1});
  try {
    const Transformer refused(model, *small, alone, nullptr);
    FAIL() << "a model of more than the limit was loaded";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kMemory);
  }
  EXPECT_EQ(small->allocated_bytes(), 0u);
}

TEST(SliceFor, CoversEverythingOnce) {
  for (const auto& [heads, kv_heads] :
       {std::pair(9, 3), std::pair(32, 8), std::pair(8, 8), std::pair(32, 1), std::pair(28, 4)}) {
    ModelConfig config = Shape(heads, kv_heads, 16, true);
    config.vocab = 49152;
    config.ffn = 1536;
    for (int32_t size = 1; size <= heads; ++size) {
      // The ranks of a KV head share its query heads: no more ranks than those.
      const bool fits = (size + kv_heads - 1) / kv_heads <= heads / kv_heads;
      if (!fits) {
        EXPECT_THROW(
            {
              for (int32_t r = 0; r < size; ++r) SliceFor(config, r, size);
            },
            Error);
        continue;
      }
      int32_t head = 0, ffn = 0, vocab = 0;
      for (int32_t r = 0; r < size; ++r) {
        const TensorSlice s = SliceFor(config, r, size);
        EXPECT_EQ(s.first_head, head);
        EXPECT_EQ(s.first_ffn, ffn);
        EXPECT_EQ(s.first_vocab, vocab);
        EXPECT_GT(s.heads, 0);
        EXPECT_EQ(s.heads % s.kv_heads, 0);
        const int32_t group = heads / kv_heads;
        EXPECT_EQ(s.first_head / group, s.first_kv_head);
        EXPECT_EQ((s.first_head + s.heads - 1) / group, s.first_kv_head + s.kv_heads - 1);
        head += s.heads;
        ffn += s.ffn;
        vocab += s.vocab;
      }
      EXPECT_EQ(head, heads);
      EXPECT_EQ(ffn, config.ffn);
      EXPECT_EQ(vocab, config.vocab);
    }
  }
}

}  // namespace
}  // namespace passel::model
