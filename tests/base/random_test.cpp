#include "runtime/base/random.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace passel {
namespace {

// The first numbers of SplitMix64 with seed 1234567, as published with its reference code.
TEST(Random, IsSplitMix64) {
  Random random(1234567);
  const std::array<uint64_t, 5> expected = {6457827717110365317u, 3203168211198807973u,
                                            9817491932198370423u, 4593380528125082431u,
                                            16408922859458223821u};
  for (const uint64_t x : expected) EXPECT_EQ(random.Next(), x);
}

TEST(Random, EqualSeedsGiveEqualStreamsAndOthersDiffer) {
  Random a(42);
  Random b(42);
  Random c(43);
  int equal_to_c = 0;
  for (int i = 0; i < 1000; ++i) {
    const double x = a.Normal();
    EXPECT_EQ(x, b.Normal());
    equal_to_c += x == c.Normal();
  }
  EXPECT_EQ(equal_to_c, 0);
}

TEST(Random, UniformStaysInItsRangeAndHasItsMoments) {
  Random random(7);
  constexpr int kCount = 1'000'000;
  double sum = 0;
  double squares = 0;
  for (int i = 0; i < kCount; ++i) {
    const double x = random.Uniform();
    ASSERT_GE(x, 0.0);
    ASSERT_LT(x, 1.0);
    sum += x;
    squares += (x - 0.5) * (x - 0.5);
  }
  // Five standard errors: sqrt(1/12/n) of the mean, sqrt(1/180/n) of the variance.
  EXPECT_NEAR(sum / kCount, 0.5, 5 * std::sqrt(1.0 / 12 / kCount));
  EXPECT_NEAR(squares / kCount, 1.0 / 12, 5 * std::sqrt(1.0 / 180 / kCount));
}

TEST(Random, NormalHasTheMomentsAndTailsOfN01) {
  Random random(8);
  constexpr int kCount = 1'000'000;
  std::array<double, 4> moments{};  // E[x], E[x²], E[x³], E[x⁴]
  int beyond_two = 0;
  double pair_product = 0;  // of the two numbers that one Box-Muller step gives
  double previous = 0;
  for (int i = 0; i < kCount; ++i) {
    const double x = random.Normal();
    ASSERT_TRUE(std::isfinite(x));
    double power = 1;
    for (double& m : moments) m += (power *= x);
    beyond_two += std::fabs(x) > 2;
    if (i % 2 == 1) pair_product += x * previous;
    previous = x;
  }
  const double n = kCount;
  // Five standard errors; Var[x^k] = E[x^2k] − E[x^k]² is 1, 2, 15, 96.
  EXPECT_NEAR(moments[0] / n, 0.0, 5 * std::sqrt(1 / n));
  EXPECT_NEAR(moments[1] / n, 1.0, 5 * std::sqrt(2 / n));
  EXPECT_NEAR(moments[2] / n, 0.0, 5 * std::sqrt(15 / n));
  EXPECT_NEAR(moments[3] / n, 3.0, 5 * std::sqrt(96 / n));
  const double tail = std::erfc(2 / std::sqrt(2.0));
  EXPECT_NEAR(beyond_two / n, tail, 5 * std::sqrt(tail / n));
  EXPECT_NEAR(pair_product / (n / 2), 0.0, 5 * std::sqrt(2 / n));
}

// Published test vectors of 64-bit FNV-1a.
TEST(HashBytes, IsFnv1a) {
  const auto hash = [](std::string_view s) { return HashBytes(s.data(), s.size()); };
  EXPECT_EQ(hash(""), 0xcbf29ce484222325u);
  EXPECT_EQ(hash("a"), 0xaf63dc4c8601ec8cu);
  EXPECT_EQ(hash("foobar"), 0x85944171f73967e8u);
}

TEST(HashBytes, ContinuesFromABasis) {
  const std::string_view text = "foobar";
  EXPECT_EQ(HashBytes(text.data() + 3, 3, HashBytes(text.data(), 3)), HashBytes(text.data(), 6));
}

TEST(RandomProjections, HasItsShapeAndDependsOnTheSeedAlone) {
  const std::vector<float> r = RandomProjections(1, 64, 10, 150);
  ASSERT_EQ(r.size(), size_t{64} * 10 * 150);
  EXPECT_EQ(r, RandomProjections(1, 64, 10, 150));
  EXPECT_NE(r, RandomProjections(2, 64, 10, 150));
}

// What SimHash rests on: a random hyperplane parts two vectors at angle θ with probability θ/π.
TEST(RandomProjections, HyperplanesPartVectorsByTheirAngle) {
  constexpr size_t kDim = 16;
  constexpr size_t kPlanes = 200'000;
  const std::vector<float> r = RandomProjections(3, kDim, 1, kPlanes);
  for (const double angle : {0.2, 1.0, 2.5}) {
    size_t parted = 0;
    for (size_t t = 0; t < kPlanes; ++t) {
      const double x = r[t];                // along axis 0
      const double y = r[5 * kPlanes + t];  // along axis 5
      parted += (x > 0) != (std::cos(angle) * x + std::sin(angle) * y > 0);
    }
    const double p = angle / std::acos(-1.0);
    EXPECT_NEAR(static_cast<double>(parted) / kPlanes, p, 5 * std::sqrt(p * (1 - p) / kPlanes));
  }
}

}  // namespace
}  // namespace passel
