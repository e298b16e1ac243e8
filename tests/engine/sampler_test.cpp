#include "runtime/engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

namespace passel::engine {
namespace {

std::vector<double> Softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> p;
  double total = 0;
  for (const float x : logits) {
    p.push_back(std::exp(x / temperature));
    total += p.back();
  }
  for (double& x : p) x /= total;
  return p;
}

const std::vector<float> kLogits = {0.5f, -1.0f, 2.0f, 0.0f, 1.5f, -0.5f, 1.0f, -2.0f};

TEST(RuleFor, SeedAndPositionAloneDecideTheDraw) {
  SamplingParams params{.temperature = 0.7, .top_p = 0.9, .seed = 77};
  std::set<double> positions, seeds;
  for (uint64_t position = 0; position < 50; ++position) {
    const gpu::SamplingRule rule = RuleFor(params, position);
    EXPECT_EQ(rule.temperature, 0.7);
    EXPECT_EQ(rule.top_p, 0.9);
    EXPECT_EQ(RuleFor(params, position).draw, rule.draw);
    positions.insert(rule.draw);
    SamplingParams other = params;
    other.seed = position;
    seeds.insert(RuleFor(other, 0).draw);
  }
  EXPECT_EQ(positions.size(), 50u);
  EXPECT_EQ(seeds.size(), 50u);
}

TEST(RuleFor, DrawsAreUniformOverSeedsAndPositions) {
  constexpr int kBins = 8, kDraws = 40000;
  std::vector<int> by_seed(kBins), by_position(kBins);
  for (uint64_t i = 0; i < kDraws; ++i) {
    const auto bin = [](double draw) { return static_cast<size_t>(draw * kBins); };
    ++by_seed.at(bin(RuleFor({.seed = i}, 3).draw));
    ++by_position.at(bin(RuleFor({.seed = 5}, i).draw));
  }
  for (const auto& counts : {by_seed, by_position}) {
    double sum = 0;
    for (const int count : counts) {
      const double want = double{kDraws} / kBins;
      sum += (count - want) * (count - want) / want;
    }
    EXPECT_LT(sum, 24.3);  // χ² of 7 degrees of freedom, 99.9%
  }
}

TEST(Logprobs, AreTheLogSoftmaxOfAllTokens) {
  const std::vector<double> p = Softmax(kLogits, 1.0);
  const PositionLogprobs all = ComputeLogprobs(kLogits, 3, 8);
  ASSERT_EQ(all.size(), 9u);
  EXPECT_EQ(all[0].id, 3);
  double sum = 0;
  for (size_t i = 1; i < all.size(); ++i) {
    sum += std::exp(static_cast<double>(all[i].logprob));
    EXPECT_NEAR(all[i].logprob, std::log(p[static_cast<size_t>(all[i].id)]), 1e-6);
    if (i > 1) {
      EXPECT_LE(all[i].logprob, all[i - 1].logprob);
    }
  }
  EXPECT_NEAR(sum, 1.0, 1e-6);
}

TEST(Logprobs, SurviveLargeLogitsAndAskForMoreThanThereIs) {
  const PositionLogprobs far = ComputeLogprobs(std::vector<float>{1e4f, -1e4f}, 1, 20);
  ASSERT_EQ(far.size(), 3u);
  EXPECT_FLOAT_EQ(far[0].logprob, -2e4f);
  EXPECT_FLOAT_EQ(far[1].logprob, 0.0f);
  EXPECT_EQ(ComputeLogprobs(kLogits, 0, 0).size(), 1u);
}

TEST(FindStop, TheFirstInTheTextWinsAndMayHaveBegunBefore) {
  const std::vector<std::string> stops = {"se", "Ho", "lo W"};
  EXPECT_EQ(FindStop("a House", 1, stops), 2u);
  EXPECT_EQ(FindStop("hello World", 5, stops), 3u);
  EXPECT_EQ(FindStop("hello", 0, stops), std::string::npos);
  EXPECT_EQ(FindStop("hello", 0, {}), std::string::npos);
}

}  // namespace
}  // namespace passel::engine
