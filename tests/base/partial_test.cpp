#include "runtime/base/partial.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <vector>

#include "runtime/base/random.h"

namespace passel {
namespace {

constexpr size_t kDim = 16;

// A partial with its own memory.
struct Partial {
  float max = kEmptyMax;
  float den = 0;
  std::vector<float> num = std::vector<float>(kDim, 0.0f);

  PartialRef ref() { return {&max, &den, num.data()}; }
  void Merge(const Partial& other) {
    MergePartial(ref(), other.max, other.den, other.num.data(), kDim);
  }
};

// n tokens with scores N(0, spread²) and values [n, kDim], N(0, 1).
struct Tokens {
  std::vector<float> scores;
  std::vector<float> values;

  Tokens(size_t n, double spread, uint64_t seed) : scores(n), values(n * kDim) {
    Random random(seed);
    for (float& s : scores) s = static_cast<float>(spread * random.Normal());
    for (float& v : values) v = static_cast<float>(random.Normal());
  }
};

// The partial of the tokens `ids`, by its definition.
Partial Of(const Tokens& tokens, const std::vector<size_t>& ids) {
  Partial p;
  for (const size_t i : ids) p.max = std::max(p.max, tokens.scores[i]);
  for (const size_t i : ids) {
    const float w = std::exp(tokens.scores[i] - p.max);
    p.den += w;
    for (size_t j = 0; j < kDim; ++j) p.num[j] += w * tokens.values[i * kDim + j];
  }
  return p;
}

// num/den and ln Σ e^s against float64 over all tokens.
void ExpectWhole(const Partial& p, const Tokens& tokens, double tolerance) {
  const double max = *std::max_element(tokens.scores.begin(), tokens.scores.end());
  double den = 0;
  std::vector<double> num(kDim, 0.0);
  for (size_t i = 0; i < tokens.scores.size(); ++i) {
    const double w = std::exp(tokens.scores[i] - max);
    den += w;
    for (size_t j = 0; j < kDim; ++j) num[j] += w * tokens.values[i * kDim + j];
  }
  EXPECT_NEAR(std::log(static_cast<double>(p.den)) + p.max, std::log(den) + max, tolerance);
  for (size_t j = 0; j < kDim; ++j) EXPECT_NEAR(p.num[j] / p.den, num[j] / den, tolerance);
}

TEST(MergePartial, EmptyWithEmptyIsEmptyWithoutNan) {
  Partial a;
  a.Merge(Partial{});
  EXPECT_EQ(a.max, kEmptyMax);
  EXPECT_EQ(a.den, 0.0f);
  for (const float x : a.num) EXPECT_EQ(x, 0.0f);
}

TEST(MergePartial, EmptyIsNeutralOnBothSides) {
  const Tokens tokens(5, 3.0, 1);
  const Partial p = Of(tokens, {0, 1, 2, 3, 4});
  Partial left = p;
  left.Merge(Partial{});
  Partial right;
  right.Merge(p);
  for (const Partial* merged : {&left, &right}) {
    EXPECT_EQ(merged->max, p.max);
    EXPECT_EQ(merged->den, p.den);
    EXPECT_EQ(merged->num, p.num);
  }
}

TEST(MergePartial, ClearedHoldsNothingOfBefore) {
  const Tokens tokens(5, 3.0, 2);
  Partial p = Of(tokens, {0, 1, 2, 3, 4});
  p.num[0] = std::numeric_limits<float>::quiet_NaN();
  ClearPartial(p.ref(), kDim);
  const Partial other = Of(tokens, {1, 2});
  p.Merge(other);
  EXPECT_EQ(p.max, other.max);
  EXPECT_EQ(p.den, other.den);
  EXPECT_EQ(p.num, other.num);
}

TEST(MergePartial, AnySplitInAnyTreeGivesTheWhole) {
  for (const double spread : {0.1, 3.0, 40.0}) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
      const Tokens tokens(300, spread, seed);
      Random random(1000 + seed);
      // Tokens dealt at random over shards, some of which stay empty.
      std::vector<std::vector<size_t>> ids(9);
      for (size_t i = 0; i < 300; ++i) ids[random.Next() % 7].push_back(i);
      std::vector<Partial> partials;
      partials.reserve(ids.size());
      for (const auto& shard : ids) partials.push_back(Of(tokens, shard));
      while (partials.size() > 1) {
        const size_t from = random.Next() % partials.size();
        const Partial taken = partials[from];
        partials.erase(partials.begin() + static_cast<std::ptrdiff_t>(from));
        partials[random.Next() % partials.size()].Merge(taken);
      }
      ExpectWhole(partials[0], tokens, 1e-5);
    }
  }
}

TEST(MergePartial, MaximaFarApartNeitherOverflowNorCancel) {
  const std::vector<float> ones(kDim, 1.0f);
  Partial p;
  MergePartial(p.ref(), -1e30f, 1.0f, ones.data(), kDim);
  MergePartial(p.ref(), 1e30f, 2.0f, ones.data(), kDim);
  MergePartial(p.ref(), 0.0f, 4.0f, ones.data(), kDim);
  EXPECT_EQ(p.max, 1e30f);
  EXPECT_EQ(p.den, 2.0f);
  EXPECT_EQ(p.num, ones);
}

TEST(MergePartial, EqualMaximaAdd) {
  const std::vector<float> ones(kDim, 1.0f);
  Partial p;
  MergePartial(p.ref(), 5.0f, 1.5f, ones.data(), kDim);
  MergePartial(p.ref(), 5.0f, 2.5f, ones.data(), kDim);
  EXPECT_EQ(p.max, 5.0f);
  EXPECT_EQ(p.den, 4.0f);
  EXPECT_EQ(p.num, std::vector<float>(kDim, 2.0f));
}

}  // namespace
}  // namespace passel
