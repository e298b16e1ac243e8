// HostAttention as a whole, against float64.
#include "host_attention/host_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "runtime/base/error.h"
#include "tests/host_attention/reference.h"

namespace passel::host {
namespace {

using reference::AppendAll;
using reference::Codes;
using reference::Data;
using reference::ItemOf;
using reference::MakeOptions;
using reference::OpenOne;
using reference::Wait;

AttendBatch One(const QueryItem& item, bool collect_ids = false) {
  AttendBatch batch;
  batch.items = {item};
  batch.collect_ids = collect_ids;
  return batch;
}

PartialItem Merged(const std::vector<PartialItem>& parts, uint32_t group, uint32_t d) {
  const size_t floats = size_t{group} * (d + 2);
  const std::shared_ptr<float> memory(new float[floats](), std::default_delete<float[]>());
  PartialItem sum;
  sum.item = 0;
  sum.segment = -1;
  sum.sampled.resize(group);
  sum.values = std::span(memory.get(), floats);
  sum.memory = memory;
  std::fill_n(sum.values.begin(), group, kEmptyMax);
  for (const PartialItem& p : parts) {
    for (uint32_t h = 0; h < group; ++h) {
      sum.sampled[h] += p.sampled[h];
      MergePartial({&sum.values[h], &sum.values[group + h], &sum.values[2 * group + size_t{h} * d]},
                   p.max()[h], p.den()[h], &p.num()[size_t{h} * d], d);
    }
  }
  return sum;
}

void ExpectNear(const reference::Exact& want, const PartialItem& got, uint32_t h, double bound) {
  EXPECT_LT(reference::OutputError(want, &got.num()[h * want.num.size()], got.den()[h]), bound);
  EXPECT_LT(reference::LseError(want, got.max()[h], got.den()[h]), bound);
}

TEST(PlanSegments, CoversEveryTokenInEqualPromptSegments) {
  const auto plan = PlanSegments(100, 70, 30);
  ASSERT_EQ(plan.size(), 7u);
  uint64_t next = 0;
  for (const SegmentSpec& s : plan) {
    EXPECT_EQ(s.first_token, next);
    next += s.capacity;
    EXPECT_LE(s.capacity, s.prompt ? 25u : 30u);
  }
  EXPECT_EQ(next, 170u);
  EXPECT_TRUE(PlanSegments(0, 0, 100).empty());
  EXPECT_EQ(PlanSegments(uint64_t{1} << 30, 0, 65536).front().capacity, 65533u);
}

// The sampled set and its weighted sums, over sealed CSR, compact and generated segments.
TEST(HostAttention, LshSamplesExactlyTheDefinedSet) {
  const uint32_t k = 6, l = 40;
  const Data data = reference::MakeData(1, 5200, 64, 4);
  const Codes codes = reference::Hash(data, 2, k, l);
  for (const uint64_t block : {700u, 2000u, 65536u}) {
    Options options = MakeOptions(data, Estimator::kLsh, k, l);
    options.block_tokens = block;
    HostAttention host(options);
    const auto plan = PlanSegments(3000, 3000, block);
    OpenOne(host, plan);
    AppendAll(host, data, &codes, l, plan);
    const auto got = Wait(host, One(ItemOf(data, &codes, 5200), true));
    ASSERT_EQ(got.size(), 1u);
    EXPECT_EQ(got[0].segment, -1);
    for (uint32_t h = 0; h < data.group; ++h) {
      std::vector<uint64_t> want;
      std::vector<uint64_t> exact_ids;
      for (const SegmentSpec& s : plan) {
        const uint64_t end = std::min<uint64_t>(s.first_token + s.capacity, 5200);
        if (s.first_token >= end) continue;
        const uint64_t exact_from =
            s.prompt ? end : s.first_token + (end - s.first_token) / kOpenTokens * kOpenTokens;
        const auto sampled = reference::Sampled(codes, h, l, s.first_token, exact_from);
        want.insert(want.end(), sampled.begin(), sampled.end());
        const auto open = reference::Range(exact_from, end);
        want.insert(want.end(), open.begin(), open.end());
        exact_ids.insert(exact_ids.end(), open.begin(), open.end());
      }
      EXPECT_EQ(got[0].ids[h], want);
      EXPECT_EQ(got[0].sampled[h], want.size());
      const double fraction = double(want.size()) / 5200;
      EXPECT_TRUE(fraction > 0 && fraction < 0.5) << fraction;
      std::vector<uint64_t> weighted;
      std::set_difference(want.begin(), want.end(), exact_ids.begin(), exact_ids.end(),
                          std::back_inserter(weighted));
      auto sum = reference::Attend(data, h, weighted, k, l);
      const auto open = reference::Attend(data, h, exact_ids, 0, 0);
      const double w = std::exp(open.max - sum.max);
      sum.den += w * open.den;
      for (size_t j = 0; j < sum.num.size(); ++j) sum.num[j] += w * open.num[j];
      ExpectNear(sum, got[0], h, 1e-4);
    }
  }
}

// A code that no table has spoils its item alone, whichever head's it is.
TEST(HostAttention, CodesOutOfRangeAreRefusedWhereTheyAreUsed) {
  const uint32_t k = 6, l = 40;
  const Data data = reference::MakeData(1, 700, 64, 4);
  const Codes codes = reference::Hash(data, 2, k, l);
  HostAttention host(MakeOptions(data, Estimator::kLsh, k, l));
  const auto plan = PlanSegments(700, 0, 65536);
  OpenOne(host, plan);
  AppendAll(host, data, &codes, l, plan);
  const auto want = Wait(host, One(ItemOf(data, &codes, 700)));
  for (size_t at = 0; at < codes.queries.size(); at += 13) {
    for (const uint32_t bad : {1u << k, 0x8000u, 0xffffu}) {
      Codes spoilt = codes;
      spoilt.queries[at] = static_cast<uint16_t>(bad);
      AttendBatch batch = One(ItemOf(data, &codes, 700));
      batch.items.push_back(ItemOf(data, &spoilt, 700));
      const auto got = Wait(host, std::move(batch));
      ASSERT_EQ(got.size(), 2u);
      EXPECT_EQ(got[0].status, Status::kOk);
      EXPECT_TRUE(std::ranges::equal(got[0].values, want[0].values));
      EXPECT_EQ(got[1].status, Status::kBadArgument);
    }
  }
}

TEST(HostAttention, FullAndExactItemsEqualExactAttention) {
  const Data data = reference::MakeData(3, 3000, 48, 3);
  const Codes codes = reference::Hash(data, 2, 5, 20);
  for (const Estimator estimator : {Estimator::kFull, Estimator::kLsh}) {
    for (const uint64_t tokens : {uint64_t{3000}, uint64_t{2999}, uint64_t{1}, uint64_t{1700}}) {
      Options options = MakeOptions(data, estimator, 5, 20);
      options.block_tokens = 800;
      HostAttention host(options);
      const auto plan = PlanSegments(2000, 1000, 800);
      OpenOne(host, plan);
      AppendAll(host, data, estimator == Estimator::kLsh ? &codes : nullptr, 20, plan);
      const auto got = Wait(host, One(ItemOf(data, nullptr, tokens)));
      ASSERT_EQ(got.size(), 1u);
      for (uint32_t h = 0; h < data.group; ++h) {
        EXPECT_EQ(got[0].sampled[h], tokens);
        ExpectNear(reference::Attend(data, h, reference::Range(0, tokens), 0, 0), got[0], h, 2e-5);
      }
    }
  }
}

TEST(HostAttention, Int8StaysNearExactAttention) {
  const Data data = reference::MakeData(4, 2000, 64, 2);
  Options options = MakeOptions(data, Estimator::kFull, 5, 20);
  options.kv_type = KvType::kInt8;
  HostAttention host(options);
  const auto plan = PlanSegments(2000, 0, 4096);
  OpenOne(host, plan);
  AppendAll(host, data, nullptr, 0, plan);
  EXPECT_EQ(host.usage().kv_bytes, 2000u * (2 * 64 + 64 / 8 + 8));
  const auto got = Wait(host, One(ItemOf(data, nullptr, 2000)));
  for (uint32_t h = 0; h < 2; ++h) {
    ExpectNear(reference::Attend(data, h, reference::Range(0, 2000), 0, 0), got[0], h, 1e-2);
  }
}

// Segments dealt over one to three hosts, one or two threads: bit-identical partials per segment.
TEST(HostAttention, ShardingAndThreadsLeavePartialsBitIdentical) {
  const uint32_t k = 6, l = 30;
  const Data data = reference::MakeData(5, 4000, 64, 4);
  const Codes codes = reference::Hash(data, 3, k, l);
  const auto plan = PlanSegments(2500, 1500, 600);
  std::vector<std::vector<PartialItem>> results;
  for (const uint32_t hosts : {1u, 2u, 3u}) {
    std::vector<PartialItem> all(plan.size());
    for (uint32_t host_number = 0; host_number < hosts; ++host_number) {
      std::vector<uint32_t> mine;
      for (uint32_t s = host_number; s < plan.size(); s += hosts) mine.push_back(s);
      Options options = MakeOptions(data, Estimator::kLsh, k, l);
      options.block_tokens = 600;
      options.deterministic = true;
      options.threads = hosts;
      HostAttention host(options);
      OpenOne(host, plan, mine);
      AppendAll(host, data, &codes, l, plan, 37 * hosts, mine);
      const auto got = Wait(host, One(ItemOf(data, &codes, 3900)));
      EXPECT_EQ(got.size(), mine.size());
      for (const PartialItem& p : got) all[static_cast<size_t>(p.segment)] = p;
    }
    results.push_back(all);
  }
  for (size_t r = 1; r < results.size(); ++r) {
    for (size_t s = 0; s < plan.size(); ++s) {
      EXPECT_EQ(results[r][s].sampled, results[0][s].sampled);
      EXPECT_TRUE(std::ranges::equal(results[r][s].values, results[0][s].values));
    }
  }
  // And the same as one merged partial, to float tolerance.
  Options options = MakeOptions(data, Estimator::kLsh, k, l);
  options.block_tokens = 600;
  HostAttention host(options);
  OpenOne(host, plan);
  AppendAll(host, data, &codes, l, plan);
  const auto one = Wait(host, One(ItemOf(data, &codes, 3900)));
  const PartialItem sum = Merged(results[0], data.group, data.d);
  for (uint32_t h = 0; h < data.group; ++h) {
    EXPECT_EQ(one[0].sampled[h], sum.sampled[h]);
    EXPECT_TRUE(sum.sampled[h] > 0 && sum.sampled[h] < 3900 / 2) << sum.sampled[h];
    EXPECT_NEAR(one[0].max()[h] + std::log(one[0].den()[h]), sum.max()[h] + std::log(sum.den()[h]),
                1e-5);
    for (uint32_t j = 0; j < data.d; ++j) {
      const size_t at = size_t{h} * data.d + j;
      EXPECT_NEAR(one[0].num()[at] / one[0].den()[h], sum.num()[at] / sum.den()[h], 1e-5);
    }
  }
}

// A query for fewer tokens than are there sees those alone, whatever has merged since.
TEST(HostAttention, NumComesInBf16WhereAsked) {
  const Data data = reference::MakeData(21, 3000, 48, 3);
  const Codes codes = reference::Hash(data, 1, 6, 30);
  for (const bool deterministic : {false, true}) {
    Options options = MakeOptions(data, Estimator::kLsh, 6, 30);
    options.deterministic = deterministic;
    HostAttention host(options);
    const auto plan = PlanSegments(3000, 0, 1024);
    OpenOne(host, plan);
    AppendAll(host, data, &codes, 30, plan);
    AttendBatch batch = One(ItemOf(data, &codes, 3000));
    const auto whole = Wait(host, batch);
    batch.bf16_num = true;
    const auto rounded = Wait(host, batch);
    // A query in bf16 is as the same in float32.
    std::vector<bf16> q(size_t{3} * 48);
    std::vector<float> same(q.size());
    std::transform(batch.items[0].q, batch.items[0].q + q.size(), q.begin(), ToBf16);
    std::transform(q.begin(), q.end(), same.begin(), ToFloat);
    AttendBatch narrow = batch, wide = batch;
    narrow.items[0].q = nullptr;
    narrow.items[0].q_bf16 = q.data();
    wide.items[0].q = same.data();
    const auto of_narrow = Wait(host, narrow), of_wide = Wait(host, wide);
    ASSERT_EQ(of_narrow.size(), of_wide.size());
    for (size_t i = 0; i < of_wide.size(); ++i) {
      EXPECT_TRUE(std::ranges::equal(of_narrow[i].values, of_wide[i].values));
      EXPECT_FALSE(std::ranges::equal(of_narrow[i].values, rounded[i].values));
    }
    ASSERT_EQ(rounded.size(), whole.size());
    for (size_t i = 0; i < whole.size(); ++i) {
      ASSERT_EQ(rounded[i].values.size(), 3u * (2 + 48 / 2));
      EXPECT_TRUE(std::ranges::equal(rounded[i].max(), whole[i].max()));
      EXPECT_TRUE(std::ranges::equal(rounded[i].den(), whole[i].den()));
      const auto* num = reinterpret_cast<const bf16*>(&rounded[i].values[6]);
      for (size_t j = 0; j < 3 * 48; ++j) {
        ASSERT_EQ(num[j].bits, ToBf16(whole[i].num()[j]).bits) << "partial " << i << ", " << j;
      }
    }
  }
}

TEST(HostAttention, EarlierTokenCountsGiveWhatTheyGaveThen) {
  const uint32_t k = 6, l = 30;
  const Data data = reference::MakeData(6, 2000, 32, 2);
  const Codes codes = reference::Hash(data, 3, k, l);
  Options options = MakeOptions(data, Estimator::kLsh, k, l);
  options.deterministic = true;
  HostAttention host(options);
  const auto plan = PlanSegments(0, 2000, 65536);
  OpenOne(host, plan);
  ASSERT_EQ(host.SetMean({RequestId(1), 0, 0, data.mean}), Status::kOk);
  std::vector<std::pair<uint64_t, PartialItem>> then;
  for (uint64_t at = 0; at < 2000; at += 50) {
    ASSERT_EQ(
        host.Append({RequestId(1), 0, 0, at, 50, &data.rows[at * 2 * data.d], &codes.keys[at * l]}),
        Status::kOk);
    then.emplace_back(at + 50, Wait(host, One(ItemOf(data, &codes, at + 50)))[0]);
  }
  for (const auto& [tokens, before] : then) {
    const PartialItem now = Wait(host, One(ItemOf(data, &codes, tokens)))[0];
    EXPECT_EQ(now.sampled, before.sampled);
    EXPECT_TRUE(std::ranges::equal(now.values, before.values));
    if (tokens < 1000) continue;
    EXPECT_TRUE(now.sampled[0] > 0 && now.sampled[0] < tokens / 2) << now.sampled[0];
  }
}

TEST(HostAttention, EmptyPartialsMergeWithoutNan) {
  const Data data = reference::MakeData(7, 100, 32, 2);
  for (const bool deterministic : {false, true}) {
    Options options = MakeOptions(data, Estimator::kFull, 6, 30);
    options.deterministic = deterministic;
    HostAttention host(options);
    OpenOne(host, PlanSegments(100, 0, 65536));
    const auto got = Wait(host, One(ItemOf(data, nullptr, 0)));
    ASSERT_EQ(got.size(), deterministic ? 0u : 1u);
    const PartialItem sum = Merged(got, 2, 32);
    EXPECT_EQ(sum.max()[0], kEmptyMax);
    EXPECT_EQ(sum.den()[0], 0.0f);
    for (const float x : sum.num()) EXPECT_EQ(x, 0.0f);
  }
  // An LSH query that samples nothing: every code differs.
  HostAttention host(MakeOptions(data, Estimator::kLsh, 6, 30));
  Codes codes = reference::Hash(data, 1, 6, 30);
  for (uint16_t& c : codes.keys) c = 1;
  for (uint16_t& c : codes.queries) c = 2;
  const auto plan = PlanSegments(100, 0, 65536);
  OpenOne(host, plan);
  AppendAll(host, data, &codes, 30, plan);
  const auto got = Wait(host, One(ItemOf(data, &codes, 100)));
  EXPECT_EQ(got[0].sampled[0], 0u);
  EXPECT_EQ(got[0].max()[0], kEmptyMax);
  EXPECT_EQ(got[0].den()[0], 0.0f);
}

TEST(HostAttention, TopKTakesTheLargestScores) {
  const Data data = reference::MakeData(8, 1000, 64, 2);
  Options options = MakeOptions(data, Estimator::kTopK, 6, 30);
  options.budget = 0.05;
  HostAttention host(options);
  const auto plan = PlanSegments(1000, 0, 65536);
  OpenOne(host, plan);
  AppendAll(host, data, nullptr, 0, plan);
  QueryItem item = ItemOf(data, nullptr, 1000);
  item.exact = false;
  const auto got = Wait(host, One(item, true));
  for (uint32_t h = 0; h < 2; ++h) {
    std::vector<std::pair<double, uint64_t>> scores;
    for (uint64_t i = 0; i < 1000; ++i) {
      scores.emplace_back(-reference::Attend(data, h, {i}, 0, 0).max, i);
    }
    std::sort(scores.begin(), scores.end());
    std::vector<uint64_t> want;
    for (size_t i = 0; i < 50; ++i) want.push_back(scores[i].second);
    std::sort(want.begin(), want.end());
    EXPECT_EQ(got[0].ids[h], want);
    ExpectNear(reference::Attend(data, h, want, 0, 0), got[0], h, 2e-5);
  }
}

TEST(HostAttention, AppendIsIdempotentAndRefusesWhatItCannotPlace) {
  const Data data = reference::MakeData(9, 1000, 32, 2);
  const Codes codes = reference::Hash(data, 1, 6, 30);
  HostAttention host(MakeOptions(data, Estimator::kLsh, 6, 30));
  const auto plan = PlanSegments(600, 400, 65536);
  OpenOne(host, plan);
  const auto append = [&](uint64_t first, uint32_t count, const uint16_t* all_codes) {
    return host.Append({RequestId(1), 0, 0, first, count, &data.rows[first * 64],
                        all_codes == nullptr ? nullptr : all_codes + first * 30});
  };
  EXPECT_EQ(append(10, 5, codes.keys.data()), Status::kMissingTokens);
  EXPECT_EQ(append(0, 400, codes.keys.data()), Status::kOk);
  EXPECT_EQ(append(0, 400, codes.keys.data()), Status::kOk);
  EXPECT_EQ(append(300, 300, codes.keys.data()), Status::kOk);
  EXPECT_EQ(append(300, 301, codes.keys.data()), Status::kBadArgument);
  EXPECT_EQ(append(600, 400, nullptr), Status::kOk);
  EXPECT_EQ(append(1000, 1, codes.keys.data()), Status::kNotHere);
  EXPECT_EQ(host.usage().kv_bytes, 1000u * 4 * 32);
  EXPECT_TRUE(host.Ready(RequestId(1), 0, 0, 1000));
  std::vector<uint16_t> bad(codes.keys);
  bad[0] = 64;
  HostAttention other(MakeOptions(data, Estimator::kLsh, 6, 30));
  OpenOne(other, plan);
  EXPECT_EQ(other.Append({RequestId(1), 0, 0, 0, 1, data.rows.data(), bad.data()}),
            Status::kBadArgument);
  EXPECT_FALSE(other.Ready(RequestId(1), 0, 0, 1));
  const auto ignore = [](std::vector<PartialItem>) { ADD_FAILURE() << "done was called"; };
  // The generated segment has no codes, so it can't be sampled.
  EXPECT_EQ(host.Attend(One(ItemOf(data, &codes, 1000)), ignore), Status::kBadArgument);
  EXPECT_EQ(other.Attend(One(ItemOf(data, &codes, 1)), ignore), Status::kMissingTokens);
  QueryItem item = ItemOf(data, &codes, 1);
  item.kv_head = 3;
  EXPECT_EQ(host.Attend(One(item), ignore), Status::kNotHere);
  item.request = RequestId(9);
  EXPECT_EQ(host.Attend(One(item), ignore), Status::kUnknownRequest);
}

TEST(HostAttention, RefusesWhatExceedsTheBudgetAndReservesNothing) {
  const Data data = reference::MakeData(10, 10, 32, 1);
  const auto plan = PlanSegments(5000, 3000, 2048);
  Options options = MakeOptions(data, Estimator::kLsh, 6, 30);
  options.block_tokens = 2048;
  uint64_t need = 0;
  for (const SegmentSpec& s : plan) need += SegmentBytes(options, s);
  options.memory_bytes = need - 1;
  HostAttention small(options);
  try {
    OpenOne(small, plan);
    FAIL() << "opened";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kMemory);
    EXPECT_NE(std::string(e.what()).find(std::to_string(need)), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find(std::to_string(need - 1)), std::string::npos) << e.what();
  }
  EXPECT_EQ(small.usage().reserved_bytes, 0u);
  options.memory_bytes = need;
  HostAttention fits(options);
  OpenOne(fits, plan);
  EXPECT_EQ(fits.usage().reserved_bytes, need);
  fits.Release(RequestId(1));
  EXPECT_EQ(fits.usage().reserved_bytes, 0u);
}

TEST(HostAttention, RefusesOptionsOutOfRange) {
  const Data data = reference::MakeData(10, 10, 32, 1);
  const auto expect_refused = [&](auto change) {
    Options options = MakeOptions(data, Estimator::kLsh, 6, 30);
    change(options);
    EXPECT_THROW(HostAttention{options}, Error);
  };
  expect_refused([](Options& o) { o.head_dim = 40; });
  expect_refused([](Options& o) { o.k = 17; });
  expect_refused([](Options& o) { o.l = 1025; });
  expect_refused([](Options& o) { o.block_tokens = 65537; });
}

}  // namespace
}  // namespace passel::host
