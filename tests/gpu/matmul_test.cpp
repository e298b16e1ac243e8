#include <gtest/gtest.h>

#include <cmath>
#include <tuple>

#include "runtime/base/error.h"
#include "tests/gpu/device_matrix.h"

namespace passel::gpu {
namespace {

std::unique_ptr<Device> MakeDevice(bool deterministic, int32_t threads) {
  return MakeTestDevice({.threads = threads, .deterministic = deterministic});
}

// Rows [0, n) of x times wᵀ on the device.
std::vector<float> Multiply(Device& device, const Linear& w, const std::vector<float>& x, int64_t n,
                            int64_t gap = 0) {
  DeviceMatrix in(device, device.activation_type(), n, w.in_features(), gap);
  in.Set(std::span(x).first(static_cast<size_t>(n * w.in_features())));
  DeviceMatrix out(device, DType::kF32, n, w.out_features(), gap);
  device.MatMul(w, in.tensor, out.tensor);
  return out.Get();
}

// (rows, in features, out features, deterministic)
class MatMul : public testing::TestWithParam<std::tuple<int64_t, int64_t, int64_t, bool>> {};

TEST_P(MatMul, EqualsFloat64) {
  const auto [n, in, out, deterministic] = GetParam();
  Random random(static_cast<uint64_t>(n * 1000003 + in * 101 + out));
  // Of what bf16 holds, so that only the products' rounding is left.
  const auto w = RoundToBf16(RandomFloats(random, out * in));
  const auto x = RoundToBf16(RandomFloats(random, n * in));
  const auto device = MakeDevice(deterministic, 2);
  const auto linear = device->MakeLinear(out, in, ReaderOf(w, in));
  for (const int64_t gap : {0, 8}) {
    const auto y = Multiply(*device, *linear, x, n, gap);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t o = 0; o < out; ++o) {
        double exact = 0, size = 0;
        for (int64_t j = 0; j < in; ++j) {
          const double product = static_cast<double>(x[static_cast<size_t>(i * in + j)]) *
                                 static_cast<double>(w[static_cast<size_t>(o * in + j)]);
          exact += product;
          size += std::abs(product);
        }
        ASSERT_NEAR(static_cast<double>(y[static_cast<size_t>(i * out + o)]), exact, 2e-6 * size)
            << "row " << i << ", feature " << o << ", gap " << gap;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, MatMul,
                         testing::Combine(testing::Values(1, 3, 17, 64, 131),
                                          testing::Values(16, 48, 576),
                                          testing::Values(1, 63, 64, 200), testing::Bool()));

TEST(MatMulBits, RowDoesNotDependOnItsBatch) {
  Random random(5);
  const auto device = MakeDevice(/*deterministic=*/true, 2);
  for (const int64_t in : {48, 576, 1536}) {
    const int64_t out = 320;
    const auto w = RandomFloats(random, out * in);
    const auto x = RandomFloats(random, 80 * in);
    const auto linear = device->MakeLinear(out, in, ReaderOf(w, in));
    const auto all = Multiply(*device, *linear, x, 80);
    for (const int64_t n : {1, 4, 16, 17}) {
      for (const int64_t first : {0, 3, 37}) {
        const std::vector<float> part(x.begin() + first * in, x.begin() + (first + n) * in);
        const auto y = Multiply(*device, *linear, part, n);
        const std::vector<float> expected(all.begin() + first * out,
                                          all.begin() + (first + n) * out);
        EXPECT_TRUE(SameBits(y, expected)) << in << " features, rows " << first << " + " << n;
      }
    }
  }
}

TEST(MatMulBits, DoNotDependOnThreads) {
  for (const bool deterministic : {false, true}) {
    for (const int64_t n : {1, 5, 200}) {
      std::vector<float> first;
      for (const int32_t threads : {1, 2, 3}) {
        Random random(9);
        const auto w = RandomFloats(random, 700 * 192);
        const auto x = RandomFloats(random, n * 192);
        const auto device = MakeDevice(deterministic, threads);
        const auto linear = device->MakeLinear(700, 192, ReaderOf(w, 192));
        const auto y = Multiply(*device, *linear, x, n);
        if (threads == 1) first = y;
        EXPECT_TRUE(SameBits(y, first)) << threads << " threads, " << n << " rows";
      }
    }
  }
}

TEST(Embed, ReadsTheRowsOfALinear) {
  Random random(11);
  const int64_t vocab = 333;
  for (const int64_t hidden : {48, 576}) {
    const auto w = RoundToBf16(RandomFloats(random, vocab * hidden));
    const auto device = MakeDevice(false, 2);
    const auto linear = device->MakeLinear(vocab, hidden, ReaderOf(w, hidden));
    const std::vector<int32_t> ids = {0, 332, 64, -1, 63, 64, 200};
    std::vector<float> expected;
    for (const int32_t id : ids) {
      for (int64_t j = 0; j < hidden; ++j) {
        expected.push_back(id < 0 ? 0.0f : w[static_cast<size_t>(id * hidden + j)]);
      }
    }
    DeviceMatrix out(*device, DType::kF32, static_cast<int64_t>(ids.size()), hidden);
    device->Embed(*linear, ids, out.tensor);
    EXPECT_EQ(out.Get(), expected);
    const std::vector<int32_t> beyond = {333, 0, 0, 0, 0, 0, 0};
    EXPECT_THROW(device->Embed(*linear, beyond, out.tensor), Error);
  }
}

TEST(Memory, IsCountedAndRefusedBeyondTheLimit) {
  const auto device = MakeTestDevice({.memory_limit_bytes = 1 << 20, .threads = 1});
  EXPECT_EQ(device->info().memory_bytes, uint64_t{1} << 20);
  EXPECT_EQ(device->allocated_bytes(), 0u);
  auto half = device->Allocate(1 << 19);
  EXPECT_EQ(device->allocated_bytes(), uint64_t{1} << 19);
  const auto refuses = [](const auto& f) {
    try {
      f();
    } catch (const Error& e) {
      return e.error_class() == ErrorClass::kMemory;
    }
    return false;
  };
  EXPECT_TRUE(refuses([&] { device->Allocate((1 << 19) + 1); }));
  EXPECT_TRUE(refuses([&] { device->Allocate(SIZE_MAX); }));
  EXPECT_TRUE(refuses([&] { device->AllocateStaging(SIZE_MAX); }));
  const std::vector<float> w(1024 * 1024);
  EXPECT_TRUE(refuses([&] { device->MakeLinear(1024, 1024, ReaderOf(w, 1024)); }));
  EXPECT_TRUE(refuses([&] { device->CreateKvPool({4, 4, 64, 1}, 1 << 20); }));
  EXPECT_EQ(device->allocated_bytes(), uint64_t{1} << 19);
  auto rest = device->Allocate(1 << 19);
  EXPECT_EQ(device->allocated_bytes(), uint64_t{1} << 20);
  half.reset();
  rest.reset();
  EXPECT_EQ(device->allocated_bytes(), 0u);
}

TEST(Memory, LinearThatCannotBeReadLeavesNothing) {
  const auto device = MakeDevice(false, 2);
  EXPECT_THROW(
      device->MakeLinear(
          256, 64, [](int64_t, int64_t, bf16*) { throw Error(ErrorClass::kModel, "truncated"); }),
      Error);
  EXPECT_EQ(device->allocated_bytes(), 0u);
}

TEST(Shapes, ThatDisagreeAreRefused) {
  const auto device = MakeDevice(false, 1);
  const std::vector<float> w(64 * 32);
  const auto linear = device->MakeLinear(64, 32, ReaderOf(w, 32));
  DeviceMatrix x(*device, device->activation_type(), 2, 32);
  DeviceMatrix narrow(*device, device->activation_type(), 2, 16);
  DeviceMatrix out(*device, DType::kF32, 2, 64);
  DeviceMatrix few(*device, DType::kF32, 1, 64);
  EXPECT_THROW(device->MatMul(*linear, narrow.tensor, out.tensor), Error);
  EXPECT_THROW(device->MatMul(*linear, x.tensor, few.tensor), Error);
  EXPECT_THROW(x.tensor.Rows(1, 2), Error);
  EXPECT_THROW(x.tensor.Cols(-1, 2), Error);
}

}  // namespace
}  // namespace passel::gpu
