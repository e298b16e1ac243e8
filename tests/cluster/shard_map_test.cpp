#include "cluster/shard_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "runtime/base/error.h"
#include "runtime/base/random.h"

namespace passel::cluster {
namespace {

using Verdict = ShardMap::Verdict;
using Hosts = std::vector<uint32_t>;

uint64_t Total(const RequestDemand& demand) {
  return demand.kv_heads *
         std::accumulate(demand.segment_bytes.begin(), demand.segment_bytes.end(), uint64_t{0});
}

// Bytes on each host by asking for every segment's owner: what the ledger must agree with.
std::vector<uint64_t> BytesByOwner(const RequestPlacement& placement, const RequestDemand& demand) {
  std::vector<uint64_t> bytes(placement.hosts, 0);
  for (uint32_t head = 0; head < demand.kv_heads; ++head) {
    for (uint32_t s = 0; s < demand.segment_bytes.size(); ++s) {
      bytes[placement.Owner(head, s)] += demand.segment_bytes[s];
    }
  }
  return bytes;
}

TEST(RequestPlacement, HeadRunsAreOfNearEqualLengthForAnyCounts) {
  for (uint32_t hosts = 1; hosts <= 9; ++hosts) {
    for (uint32_t heads = 1; heads <= 17; ++heads) {
      const RequestPlacement placement{PlacementMode::kHead, hosts - 1, hosts, heads};
      std::map<uint32_t, uint32_t> count;
      for (uint32_t head = 0; head < heads; ++head) {
        ASSERT_LT(placement.Owner(head, 0), hosts);
        ++count[placement.Owner(head, 0)];
        EXPECT_EQ(placement.Owner(head, 0), placement.Owner(head, 5));
      }
      EXPECT_EQ(count.size(), std::min(hosts, heads));
      const auto [low, high] = std::minmax_element(
          count.begin(), count.end(), [](auto& a, auto& b) { return a.second < b.second; });
      EXPECT_LE(high->second - low->second, 1u) << hosts << " hosts, " << heads << " heads";
    }
  }
}

TEST(RequestPlacement, HostsForIsWhatTheOwnersSay) {
  Random random(7);
  for (int round = 0; round < 2000; ++round) {
    const auto hosts = static_cast<uint32_t>(1 + random.Next() % 7);
    const auto heads = static_cast<uint32_t>(1 + random.Next() % 9);
    const RequestPlacement placement{static_cast<PlacementMode>(1 + random.Next() % 3),
                                     static_cast<uint32_t>(random.Next() % hosts), hosts, heads};
    ASSERT_TRUE(placement.Valid());
    const auto first = static_cast<uint32_t>(random.Next() % heads);
    const auto count = static_cast<uint32_t>(random.Next() % (heads - first + 1));
    const auto segments = static_cast<uint32_t>(random.Next() % 12);
    Hosts expected;
    for (uint32_t head = first; head < first + count; ++head) {
      for (uint32_t s = 0; s < segments; ++s) expected.push_back(placement.Owner(head, s));
    }
    std::sort(expected.begin(), expected.end());
    expected.erase(std::unique(expected.begin(), expected.end()), expected.end());
    EXPECT_EQ(placement.HostsFor(first, count, segments), expected);
  }
}

TEST(RequestPlacement, PlacementsFromMessagesAreChecked) {
  EXPECT_TRUE((RequestPlacement{PlacementMode::kHead, 1, 2, 3}).Valid());
  EXPECT_FALSE((RequestPlacement{PlacementMode::kAuto, 0, 2, 3}).Valid());
  EXPECT_FALSE((RequestPlacement{static_cast<PlacementMode>(9), 0, 2, 3}).Valid());
  EXPECT_FALSE((RequestPlacement{PlacementMode::kHead, 2, 2, 3}).Valid());
  EXPECT_FALSE((RequestPlacement{PlacementMode::kHead, 0, 0, 3}).Valid());
  EXPECT_FALSE((RequestPlacement{PlacementMode::kHead, 0, 2, 0}).Valid());
  EXPECT_THROW((RequestPlacement{PlacementMode::kHead, 0, 2, 3}).Owner(3, 0), Error);
  EXPECT_THROW((RequestPlacement{PlacementMode::kHead, 0, 2, 3}).HostsFor(1, 0xffffffffu, 1),
               Error);
}

TEST(ShardMap, AutoTakesTheFewestHostsThatFit) {
  ShardMap map(PlacementMode::kAuto, {100, 120, 110});
  RequestPlacement placement;
  // 100 bytes: whole, on the freest host.
  ASSERT_EQ(map.Place(RequestId(1), {2, {25, 25}}, &placement), Verdict::kPlaced);
  EXPECT_EQ(placement.mode, PlacementMode::kRequest);
  EXPECT_EQ(placement.first_host, 1u);
  // 180: no host has it; two runs of heads of 90 fit hosts 2 and 0.
  ASSERT_EQ(map.Place(RequestId(2), {2, {60, 30}}, &placement), Verdict::kPlaced);
  EXPECT_EQ(placement.mode, PlacementMode::kHead);
  EXPECT_EQ(placement.first_host, 2u);
  EXPECT_EQ(map.free_bytes()[0], 10u);
  EXPECT_EQ(map.free_bytes()[1], 20u);
  EXPECT_EQ(map.free_bytes()[2], 20u);
  // One head of 35: only its three segments, striped, fit.
  ASSERT_EQ(map.Place(RequestId(3), {1, {15, 15, 5}}, &placement), Verdict::kPlaced);
  EXPECT_EQ(placement.mode, PlacementMode::kSequence);
  EXPECT_EQ(placement.first_host, 1u);
  EXPECT_EQ(map.Place(RequestId(4), {1, {30}}, &placement), Verdict::kWait);
  EXPECT_EQ(map.Place(RequestId(4), {1, {121}}, &placement), Verdict::kNever);
  map.Release(RequestId(1));
  EXPECT_EQ(map.Place(RequestId(4), {1, {30}}, &placement), Verdict::kPlaced);
}

TEST(ShardMap, ForcedModesAreKept) {
  RequestPlacement placement;
  for (const auto mode :
       {PlacementMode::kRequest, PlacementMode::kHead, PlacementMode::kSequence}) {
    ShardMap map(mode, {1000, 1000, 1000});
    ASSERT_EQ(map.Place(RequestId(1), {2, {10, 10, 10}}, &placement), Verdict::kPlaced);
    EXPECT_EQ(placement.mode, mode);
  }
  ShardMap whole(PlacementMode::kRequest, {50, 50});
  EXPECT_EQ(whole.Place(RequestId(1), {2, {30}}, &placement), Verdict::kNever);
}

TEST(ShardMap, EqualRequestsBalance) {
  ShardMap map(PlacementMode::kAuto, std::vector<uint64_t>(4, 1000));
  RequestPlacement placement;
  std::vector<int> count(4, 0);
  for (uint64_t id = 0; id < 20; ++id) {
    ASSERT_EQ(map.Place(RequestId(id), {4, {25}}, &placement), Verdict::kPlaced);
    ++count[placement.first_host];
  }
  EXPECT_EQ(count, (std::vector<int>{5, 5, 5, 5}));
}

TEST(ShardMap, SumsBeyond64BitsNeverFit) {
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  ShardMap map(PlacementMode::kAuto, {kMax, kMax});
  RequestPlacement placement;
  EXPECT_EQ(map.Place(RequestId(1), {2, {kMax / 2 + 1}}, &placement), Verdict::kNever);
  EXPECT_EQ(map.Place(RequestId(1), {1, {kMax, 1}}, &placement), Verdict::kNever);
  EXPECT_EQ(map.Place(RequestId(1), {1, {kMax}}, &placement), Verdict::kPlaced);
}

TEST(ShardMap, NoHostsHoldNothing) {
  ShardMap map(PlacementMode::kAuto, {});
  RequestPlacement placement;
  EXPECT_EQ(map.Place(RequestId(1), {1, {1}}, &placement), Verdict::kNever);
}

TEST(ShardMap, ARequestIsPlacedOnce) {
  ShardMap map(PlacementMode::kAuto, {10});
  RequestPlacement placement;
  ASSERT_EQ(map.Place(RequestId(1), {1, {1}}, &placement), Verdict::kPlaced);
  EXPECT_THROW(map.Place(RequestId(1), {1, {1}}, &placement), Error);
  map.Release(RequestId(1));
  map.Release(RequestId(1));
  EXPECT_EQ(map.free_bytes()[0], 10u);
}

// Random demand against any number of hosts and heads: the ledger is what the owners say, never
// goes below zero, and everything comes back.
TEST(ShardMap, LedgersHoldUnderRandomDemand) {
  Random random(11);
  size_t verdicts[3] = {0, 0, 0};
  for (int round = 0; round < 200; ++round) {
    const size_t hosts = 1 + random.Next() % 6;
    std::vector<uint64_t> budget(hosts);
    for (auto& bytes : budget) bytes = random.Next() % 5000;
    const auto mode = static_cast<PlacementMode>(random.Next() % 4);
    ShardMap map(mode, budget);
    std::map<uint64_t, std::vector<uint64_t>> booked;
    for (uint64_t id = 0; id < 60; ++id) {
      if (!booked.empty() && random.Next() % 3 == 0) {
        map.Release(RequestId(booked.begin()->first));
        booked.erase(booked.begin());
      }
      RequestDemand demand{static_cast<uint32_t>(1 + random.Next() % 9), {}};
      demand.segment_bytes.resize(random.Next() % 8);
      for (auto& bytes : demand.segment_bytes) bytes = random.Next() % 150;
      RequestPlacement placement;
      const Verdict verdict = map.Place(RequestId(id), demand, &placement);
      ++verdicts[static_cast<size_t>(verdict)];
      if (verdict == Verdict::kPlaced) {
        ASSERT_TRUE(placement.Valid());
        ASSERT_EQ(placement.hosts, hosts);
        if (mode != PlacementMode::kAuto) {
          ASSERT_EQ(placement.mode, mode);
        }
        booked[id] = BytesByOwner(placement, demand);
      } else if (verdict == Verdict::kWait) {
        ASSERT_FALSE(booked.empty());  // else nothing could be waited for
      } else if (mode == PlacementMode::kAuto) {
        ASSERT_GT(Total(demand), *std::max_element(budget.begin(), budget.end()));
      }
      for (size_t h = 0; h < hosts; ++h) {
        uint64_t used = 0;
        for (const auto& [request, bytes] : booked) used += bytes[h];
        ASSERT_LE(used, budget[h]);
        ASSERT_EQ(map.free_bytes()[h], budget[h] - used);
      }
    }
    for (const auto& [request, bytes] : booked) map.Release(RequestId(request));
    ASSERT_TRUE(std::equal(budget.begin(), budget.end(), map.free_bytes().begin()));
  }
  for (const size_t count : verdicts) EXPECT_GT(count, 100u);  // each case was met
}

}  // namespace
}  // namespace passel::cluster
