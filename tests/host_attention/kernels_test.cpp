// Every kernel at every ISA level of this machine, against float64 on fresh inputs.
#include "host_attention/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "host_attention/tables.h"
#include "tests/host_attention/reference.h"

namespace passel::host {
namespace {

using reference::Data;

class KernelsTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > BestIsa()) GTEST_SKIP() << "this machine lacks " << IsaName(GetParam());
  }
  const Kernels& kernels() const { return KernelsFor(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Levels, KernelsTest,
                         testing::Values(Isa::kScalar, Isa::kAvx2, Isa::kAvx512),
                         [](const auto& level) { return std::string(IsaName(level.param)); });

// Rows in storage of this type.
struct Store {
  std::vector<std::byte> bytes;
  RowsView view;
  Store(const Data& data, KvType type) {
    const size_t stride = RowStride(type, data.d);
    bytes.resize(data.n * stride);
    for (uint64_t i = 0; i < data.n; ++i) {
      StoreRow(type, data.d, &data.rows[i * 2 * data.d], &bytes[i * stride]);
    }
    view = {bytes.data(), stride, data.d, type};
  }
};

// The same data as the storage type holds it.
Data AsStored(const Data& data, const Store& store) {
  Data stored = data;
  std::vector<float> k(data.d), v(data.d);
  for (uint64_t i = 0; i < data.n; ++i) {
    LoadRow(store.view, i, k.data(), v.data());
    for (uint32_t j = 0; j < data.d; ++j) {
      stored.rows[i * 2 * data.d + j] = ToBf16(k[j]);
      stored.rows[i * 2 * data.d + data.d + j] = ToBf16(v[j]);
    }
  }
  return stored;
}

TEST_P(KernelsTest, InclusionProbabilityAtTheExtremes) {
  std::vector<float> cosines = {1.0f,  -1.0f, 1.5f,  -1.5f,   0.0f,  0.999999f, -0.9f,
                                0.5f,  -0.5f, 1e-6f, 0.9999f, 0.95f, -0.7f,     0.3f,
                                -0.3f, 0.1f,  -0.1f, 0.05f,   0.8f,  0.7f,      0.6f};
  Random random(7);
  for (int i = 0; i < 300; ++i) cosines.push_back(static_cast<float>(2 * random.Uniform() - 1));
  std::vector<float> u(cosines.size());
  for (const auto& [k, l] : {std::pair{10u, 150u},
                             {1u, 2u},
                             {16u, 1024u},
                             {10u, 1024u},
                             {8u, 75u},
                             {1u, 1024u},
                             {16u, 2u},
                             {2u, 3u},
                             {11u, 300u}}) {
    kernels().inclusion(cosines.data(), cosines.size(), k, l, u.data());
    for (size_t i = 0; i < cosines.size(); ++i) {
      const auto want = static_cast<double>(reference::Inclusion(cosines[i], k, l));
      ASSERT_TRUE(u[i] > 0 && u[i] <= 1) << "cos " << cosines[i] << " k " << k << " l " << l;
      // Where u is below 1e-25 the value does not matter, only that it is positive.
      const double slack = want < 1e-25 ? 1e-25 : 2e-5 * want;
      // float32 cosines next to ±1 leave acos, and so u, uncertain by the cosine's own rounding.
      const double next = std::nextafter(cosines[i], 2.0f),
                   last = std::nextafter(cosines[i], -2.0f);
      const double spread = static_cast<double>(
          std::fabs(reference::Inclusion(next, k, l) - reference::Inclusion(last, k, l)));
      ASSERT_NEAR(u[i], want, slack + spread) << "cos " << cosines[i] << " k " << k << " l " << l;
    }
    EXPECT_FLOAT_EQ(u[0], 1.0f) << "a parallel key, k " << k << " l " << l;
  }
}

TEST(InclusionProbability, Float64MatchesTheBinomialSum) {
  for (const auto& [k, l] : {std::pair{10u, 150u}, {1u, 2u}, {16u, 1024u}, {1u, 1024u}}) {
    for (double c = -0.9999; c < 1; c += 0.00917) {
      const auto want = static_cast<double>(reference::Inclusion(c, k, l));
      if (want < 1e-29) continue;
      ASSERT_NEAR(InclusionProbability(c, k, l) / want, 1.0, 1e-9) << c << " " << k << " " << l;
    }
    EXPECT_EQ(InclusionProbability(1.0, k, l), 1.0);
    EXPECT_EQ(InclusionProbability(1.0 + 1e-9, k, l), 1.0);
    EXPECT_GT(InclusionProbability(-1.0, k, l), 0.0);
  }
}

// CSR and compact probes against the definition of S, whole and below a limit.
TEST_P(KernelsTest, ProbesFindExactlyTheTokensThatShareTwoCodes) {
  Random random(11);
  for (const auto& [n, k, l] : {std::tuple{3000u, 6u, 40u},
                                {1u, 3u, 2u},
                                {1537u, 10u, 1024u},
                                {20000u, 9u, 150u},
                                {300u, 4u, 17u},
                                {2048u, 1u, 700u}}) {
    std::vector<uint16_t> codes(size_t{n} * l), query(l);
    const auto draw = [&, buckets = uint64_t{1} << k] {
      // Half of the codes crowd into one bucket, to make large ones.
      return random.Uniform() < 0.02 ? uint16_t{0} : static_cast<uint16_t>(random.Next() % buckets);
    };
    for (uint16_t& c : codes) c = draw();
    for (uint16_t& c : query) c = draw();
    std::fill_n(&codes[0], l, uint16_t{0});
    std::fill_n(query.begin(), l / 2, uint16_t{0});
    const size_t stride = TableStride(n), buckets = size_t{1} << k;
    std::vector<uint16_t> compact(stride * l + kTableSlack), ids(compact),
        bounds((buckets + 1) * l);
    for (uint32_t i = 0; i < n; ++i) {
      for (uint32_t t = 0; t < l; ++t) compact[t * stride + i] = codes[size_t{i} * l + t];
    }
    for (uint32_t t = 0; t < l; ++t) {
      SortTable(&compact[t * stride], n, k, &bounds[t * (buckets + 1)], &ids[t * stride]);
    }
    std::vector<uint8_t> counters(kMaxBlockTokens + 65);
    std::vector<uint16_t> staging(kStagingIds);
    for (const uint32_t limit : {n, n / 2, n > 70 ? n - 70 : 0u}) {
      std::vector<uint32_t> want;
      for (uint32_t i = 0; i < limit; ++i) {
        uint32_t agreeing = 0;
        for (uint32_t t = 0; t < l; ++t) agreeing += codes[size_t{i} * l + t] == query[t];
        if (agreeing >= 2) want.push_back(500 + i);
      }
      std::vector<uint32_t> got(limit + kProbeSlack);
      got.resize(kernels().probe_csr({bounds.data(), ids.data(), stride, n, k, l}, query.data(),
                                     limit, 500, {counters.data(), staging.data()}, got.data()));
      EXPECT_EQ(got, want) << "CSR n " << n << " limit " << limit;
      EXPECT_TRUE(std::all_of(counters.begin(), counters.end(), [](uint8_t c) { return c == 0; }));
      got.assign(limit + kProbeSlack, 0);
      got.resize(kernels().probe_compact({compact.data(), stride, l}, query.data(), limit, 500,
                                         got.data()));
      EXPECT_EQ(got, want) << "compact n " << n << " limit " << limit;
    }
  }
}

TEST_P(KernelsTest, ListedRowsMatchFloat64) {
  for (const uint32_t d : {16u, 48u, 64u, 80u, 128u, 256u}) {
    for (const KvType type : {KvType::kBf16, KvType::kInt8}) {
      const Data fresh = reference::MakeData(100 + d, 400, d, 1);
      const Store store(fresh, type);
      const Data data = AsStored(fresh, store);
      std::vector<float> work(WorkFloats(1, d));
      for (const size_t count : {size_t{0}, size_t{1}, size_t{15}, size_t{16}, size_t{133}}) {
        std::vector<uint64_t> ids;
        std::vector<uint32_t> ids32;
        for (size_t i = 0; i < count; ++i) ids.push_back(i * 3);
        ids32.assign(ids.begin(), ids.end());
        for (const uint32_t l : {0u, 75u}) {
          float max = kEmptyMax, den = 0;
          std::vector<float> num(d);
          // In two calls: the second goes on from the first's partial.
          const size_t first = count / 3;
          const Weighting weighting{data.mean.data(), 8, l};
          kernels().attend_list(store.view, ids32.data(), first, data.q.data(), weighting,
                                work.data(), {&max, &den, num.data()});
          kernels().attend_list(store.view, ids32.data() + first, count - first, data.q.data(),
                                weighting, work.data(), {&max, &den, num.data()});
          if (count == 0) {
            EXPECT_EQ(max, kEmptyMax);
            EXPECT_EQ(den, 0.0f);
            continue;
          }
          const auto want = reference::Attend(data, 0, ids, 8, l);
          // int8 rows are compared as rounded to bf16, hence the wider bound.
          const double bound = type == KvType::kBf16 ? 2e-4 : 2e-2;
          EXPECT_LT(reference::OutputError(want, num.data(), den), bound) << d << " " << count;
          EXPECT_LT(reference::LseError(want, max, den), bound) << d << " " << count;
        }
      }
    }
  }
}

TEST_P(KernelsTest, DenseRowsMatchFloat64ForEveryGroupSize) {
  for (const uint32_t group : {1u, 2u, 3u, 4u, 7u, 8u}) {
    for (const uint32_t d : {16u, 80u, 128u}) {
      const Data data = reference::MakeData(200 + d, 333, d, group);
      const Store store(data, KvType::kBf16);
      std::vector<float> work(WorkFloats(group, d)), max(group, kEmptyMax), den(group),
          num(size_t{group} * d), scores(300);
      kernels().attend_dense(store.view, 10, 1, data.q.data(), group, work.data(), max.data(),
                             den.data(), num.data());
      kernels().attend_dense(store.view, 11, 299, data.q.data(), group, work.data(), max.data(),
                             den.data(), num.data());
      kernels().scores(store.view, 10, 300, data.q.data(), work.data(), scores.data());
      for (uint32_t h = 0; h < group; ++h) {
        const auto want = reference::Attend(data, h, reference::Range(10, 310), 0, 0);
        EXPECT_LT(reference::OutputError(want, &num[size_t{h} * d], den[h]), 2e-5);
        EXPECT_LT(reference::LseError(want, max[h], den[h]), 2e-5);
        if (h == 0) {
          EXPECT_NEAR(*std::max_element(scores.begin(), scores.end()), want.max, 1e-4);
        }
      }
    }
  }
}

TEST_P(KernelsTest, SignBitsMatchFloat64) {
  const uint32_t d = 48, columns = 96, n = 37;
  Random random(5);
  std::vector<float> x(n * d), r(d * columns);
  for (float& v : x) v = static_cast<float>(random.Normal());
  for (float& v : r) v = static_cast<float>(random.Normal());
  std::vector<uint16_t> bits(n * columns / 16);
  kernels().sign_bits(x.data(), n, d, r.data(), columns, bits.data());
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t c = 0; c < columns; ++c) {
      double dot = 0;
      for (uint32_t j = 0; j < d; ++j) dot += double(x[i * d + j]) * double(r[j * columns + c]);
      if (std::fabs(dot) < 1e-4) continue;
      EXPECT_EQ((bits[i * columns / 16 + c / 16] >> (c % 16)) & 1, dot > 0 ? 1 : 0);
    }
  }
}

}  // namespace
}  // namespace passel::host
