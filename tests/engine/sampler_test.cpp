#include "runtime/engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/random.h"

namespace passel::engine {
namespace {

constexpr int kDraws = 40000;

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

std::vector<int> Draw(const std::vector<float>& logits, SamplingParams params) {
  std::vector<int> counts(logits.size());
  for (int i = 0; i < kDraws; ++i) {
    // Half of the draws differ in the seed, half in the position: both must be random.
    params.seed = static_cast<uint64_t>(i % 200);
    ++counts[static_cast<size_t>(SampleToken(logits, params, static_cast<uint64_t>(i / 200)))];
  }
  return counts;
}

double ChiSquare(const std::vector<int>& counts, const std::vector<double>& p) {
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0) {
      EXPECT_EQ(counts[i], 0) << "token " << i << " has no probability";
      continue;
    }
    const double want = kDraws * p[i];
    sum += (counts[i] - want) * (counts[i] - want) / want;
  }
  return sum;
}

const std::vector<float> kLogits = {0.5f, -1.0f, 2.0f, 0.0f, 1.5f, -0.5f, 1.0f, -2.0f};
constexpr double kLimit7 = 24.3;  // χ² of 7 degrees of freedom, 99.9%
constexpr double kLimit2 = 13.8;  // of 2

TEST(Sampler, GreedyTakesTheHighestAndTiesGoToTheLowerId) {
  SamplingParams greedy;
  greedy.temperature = 0;
  EXPECT_EQ(SampleToken(std::vector<float>{1, 5, 5, 2}, greedy, 0), 1);
  EXPECT_EQ(SampleToken(std::vector<float>{3, 1, 3, 3}, greedy, 9), 0);
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(SampleToken(std::vector<float>{-infinity, -infinity, -1000}, greedy, 0), 2);
}

TEST(Sampler, NoLogitsAndNaNAreBugs) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(SampleToken({}, {}, 0), Error);
  EXPECT_THROW(SampleToken(std::vector<float>{1, nan}, {}, 0), Error);
}

TEST(Sampler, FollowsTheSoftmaxAtEveryTemperature) {
  for (const double temperature : {0.5, 1.0, 2.0}) {
    SamplingParams params;
    params.temperature = temperature;
    EXPECT_LT(ChiSquare(Draw(kLogits, params), Softmax(kLogits, temperature)), kLimit7)
        << "temperature " << temperature;
  }
}

TEST(Sampler, ChiSquareSeesAWrongTemperature) {
  SamplingParams params;
  EXPECT_GT(ChiSquare(Draw(kLogits, params), Softmax(kLogits, 1.05)), kLimit7);
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
  // The most likely are 2, 4 and 6: two of them miss 0.75, three reach it.
  SamplingParams params;
  params.top_p = 0.75;
  std::vector<double> p = Softmax(kLogits, 1.0);
  ASSERT_LT(p[2] + p[4], 0.75);
  ASSERT_GT(p[2] + p[4] + p[6], 0.75);
  const double kept = p[2] + p[4] + p[6];
  for (size_t i = 0; i < p.size(); ++i) p[i] = i == 2 || i == 4 || i == 6 ? p[i] / kept : 0;
  EXPECT_LT(ChiSquare(Draw(kLogits, params), p), kLimit2);
}

TEST(Sampler, TinyTopPAndTinyTemperatureAreGreedy) {
  SamplingParams narrow;
  narrow.top_p = 1e-9;
  SamplingParams cold;
  cold.temperature = 1e-4;
  for (uint64_t i = 0; i < 200; ++i) {
    EXPECT_EQ(SampleToken(kLogits, narrow, i), 2);
    EXPECT_EQ(SampleToken(kLogits, cold, i), 2);
  }
}

TEST(Sampler, TopPTiesGoToTheLowerId) {
  SamplingParams narrow;
  narrow.top_p = 0.4;  // of four equal tokens: two
  std::set<int32_t> seen;
  for (uint64_t i = 0; i < 200; ++i) {
    seen.insert(SampleToken(std::vector<float>{1, 1, 1, 1}, narrow, i));
  }
  EXPECT_EQ(seen, (std::set<int32_t>{0, 1}));
}

TEST(Sampler, SeedAndPositionAloneDecideTheDraw) {
  Random random(3);
  std::vector<float> logits(1000);
  for (float& x : logits) x = static_cast<float>(random.Normal());
  SamplingParams params;
  params.seed = 77;
  std::set<int32_t> positions, seeds;
  for (uint64_t position = 0; position < 50; ++position) {
    const int32_t first = SampleToken(logits, params, position);
    EXPECT_EQ(first, SampleToken(logits, params, position));
    positions.insert(first);
    SamplingParams other = params;
    other.seed = position;
    seeds.insert(SampleToken(logits, other, 0));
  }
  EXPECT_GT(positions.size(), 30u);
  EXPECT_GT(seeds.size(), 30u);
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
