// The estimator's statistics over many projections.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "host_attention/host_attention.h"
#include "tests/host_attention/reference.h"

namespace passel::host {
namespace {

using reference::Codes;
using reference::Data;

Options OneThread(const Data& data, Estimator estimator, uint32_t k, uint32_t l) {
  Options options = reference::MakeOptions(data, estimator, k, l);
  options.threads = 1;
  options.deterministic = true;
  return options;
}

// Mean and standard error of a stream of numbers (Welford).
class Moments {
 public:
  void Add(double x) {
    ++n_;
    const double delta = x - mean_;
    mean_ += delta / n_;
    squares_ += delta * (x - mean_);
  }
  double mean() const { return mean_; }
  double error() const { return std::sqrt(squares_ / (n_ - 1) / n_); }

 private:
  double n_ = 0, mean_ = 0, squares_ = 0;
};

// Collects den and num of a partial against exact values of the same tokens. All are taken
// relative to the exact maximum.
class Unbiased {
 public:
  explicit Unbiased(reference::Exact exact) : exact_(std::move(exact)), num_(exact_.num.size()) {}
  void Add(float max, float den, const float* num) {
    const double w = std::exp(double(max) - exact_.max);
    den_.Add(w * double(den));
    AddNum(max, num);
  }
  void AddNum(float max, const float* num) {
    const double w = std::exp(double(max) - exact_.max);
    for (size_t j = 0; j < num_.size(); ++j) num_[j].Add(w * double(num[j]));
  }
  // 99.99% intervals; with d + 1 of them a right estimator fails in less than 1% of seeds.
  void Expect() const {
    EXPECT_NEAR(den_.mean(), exact_.den, kSigmas * den_.error());
    // The test has the power to see a bias of a few percent.
    EXPECT_LT(den_.error(), 0.02 * exact_.den);
    ExpectNum();
  }
  void ExpectNum() const {
    for (size_t j = 0; j < num_.size(); ++j) {
      EXPECT_NEAR(num_[j].mean(), exact_.num[j], kSigmas * num_[j].error()) << "component " << j;
    }
  }

 private:
  static constexpr double kSigmas = 3.9;
  reference::Exact exact_;
  Moments den_;
  std::vector<Moments> num_;
};

AttendBatch One(const QueryItem& item) {
  AttendBatch batch;
  batch.items = {item};
  return batch;
}

TEST(Estimator, LshIsUnbiasedOver200Projections) {
  const uint32_t k = 6, l = 40;
  const uint64_t n = 1200;
  const Data data = reference::MakeData(21, n, 32, 1);
  Unbiased unbiased(reference::Attend(data, 0, reference::Range(0, n), 0, 0));
  double sampled = 0;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const Codes codes = reference::Hash(data, 1000 + seed, k, l);
    HostAttention host(OneThread(data, Estimator::kLsh, k, l));
    const auto plan = PlanSegments(n, 0, 65536);
    reference::OpenOne(host, plan);
    reference::AppendAll(host, data, &codes, l, plan);
    const auto got = reference::Wait(host, One(reference::ItemOf(data, &codes, n)));
    unbiased.Add(got[0].max()[0], got[0].den()[0], got[0].num().data());
    sampled += double(got[0].sampled[0]) / double(n * 200);
  }
  unbiased.Expect();
  EXPECT_TRUE(sampled > 0.01 && sampled < 0.5) << sampled;
}

// After 3,000 generated tokens that came one by one, through open end, small blocks and merges.
TEST(Estimator, GeneratedTokensStayUnbiased) {
  const uint32_t k = 6, l = 40;
  const uint64_t prompt = 300, n = prompt + 3000;
  const Data data = reference::MakeData(22, n, 16, 1);
  Unbiased unbiased(reference::Attend(data, 0, reference::Range(prompt, n), 0, 0));
  double sampled = 0;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const Codes codes = reference::Hash(data, 5000 + seed, k, l);
    HostAttention host(OneThread(data, Estimator::kLsh, k, l));
    const auto plan = PlanSegments(prompt, 4000, 65536);
    reference::OpenOne(host, plan);
    reference::AppendAll(host, data, &codes, l, plan, 1);
    const auto got = reference::Wait(host, One(reference::ItemOf(data, &codes, n)));
    ASSERT_EQ(got.size(), 2u);
    ASSERT_EQ(got[1].segment, 1);
    unbiased.Add(got[1].max()[0], got[1].den()[0], got[1].num().data());
    sampled += double(got[1].sampled[0]) / (3000.0 * 200);
    ASSERT_LE(host.usage().kv_bytes + host.usage().table_bytes, host.usage().reserved_bytes);
  }
  unbiased.Expect();
  EXPECT_TRUE(sampled > 0.01 && sampled < 0.5) << sampled;
}

TEST(Estimator, OracleSamplingIsUnbiased) {
  const uint64_t n = 800;
  const Data data = reference::MakeData(23, n, 32, 1);
  Unbiased unbiased(reference::Attend(data, 0, reference::Range(0, n), 0, 0));
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Options options = OneThread(data, Estimator::kOracleSample, 6, 40);
    options.seed = seed;
    HostAttention host(options);
    const auto plan = PlanSegments(n, 0, 65536);
    reference::OpenOne(host, plan);
    reference::AppendAll(host, data, nullptr, 0, plan);
    QueryItem item = reference::ItemOf(data, nullptr, n);
    item.exact = false;
    const auto got = reference::Wait(host, One(item));
    // den is exact up to rounding, so its interval has no width: it is checked apart.
    const double want = reference::Attend(data, 0, reference::Range(0, n), 0, 0).den;
    EXPECT_NEAR(got[0].den()[0] / want, 1.0, 1e-4);
    EXPECT_LE(got[0].sampled[0], 16u);
    unbiased.AddNum(got[0].max()[0], got[0].num().data());
  }
  unbiased.ExpectNum();
}

// Keys parallel to the query are always sampled, with weight 1, also with 1,024 tables.
TEST(Estimator, ParallelKeysHaveWeightOne) {
  const uint32_t k = 10, l = 1024, d = 64;
  const uint64_t n = 3000;
  Data data = reference::MakeData(24, n, d, 1, 0.0);
  for (uint32_t j = 0; j < d; ++j) data.q[j] = 2 * ToFloat(ToBf16(data.q[j]));
  std::vector<uint64_t> parallel = {0, 17, 1500, 2999};
  for (const uint64_t i : parallel) {
    for (uint32_t j = 0; j < d; ++j) data.rows[i * 2 * d + j] = ToBf16(data.q[j]);
  }
  std::fill(data.mean.begin(), data.mean.end(), 0.0f);
  const Codes codes = reference::Hash(data, 3, k, l);
  HostAttention host(OneThread(data, Estimator::kLsh, k, l));
  const auto plan = PlanSegments(n, 0, 65536);
  reference::OpenOne(host, plan);
  reference::AppendAll(host, data, &codes, l, plan);
  AttendBatch batch = One(reference::ItemOf(data, &codes, n));
  batch.collect_ids = true;
  const auto got = reference::Wait(host, std::move(batch));
  const auto want = reference::Sampled(codes, 0, l, 0, n);
  EXPECT_EQ(got[0].ids[0], want);
  const double fraction = double(want.size()) / double(n);
  EXPECT_TRUE(fraction > 0 && fraction < 0.5) << fraction;
  for (const uint64_t i : parallel) {
    EXPECT_TRUE(std::find(want.begin(), want.end(), i) != want.end());
  }
  const auto exact = reference::Attend(data, 0, want, k, l);
  EXPECT_LT(reference::OutputError(exact, got[0].num().data(), got[0].den()[0]), 1e-4);
  EXPECT_LT(reference::LseError(exact, got[0].max()[0], got[0].den()[0]), 1e-4);
  // Their scores, |q|²/√d, dominate: den is close to their number.
  EXPECT_NEAR(got[0].den()[0], double(parallel.size()), 1e-2);
}

}  // namespace
}  // namespace passel::host
