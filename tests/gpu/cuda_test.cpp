// What only the CUDA device does: larger shapes than the shared tests', which meet every template
// and every cut, against float64.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "tests/gpu/device_matrix.h"

namespace passel::gpu {
namespace {

TEST(CudaMatMul, DeterministicRowsDoNotDependOnTheBatch) {
  const auto device = MakeTestDevice({.deterministic = true});
  Random random(41);
  const int64_t n = 300, in = 576, out = 1000;
  const auto w = RoundToBf16(RandomFloats(random, out * in));
  const auto x = RoundToBf16(RandomFloats(random, n * in));
  const auto linear = device->MakeLinear(out, in, ReaderOf(w, in));
  DeviceMatrix dx(*device, DType::kBf16, n, in, 8), all(*device, DType::kF32, n, out);
  dx.Set(x);
  device->MatMul(*linear, dx.tensor, all.tensor);
  const auto y = all.Get();
  for (const int64_t i : {int64_t{0}, int64_t{127}, int64_t{128}, int64_t{299}}) {
    DeviceMatrix alone(*device, DType::kF32, 1, out, 3);
    device->MatMul(*linear, dx.tensor.Rows(i, 1), alone.tensor);
    EXPECT_TRUE(SameBits(alone.Get(), {y.begin() + i * out, y.begin() + (i + 1) * out}));
    for (int64_t o = 0; o < out; o += 37) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < in; ++j) {
        const double product = static_cast<double>(x[static_cast<size_t>(i * in + j)]) *
                               static_cast<double>(w[static_cast<size_t>(o * in + j)]);
        sum += product;
        size += std::abs(product);
      }
      ASSERT_NEAR(static_cast<double>(y[static_cast<size_t>(i * out + o)]), sum, 1e-6 * size);
    }
  }
}

// Rows of every way to multiply, with features and k that leave ends over: few rows, some tens
// (shared tiles), many; into an empty matrix and onto a full one.
TEST(CudaMatMul, EveryNumberOfRowsEqualsFloat64) {
  const auto device = MakeTestDevice({});
  Random random(43);
  for (const auto& [out, in] :
       {std::pair<int64_t, int64_t>{4096, 1536}, {6000, 1088}, {40000, 136}, {70, 14336}}) {
    const auto w = RoundToBf16(RandomFloats(random, out * in));
    const auto linear = device->MakeLinear(out, in, ReaderOf(w, in));
    for (const int64_t n : {1, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65}) {
      const auto x = RoundToBf16(RandomFloats(random, n * in));
      const auto before = RandomFloats(random, n * out);
      DeviceMatrix dx(*device, DType::kBf16, n, in, 8), y(*device, DType::kF32, n, out, 4),
          sum(*device, DType::kF32, n, out), scratch(*device, DType::kF32, n, out);
      dx.Set(x);
      sum.Set(before);
      for (int repeat = 0; repeat < 3; ++repeat) device->MatMul(*linear, dx.tensor, y.tensor);
      device->MatMulAdd(*linear, dx.tensor, sum.tensor, scratch.tensor);
      const auto got = y.Get(), added = sum.Get();
      for (int64_t i = 0; i < n; i += 1 + n / 5) {
        for (int64_t o = i % 3; o < out; o += 61) {
          double exact = 0, size = 0, squares = 0;
          for (int64_t j = 0; j < in; ++j) {
            const double product = static_cast<double>(x[static_cast<size_t>(i * in + j)]) *
                                   static_cast<double>(w[static_cast<size_t>(o * in + j)]);
            exact += product;
            size += std::abs(product);
            squares += product * product;
          }
          // A chain's blocks round what they hand each other to bf16, 2^-8 of a part's size at
          // most.
          const double rounded =
              n > 8 && n <= 64 ? (std::sqrt(squares) + std::abs(exact)) / 128 : 0;
          const auto at = static_cast<size_t>(i * out + o);
          ASSERT_NEAR(static_cast<double>(got[at]), exact, 1e-6 * size) << n << " rows, " << o;
          ASSERT_NEAR(static_cast<double>(added[at]), exact + static_cast<double>(before[at]),
                      1e-6 * size + rounded)
              << n << " rows, " << o;
        }
      }
    }
  }
}

// What came after a weight is asked for early the next time; that it may be gone by then, or that
// another comes, changes nothing.
TEST(CudaMatMul, WeightsMayComeInAnyOrderAndGo) {
  const auto device = MakeTestDevice({});
  Random random(44);
  const int64_t in = 1024, out = 1200;
  const auto w = RoundToBf16(RandomFloats(random, out * in));
  for (const int64_t n : {4, 60}) {
    DeviceMatrix x(*device, DType::kBf16, n, in), y(*device, DType::kF32, n, out);
    x.Set(RandomFloats(random, n * in));
    const auto first = device->MakeLinear(out, in, ReaderOf(w, in));
    auto second = device->MakeLinear(out, in, ReaderOf(w, in));
    const auto third = device->MakeLinear(out / 2, in, ReaderOf(w, in));
    const auto multiply = [&](const Linear& linear) {
      DeviceMatrix half(*device, DType::kF32, n, out / 2);
      const bool whole = linear.out_features() == out;
      device->MatMul(linear, x.tensor, whole ? y.tensor : half.tensor);
      return whole ? y.Get() : half.Get();
    };
    const auto expected = multiply(*first);
    for (int turn = 0; turn < 2; ++turn) {
      EXPECT_TRUE(SameBits(multiply(*second), expected));
      EXPECT_TRUE(SameBits(multiply(*first), expected));
    }
    second.reset();
    EXPECT_TRUE(SameBits(multiply(*first), expected));
    const auto part = multiply(*third);
    EXPECT_TRUE(SameBits(multiply(*first), expected));
    EXPECT_TRUE(SameBits(multiply(*third), part));
  }
}

// A matrix of several upload panels arrives whole and in place.
TEST(CudaLinear, OfSeveralPanelsIsReadBackByEmbed) {
  const auto device = MakeTestDevice({});
  const int64_t rows = 9001, cols = 2056;
  const auto linear = device->MakeLinear(rows, cols, [&](int64_t begin, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count * cols; ++i) {
      out[i] = bf16{static_cast<uint16_t>(0x3f80 + (begin * cols + i) * 7919 % 4093 % 128)};
    }
  });
  EXPECT_EQ(device->allocated_bytes(), static_cast<uint64_t>(rows * cols * 2));
  const std::vector<int32_t> ids = {0, 4079, 4080, 4081, 8160, 9000};
  DeviceMatrix out(*device, DType::kF32, static_cast<int64_t>(ids.size()), cols);
  device->Embed(*linear, ids, out.tensor);
  const auto y = out.Get();
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t at = ids[i / static_cast<size_t>(cols)] * cols +
                       static_cast<int64_t>(i % static_cast<size_t>(cols));
    ASSERT_EQ(y[i], ToFloat(bf16{static_cast<uint16_t>(0x3f80 + at * 7919 % 4093 % 128)}));
  }
}

// Replies are read from host memory that is written anew every layer, before kernels issued earlier
// are through: never what was there before. Lists of all sizes.
TEST(CudaMergePartials, ReadsWhatTheHostHasJustWritten) {
  const auto device = MakeTestDevice({});
  Random random(45);
  const int64_t rows = 16, heads = 32, dim = 128;
  DeviceMatrix busy(*device, DType::kF32, 2048, heads * dim),
      copy(*device, DType::kF32, 2048, heads * dim);
  DeviceMatrix max(*device, DType::kF32, rows, heads), den(*device, DType::kF32, rows, heads),
      num(*device, DType::kF32, rows, heads * dim);
  for (const int64_t each : {int64_t{1}, int64_t{3}, int64_t{40}}) {  // partials of a head
    const int64_t entries = rows * heads * each;
    const auto staging = device->AllocateStaging(static_cast<size_t>(entries * (dim + 4)) * 4);
    auto* values = static_cast<float*>(staging->data());
    const Partials from{{values, DType::kF32, entries, 1, 1},
                        {values + entries, DType::kF32, entries, 1, 1},
                        {values + 2 * entries, DType::kF32, entries, dim, dim}};
    std::vector<int32_t> at, first;
    for (int64_t i = 0; i < entries; ++i) {
      at.push_back(static_cast<int32_t>(i / (heads * each)));
      first.push_back(static_cast<int32_t>(i / each % heads));
    }
    for (int turn = 0; turn < 20; ++turn) {
      device->ClearPartials({max.tensor, den.tensor, num.tensor});
      for (int i = 0; i < 40; ++i) device->Convert(busy.tensor, copy.tensor);
      const auto value = static_cast<float>(1 + random.Next() % 1000);
      std::fill_n(values, entries, 0.0f);
      std::fill_n(values + entries, entries * (dim + 1), value);
      device->MergePartials({max.tensor, den.tensor, num.tensor}, from, at, first);
      const float sum = value * static_cast<float>(each);
      for (const float x : den.Get()) ASSERT_EQ(x, sum) << each << ", turn " << turn;
      for (const float x : num.Get()) ASSERT_EQ(x, sum) << each << ", turn " << turn;
    }
  }
}

// (heads, kv_heads, head_dim)
class CudaDecode : public testing::TestWithParam<std::tuple<int32_t, int32_t, int32_t>> {};

TEST_P(CudaDecode, OfALongSequenceEqualsFloat64) {
  const auto [heads, kv_heads, dim] = GetParam();
  const auto device = MakeTestDevice({});
  Random random(42);
  const int64_t tokens = 40'007, cols = kv_heads * dim;  // runs of more than one size of split
  const auto pages = static_cast<int32_t>((tokens + kKvPageTokens - 1) / kKvPageTokens);
  device->CreateKvPool({heads, kv_heads, dim, 1 / std::sqrt(static_cast<float>(dim))}, pages);
  std::vector<int32_t> order(static_cast<size_t>(pages));
  for (int32_t p = 0; p < pages; ++p) order[static_cast<size_t>(p)] = pages - 1 - p;
  const auto k = RoundToBf16(RandomFloats(random, tokens * cols));
  const auto v = RoundToBf16(RandomFloats(random, tokens * cols));
  const auto q = RandomFloats(random, heads * dim);
  const auto buffer = device->Allocate(k.size() * sizeof(float));
  const Tensor matrix{buffer->data(), DType::kF32, tokens, cols, cols};
  const auto values = device->Allocate(v.size() * sizeof(float));
  const Tensor value_matrix{values->data(), DType::kF32, tokens, cols, cols};
  device->CopyToDevice(matrix.data, k.data(), buffer->bytes());
  device->CopyToDevice(value_matrix.data, v.data(), values->bytes());
  std::vector<int64_t> slots(static_cast<size_t>(tokens));
  std::iota(slots.begin(), slots.end(), 0);
  device->StoreKv(order, slots, matrix, value_matrix);
  DeviceMatrix dq(*device, DType::kF32, 1, heads * dim), max(*device, DType::kF32, 1, heads),
      den(*device, DType::kF32, 1, heads), num(*device, DType::kF32, 1, heads * dim);
  dq.Set(q);
  const std::vector<KvView> views = {{order, tokens}};
  device->DecodeAttention(dq.tensor, views, {max.tensor, den.tensor, num.tensor});
  const auto m = max.Get(), d = den.Get(), y = num.Get();
  for (int32_t h = 0; h < heads; ++h) {
    const int64_t kv = h / (heads / kv_heads) * dim;
    std::vector<double> scores;
    for (int64_t t = 0; t < tokens; ++t) {
      double dot = 0;
      for (int64_t j = 0; j < dim; ++j) {
        dot += static_cast<double>(q[static_cast<size_t>(h * dim + j)]) *
               static_cast<double>(k[static_cast<size_t>(t * cols + kv + j)]);
      }
      scores.push_back(dot / std::sqrt(static_cast<double>(dim)));
    }
    const double top = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    std::vector<double> exact(static_cast<size_t>(dim));
    for (int64_t t = 0; t < tokens; ++t) {
      const double weight = std::exp(scores[static_cast<size_t>(t)] - top);
      sum += weight;
      for (int64_t j = 0; j < dim; ++j) {
        exact[static_cast<size_t>(j)] +=
            weight * static_cast<double>(v[static_cast<size_t>(t * cols + kv + j)]);
      }
    }
    ASSERT_NEAR(static_cast<double>(m[static_cast<size_t>(h)]), top, 1e-5);
    ASSERT_NEAR(static_cast<double>(d[static_cast<size_t>(h)]), sum, 3e-5 * sum);
    for (int64_t j = 0; j < dim; ++j) {
      ASSERT_NEAR(static_cast<double>(y[static_cast<size_t>(h * dim + j)]),
                  exact[static_cast<size_t>(j)], 3e-5 * sum);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaDecode,
                         testing::Values(std::tuple(8, 2, 128), std::tuple(2, 1, 256),
                                         std::tuple(11, 1, 32), std::tuple(2, 2, 64)));

}  // namespace
}  // namespace passel::gpu
