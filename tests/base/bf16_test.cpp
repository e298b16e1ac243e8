#include "runtime/base/bf16.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "runtime/base/random.h"

namespace passel {
namespace {

// The reference: of the two bfloat16 neighbours of a finite x (truncated, and truncated plus one
// step), the nearer one in exact (double) arithmetic, the even one of a tie. Above the largest
// finite value the next step counts as 2^128 and stands for infinity.
uint16_t NearestBf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const auto low = static_cast<uint16_t>(u >> 16);
  const auto high = static_cast<uint16_t>(low + 1);
  const auto magnitude = [](uint16_t bits) {
    const uint16_t m = bits & 0x7fffu;
    return m == 0x7f80u ? std::ldexp(1.0, 128)
                        : static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(m) << 16));
  };
  const double value = std::fabs(static_cast<double>(x));
  const double to_low = value - magnitude(low);
  const double to_high = magnitude(high) - value;
  if (to_low < to_high) return low;
  if (to_high < to_low) return high;
  return (low & 1u) == 0 ? low : high;
}

TEST(Bf16, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const bf16 x{static_cast<uint16_t>(bits)};
    const bf16 back = ToBf16(ToFloat(x));
    if (std::isnan(ToFloat(x))) {
      EXPECT_TRUE(std::isnan(ToFloat(back))) << bits;
    } else {
      EXPECT_EQ(back.bits, x.bits) << bits;
    }
  }
}

TEST(Bf16, RoundsToNearestEven) {
  Random random(11);
  for (int i = 0; i < 1'000'000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random.Next()));
    if (!std::isfinite(x)) continue;
    ASSERT_EQ(ToBf16(x).bits, NearestBf16(x)) << x;
  }
}

TEST(Bf16, TiesGoToTheEvenNeighbour) {
  for (uint32_t high = 0; high < 0xff80; ++high) {
    if ((high & 0x7f80u) == 0x7f80u) continue;  // infinities and NaN
    const float tie = std::bit_cast<float>((high << 16) | 0x8000u);
    const uint32_t even = high + (high & 1u);
    ASSERT_EQ(ToBf16(tie).bits, even) << high;
  }
}

TEST(Bf16, NanStaysNanHoweverSmallItsPayload) {
  for (const uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    const bf16 rounded = ToBf16(std::bit_cast<float>(bits));
    EXPECT_TRUE(std::isnan(ToFloat(rounded))) << std::hex << bits;
    EXPECT_EQ(rounded.bits >> 15, bits >> 31) << std::hex << bits;
  }
}

TEST(Bf16, OverflowRoundsToInfinity) {
  EXPECT_EQ(ToFloat(ToBf16(std::numeric_limits<float>::max())),
            std::numeric_limits<float>::infinity());
  EXPECT_EQ(ToFloat(ToBf16(-std::numeric_limits<float>::max())),
            -std::numeric_limits<float>::infinity());
}

}  // namespace
}  // namespace passel
