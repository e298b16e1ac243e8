#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "runtime/base/error.h"
#include "runtime/base/partial.h"
#include "tests/gpu/device_matrix.h"

namespace passel::gpu {
namespace {

// Shapes that fill no vector register, and some that do.
constexpr int64_t kRows[] = {1, 7, 40};
constexpr int64_t kCols[] = {3, 64, 577};

std::unique_ptr<Device> MakeDevice() { return MakeTestDevice({.threads = 2}); }

size_t At(int64_t i, int64_t j, int64_t cols) { return static_cast<size_t>(i * cols + j); }

TEST(AddRmsNorm, EqualsFloat64) {
  const auto device = MakeDevice();
  Random random(1);
  for (const int64_t n : kRows) {
    for (const int64_t cols : kCols) {
      const auto x = RandomFloats(random, n * cols), d = RandomFloats(random, n * cols),
                 w = RandomFloats(random, cols);
      DeviceMatrix residual(*device, DType::kF32, n, cols, 5), delta(*device, DType::kF32, n, cols);
      DeviceMatrix weight(*device, DType::kF32, 1, cols);
      weight.Set(w);
      delta.Set(d);
      for (const bool add : {false, true}) {
        for (const DType type : {DType::kF32, device->activation_type()}) {
          residual.Set(x);
          DeviceMatrix out(*device, type, n, cols);
          device->AddRmsNorm(residual.tensor, add ? delta.tensor : Tensor{}, weight.tensor, 1e-5f,
                             out.tensor);
          const auto r = residual.Get(), y = out.Get();
          const double error = type == DType::kF32 ? 2e-6 : ActivationError(*device);
          for (int64_t i = 0; i < n; ++i) {
            double squares = 0;
            for (int64_t j = 0; j < cols; ++j) {
              const float sum = add ? x[At(i, j, cols)] + d[At(i, j, cols)] : x[At(i, j, cols)];
              ASSERT_EQ(r[At(i, j, cols)], sum);
              squares += static_cast<double>(sum) * static_cast<double>(sum);
            }
            const double scale = 1 / std::sqrt(squares / static_cast<double>(cols) + 1e-5);
            for (int64_t j = 0; j < cols; ++j) {
              const double exact = static_cast<double>(r[At(i, j, cols)]) * scale *
                                   static_cast<double>(w[static_cast<size_t>(j)]);
              ASSERT_NEAR(static_cast<double>(y[At(i, j, cols)]), exact,
                          error * std::abs(exact) + 1e-12);
            }
          }
        }
      }
    }
  }
}

// (heads, head_dim)
class HeadRmsNorm : public testing::TestWithParam<std::tuple<int64_t, int32_t>> {};

TEST_P(HeadRmsNorm, EqualsFloat64) {
  const auto [heads, dim] = GetParam();
  const auto device = MakeDevice();
  Random random(16);
  const int64_t cols = heads * dim, beside = 19;
  const auto w = RandomFloats(random, cols);
  DeviceMatrix weight(*device, DType::kF32, 1, cols);
  weight.Set(w);
  for (const int64_t n : kRows) {
    const auto x = RandomFloats(random, n * (cols + beside), 3);
    DeviceMatrix in(*device, DType::kF32, n, cols + beside, 5);
    in.Set(x);
    device->HeadRmsNorm(in.tensor.Cols(0, cols), dim, weight.tensor, 1e-5f);
    const auto y = in.Get();
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t h = 0; h < cols; h += dim) {
        double squares = 0;
        for (int64_t j = h; j < h + dim; ++j) {
          const auto value = static_cast<double>(x[At(i, j, cols + beside)]);
          squares += value * value;
        }
        const double scale = 1 / std::sqrt(squares / dim + 1e-5);
        for (int64_t j = h; j < h + dim; ++j) {
          const double exact = static_cast<double>(x[At(i, j, cols + beside)]) * scale *
                               static_cast<double>(w[static_cast<size_t>(j)]);
          ASSERT_NEAR(static_cast<double>(y[At(i, j, cols + beside)]), exact,
                      2e-6 * std::abs(exact) + 1e-12);
        }
      }
      for (int64_t j = cols; j < cols + beside; ++j) {  // what lies beside stays
        ASSERT_EQ(y[At(i, j, cols + beside)], x[At(i, j, cols + beside)]);
      }
    }
    // A row's bits do not depend on the batch.
    DeviceMatrix alone(*device, DType::kF32, 1, cols);
    alone.Set(std::span(x).subspan(At(n - 1, 0, cols + beside), static_cast<size_t>(cols)));
    device->HeadRmsNorm(alone.tensor, dim, weight.tensor, 1e-5f);
    const auto last = alone.Get();
    EXPECT_TRUE(std::equal(last.begin(), last.end(), y.begin() + (n - 1) * (cols + beside)));
  }
  EXPECT_THROW(device->HeadRmsNorm(weight.tensor, dim + 1, weight.tensor, 1e-5f), Error);
  EXPECT_THROW(device->HeadRmsNorm(weight.tensor, dim, weight.tensor.Cols(0, cols - 1), 1e-5f),
               Error);
}

INSTANTIATE_TEST_SUITE_P(Shapes, HeadRmsNorm,
                         testing::Values(std::tuple(1, 16), std::tuple(5, 48), std::tuple(9, 80),
                                         std::tuple(40, 128), std::tuple(3, 256)));

TEST(SiluMul, EqualsFloat64) {
  const auto device = MakeDevice();
  Random random(2);
  for (const int64_t n : kRows) {
    for (const int64_t cols : kCols) {
      auto x = RandomFloats(random, n * 2 * cols, 8);
      x[0] = 200;  // the ends of the exponential's range
      x[1] = -200;
      DeviceMatrix in(*device, DType::kF32, n, 2 * cols, 3);
      in.Set(x);
      for (const DType type : {DType::kF32, device->activation_type()}) {
        DeviceMatrix out(*device, type, n, cols, 1);
        device->SiluMul(in.tensor, out.tensor);
        const auto y = out.Get();
        const double error = type == DType::kF32 ? 2e-6 : ActivationError(*device);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < cols; ++j) {
            const double g = static_cast<double>(x[At(i, j, 2 * cols)]);
            const double exact =
                g / (1 + std::exp(-g)) * static_cast<double>(x[At(i, cols + j, 2 * cols)]);
            ASSERT_NEAR(static_cast<double>(y[At(i, j, cols)]), exact,
                        error * std::abs(exact) + 1e-12);
          }
        }
      }
    }
  }
}

TEST(Rope, RotatesHalvesByPositionTimesFrequency) {
  const auto device = MakeDevice();
  Random random(3);
  for (const int32_t dim : {16, 80, 128}) {
    const int64_t n = 9, cols = 3 * dim;
    const auto x = RandomFloats(random, n * cols);
    std::vector<float> inv_freq;
    for (int j = 0; j < dim / 2; ++j) {
      inv_freq.push_back(static_cast<float>(std::pow(1e5, -2.0 * j / dim)));
    }
    std::vector<int64_t> positions = {0, 1, 2, 77, 8191, 1 << 20, 5, 5, 3};
    for (int call = 0; call < 2; ++call) {
      DeviceMatrix t(*device, DType::kF32, n, cols, 7), turns(*device, DType::kF32, n, dim);
      t.Set(x);
      device->RopeTable(inv_freq, positions, turns.tensor);
      device->Rope(t.tensor, dim, turns.tensor);
      const auto y = t.Get();
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < cols; ++c) {
          const int64_t j = c % dim, half = dim / 2;
          const double angle = static_cast<double>(positions[static_cast<size_t>(i)]) *
                               static_cast<double>(inv_freq[static_cast<size_t>(j % half)]);
          const double own = static_cast<double>(x[At(i, c, cols)]);
          const double other = static_cast<double>(x[At(i, j < half ? c + half : c - half, cols)]);
          const double exact =
              own * std::cos(angle) + (j < half ? -other : other) * std::sin(angle);
          ASSERT_NEAR(static_cast<double>(y[At(i, c, cols)]), exact, 1e-6);
        }
      }
      for (int64_t& p : positions) p += 100;
    }
  }
}

TEST(Convert, RoundsToNearestAndCopies) {
  const auto device = MakeDevice();
  Random random(4);
  auto x = RandomFloats(random, 5 * 67);
  x[0] = NAN;
  x[1] = INFINITY;
  x[2] = std::bit_cast<float>(0x3f808000u);  // a tie: to even
  DeviceMatrix in(*device, DType::kF32, 5, 67, 2), rounded(*device, DType::kBf16, 5, 67, 3),
      back(*device, DType::kF32, 5, 67), copy(*device, DType::kF32, 5, 67, 1);
  in.Set(x);
  device->Convert(in.tensor, rounded.tensor);
  device->Convert(rounded.tensor, back.tensor);
  device->Convert(in.tensor, copy.tensor);
  const auto expected = RoundToBf16(x), y = back.Get(), z = copy.Get();
  EXPECT_TRUE(std::isnan(y[0]));
  EXPECT_TRUE(std::equal(y.begin() + 1, y.end(), expected.begin() + 1));
  EXPECT_TRUE(std::equal(z.begin() + 1, z.end(), x.begin() + 1));
}

TEST(Add, Adds) {
  const auto device = MakeDevice();
  Random random(14);
  const auto x = RandomFloats(random, 6 * 37), y = RandomFloats(random, 6 * 37);
  DeviceMatrix into(*device, DType::kF32, 6, 37, 4), delta(*device, DType::kF32, 6, 37);
  into.Set(x);
  delta.Set(y);
  device->Add(into.tensor, delta.tensor);
  const auto sum = into.Get();
  for (size_t i = 0; i < sum.size(); ++i) ASSERT_EQ(sum[i], x[i] + y[i]);
  // One row to all: a bias.
  device->Add(into.tensor, delta.tensor.Rows(2, 1));
  const auto biased = into.Get();
  for (size_t i = 0; i < sum.size(); ++i) ASSERT_EQ(biased[i], sum[i] + y[2 * 37 + i % 37]);
  EXPECT_THROW(device->Add(into.tensor, delta.tensor.Rows(2, 2)), Error);
}

TEST(PackKv, PutsHeadsOneBehindTheOtherAndUnpackKvBack) {
  const auto device = MakeDevice();
  Random random(6);
  for (const auto& [n, heads, dim] :
       {std::tuple{5, 3, 64}, std::tuple{700, 8, 128}, std::tuple{2, 1, 48}}) {
    const int64_t cols = heads * dim;
    const auto x = RoundToBf16(RandomFloats(random, n * cols));
    const auto y = RoundToBf16(RandomFloats(random, n * cols));
    DeviceMatrix k(*device, DType::kBf16, n, cols, 2), v(*device, DType::kBf16, n, cols);
    DeviceMatrix packed(*device, DType::kBf16, n * heads, 2 * dim, 4);
    k.Set(x);
    v.Set(y);
    device->PackKv(k.tensor, v.tensor, packed.tensor);
    const auto got = packed.Get();
    const auto host = device->AllocateStaging(static_cast<size_t>(2 * n * cols) * sizeof(bf16));
    device->PackKv(k.tensor, v.tensor, {host->data(), DType::kBf16, n * heads, 2 * dim, 2 * dim});
    device->Record()->Wait();
    const auto* there = static_cast<const bf16*>(host->data());
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < 2 * dim; ++j) {
          const auto at = static_cast<size_t>((h * n + i) * 2 * dim + j);
          const float want = (j < dim ? x : y)[At(i, h * dim + j % dim, cols)];
          ASSERT_EQ(got[at], want) << h << ' ' << i << ' ' << j;
          ASSERT_EQ(ToFloat(there[at]), want);
        }
      }
    }
    DeviceMatrix k2(*device, DType::kBf16, n, cols), v2(*device, DType::kBf16, n, cols, 6);
    device->UnpackKv(packed.tensor, k2.tensor, v2.tensor);
    EXPECT_EQ(k2.Get(), x);
    EXPECT_EQ(v2.Get(), y);
    // From staging memory; head 0's row 0 has changed since.
    static_cast<bf16*>(host->data())[dim] = ToBf16(0.25f);
    device->UnpackKv({host->data(), DType::kBf16, n * heads, 2 * dim, 2 * dim}, k2.tensor,
                     v2.tensor);
    auto changed = y;
    changed[0] = 0.25f;
    EXPECT_EQ(k2.Get(), x);
    EXPECT_EQ(v2.Get(), changed);
    EXPECT_THROW(device->UnpackKv(packed.tensor.Rows(0, 1), k2.tensor, v2.tensor), Error);
    EXPECT_THROW(device->PackKv(k.tensor, v.tensor, packed.tensor.Rows(0, 1)), Error);
    EXPECT_THROW(device->PackKv(k.tensor, v.tensor.Cols(0, dim / 2), packed.tensor), Error);
  }
}

TEST(ColumnMean, EqualsFloat64) {
  const auto device = MakeDevice();
  Random random(5);
  for (const DType type : {DType::kF32, DType::kBf16}) {
    const int64_t n = 1000, cols = 131;
    auto x = RandomFloats(random, n * cols);
    for (float& v : x) v += 100;  // a float32 sum would lose digits here
    if (type == DType::kBf16) x = RoundToBf16(x);
    DeviceMatrix in(*device, type, n, cols, 2), mean(*device, DType::kF32, 1, cols);
    in.Set(x);
    device->ColumnMean(in.tensor, mean.tensor);
    const auto y = mean.Get();
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[At(i, j, cols)]);
      ASSERT_NEAR(static_cast<double>(y[static_cast<size_t>(j)]), sum / static_cast<double>(n),
                  8e-6);
    }
  }
}

// (k, l, head_dim)
class HashCodes : public testing::TestWithParam<std::tuple<int32_t, int32_t, int32_t>> {};

TEST_P(HashCodes, AreTheSignsOfFloat64Projections) {
  const auto [k, l, dim] = GetParam();
  const auto device = MakeDevice();
  Random random(6);
  // Many tables: of more vectors, so that a GPU cuts them in another way than those of one row.
  const int64_t n = l >= 150 ? 200 : 37, heads = 3, cols = heads * dim;
  const auto r = RandomProjections(17, static_cast<size_t>(dim), static_cast<size_t>(k),
                                   static_cast<size_t>(l));
  device->SetProjections(r, dim, k, l);
  for (const DType type : {DType::kF32, DType::kBf16}) {
    auto x = RandomFloats(random, n * cols);
    const float scales[] = {1e-6f, 1, 1e5f};  // of a vector: signs do not depend on it
    for (size_t i = 0; i < x.size(); ++i) x[i] *= scales[i / static_cast<size_t>(dim) % 3];
    if (type == DType::kBf16) x = RoundToBf16(x);
    const auto mu = RandomFloats(random, cols);
    DeviceMatrix in(*device, type, n, cols), mean(*device, DType::kF32, 1, cols);
    DeviceMatrix codes(*device, DType::kU16, n, heads * l);
    in.Set(x);
    mean.Set(mu);
    for (const bool centred : {false, true}) {
      device->HashCodes(in.tensor, centred ? mean.tensor : Tensor{}, codes.tensor);
      const auto got = codes.Raw<uint16_t>();
      int64_t unclear = 0;
      for (int64_t i = 0; i < n * heads; ++i) {
        const int64_t h = i % heads;
        for (int64_t t = 0; t < l; ++t) {
          const uint16_t code = got[static_cast<size_t>(i * l + t)];
          ASSERT_EQ(code >> k, 0);
          for (int64_t b = 0; b < k; ++b) {
            double dot = 0, size = 0;
            for (int64_t j = 0; j < dim; ++j) {
              const float centre = centred ? mu[static_cast<size_t>(h * dim + j)] : 0.0f;
              const double product =
                  static_cast<double>(x[static_cast<size_t>(i * dim + j)] - centre) *
                  static_cast<double>(r[static_cast<size_t>(j * k * l + t * k + b)]);
              dot += product;
              size += std::abs(product);
            }
            if (std::abs(dot) <= 1e-6 * size) {
              ++unclear;  // float32 may round to either side of 0
            } else {
              ASSERT_EQ((code >> b) & 1, dot > 0 ? 1 : 0) << "vector " << i << " table " << t;
            }
          }
        }
      }
      ASSERT_LE(unclear, n * heads * l * k / 1000 + 1);
      // The codes of a vector alone are those it has in a batch.
      DeviceMatrix alone(*device, DType::kU16, 1, heads * l);
      device->HashCodes(in.tensor.Rows(n - 2, 1), centred ? mean.tensor : Tensor{}, alone.tensor);
      const auto last = alone.Raw<uint16_t>();
      EXPECT_TRUE(std::equal(last.begin(), last.end(), got.begin() + (n - 2) * heads * l));
      // Where they lie, and whether in one piece, makes no difference; twice, as what the first
      // leaves must do for the next; and of a row alone.
      const auto host = device->AllocateStaging(got.size() * sizeof(uint16_t));
      const auto* codes_there = static_cast<const uint16_t*>(host->data());
      for (int repeat = 0; repeat < 2; ++repeat) {
        std::memset(host->data(), 0xff, host->bytes());
        device->HashCodes(in.tensor, centred ? mean.tensor : Tensor{},
                          {host->data(), DType::kU16, n, heads * l, heads * l});
        device->Record()->Wait();
        EXPECT_TRUE(std::equal(got.begin(), got.end(), codes_there));
      }
      device->HashCodes(in.tensor.Rows(n - 2, 1), centred ? mean.tensor : Tensor{},
                        {host->data(), DType::kU16, 1, heads * l, heads * l});
      device->Record()->Wait();
      EXPECT_TRUE(std::equal(last.begin(), last.end(), codes_there));
      DeviceMatrix apart(*device, DType::kU16, n, heads * l, 5);
      device->HashCodes(in.tensor, centred ? mean.tensor : Tensor{}, apart.tensor);
      EXPECT_EQ(apart.Raw<uint16_t>(), got);
      // By head.
      std::vector<uint16_t> by_head(got.size());
      for (int64_t i = 0; i < n * heads; ++i) {
        std::copy_n(got.begin() + i * l, l, by_head.begin() + (i % heads * n + i / heads) * l);
      }
      DeviceMatrix other(*device, DType::kU16, heads * n, l, 3);
      device->HashCodes(in.tensor, centred ? mean.tensor : Tensor{}, other.tensor);
      EXPECT_EQ(other.Raw<uint16_t>(), by_head);
      device->HashCodes(in.tensor, centred ? mean.tensor : Tensor{},
                        {host->data(), DType::kU16, heads * n, l, l});
      device->Record()->Wait();
      EXPECT_TRUE(std::equal(by_head.begin(), by_head.end(), codes_there));
      EXPECT_THROW(device->HashCodes(in.tensor, Tensor{}, other.tensor.Rows(0, n)), Error);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, HashCodes,
                         testing::Values(std::tuple(10, 150, 64), std::tuple(1, 1, 16),
                                         std::tuple(16, 5, 128), std::tuple(7, 64, 80),
                                         std::tuple(10, 150, 128), std::tuple(12, 31, 144),
                                         std::tuple(3, 77, 260)));

TEST(Partials, MergeByRowAndHeadAndNormalize) {
  const auto device = MakeDevice();
  Random random(7);
  const int64_t heads = 4, dim = 16;
  const auto make = [&](int64_t n, int64_t h) {
    return std::array<DeviceMatrix, 3>{DeviceMatrix(*device, DType::kF32, n, h),
                                       DeviceMatrix(*device, DType::kF32, n, h),
                                       DeviceMatrix(*device, DType::kF32, n, h * dim)};
  };
  const auto view = [](const std::array<DeviceMatrix, 3>& p) {
    return Partials{p[0].tensor, p[1].tensor, p[2].tensor};
  };
  auto into = make(3, heads);
  auto from = make(3, 2);
  device->ClearPartials(view(into));
  const std::vector<float> max = {1, 2, -3, kEmptyMax, 200, -200}, den = {1, 2, 3, 0, 1.5f, 2.5f};
  auto num = RandomFloats(random, 3 * 2 * dim);
  std::fill(num.begin() + 3 * dim, num.begin() + 4 * dim, 0.0f);
  from[0].Set(max);
  from[1].Set(den);
  from[2].Set(num);
  // Partials 0 and 2 meet in row 1, heads 2 and 3; partial 1 goes to row 0, heads 0 and 1.
  const std::vector<int32_t> rows = {1, 0, 1}, first = {2, 0, 2};
  device->MergePartials(view(into), view(from), rows, first);
  DeviceMatrix out(*device, DType::kF32, 3, heads * dim);
  device->NormalizePartials(view(into), out.tensor);
  const auto y = out.Get();
  const auto value = [&](int64_t row, int64_t head, int64_t j) {
    return static_cast<double>(y[static_cast<size_t>((row * heads + head) * dim + j)]);
  };
  for (int64_t j = 0; j < dim; ++j) {
    const auto n = [&](int64_t p, int64_t h) {
      return static_cast<double>(num[static_cast<size_t>((p * 2 + h) * dim + j)]);
    };
    EXPECT_NEAR(value(0, 0, j), n(1, 0) / 3, 1e-6);
    EXPECT_EQ(value(0, 1, j), 0);                      // the empty partial
    EXPECT_NEAR(value(1, 2, j), n(2, 0) / 1.5, 1e-6);  // e^{1 − 200} vanishes
    EXPECT_NEAR(value(1, 3, j), n(0, 1) / 2, 1e-6);
    EXPECT_EQ(value(1, 0, j), 0);
    EXPECT_EQ(value(2, 3, j), 0);
  }
  EXPECT_EQ(into[0].Get()[0], -3);
  EXPECT_EQ(into[0].Get()[8], kEmptyMax);
  const std::vector<int32_t> beyond = {3, 0, 0};
  EXPECT_THROW(device->MergePartials(view(into), view(from), beyond, first), Error);
  const std::vector<int32_t> wide = {3, 0, 0};  // two heads from the last one on
  EXPECT_THROW(device->MergePartials(view(into), view(from), rows, wide), Error);
}

TEST(Backends, SayWhatTheyAre) {
  EXPECT_EQ(MakeDevice()->info().backend, TestBackend());
  std::string why;
  const bool has_cuda = MakeCudaDevice({}, &why) != nullptr;
  EXPECT_EQ(why.empty(), has_cuda);
}

}  // namespace
}  // namespace passel::gpu
