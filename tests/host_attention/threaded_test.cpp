// Concurrency: many batches in flight, sealing and merging underneath, release in flight.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "host_attention/host_attention.h"
#include "host_attention/pool.h"
#include "tests/host_attention/reference.h"

namespace passel::host {
namespace {

using reference::Codes;
using reference::Data;

// Counts batches that are done.
class Latch {
 public:
  void Arrive() {
    const std::lock_guard lock(mutex_);
    ++count_;
    arrived_.notify_one();
  }
  void WaitFor(size_t count) {
    std::unique_lock lock(mutex_);
    arrived_.wait(lock, [&] { return count_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  size_t count_ = 0;
};

TEST(Pool, RunsEveryUnitOnceAndThenFinishes) {
  Latch latch;
  std::vector<std::atomic<int>> runs(1000);
  std::atomic<int> finished{0};
  Pool pool(3, true);
  for (const Pool::Lane lane : {Pool::Lane::kForeground, Pool::Lane::kBackground}) {
    pool.ForEach(
        lane, runs.size(), [&](size_t i) { ++runs[i]; },
        [&] {
          ++finished;
          latch.Arrive();
        });
  }
  pool.ForEach(
      Pool::Lane::kForeground, 0, [](size_t) {}, [&] { latch.Arrive(); });
  latch.WaitFor(3);
  EXPECT_EQ(finished, 2);
  for (const auto& r : runs) EXPECT_EQ(r, 2);
}

TEST(Pool, HelpRunsWhatTheThreadsDoNotGetTo) {
  Latch latch;
  std::atomic<bool> begun{false}, released{false};
  Pool pool(1, false);
  EXPECT_FALSE(pool.Help());
  pool.ForEach(
      Pool::Lane::kForeground, 1,
      [&](size_t) {
        begun = true;
        while (!released) std::this_thread::yield();
      },
      [&] { latch.Arrive(); });
  while (!begun) std::this_thread::yield();
  // The only thread is busy: what follows is run by this one, the oldest loop first.
  const auto self = std::this_thread::get_id();
  std::vector<int> order;
  bool finished[2] = {};
  for (const int loop : {0, 1}) {
    pool.ForEach(
        Pool::Lane::kForeground, 10,
        [&, loop](size_t) {
          EXPECT_EQ(std::this_thread::get_id(), self);
          order.push_back(loop);
        },
        [&, loop] { finished[loop] = true; });
  }
  pool.ForEach(
      Pool::Lane::kBackground, 1, [](size_t) {}, [&] { latch.Arrive(); });
  for (size_t i = 0; i < 20; ++i) EXPECT_TRUE(pool.Help());
  EXPECT_FALSE(pool.Help());
  EXPECT_EQ(order.size(), 20u);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
  EXPECT_TRUE(finished[0] && finished[1]);
  released = true;
  latch.WaitFor(2);
}

TEST(Pool, HelpersAndThreadsRunEveryUnitOnce) {
  Latch latch;
  constexpr size_t kLoops = 200;
  std::vector<std::atomic<int>> runs(kLoops * 7);
  std::atomic<bool> stop{false};
  Pool pool(2, false);
  std::vector<std::jthread> helpers;
  for (int i = 0; i < 2; ++i) {
    helpers.emplace_back([&] {
      while (!stop) {
        if (!pool.Help()) std::this_thread::yield();
      }
    });
  }
  for (size_t loop = 0; loop < kLoops; ++loop) {
    pool.ForEach(
        Pool::Lane::kForeground, 7, [&, loop](size_t i) { ++runs[loop * 7 + i]; },
        [&, loop] {
          for (size_t i = 0; i < 7; ++i) EXPECT_EQ(runs[loop * 7 + i], 1);
          latch.Arrive();
        });
  }
  latch.WaitFor(kLoops);
  stop = true;
}

struct Fixture {
  static constexpr uint32_t kK = 5, kL = 24;
  Data data = reference::MakeData(31, 4500, 32, 2);
  Codes codes = reference::Hash(data, 3, kK, kL);
  Options options;
  Fixture() {
    options.head_dim = data.d;
    options.group = data.group;
    options.k = kK;
    options.l = kL;
    options.memory_bytes = uint64_t{1} << 30;
    options.threads = 4;
    options.deterministic = true;
    options.block_tokens = 1500;
  }
};

Status AppendFrom(HostAttention& host, const Fixture& f, RequestId request, uint32_t layer,
                  uint64_t first, uint32_t count, std::atomic<int>* gone, uint16_t set_bits = 0) {
  const auto sent = std::make_shared<reference::Sent>(f.data, f.codes, Fixture::kL, first, count);
  sent->codes.back() |= set_bits;
  sent->gone = gone;
  return host.Append({request, layer, 0, first, count, sent->rows.data(), sent->codes.data()},
                     sent);
}

TEST(HostAttentionThreaded, WhatThreadsCopyIsWhatWasSent) {
  Fixture f;
  const auto plan = PlanSegments(3000, 1500, 1500);
  for (const Estimator estimator : {Estimator::kLsh, Estimator::kFull}) {
    f.options.estimator = estimator;
    const Codes* codes = estimator == Estimator::kLsh ? &f.codes : nullptr;
    HostAttention before(f.options);
    reference::OpenOne(before, plan);
    reference::AppendAll(before, f.data, &f.codes, Fixture::kL, plan, 500);
    for (int repeat = 0; repeat < 10; ++repeat) {
      HostAttention host(f.options);
      reference::OpenOne(host, plan);
      ASSERT_EQ(host.SetMean({RequestId(1), 0, 0, f.data.mean}), Status::kOk);
      std::atomic<int> gone{0};
      int sent = 0;
      // Large spans and small ones, some of which begin with tokens that are there already.
      for (const SegmentSpec& s : plan) {
        for (uint64_t at = 0; at < s.capacity; at += 500, sent += 3) {
          const uint64_t first = s.first_token + at;
          ASSERT_EQ(AppendFrom(host, f, RequestId(1), 0, first, 400, &gone), Status::kOk);
          ASSERT_EQ(AppendFrom(host, f, RequestId(1), 0, first + 200, 250, &gone), Status::kOk);
          ASSERT_EQ(AppendFrom(host, f, RequestId(1), 0, first + 450, 50, &gone), Status::kOk);
        }
      }
      for (const uint64_t tokens : {4500u, 3000u, 1700u}) {
        ASSERT_TRUE(host.Ready(RequestId(1), 0, 0, tokens));
        AttendBatch batch, same;
        batch.items = {reference::ItemOf(f.data, codes, tokens)};
        same.items = batch.items;
        const auto got = reference::Wait(host, std::move(batch));
        const auto want = reference::Wait(before, std::move(same));
        ASSERT_EQ(got.size(), want.size());
        for (size_t i = 0; i < got.size(); ++i) {
          EXPECT_EQ(got[i].status, Status::kOk);
          EXPECT_EQ(got[i].sampled, want[i].sampled);
          EXPECT_TRUE(std::ranges::equal(got[i].values, want[i].values));
        }
      }
      while (gone != sent) std::this_thread::yield();
    }
  }
}

// Reads that come right behind the appends, while these are copied and sealed, and queries between.
TEST(HostAttentionThreaded, ReadsWaitForWhatThreadsCopy) {
  Fixture f;
  const auto plan = PlanSegments(3000, 1500, 1500);
  const size_t row = 2 * f.data.d;
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::vector<std::vector<bf16>> rows;  // of each read
    std::atomic<int> wrong{0};
    Latch latch;
    size_t begun = 0;
    HostAttention host(f.options);
    reference::OpenOne(host, plan);
    ASSERT_EQ(host.SetMean({RequestId(1), 0, 0, f.data.mean}), Status::kOk);
    const auto read = [&](uint64_t first, uint32_t count) {
      // In two spans, so that a slice crosses them.
      bf16* to = rows.emplace_back(count * row).data();
      const auto judge = [&, first, count, to](Status status) {
        const bool same =
            std::ranges::equal(std::as_bytes(std::span(to, count * row)),
                               std::as_bytes(std::span(&f.data.rows[first * row], count * row)));
        if (status != Status::kOk || !same) ++wrong;
        latch.Arrive();
      };
      const uint32_t half = count / 2;
      ASSERT_EQ(host.Read({{RequestId(1), 0, 0, first + half, count - half, to + half * row},
                           {RequestId(1), 0, 0, first, half, to}},
                          judge),
                Status::kOk);
      ++begun;
    };
    for (const SegmentSpec& s : plan) {
      for (uint64_t at = s.first_token; at < s.first_token + s.capacity; at += 500) {
        ASSERT_EQ(AppendFrom(host, f, RequestId(1), 0, at, 500, nullptr), Status::kOk);
        read(at, 500);
        read(s.first_token, static_cast<uint32_t>(at + 500 - s.first_token));
        AttendBatch batch;
        batch.items = {reference::ItemOf(f.data, &f.codes, at + 500)};
        ++begun;
        ASSERT_EQ(host.Attend(std::move(batch), [&](auto) { latch.Arrive(); }), Status::kOk);
      }
    }
    // What is read stays while it is.
    host.Release(RequestId(1));
    latch.WaitFor(begun);
    EXPECT_EQ(wrong, 0);
    while (host.usage().reserved_bytes != 0) std::this_thread::yield();
    EXPECT_EQ(host.usage().kv_bytes, 0u);
  }
}

TEST(HostAttentionThreaded, CodesOutOfRangeFailTheQueriesOfTheirSegmentAlone) {
  Fixture f;
  HostAttention host(f.options);
  const auto plan = PlanSegments(3000, 0, 1500);
  reference::OpenOne(host, plan);
  ASSERT_EQ(AppendFrom(host, f, RequestId(1), 0, 0, 1500, nullptr, 1 << Fixture::kK), Status::kOk);
  ASSERT_EQ(AppendFrom(host, f, RequestId(1), 0, 1500, 1500, nullptr), Status::kOk);
  AttendBatch batch;
  batch.items = {reference::ItemOf(f.data, &f.codes, 3000)};
  const auto partials = reference::Wait(host, std::move(batch));
  ASSERT_EQ(partials.size(), 2u);
  EXPECT_EQ(partials[0].status, Status::kBadArgument);
  EXPECT_EQ(partials[1].status, Status::kOk);
  // Of few tokens it is said at once, and they are not taken.
  HostAttention other(f.options);
  reference::OpenOne(other, plan);
  EXPECT_EQ(AppendFrom(other, f, RequestId(1), 0, 0, 10, nullptr, 0x8000), Status::kBadArgument);
  EXPECT_FALSE(other.Ready(RequestId(1), 0, 0, 1));
}

TEST(HostAttentionThreaded, QueriesInFlightWhileTokensComeAndBlocksMerge) {
  Fixture f;
  HostAttention host(f.options);
  const auto plan = PlanSegments(2000, 2500, 1500);
  OpenSpec spec;
  spec.request = RequestId(1);
  spec.layers = 1;
  spec.layer_list = {0};
  for (uint32_t s = 0; s < plan.size(); ++s) spec.parts.push_back({0, s, plan[s]});
  host.Open(spec);
  ASSERT_EQ(host.SetMean({RequestId(1), 0, 0, f.data.mean}), Status::kOk);
  Latch latch;
  std::mutex mutex;
  std::vector<std::pair<uint64_t, std::vector<PartialItem>>> results;
  size_t queries = 0;
  const auto append = [&](uint64_t first, uint32_t count) {
    ASSERT_EQ(host.Append({RequestId(1), 0, 0, first, count, &f.data.rows[first * 2 * f.data.d],
                           &f.codes.keys[first * Fixture::kL]}),
              Status::kOk);
  };
  append(0, 1000);
  append(1000, 1000);
  for (uint64_t at = 2000; at < 4500; ++at) {
    // The prompt's tables are likely still being sealed at the first of these.
    if (at % 25 == 0) {
      AttendBatch batch;
      batch.items = {reference::ItemOf(f.data, &f.codes, at)};
      ++queries;
      ASSERT_EQ(host.Attend(std::move(batch),
                            [&, at](std::vector<PartialItem> partials) {
                              {
                                const std::lock_guard lock(mutex);
                                results.emplace_back(at, std::move(partials));
                              }
                              latch.Arrive();
                            }),
                Status::kOk);
    }
    append(at, 1);
  }
  latch.WaitFor(queries);
  // The same queries again, with everything merged, on one thread at a time.
  for (const auto& [tokens, before] : results) {
    AttendBatch batch;
    batch.items = {reference::ItemOf(f.data, &f.codes, tokens)};
    const auto now = reference::Wait(host, std::move(batch));
    ASSERT_EQ(now.size(), before.size());
    uint64_t sampled = 0;
    for (size_t i = 0; i < now.size(); ++i) {
      EXPECT_EQ(now[i].sampled, before[i].sampled);
      EXPECT_TRUE(std::ranges::equal(now[i].values, before[i].values));
      sampled += now[i].sampled[0];
    }
    EXPECT_TRUE(sampled > 0 && sampled < tokens / 2) << sampled << " of " << tokens;
  }
}

TEST(HostAttentionThreaded, ReleaseInFlightReturnsAccountingToZero) {
  Fixture f;
  HostAttention host(f.options);
  Random random(1);
  Latch latch;
  size_t queries = 0;
  for (uint64_t life = 1; life <= 60; ++life) {
    const uint64_t prompt = random.Next() % 1800, generated = 1 + random.Next() % 900;
    const auto plan = PlanSegments(prompt, generated, 1500);
    OpenSpec spec;
    spec.request = RequestId(life);
    spec.layers = 2;
    spec.layer_list = {0, 1};
    for (uint32_t s = 0; s < plan.size(); ++s) spec.parts.push_back({0, s, plan[s]});
    host.Open(spec);
    for (const SegmentSpec& s : plan) {
      const auto count = static_cast<uint32_t>(s.capacity);
      if (life % 2 == 0) {
        ASSERT_EQ(AppendFrom(host, f, RequestId(life), 1, s.first_token, count, nullptr),
                  Status::kOk);
        continue;
      }
      ASSERT_EQ(host.Append({RequestId(life), 1, 0, s.first_token, count,
                             &f.data.rows[s.first_token * 2 * f.data.d],
                             &f.codes.keys[s.first_token * Fixture::kL]}),
                Status::kOk);
    }
    // Some are gone before anyone asks.
    if (life % 7 == 0) {
      host.Release(RequestId(life));
      continue;
    }
    AttendBatch batch;
    batch.layer = 1;
    batch.items = {reference::ItemOf(f.data, &f.codes, prompt + generated)};
    batch.items[0].request = RequestId(life);
    ++queries;
    ASSERT_EQ(host.Attend(std::move(batch),
                          [&](std::vector<PartialItem> partials) {
                            EXPECT_FALSE(partials.empty());
                            latch.Arrive();
                          }),
              Status::kOk);
    EXPECT_GT(host.usage().reserved_bytes, 0u);
    EXPECT_LE(host.usage().kv_bytes + host.usage().table_bytes, host.usage().reserved_bytes);
    host.Release(RequestId(life));
  }
  latch.WaitFor(queries);
  // Merges of released requests may still be running: their memory goes with them.
  while (host.usage().reserved_bytes != 0) std::this_thread::yield();
  EXPECT_EQ(host.usage().kv_bytes, 0u);
  EXPECT_EQ(host.usage().table_bytes, 0u);
}

TEST(HostAttentionThreaded, DestructionWaitsForWhatRuns) {
  Fixture f;
  std::atomic<int> done{0};
  {
    HostAttention host(f.options);
    const auto plan = PlanSegments(1500, 0, 1500);
    reference::OpenOne(host, plan);
    reference::AppendAll(host, f.data, &f.codes, Fixture::kL, plan, 500);
    for (int i = 0; i < 20; ++i) {
      AttendBatch batch;
      batch.items = {reference::ItemOf(f.data, &f.codes, 1500)};
      ASSERT_EQ(host.Attend(std::move(batch), [&](std::vector<PartialItem>) { ++done; }),
                Status::kOk);
    }
  }
  EXPECT_EQ(done, 20);
}

}  // namespace
}  // namespace passel::host
