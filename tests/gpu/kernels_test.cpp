// Every instruction set's loops against float64. What CpuDevice does with them is tested through
// it.

#include "gpu/cpu/kernels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "runtime/base/error.h"
#include "runtime/base/partial.h"
#include "tests/gpu/device_matrix.h"

namespace passel::gpu::cpu {
namespace {

class KernelsOf : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    try {
      kernels_ = &SelectKernels(GetParam());
    } catch (const Error& e) {
      GTEST_SKIP() << e.what();
    }
  }
  const Kernels* kernels_ = nullptr;
  Random random_{33};
};

TEST_P(KernelsOf, ConvertBothWays) {
  auto x = RandomFloats(random_, 1003, 1e3);
  x[0] = NAN;
  x[1] = -INFINITY;
  x[2] = std::bit_cast<float>(0x7f7fffffu);  // rounds up to infinity
  x[3] = std::bit_cast<float>(1u);
  std::vector<bf16> rounded(x.size());
  kernels_->to_bf16(x.data(), rounded.data(), static_cast<int64_t>(x.size()));
  std::vector<float> back(x.size());
  kernels_->to_f32(rounded.data(), back.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_EQ(rounded[i].bits, ToBf16(x[i]).bits) << x[i];
    ASSERT_EQ(std::bit_cast<uint32_t>(back[i]), uint32_t{rounded[i].bits} << 16);
  }
}

TEST_P(KernelsOf, SoftmaxRowIsAStepOfTheOnlineSoftmax) {
  for (const auto& [begin, end] : {std::pair(0, 256), std::pair(5, 199), std::pair(31, 32)}) {
    const auto scores = RandomFloats(random_, 256, 20);
    const float scale = 0.25f;
    for (const float before : {kEmptyMax, -50.0f, 3.0f, 60.0f}) {
      auto p = scores;
      float max = before, den = before == kEmptyMax ? 0.0f : 2.0f;
      const float shrink = kernels_->softmax_row(p.data(), begin, end, 256, scale, &max, &den);
      double exact_max = static_cast<double>(before);
      for (int j = begin; j < end; ++j) {
        exact_max =
            std::max(exact_max, static_cast<double>(scores[static_cast<size_t>(j)] * scale));
      }
      ASSERT_NEAR(static_cast<double>(max), exact_max, 1e-6);
      const double exact_shrink =
          before == kEmptyMax ? 0 : std::exp(static_cast<double>(before) - exact_max);
      ASSERT_NEAR(static_cast<double>(shrink), exact_shrink, 1e-6);
      double sum = before == kEmptyMax ? 0 : 2 * exact_shrink;
      for (int j = 0; j < 256; ++j) {
        const bool counts = j >= begin && j < end;
        const double w =
            counts
                ? std::exp(static_cast<double>(scores[static_cast<size_t>(j)]) * 0.25 - exact_max)
                : 0;
        // An argument of size a is rounded by up to a·2⁻²⁴, twice.
        const double a = std::abs(static_cast<double>(scores[static_cast<size_t>(j)]) * 0.25) +
                         std::abs(exact_max);
        ASSERT_NEAR(static_cast<double>(p[static_cast<size_t>(j)]), w,
                    (1e-6 + a * 1.2e-7) * w + 1e-37);
        sum += w;
      }
      ASSERT_NEAR(static_cast<double>(den), sum, 4e-6 * sum);
    }
  }
}

TEST_P(KernelsOf, SoftmaxRowOfNothingChangesNothing) {
  for (const float before : {kEmptyMax, 1.5f}) {
    auto p = RandomFloats(random_, 64);
    float max = before, den = before == kEmptyMax ? 0.0f : 3.0f;
    const float den_before = den;
    EXPECT_EQ(kernels_->softmax_row(p.data(), 7, 7, 64, 1.0f, &max, &den), 1.0f);
    EXPECT_EQ(max, before);
    EXPECT_EQ(den, den_before);
    for (const float w : p) EXPECT_EQ(w, 0);
  }
}

TEST_P(KernelsOf, RmsNormAndSilu) {
  for (const int64_t n : {1, 15, 16, 100, 576}) {
    auto x = RandomFloats(random_, n), up = RandomFloats(random_, n), w = RandomFloats(random_, n);
    std::vector<float> out(static_cast<size_t>(n));
    kernels_->silu_mul(x.data(), up.data(), out.data(), n);
    double squares = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      const double g = static_cast<double>(x[i]);
      const double exact = g / (1 + std::exp(-g)) * static_cast<double>(up[i]);
      ASSERT_NEAR(static_cast<double>(out[i]), exact, 2e-6 * std::abs(exact));
      squares += g * g;
    }
    kernels_->add_rms_norm(x.data(), nullptr, w.data(), 1e-5f, n, out.data());
    const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
    for (size_t i = 0; i < out.size(); ++i) {
      const double exact = static_cast<double>(x[i]) * scale * static_cast<double>(w[i]);
      ASSERT_NEAR(static_cast<double>(out[i]), exact, 2e-6 * std::abs(exact));
    }
  }
}

TEST_P(KernelsOf, PositiveMask) {
  auto c = RandomFloats(random_, 64);
  c[3] = 0.0f;
  c[5] = -0.0f;
  c[7] = NAN;
  uint64_t expected = 0;
  for (size_t j = 0; j < 64; ++j) expected |= static_cast<uint64_t>(c[j] > 0) << j;
  EXPECT_EQ(kernels_->positive_mask(c.data()), expected);
}

INSTANTIATE_TEST_SUITE_P(Sets, KernelsOf, testing::Values("scalar", "avx2", "avx512"));

TEST(SelectKernels, RefusesUnknownNames) {
  EXPECT_THROW(SelectKernels("avx1024"), Error);
  EXPECT_NO_THROW(SelectKernels(""));
  EXPECT_STREQ(SelectKernels("scalar").name, "scalar");
}

}  // namespace
}  // namespace passel::gpu::cpu
