// The products of a decoder layer one after another, as a model issues them, which a device may
// join to one piece of work.

#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "runtime/base/single_rank.h"
#include "tests/gpu/device_matrix.h"
#include "tests/gpu/float64_layer.h"

namespace passel::gpu {
namespace {

struct Layer {
  int64_t heads, hidden, ffn, qkv;  // widths
  int64_t head_dim, turned;         // columns of qkv
};

class DecoderProducts : public testing::TestWithParam<Layer> {};

// The tail of a layer and the head of the next; with `apart`, the norms do not follow on the sums
// they are of, as where ranks add theirs in between.
TEST_P(DecoderProducts, EqualFloat64) {
  const Layer s = GetParam();
  const auto device = MakeTestDevice({.threads = 2});
  Random random(static_cast<uint64_t>(s.hidden * 7 + s.ffn));
  const auto weight = [&](int64_t out, int64_t in) {
    return RoundToBf16(RandomFloats(random, out * in, 1 / std::sqrt(static_cast<double>(in))));
  };
  const auto o = weight(s.hidden, s.heads), gate_up = weight(2 * s.ffn, s.hidden),
             down = weight(s.hidden, s.ffn), qkv = weight(s.qkv, s.hidden);
  const auto wo = device->MakeLinear(s.hidden, s.heads, ReaderOf(o, s.heads)),
             wg = device->MakeLinear(2 * s.ffn, s.hidden, ReaderOf(gate_up, s.hidden)),
             wd = device->MakeLinear(s.hidden, s.ffn, ReaderOf(down, s.ffn)),
             wq = device->MakeLinear(s.qkv, s.hidden, ReaderOf(qkv, s.hidden));
  const auto norm = RandomFloats(random, s.hidden);
  DeviceMatrix dnorm(*device, DType::kF32, 1, s.hidden);
  dnorm.Set(norm);
  std::vector<float> inv_freq;
  for (int64_t i = 0; i < s.head_dim / 2; ++i) {
    inv_freq.push_back(static_cast<float>(
        std::pow(500.0, -static_cast<double>(2 * i) / static_cast<double>(s.head_dim))));
  }
  const DType type = device->activation_type();
  // Activations are rounded two or three times on the way.
  const double bound = 2 * ActivationError(*device);
  for (const int64_t n : {1, 9, 16, 17, 40, 64, 65}) {
    const auto x = RoundToBf16(RandomFloats(random, n * s.heads));
    const auto before = RandomFloats(random, n * s.hidden);
    DeviceMatrix attention(*device, type, n, s.heads, 8), hidden(*device, DType::kF32, n, s.hidden),
        scratch(*device, DType::kF32, n, s.hidden), normed(*device, type, n, s.hidden, 16),
        pairs(*device, DType::kF32, n, 2 * s.ffn), ffn(*device, type, n, s.ffn, 24),
        out(*device, DType::kF32, n, s.qkv, 3);
    attention.Set(x);
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < n; ++i) positions.push_back(static_cast<int64_t>(random.Next() % 9999));
    DeviceMatrix turns(*device, DType::kF32, n, s.head_dim);
    device->RopeTable(inv_freq, positions, turns.tensor);
    const auto run = [&](bool apart) {
      hidden.Set(before);
      device->MatMulAdd(*wo, attention.tensor, hidden.tensor, scratch.tensor);
      if (apart) device->Record()->Wait();
      device->NormMatMulSilu(hidden.tensor, dnorm.tensor, 1e-5f, *wg, ffn.tensor, normed.tensor,
                             pairs.tensor);
      if (apart) {
        device->MatMul(*wd, ffn.tensor, scratch.tensor);
        device->Add(hidden.tensor, scratch.tensor);
      } else {
        device->MatMulAdd(*wd, ffn.tensor, hidden.tensor, scratch.tensor);
      }
      device->NormMatMul(hidden.tensor, dnorm.tensor, 1e-5f, *wq, out.tensor, normed.tensor);
      device->Rope(out.tensor.Cols(0, s.turned), static_cast<int32_t>(s.head_dim), turns.tensor);
    };
    Doubles exact = Product(Doubles(x.begin(), x.end()), o, n, s.heads);
    for (size_t i = 0; i < exact.size(); ++i) exact[i] += static_cast<double>(before[i]);
    const Doubles middle = Silu(Product(Norm(exact, norm, 1e-5), gate_up, n, s.hidden), s.ffn);
    const Doubles more = Product(middle, down, n, s.ffn);
    for (size_t i = 0; i < exact.size(); ++i) exact[i] += more[i];
    Doubles last = Product(Norm(exact, norm, 1e-5), qkv, n, s.hidden);
    Turn(&last, s.qkv, s.turned, s.head_dim, inv_freq, positions);
    for (const bool apart : {false, true}) {
      run(apart);
      const auto first = out.Get();
      EXPECT_LT(RelativeError(ffn.Get(), middle), bound) << n << " rows, " << apart;
      EXPECT_LT(RelativeError(hidden.Get(), exact), bound) << n << " rows, " << apart;
      EXPECT_LT(RelativeError(first, last), bound) << n << " rows, " << apart;
      for (int repeat = 0; repeat < 5; ++repeat) {
        run(apart);
        ASSERT_TRUE(SameBits(out.Get(), first)) << n << " rows, " << apart;
      }
    }
  }
}

// Widths that leave ends over in tiles of features and steps of k; a product whose blocks have many
// tiles each; one whose k is cut into more parts than fit at once; heads that are a tile each, of
// few tiles or many.
INSTANTIATE_TEST_SUITE_P(
    Shapes, DecoderProducts,
    testing::Values(Layer{576, 576, 1536, 960, 64, 768}, Layer{136, 200, 328, 1000, 128, 896},
                    Layer{64, 64, 64, 64, 64, 64}, Layer{72, 1000, 12, 777, 128, 640},
                    Layer{4096, 128, 96, 20000, 128, 19968}, Layer{328, 520, 14336, 336, 128, 256},
                    Layer{64, 136, 7160, 14330, 128, 12800}, Layer{64, 72, 17000, 64, 16, 48}));

// What a device has recorded reads its tensors anew each time.
TEST_P(DecoderProducts, ReplayedEqualThoseIssued) {
  const Layer s = GetParam();
  const auto device = MakeTestDevice({.threads = 2});
  Random random(static_cast<uint64_t>(s.hidden * 5 + s.ffn));
  const auto linear = [&](int64_t out, int64_t in) {
    const auto w = RandomFloats(random, out * in, 1 / std::sqrt(static_cast<double>(in)));
    return device->MakeLinear(out, in, ReaderOf(w, in));
  };
  const auto wo = linear(s.hidden, s.heads), wg = linear(2 * s.ffn, s.hidden),
             wd = linear(s.hidden, s.ffn), wq = linear(s.qkv, s.hidden);
  DeviceMatrix norm(*device, DType::kF32, 1, s.hidden);
  norm.Set(RandomFloats(random, s.hidden));
  const DType type = device->activation_type();
  SingleRank alone;
  for (const int64_t n : {1, 8, 20, 65}) {
    DeviceMatrix attention(*device, type, n, s.heads), hidden(*device, DType::kF32, n, s.hidden),
        scratch(*device, DType::kF32, n, s.hidden), normed(*device, type, n, s.hidden),
        pairs(*device, DType::kF32, n, 2 * s.ffn), ffn(*device, type, n, s.ffn),
        out(*device, DType::kF32, n, s.qkv), turns(*device, DType::kF32, n, s.head_dim);
    int calls = 0;
    const auto issue = [&] {
      ++calls;
      device->MatMulSumAdd(*wo, attention.tensor, hidden.tensor, scratch.tensor, alone);
      device->NormMatMulSilu(hidden.tensor, norm.tensor, 1e-5f, *wg, ffn.tensor, normed.tensor,
                             pairs.tensor);
      device->MatMulSumAdd(*wd, ffn.tensor, hidden.tensor, scratch.tensor, alone);
      device->NormMatMul(hidden.tensor, norm.tensor, 1e-5f, *wq, out.tensor, normed.tensor);
      device->Rope(out.tensor.Cols(0, s.turned), static_cast<int32_t>(s.head_dim), turns.tensor);
    };
    std::unique_ptr<Recording> recording;
    for (int repeat = 0; repeat < 5; ++repeat) {
      const auto before = RandomFloats(random, n * s.hidden);
      attention.Set(RandomFloats(random, n * s.heads));
      turns.Set(RandomFloats(random, n * s.head_dim));
      hidden.Set(before);
      issue();
      const auto expected = out.Get(), sum = hidden.Get();
      hidden.Set(before);
      out.Set(std::vector<float>(static_cast<size_t>(n * s.qkv)));
      device->Replay(recording, alone, issue);
      ASSERT_TRUE(SameBits(out.Get(), expected)) << n << " rows, " << repeat;
      ASSERT_TRUE(SameBits(hidden.Get(), sum)) << n << " rows, " << repeat;
    }
    // Issued, recorded, and from then on replayed.
    if (TestBackend() == "CUDA" && n < 9) {
      EXPECT_EQ(calls, 5 + 2);
    }
  }
}

// What was put off is done before its memory goes, or anything is read.
TEST(DecoderProducts, AreDoneBeforeMemoryGoes) {
  const auto device = MakeTestDevice({.threads = 2});
  Random random(3);
  const int64_t n = 20, in = 128, features = 192;
  const auto w = RoundToBf16(RandomFloats(random, features * in)),
             x = RoundToBf16(RandomFloats(random, n * in)),
             before = RandomFloats(random, n * features);
  auto linear = device->MakeLinear(features, in, ReaderOf(w, in));
  DeviceMatrix sum(*device, DType::kF32, n, features), scratch(*device, DType::kF32, n, features);
  sum.Set(before);
  {
    DeviceMatrix dx(*device, device->activation_type(), n, in);
    dx.Set(x);
    device->MatMulAdd(*linear, dx.tensor, sum.tensor, scratch.tensor);
    linear.reset();
  }
  Doubles exact = Product(Doubles(x.begin(), x.end()), w, n, in);
  for (size_t i = 0; i < exact.size(); ++i) exact[i] += static_cast<double>(before[i]);
  EXPECT_LT(RelativeError(sum.Get(), exact), ActivationError(*device));
}

}  // namespace
}  // namespace passel::gpu
