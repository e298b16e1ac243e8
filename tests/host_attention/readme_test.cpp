// The example of host_attention/README.md, as it stands there.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "readme_example.h"

namespace passel {
namespace {

// Keys that stand at a cosine of about 0.97 to every query: each token is sampled all but surely,
// so that the estimate is exact attention.
TEST(ReadmeExample, AttendsToKeysThatAreSurelySampled) {
  constexpr uint64_t kTokens = 3000;
  constexpr uint32_t kDim = 64, kGroup = 2;
  Random random(5);
  std::vector<float> base(kDim), q, keys;
  for (float& x : base) x = static_cast<float>(random.Normal());
  for (uint32_t h = 0; h < kGroup; ++h) {
    for (const float x : base) q.push_back(x * (1.0f + 0.1f * static_cast<float>(h)));
  }
  std::vector<bf16> rows;
  for (uint64_t i = 0; i < kTokens; ++i) {
    for (const float x : base) {
      rows.push_back(ToBf16(x + 0.25f * static_cast<float>(random.Normal())));
      keys.push_back(ToFloat(rows.back()));
    }
    for (uint32_t j = 0; j < kDim; ++j) {
      rows.push_back(ToBf16(static_cast<float>(random.Normal()) + 1.0f));
    }
  }
  const std::vector<float> mean(kDim);
  const std::vector<float> out = Attend(rows, keys, mean, q, kTokens, kDim);

  ASSERT_EQ(out.size(), size_t{kGroup} * kDim);
  for (uint32_t h = 0; h < kGroup; ++h) {
    double den = 0, error = 0, norm = 0;
    std::vector<double> num(kDim);
    for (uint64_t i = 0; i < kTokens; ++i) {
      double score = 0;
      for (uint32_t j = 0; j < kDim; ++j) {
        score += static_cast<double>(q[h * kDim + j]) * static_cast<double>(keys[i * kDim + j]);
      }
      const double weight = std::exp(score / std::sqrt(static_cast<double>(kDim)));
      den += weight;
      for (uint32_t j = 0; j < kDim; ++j) {
        num[j] += weight * static_cast<double>(ToFloat(rows[(2 * i + 1) * kDim + j]));
      }
    }
    for (uint32_t j = 0; j < kDim; ++j) {
      const double exact = num[j] / den;
      error += std::pow(static_cast<double>(out[h * kDim + j]) - exact, 2);
      norm += exact * exact;
    }
    EXPECT_LT(std::sqrt(error / norm), 1e-3) << h;
  }
}

}  // namespace
}  // namespace passel
