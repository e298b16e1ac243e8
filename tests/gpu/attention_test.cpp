#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "runtime/base/error.h"
#include "runtime/base/partial.h"
#include "tests/gpu/device_matrix.h"

namespace passel::gpu {
namespace {

struct Exact {
  double max = -INFINITY, den = 0;
  std::vector<double> num;
};

// Float64 attention of one query over keys [first, last) of one KV head; k, v: [n, cols].
Exact Attend(const float* q, const std::vector<float>& k, const std::vector<float>& v, int64_t cols,
             int64_t kv_head, int64_t dim, int64_t first, int64_t last, double scale) {
  Exact e;
  e.num.assign(static_cast<size_t>(dim), 0);
  std::vector<double> s;
  for (int64_t t = first; t < last; ++t) {
    double dot = 0;
    for (int64_t j = 0; j < dim; ++j) {
      dot += static_cast<double>(q[j]) *
             static_cast<double>(k[static_cast<size_t>(t * cols + kv_head * dim + j)]);
    }
    s.push_back(dot * scale);
    e.max = std::max(e.max, s.back());
  }
  for (int64_t t = first; t < last; ++t) {
    const double w = std::exp(s[static_cast<size_t>(t - first)] - e.max);
    e.den += w;
    for (int64_t j = 0; j < dim; ++j) {
      e.num[static_cast<size_t>(j)] +=
          w * static_cast<double>(v[static_cast<size_t>(t * cols + kv_head * dim + j)]);
    }
  }
  return e;
}

struct Case {
  int32_t heads, kv_heads, dim;
  int64_t start, n, window;
};

class CausalAttention : public testing::TestWithParam<Case> {};

// `more`: rows of k and v behind those of the chunk.
std::vector<float> RunCausal(Device& device, const Case& c, const std::vector<float>& q,
                             const std::vector<float>& k, const std::vector<float>& v, DType type,
                             int64_t more = 3) {
  const AttentionShape shape{c.heads, c.kv_heads, c.dim, 1 / std::sqrt(static_cast<float>(c.dim))};
  const int64_t kv_cols = c.kv_heads * c.dim;
  // What rows beyond start + n hold must not be seen.
  DeviceMatrix dq(device, DType::kF32, c.n, c.heads * c.dim, 16);
  DeviceMatrix dk(device, DType::kBf16, c.start + c.n + more, kv_cols);
  DeviceMatrix dv(device, DType::kBf16, c.start + c.n + more, kv_cols);
  DeviceMatrix out(device, type, c.n, c.heads * c.dim);
  const std::vector<float> junk(static_cast<size_t>(more * kv_cols), NAN);
  auto padded_k = k, padded_v = v;
  padded_k.insert(padded_k.end(), junk.begin(), junk.end());
  padded_v.insert(padded_v.end(), junk.begin(), junk.end());
  dq.Set(q);
  dk.Set(padded_k);
  dv.Set(padded_v);
  device.CausalAttention(shape, dq.tensor, dk.tensor, dv.tensor, c.start, c.window, out.tensor);
  return out.Get();
}

TEST_P(CausalAttention, EqualsFloat64) {
  const Case c = GetParam();
  Random random(static_cast<uint64_t>(c.start * 31 + c.n));
  const int64_t kv_cols = c.kv_heads * c.dim, cols = c.heads * c.dim;
  const auto q = RoundToBf16(RandomFloats(random, c.n * cols, 2));
  const auto k = RoundToBf16(RandomFloats(random, (c.start + c.n) * kv_cols));
  const auto v = RoundToBf16(RandomFloats(random, (c.start + c.n) * kv_cols));
  const auto device = MakeTestDevice({.threads = 1});
  // The weights of V are rounded to the activation type; their sum is not. Where there is room for
  // whole tiles of keys, the result may be rounded too.
  const bool bf16_weights = device->activation_type() == DType::kBf16;
  const double tolerance = bf16_weights ? 6e-3 : 1e-5, rounding = bf16_weights ? 1.0 / 512 : 0;
  const auto exact_room = RunCausal(*device, c, q, k, v, DType::kF32);
  const auto padded = RunCausal(*device, c, q, k, v, DType::kF32, kCausalPadding);
  for (int64_t i = 0; i < c.n; ++i) {
    const int64_t last = c.start + i + 1;
    const int64_t begin = c.window > 0 ? std::max<int64_t>(0, last - c.window) : 0;
    for (int64_t h = 0; h < c.heads; ++h) {
      const Exact e = Attend(&q[static_cast<size_t>(i * cols + h * c.dim)], k, v, kv_cols,
                             h / (c.heads / c.kv_heads), c.dim, begin, last,
                             1 / std::sqrt(static_cast<double>(c.dim)));
      for (int64_t j = 0; j < c.dim; ++j) {
        const auto at = static_cast<size_t>(i * cols + h * c.dim + j);
        const double expected = e.num[static_cast<size_t>(j)] / e.den;
        ASSERT_NEAR(static_cast<double>(exact_room[at]), expected, tolerance)
            << "row " << i << " head " << h;
        ASSERT_NEAR(static_cast<double>(padded[at]), expected,
                    tolerance + std::fabs(expected) * rounding)
            << "row " << i << " head " << h << ", with room for whole tiles";
      }
    }
  }
  const auto two_threads = MakeTestDevice({.threads = 2});
  EXPECT_TRUE(SameBits(RunCausal(*two_threads, c, q, k, v, DType::kF32), exact_room));
}

INSTANTIATE_TEST_SUITE_P(Cases, CausalAttention,
                         testing::Values(Case{3, 1, 64, 0, 1, 0}, Case{9, 3, 64, 0, 70, 0},
                                         Case{6, 3, 16, 250, 37, 0}, Case{2, 2, 80, 17, 300, 0},
                                         Case{8, 1, 128, 500, 20, 0}, Case{4, 2, 48, 0, 400, 33},
                                         Case{3, 1, 64, 700, 40, 600}, Case{1, 1, 64, 4300, 20, 0},
                                         Case{20, 1, 32, 5, 50, 0}, Case{4, 1, 128, 900, 300, 0},
                                         Case{4, 4, 256, 100, 129, 0}));

// How a prompt is cut into chunks does not change a row's bits where that is promised.
TEST(CausalAttentionChunks, HaveTheSameBitsHoweverCutWhenDeterministic) {
  const Case whole{4, 2, 64, 0, 700, 0};
  Random random(29);
  const auto q = RandomFloats(random, whole.n * 256), k = RandomFloats(random, whole.n * 128),
             v = RandomFloats(random, whole.n * 128);
  const auto device = MakeTestDevice({.threads = 2, .deterministic = true});
  const auto all = RunCausal(*device, whole, q, k, v, DType::kF32, kCausalPadding);
  const auto part = [](const std::vector<float>& from, int64_t begin, int64_t end, int64_t cols) {
    return std::vector<float>(from.begin() + begin * cols, from.begin() + end * cols);
  };
  std::vector<float> pieces;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 256}, {256, 640}, {640, 700}}) {
    const Case c{4, 2, 64, begin, end - begin, 0};
    const auto piece = RunCausal(*device, c, part(q, begin, end, 256), part(k, 0, end, 128),
                                 part(v, 0, end, 128), DType::kF32, kCausalPadding);
    pieces.insert(pieces.end(), piece.begin(), piece.end());
  }
  EXPECT_TRUE(SameBits(pieces, all));
}

TEST(CausalAttentionOut, IsRoundedToTheActivationType) {
  const Case c{3, 1, 64, 3, 40, 0};
  Random random(3);
  const auto q = RandomFloats(random, c.n * 192), k = RandomFloats(random, (c.start + c.n) * 64),
             v = RandomFloats(random, (c.start + c.n) * 64);
  const auto device = MakeTestDevice({.threads = 2});
  const auto exact = RunCausal(*device, c, q, k, v, DType::kF32);
  const auto rounded = RunCausal(*device, c, q, k, v, device->activation_type());
  EXPECT_EQ(rounded, device->activation_type() == DType::kBf16 ? RoundToBf16(exact) : exact);
}

// A pool with some sequences whose pages are scattered over it.
class DecodeAttention : public testing::TestWithParam<std::tuple<int32_t, int32_t, int32_t>> {
 protected:
  static constexpr int64_t kTokens[] = {1, 64, 65, 1500, 0, 2049, 128, 129};
  static constexpr int32_t kPages = 80;

  void SetUp() override {
    const auto [heads, kv_heads, dim] = GetParam();
    shape_ = {heads, kv_heads, dim, 1 / std::sqrt(static_cast<float>(dim))};
    std::vector<int32_t> order(kPages);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size() - 1; i > 0; --i) {
      std::swap(order[i], order[random_.Next() % (i + 1)]);
    }
    size_t next = 0;
    for (const int64_t tokens : kTokens) {
      const auto count = static_cast<size_t>((tokens + kKvPageTokens - 1) / kKvPageTokens);
      pages_.emplace_back(order.begin() + next, order.begin() + next + count);
      next += count;
      k_.push_back(RoundToBf16(RandomFloats(random_, tokens * kv_heads * dim)));
      v_.push_back(RoundToBf16(RandomFloats(random_, tokens * kv_heads * dim)));
    }
    q_ = RandomFloats(random_, static_cast<int64_t>(std::size(kTokens)) * heads * dim, 2);
  }

  // Fills the pool in descending order of slots, half from f32 and half from bf16.
  void Fill(Device& device) {
    device.CreateKvPool(shape_, kPages);
    for (size_t s = 0; s < pages_.size(); ++s) {
      const int64_t tokens = kTokens[s], cols = shape_.kv_heads * shape_.head_dim;
      for (int64_t part = 1; part >= 0; --part) {
        const int64_t begin = part * (tokens / 2), end = part == 1 ? tokens : tokens / 2;
        if (begin == end) continue;
        const DType type = part == 1 ? DType::kF32 : DType::kBf16;
        DeviceMatrix k(device, type, end - begin, cols, 4), v(device, type, end - begin, cols);
        k.Set(std::span(k_[s]).subspan(static_cast<size_t>(begin * cols)));
        v.Set(std::span(v_[s]).subspan(static_cast<size_t>(begin * cols)));
        std::vector<int64_t> slots(static_cast<size_t>(end - begin));
        std::iota(slots.begin(), slots.end(), begin);
        device.StoreKv(pages_[s], slots, k.tensor, v.tensor);
      }
    }
  }

  struct Result {
    std::vector<float> max, den, num;
  };
  Result Run(Device& device, const std::vector<size_t>& sequences) {
    const auto n = static_cast<int64_t>(sequences.size());
    const int64_t cols = shape_.heads * shape_.head_dim;
    std::vector<float> q;
    std::vector<KvView> views;
    for (const size_t s : sequences) {
      q.insert(q.end(), q_.begin() + static_cast<int64_t>(s) * cols,
               q_.begin() + static_cast<int64_t>(s + 1) * cols);
      views.push_back({pages_[s], kTokens[s]});
    }
    DeviceMatrix dq(device, DType::kF32, n, cols), max(device, DType::kF32, n, shape_.heads),
        den(device, DType::kF32, n, shape_.heads), num(device, DType::kF32, n, cols);
    dq.Set(q);
    device.DecodeAttention(dq.tensor, views, {max.tensor, den.tensor, num.tensor});
    return {max.Get(), den.Get(), num.Get()};
  }

  Random random_{21};
  AttentionShape shape_;
  std::vector<std::vector<int32_t>> pages_;
  std::vector<std::vector<float>> k_, v_;
  std::vector<float> q_;
};

TEST_P(DecodeAttention, EqualsFloat64) {
  const auto device = MakeTestDevice({.threads = 2});
  Fill(*device);
  const Result r = Run(*device, {0, 1, 2, 3, 4, 5, 6, 7});
  const int64_t dim = shape_.head_dim;
  for (int64_t s = 0; s < 8; ++s) {
    for (int64_t h = 0; h < shape_.heads; ++h) {
      const auto at = static_cast<size_t>(s * shape_.heads + h);
      const Exact e = Attend(&q_[at * static_cast<size_t>(dim)], k_[static_cast<size_t>(s)],
                             v_[static_cast<size_t>(s)], shape_.kv_heads * dim, h / shape_.group(),
                             dim, 0, kTokens[s], 1 / std::sqrt(static_cast<double>(dim)));
      if (kTokens[s] == 0) {
        EXPECT_EQ(r.max[at], kEmptyMax);
        EXPECT_EQ(r.den[at], 0);
        continue;
      }
      // On a GPU queries and weights count with 16 bits.
      const double wider = TestBackend() == "CUDA" ? 3 : 1;
      ASSERT_NEAR(static_cast<double>(r.max[at]), e.max, wider * 1e-5);
      ASSERT_NEAR(static_cast<double>(r.den[at]), e.den, wider * 2e-5 * e.den);
      for (int64_t j = 0; j < dim; ++j) {
        ASSERT_NEAR(
            static_cast<double>(r.num[at * static_cast<size_t>(dim) + static_cast<size_t>(j)]),
            e.num[static_cast<size_t>(j)], wider * 3e-5 * e.den);
      }
    }
  }
}

TEST_P(DecodeAttention, BitsDependOnNeitherBatchNorThreads) {
  const auto one = MakeTestDevice({.threads = 1}), two = MakeTestDevice({.threads = 2});
  Fill(*one);
  Fill(*two);
  const Result all = Run(*one, {0, 1, 2, 3, 4, 5});
  const Result same = Run(*two, {0, 1, 2, 3, 4, 5});
  EXPECT_TRUE(SameBits(all.num, same.num) && SameBits(all.den, same.den));
  const int64_t heads = shape_.heads, row = heads * shape_.head_dim;
  for (const int64_t one_of : {2, 3}) {  // a short one and a long one
    const Result alone = Run(*two, {static_cast<size_t>(one_of)});
    EXPECT_EQ(alone.den, std::vector<float>(all.den.begin() + one_of * heads,
                                            all.den.begin() + (one_of + 1) * heads));
    EXPECT_EQ(alone.num, std::vector<float>(all.num.begin() + one_of * row,
                                            all.num.begin() + (one_of + 1) * row));
  }
}

TEST_P(DecodeAttention, StoredRowsAreReadBack) {
  const auto device = MakeTestDevice({.threads = 1});
  Fill(*device);
  const int64_t cols = shape_.kv_heads * shape_.head_dim;
  const std::vector<int64_t> slots = {1499, 0, 63, 64};
  DeviceMatrix k(*device, DType::kBf16, 4, cols), v(*device, DType::kBf16, 4, cols, 2);
  device->LoadKv(pages_[3], slots, k.tensor, v.tensor);
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const auto from = static_cast<size_t>(slots[static_cast<size_t>(i)] * cols + j);
      ASSERT_EQ(k.Get()[static_cast<size_t>(i * cols + j)], k_[3][from]);
      ASSERT_EQ(v.Get()[static_cast<size_t>(i * cols + j)], v_[3][from]);
    }
  }
  const std::vector<int64_t> beyond = {1536, 0, 63, 64};
  EXPECT_THROW(device->LoadKv(pages_[3], beyond, k.tensor, v.tensor), Error);
  const std::vector<int32_t> no_page = {kPages};
  EXPECT_THROW(device->LoadKv(no_page, std::vector<int64_t>{0, 1, 2, 3}, k.tensor, v.tensor),
               Error);
}

INSTANTIATE_TEST_SUITE_P(Shapes, DecodeAttention,
                         testing::Values(std::tuple(9, 3, 64), std::tuple(2, 2, 16),
                                         std::tuple(8, 1, 128), std::tuple(5, 1, 80)));

// (head_dim, heads, heads of a partial, type of its num)
class MergePartials : public testing::TestWithParam<std::tuple<int64_t, int64_t, int64_t, DType>> {
};

TEST_P(MergePartials, EqualsFloat64InOrder) {
  const auto [dim, heads, of_partial, type] = GetParam();
  const int64_t rows = 3, count = 41;
  Random random(static_cast<uint64_t>(dim));
  const auto device = MakeTestDevice({});
  const auto fill = [&](DeviceMatrix& m, double scale) {
    auto values = RandomFloats(random, m.tensor.rows * m.tensor.cols, scale);
    m.Set(values);
    return values;
  };
  DeviceMatrix max(*device, DType::kF32, rows, heads), den(*device, DType::kF32, rows, heads, 3),
      num(*device, DType::kF32, rows, heads * dim),
      from_max(*device, DType::kF32, count, of_partial),
      from_den(*device, DType::kF32, count, of_partial, 1),
      from_num(*device, type, count, of_partial * dim, 4);
  const auto max0 = fill(max, 3), den0 = fill(den, 1), num0 = fill(num, 1);
  const auto max1 = fill(from_max, 3), den1 = fill(from_den, 1), num1 = [&] {
    fill(from_num, 1);
    return from_num.Get();  // as it was rounded
  }();
  std::vector<int32_t> at, first;
  for (int64_t i = 0; i < count; ++i) {
    at.push_back(i < 20 ? 0 : static_cast<int32_t>(random.Next() % 2) * 2);  // none to row 1
    first.push_back(
        static_cast<int32_t>(random.Next() % static_cast<uint64_t>(heads - of_partial + 1)));
  }
  device->MergePartials({max.tensor, den.tensor, num.tensor},
                        {from_max.tensor, from_den.tensor, from_num.tensor}, at, first);
  const auto got_max = max.Get(), got_den = den.Get(), got_num = num.Get();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      const auto own = static_cast<size_t>(r * heads + h);
      std::vector<double> weights(static_cast<size_t>(count));
      double top = static_cast<double>(max0[own]);
      const auto index = [&](int64_t i) {  // of the head in partial i, or −1
        const int64_t in = h - first[static_cast<size_t>(i)];
        return at[static_cast<size_t>(i)] == r && in >= 0 && in < of_partial ? i * of_partial + in
                                                                             : int64_t{-1};
      };
      for (int64_t i = 0; i < count; ++i) {
        if (index(i) >= 0)
          top = std::max(top, static_cast<double>(max1[static_cast<size_t>(index(i))]));
      }
      const double keep = std::exp(static_cast<double>(max0[own]) - top);
      double total = keep * static_cast<double>(den0[own]), size = std::abs(total);
      for (int64_t i = 0; i < count; ++i) {
        if (index(i) < 0) continue;
        const auto p = static_cast<size_t>(index(i));
        const double weight = std::exp(static_cast<double>(max1[p]) - top);
        weights[static_cast<size_t>(i)] = weight;
        total += weight * static_cast<double>(den1[p]);
        size += std::abs(weight * static_cast<double>(den1[p]));
      }
      ASSERT_EQ(static_cast<double>(got_max[own]), top);
      ASSERT_NEAR(static_cast<double>(got_den[own]), total, 1e-5 * size);
      for (int64_t j = 0; j < dim; ++j) {
        const auto element = [&](const std::vector<float>& values, int64_t head) {
          return static_cast<double>(values[static_cast<size_t>(head * dim + j)]);
        };
        double sum = keep * element(num0, r * heads + h), of_sum = std::abs(sum);
        for (int64_t i = 0; i < count; ++i) {
          if (index(i) < 0) continue;
          const double term = weights[static_cast<size_t>(i)] * element(num1, index(i));
          sum += term;
          of_sum += std::abs(term);
        }
        ASSERT_NEAR(element(got_num, r * heads + h), sum, 1e-5 * of_sum)
            << "row " << r << ", head " << h << ", element " << j;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, MergePartials,
    testing::Values(std::tuple(128, 32, 4, DType::kF32), std::tuple(80, 9, 3, DType::kF32),
                    std::tuple(66, 5, 1, DType::kF32), std::tuple(256, 3, 3, DType::kF32),
                    std::tuple(128, 32, 4, DType::kBf16), std::tuple(80, 9, 3, DType::kBf16),
                    std::tuple(66, 5, 1, DType::kBf16), std::tuple(256, 3, 3, DType::kBf16)));

}  // namespace
}  // namespace passel::gpu
