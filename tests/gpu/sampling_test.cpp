#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "tests/gpu/device_matrix.h"

namespace passel::gpu {
namespace {

std::vector<int32_t> Sample(Device& device, const DeviceMatrix& logits,
                            const std::vector<SamplingRule>& rules) {
  const auto staging = device.AllocateStaging(rules.size() * sizeof(int32_t));
  const std::span<int32_t> ids(static_cast<int32_t*>(staging->data()), rules.size());
  std::fill(ids.begin(), ids.end(), -77);
  device.Sample(logits.tensor, rules, ids);
  device.Record()->Wait();
  return {ids.begin(), ids.end()};
}

std::vector<double> Softmax(const std::vector<float>& logits, double temperature) {
  const double max = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  for (const float x : logits) p.push_back(std::exp((x - max) / temperature));
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= total;
  return p;
}

const std::vector<float> kLogits = {0.5f, -1.0f, 2.0f, 0.0f, 1.5f, -0.5f, 1.0f, -2.0f};
constexpr double kLimit7 = 24.3;  // χ² of 7 degrees of freedom, 99.9%
constexpr double kLimit2 = 13.8;  // of 2

// How often each token of `logits` is chosen.
constexpr int kRows = 1000, kRounds = 40;
std::vector<int> Draw(const std::vector<float>& logits, SamplingRule rule) {
  const auto device = MakeTestDevice({.threads = 2});
  const auto cols = static_cast<int64_t>(logits.size());
  std::vector<float> all;
  for (int i = 0; i < kRows; ++i) all.insert(all.end(), logits.begin(), logits.end());
  DeviceMatrix in(*device, DType::kF32, kRows, cols, 3);
  in.Set(all);
  Random random(41);
  std::vector<int> counts(logits.size());
  for (int round = 0; round < kRounds; ++round) {
    std::vector<SamplingRule> rules(kRows, rule);
    for (SamplingRule& r : rules) r.draw = random.Uniform();
    for (const int32_t id : Sample(*device, in, rules)) ++counts.at(static_cast<size_t>(id));
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
    const double want = kRows * kRounds * p[i];
    sum += (counts[i] - want) * (counts[i] - want) / want;
  }
  return sum;
}

TEST(Sample, GreedyTakesTheLowestOfTheLargestAndNaNIsReported) {
  const auto device = MakeTestDevice({.threads = 2});
  Random random(15);
  const int64_t n = 6, cols = 5003;
  auto x = RandomFloats(random, n * cols);
  const auto at = [&](int64_t row, int64_t col) -> float& {
    return x[static_cast<size_t>(row * cols + col)];
  };
  at(0, 4999) = 50;
  at(1, 17) = at(1, 4098) = 50;
  at(2, 0) = 50;
  at(3, 2500) = NAN;
  at(3, 100) = INFINITY;
  for (int64_t j = 0; j < cols; ++j) at(4, j) = -INFINITY;
  at(5, 3000) = INFINITY;
  DeviceMatrix in(*device, DType::kF32, n, cols, 1);
  in.Set(x);
  const std::vector<int32_t> expected{4999, 17, 0, -1, 0, 3000};
  EXPECT_EQ(Sample(*device, in, std::vector<SamplingRule>(n)), expected);
  // Nearly no temperature, nearly no top_p.
  const SamplingRule cold{1e-6, 1, 0.99}, narrow{1, 1e-9, 0.99};
  EXPECT_EQ(Sample(*device, in, {cold, narrow, cold, cold, narrow, cold}), expected);
}

TEST(Sample, FollowsTheSoftmaxAtEveryTemperature) {
  for (const double temperature : {0.5, 1.0, 2.0}) {
    EXPECT_LT(ChiSquare(Draw(kLogits, {temperature}), Softmax(kLogits, temperature)), kLimit7)
        << "temperature " << temperature;
  }
}

TEST(Sample, ChiSquareSeesAWrongTemperature) {
  EXPECT_GT(ChiSquare(Draw(kLogits, {1.0}), Softmax(kLogits, 1.05)), kLimit7);
}

TEST(Sample, TopPKeepsTheSmallestSetThatReachesIt) {
  // The most likely are 2, 4 and 6: two of them miss 0.75, three reach it.
  std::vector<double> p = Softmax(kLogits, 1.0);
  ASSERT_LT(p[2] + p[4], 0.75);
  ASSERT_GT(p[2] + p[4] + p[6], 0.75);
  const double kept = p[2] + p[4] + p[6];
  for (size_t i = 0; i < p.size(); ++i) p[i] = i == 2 || i == 4 || i == 6 ? p[i] / kept : 0;
  EXPECT_LT(ChiSquare(Draw(kLogits, {1.0, 0.75}), p), kLimit2);
}

TEST(Sample, TopPTiesGoToTheLowerId) {
  const auto counts = Draw({1, 1, 1, 1, -5}, {1.0, 0.45});  // of four equal tokens: two
  EXPECT_GT(counts[0], 0);
  EXPECT_GT(counts[1], 0);
  EXPECT_EQ(counts[0] + counts[1], kRows * kRounds);
}

// Random rows and rules: what is chosen is in the set, and where the draw falls, up to rounding.
TEST(Sample, EqualsFloat64) {
  constexpr double kEdge = 1e-5;
  const auto device = MakeTestDevice({.threads = 2});
  Random random(19);
  for (const int64_t cols : {1, 37, 1025, 50021}) {
    const int64_t n = 24;
    auto x = RandomFloats(random, n * cols, 3);
    // Some equal ones, some that are out of the question.
    for (size_t i = 0; i < x.size(); i += 7) x[i] = std::round(x[i]);
    for (size_t i = 3; i < x.size(); i += 29) {
      if (i % static_cast<size_t>(cols) != 0) x[i] = -INFINITY;
    }
    DeviceMatrix in(*device, DType::kF32, n, cols, 5);
    in.Set(x);
    std::vector<SamplingRule> rules;
    for (int64_t i = 0; i < n; ++i) {
      rules.push_back({0.2 + 2 * random.Uniform(), i % 3 == 0 ? 1 : random.Uniform(),
                       i % 5 == 0 ? 0 : random.Uniform()});
    }
    const auto ids = Sample(*device, in, rules);
    EXPECT_EQ(Sample(*device, in, rules), ids) << "twice the same";
    for (int64_t i = 0; i < n; ++i) {
      const std::vector<float> row(x.begin() + i * cols, x.begin() + (i + 1) * cols);
      const SamplingRule& rule = rules[static_cast<size_t>(i)];
      const auto p = Softmax(row, rule.temperature);
      std::vector<size_t> order(row.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](size_t a, size_t b) { return row[a] > row[b]; });
      std::vector<double> before(row.size()), kept(row.size());  // of the likelier; if in the set
      double sum = 0;
      for (const size_t id : order) {
        before[id] = sum;
        if (sum == 0 || sum < rule.top_p) kept[id] = p[id];
        sum += p[id];
      }
      const double total = std::accumulate(kept.begin(), kept.end(), 0.0);
      const auto chosen = static_cast<size_t>(ids[static_cast<size_t>(i)]);
      ASSERT_LT(chosen, row.size());
      EXPECT_TRUE(before[chosen] == 0 || before[chosen] < rule.top_p + kEdge)
          << cols << " columns, row " << i << ": not in the set";
      const double low =
          std::accumulate(kept.begin(), kept.begin() + static_cast<long>(chosen), 0.0);
      EXPECT_LE(low / total, rule.draw + kEdge) << cols << " columns, row " << i;
      EXPECT_GE((low + p[chosen]) / total, rule.draw - kEdge) << cols << " columns, row " << i;
    }
  }
}

}  // namespace
}  // namespace passel::gpu
