// What int8 rows add to the error of sampled and of exact attention, at every ISA level.
#include <gtest/gtest.h>

#include <cmath>

#include "host_attention/kernels.h"
#include "tests/host_attention/reference.h"

namespace passel::host {
namespace {

using reference::Data;

class Int8Test : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > BestIsa()) GTEST_SKIP() << "this machine lacks " << IsaName(GetParam());
  }
  const Kernels& kernels() const { return KernelsFor(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Levels, Int8Test, testing::Values(Isa::kScalar, Isa::kAvx2, Isa::kAvx512),
                         [](const auto& level) { return std::string(IsaName(level.param)); });

// kClustered: 2% of the keys stand at cosine 0.3 … 0.8 to a query. kOutliers: a few channels
// are far from zero and three times as wide; the row's scale is theirs.
enum class Kind { kIid, kClustered, kOutliers };

Data MakeKeys(Kind kind, uint32_t d) {
  Data data = reference::MakeData(40 + d, 6000, d, 4, 0.0);
  Random random(8);
  for (uint64_t i = 0; i < data.n; ++i) {
    bf16* key = &data.rows[i * 2 * d];
    if (kind == Kind::kOutliers) {
      for (uint32_t j = 5; j < d; j += 16) key[j] = ToBf16(3 * ToFloat(key[j]) + 8);
      continue;
    }
    if (kind == Kind::kIid || random.Uniform() > 0.02) continue;
    const float* q = &data.q[random.Next() % data.group * d];
    double qq = 0, kq = 0, kk = 0;
    for (uint32_t j = 0; j < d; ++j) {
      const double x = double(ToFloat(key[j]));
      qq += double(q[j]) * double(q[j]);
      kq += x * double(q[j]);
      kk += x * x;
    }
    const double cosine = 0.3 + 0.5 * random.Uniform();
    const double along = cosine * std::sqrt(kk / qq);
    const double across = std::sqrt((1 - cosine * cosine) * kk / (kk - kq * kq / qq));
    for (uint32_t j = 0; j < d; ++j) {
      const double x = double(ToFloat(key[j])), y = double(q[j]);
      key[j] = ToBf16(static_cast<float>(along * y + across * (x - kq / qq * y)));
    }
  }
  if (kind == Kind::kOutliers) {
    for (uint32_t h = 0; h < data.group; ++h) {
      for (uint32_t j = 5; j < d; j += 16) data.q[size_t{h} * d + j] *= 0.3f;
    }
  }
  reference::ComputeMean(data);
  return data;
}

// A draw of S: each token with its probability.
std::vector<uint64_t> Draw(const Data& data, uint32_t h, uint32_t k, uint32_t l, Random& random) {
  const float* q = &data.q[size_t{h} * data.d];
  std::vector<uint64_t> ids;
  for (uint64_t i = 0; i < data.n; ++i) {
    double dot = 0, norm = 0, q_norm = 0;
    for (uint32_t j = 0; j < data.d; ++j) {
      const double x = double(ToFloat(data.rows[i * 2 * data.d + j])) - double(data.mean[j]);
      dot += x * double(q[j]);
      norm += x * x;
      q_norm += double(q[j]) * double(q[j]);
    }
    const double u = InclusionProbability(dot / std::sqrt(norm * q_norm), k, l);
    if (random.Uniform() < u) ids.push_back(i);
  }
  return ids;
}

TEST_P(Int8Test, AddsAtMostOnePercentToSampledAttention) {
  const uint32_t k = 10, l = 150;
  for (const Kind kind : {Kind::kIid, Kind::kClustered, Kind::kOutliers}) {
    for (const uint32_t d : {64u, 80u, 128u}) {
      const Data data = MakeKeys(kind, d);
      const size_t stride = RowStride(KvType::kInt8, d);
      std::vector<std::byte> bytes(data.n * stride);
      for (uint64_t i = 0; i < data.n; ++i) {
        StoreRow(KvType::kInt8, d, &data.rows[i * 2 * d], &bytes[i * stride]);
      }
      const RowsView rows{bytes.data(), stride, d, KvType::kInt8};
      std::vector<float> work(WorkFloats(1, d));
      Random random(9);
      double squares = 0;
      for (uint32_t h = 0; h < data.group; ++h) {
        const auto ids = Draw(data, h, k, l, random);
        ASSERT_GT(ids.size(), 10u);
        ASSERT_LT(ids.size(), data.n / 2);
        const std::vector<uint32_t> ids32(ids.begin(), ids.end());
        float max = kEmptyMax, den = 0;
        std::vector<float> num(d);
        kernels().attend_list(rows, ids32.data(), ids32.size(), &data.q[size_t{h} * d],
                              {data.mean.data(), k, l}, work.data(), {&max, &den, num.data()});
        const auto exact = reference::Attend(data, h, ids, k, l);
        squares += std::pow(reference::OutputError(exact, num.data(), den), 2) / data.group;
      }
      EXPECT_LT(std::sqrt(squares), 1e-2) << "kind " << static_cast<int>(kind) << " d " << d;
    }
  }
}

TEST_P(Int8Test, DenseAndScoresReadTheSameRows) {
  for (const uint32_t d : {16u, 48u, 128u}) {
    const Data data = reference::MakeData(50 + d, 200, d, 3);
    const size_t stride = RowStride(KvType::kInt8, d);
    std::vector<std::byte> bytes(data.n * stride);
    std::vector<float> k(d), v(d), scores(data.n);
    for (uint64_t i = 0; i < data.n; ++i) {
      StoreRow(KvType::kInt8, d, &data.rows[i * 2 * d], &bytes[i * stride]);
    }
    const RowsView rows{bytes.data(), stride, d, KvType::kInt8};
    std::vector<float> work(WorkFloats(data.group, d)), max(data.group, kEmptyMax), den(data.group),
        num(size_t{data.group} * d);
    kernels().scores(rows, 0, data.n, data.q.data(), work.data(), scores.data());
    kernels().attend_dense(rows, 0, data.n, data.q.data(), data.group, work.data(), max.data(),
                           den.data(), num.data());
    double sum = 0;
    std::vector<double> want(d);
    for (uint64_t i = 0; i < data.n; ++i) {
      LoadRow(rows, i, k.data(), v.data());
      double dot = 0, key_max = 0;
      for (uint32_t j = 0; j < d; ++j) {
        const double x = double(ToFloat(data.rows[i * 2 * d + j]));
        key_max = std::max(key_max, std::fabs(x));
        dot += double(k[j]) * double(data.q[j]);
      }
      // A quarter of an int8 step at most: halves of a step are stored, the largest one aside.
      for (uint32_t j = 0; j < d; ++j) {
        const double x = double(ToFloat(data.rows[i * 2 * d + j]));
        ASSERT_NEAR(k[j], x, key_max / 127 * 0.2501);
      }
      ASSERT_NEAR(scores[i], dot / std::sqrt(double(d)), 1e-5);
      const double w = std::exp(dot / std::sqrt(double(d)) - double(max[0]));
      sum += w;
      for (uint32_t j = 0; j < d; ++j) want[j] += w * double(v[j]);
    }
    EXPECT_NEAR(den[0] / sum, 1, 1e-4);
    for (uint32_t j = 0; j < d; ++j) EXPECT_NEAR(num[j], want[j], 1e-4 * sum) << j;
  }
}

}  // namespace
}  // namespace passel::host
