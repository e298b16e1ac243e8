#include "runtime/base/checked_math.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

#include "runtime/base/random.h"

namespace passel {
namespace {

constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();

TEST(CheckedMath, ProductsAtTheEdge) {
  EXPECT_EQ(CheckedMul(0, kMax), 0u);
  EXPECT_EQ(CheckedMul(1, kMax), kMax);
  EXPECT_EQ(CheckedMul(uint64_t{1} << 32, (uint64_t{1} << 32) - 1), kMax - 0xffffffffu);
  EXPECT_EQ(CheckedMul(uint64_t{1} << 32, uint64_t{1} << 32), std::nullopt);
  EXPECT_EQ(CheckedMul(2, kMax / 2 + 1), std::nullopt);
  EXPECT_EQ(CheckedMul(kMax, kMax), std::nullopt);
}

TEST(CheckedMath, SumsAtTheEdge) {
  EXPECT_EQ(CheckedAdd(kMax, 0), kMax);
  EXPECT_EQ(CheckedAdd(kMax - 1, 1), kMax);
  EXPECT_EQ(CheckedAdd(kMax, 1), std::nullopt);
  EXPECT_EQ(CheckedAdd(kMax, kMax), std::nullopt);
}

TEST(CheckedMath, AgreesWith128Bits) {
  Random random(5);
  int overflows = 0;
  for (int i = 0; i < 100'000; ++i) {
    const uint64_t a = random.Next() >> (random.Next() % 64);
    const uint64_t b = random.Next() >> (random.Next() % 64);
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(a) * b;
    const Wide sum = static_cast<Wide>(a) + b;
    const auto checked_product = CheckedMul(a, b);
    const auto checked_sum = CheckedAdd(a, b);
    ASSERT_EQ(checked_product.has_value(), product <= kMax) << a << " * " << b;
    ASSERT_EQ(checked_sum.has_value(), sum <= kMax) << a << " + " << b;
    if (checked_product) {
      ASSERT_EQ(*checked_product, static_cast<uint64_t>(product));
    }
    if (checked_sum) {
      ASSERT_EQ(*checked_sum, static_cast<uint64_t>(sum));
    }
    overflows += !checked_product;
  }
  EXPECT_GT(overflows, 1000);
}

TEST(CheckedMath, CeilDivDoesNotWrap) {
  EXPECT_EQ(CeilDiv(0, 7), 0u);
  EXPECT_EQ(CeilDiv(1, 7), 1u);
  EXPECT_EQ(CeilDiv(7, 7), 1u);
  EXPECT_EQ(CeilDiv(8, 7), 2u);
  EXPECT_EQ(CeilDiv(kMax, 2), uint64_t{1} << 63);
  EXPECT_EQ(CeilDiv(kMax, 1), kMax);
}

TEST(CheckedMath, RoundUpGivesTheNextMultiple) {
  EXPECT_EQ(RoundUp(0, 64), 0u);
  EXPECT_EQ(RoundUp(1, 64), 64u);
  EXPECT_EQ(RoundUp(64, 64), 64u);
  EXPECT_EQ(RoundUp(65, 64), 128u);
  EXPECT_EQ(RoundUp(10, 3), 12u);
}

}  // namespace
}  // namespace passel
