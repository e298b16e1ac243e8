// What a Transformer asks of its file while it loads.

#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "runtime/base/single_rank.h"
#include "runtime/model/mapped_model.h"
#include "runtime/model/transformer.h"
#include "tests/gpu/device_matrix.h"
#include "tests/model/random_model.h"
#include "tests/model/thread_ranks.h"

namespace passel::model {
namespace {

// Counts the reads of every element of a model.
class CountingModel final : public ModelFile {
 public:
  explicit CountingModel(const ModelConfig& config) : model_(config, 9) {
    for (const ExpectedWeight& e : ExpectedWeights(config)) {
      counts_[Key(e.id)] = {e.cols, std::vector<int>(static_cast<size_t>(e.rows * e.cols))};
    }
  }
  const ModelConfig& config() const override { return model_.config(); }
  void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            bf16* out) const override {
    Count(id, row, rows, col, cols);
    model_.Read(id, row, rows, col, cols, out);
  }
  void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            float* out) const override {
    Count(id, row, rows, col, cols);
    model_.Read(id, row, rows, col, cols, out);
  }
  void Release(WeightId id) const override {
    EXPECT_TRUE(released_.insert(Key(id)).second) << WeightName(id) << " released twice";
  }
  const TokenizerData& tokenizer() const override { return model_.tokenizer(); }
  uint64_t weight_bytes() const override { return 0; }

  // Calls f(name, reads of one element) for every element.
  template <typename F>
  void ForEach(const F& f) const {
    for (const auto& [key, weight] : counts_) {
      const std::string name = WeightName({static_cast<WeightKind>(key.first), key.second});
      EXPECT_TRUE(released_.contains(key)) << name << " not released";
      for (const int count : weight.reads) f(name, count);
    }
  }

 private:
  struct Weight {
    int64_t cols;
    std::vector<int> reads;
  };
  std::pair<int, int32_t> Key(WeightId id) const {
    const bool tied = id.kind == WeightKind::kOutput && config().tied_embeddings;
    return {static_cast<int>(tied ? WeightKind::kTokenEmbedding : id.kind), id.layer};
  }
  void Count(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(released_.contains(Key(id))) << WeightName(id) << " read after its release";
    Weight& weight = counts_.at(Key(id));
    for (int64_t i = 0; i < rows * cols; ++i) {
      ++weight.reads.at(static_cast<size_t>((row + i / cols) * weight.cols + col + i % cols));
    }
  }

  RandomModel model_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<int, int32_t>, Weight> counts_;
  mutable std::set<std::pair<int, int32_t>> released_;
};

// (architecture, tied, ranks)
class Loading : public testing::TestWithParam<std::tuple<const char*, bool, int>> {};

TEST_P(Loading, ReadsEveryElementOnce) {
  const auto [architecture, tied, ranks] = GetParam();
  ModelConfig config;
  config.architecture = architecture;
  config.layers = 2;
  config.hidden = 72;
  config.heads = 6;
  config.kv_heads = 3;
  config.head_dim = 16;
  config.ffn = 200;
  config.vocab = 333;
  config.context_length = 64;
  config.tied_embeddings = tied;
  config.qkv_bias = config.architecture == "qwen2";
  config.qk_norm = config.architecture == "qwen3";
  std::vector<std::unique_ptr<CountingModel>> models;  // each rank's own, as ranks open the file
  for (int r = 0; r < ranks; ++r) models.push_back(std::make_unique<CountingModel>(config));
  ThreadRanks(ranks).Run([&](Collectives& host) {
    const auto device = gpu::MakeTestDevice({.threads = 2});
    const auto collectives = device->MakeCollectives(std::make_unique<BorrowedCollectives>(host));
    const CountingModel& model = *models[static_cast<size_t>(host.rank())];
    std::vector<int32_t> layers;
    std::optional<uint64_t> bytes;
    const Transformer transformer(model, *device, *collectives, [&](int32_t l, uint64_t b) {
      layers.push_back(l);
      EXPECT_TRUE(bytes ? b > *bytes : b == 0) << b;
      bytes = b;
    });
    EXPECT_EQ(layers, (std::vector<int32_t>{0, 0, 1, 2}));
    uint64_t elements = 0;
    model.ForEach([&](const std::string&, int count) { elements += static_cast<uint64_t>(count); });
    EXPECT_EQ(bytes, elements * sizeof(bf16));
  });
  std::map<std::string, std::vector<int>> sums;
  for (const auto& model : models) {
    std::map<std::string, size_t> next;
    model->ForEach([&](const std::string& name, int count) {
      ASSERT_LE(count, 1) << name;
      std::vector<int>& sum = sums[name];
      const size_t i = next[name]++;
      if (i == sum.size()) sum.push_back(0);
      sum[i] += count;
    });
  }
  for (const auto& [name, sum] : sums) {
    for (const int count : sum) {
      // Vectors that all ranks need are read by each.
      const bool shared = name.ends_with("norm");
      ASSERT_EQ(count, shared ? ranks : 1) << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Loading,
                         testing::Values(std::tuple("llama", false, 1),
                                         std::tuple("llama", true, 1), std::tuple("llama", true, 3),
                                         std::tuple("qwen2", true, 1),
                                         std::tuple("qwen2", false, 2),
                                         std::tuple("qwen3", false, 1),
                                         std::tuple("qwen3", true, 3)));

}  // namespace
}  // namespace passel::model
