#include "runtime/engine/job.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/engine/host_link.h"
#include "runtime/engine/kv_pages.h"
#include "runtime/engine/micro_batch_tuner.h"
#include "tests/engine/test_job.h"

namespace passel::engine {
namespace {

using cluster::PlacementMode;
using cluster::RequestPlacement;

TEST(Job, OffloadedIsAllButSinksAndWindow) {
  const Job job = MakeJob({.settings = {"attention.sinks=3", "attention.window=10"}});
  EXPECT_EQ(job.Offloaded(0), 0u);
  EXPECT_EQ(job.Offloaded(13), 0u);
  EXPECT_EQ(job.Offloaded(14), 1u);
  EXPECT_EQ(job.Offloaded(uint64_t{1} << 40), (uint64_t{1} << 40) - 13);
}

TEST(Job, SegmentsCoverEveryOffloadedTokenOnce) {
  const Job job =
      MakeJob({.settings = {"attention.sinks=4", "attention.window=16", "host.block_tokens=256"}});
  for (const uint64_t prompt : {1u, 20u, 21u, 276u, 277u, 1000u, 4000u}) {
    for (const uint64_t generated : {1u, 16u, 300u, 3000u}) {
      const auto segments = job.Segments(prompt, generated);
      uint64_t next = 0;
      for (const auto& s : segments) {
        EXPECT_EQ(s.first_token, next);
        EXPECT_GT(s.capacity, 0u);
        EXPECT_LE(s.capacity, 256u);
        EXPECT_EQ(s.prompt, next < job.Offloaded(prompt));
        next += s.capacity;
      }
      EXPECT_GE(next, job.Offloaded(prompt + generated)) << prompt << " + " << generated;
      EXPECT_LE(next, job.Offloaded(prompt + generated) + 1) << prompt << " + " << generated;
    }
  }
}

TEST(Job, SegmentOfFindsTheSegmentThatHoldsAToken) {
  const Job job = MakeJob({.settings = {"host.block_tokens=256"}});
  HostedRequest hosted{RequestId(1), {}, job.Segments(1000, 700)};
  ASSERT_GT(hosted.segments.size(), 4u);
  for (uint32_t s = 0; s < hosted.segments.size(); ++s) {
    const auto& spec = hosted.segments[s];
    for (const uint64_t token : {spec.first_token, spec.first_token + spec.capacity / 2,
                                 spec.first_token + spec.capacity - 1}) {
      EXPECT_EQ(hosted.SegmentOf(token), s) << token;
    }
  }
  hosted.segments.clear();
  EXPECT_THROW(hosted.SegmentOf(0), Error);
}

// Every (KV head, token) lives on exactly one host, whatever the placement, and every query that
// covers it goes to that host and to none that holds nothing.
TEST(Job, EveryTokenBelongsToExactlyOneHost) {
  for (uint32_t hosts = 1; hosts <= 5; ++hosts) {
    for (int32_t heads = 1; heads <= 9; ++heads) {
      const Job job =
          MakeJob({.hosts = hosts, .kv_heads = heads, .settings = {"host.block_tokens=256"}});
      const auto segments = job.Segments(900, 500);
      const auto count = static_cast<uint32_t>(segments.size());
      for (const auto mode :
           {PlacementMode::kRequest, PlacementMode::kHead, PlacementMode::kSequence}) {
        for (uint32_t first = 0; first < hosts; ++first) {
          const RequestPlacement placement{mode, first, hosts, static_cast<uint32_t>(heads)};
          ASSERT_TRUE(placement.Valid());
          std::map<std::pair<uint32_t, uint32_t>, uint32_t> owner;  // (head, segment) → host
          std::map<uint32_t, std::set<uint32_t>> hosts_of;          // head → hosts
          for (uint32_t host = 0; host < hosts; ++host) {
            const auto spec = OpenSpecFor(job, RequestId(9), host, placement, segments);
            EXPECT_EQ(spec.request, RequestId(9));
            for (const auto& part : spec.parts) {
              EXPECT_TRUE(owner.emplace(std::pair(part.kv_head, part.segment), host).second)
                  << "held twice";
              EXPECT_EQ(part.spec.first_token, segments[part.segment].first_token);
              EXPECT_EQ(part.spec.capacity, segments[part.segment].capacity);
              EXPECT_EQ(placement.Owner(part.kv_head, part.segment), host);
              hosts_of[part.kv_head].insert(host);
            }
          }
          EXPECT_EQ(owner.size(), static_cast<size_t>(heads) * segments.size());
          for (const auto& [head, set] : hosts_of) {
            const auto reached = placement.HostsFor(head, 1, count);
            EXPECT_EQ(std::set<uint32_t>(reached.begin(), reached.end()), set);
            EXPECT_EQ(reached.size(), set.size());
          }
        }
      }
    }
  }
}

TEST(Job, OnlyLayersThatHostsServeAreOpened) {
  const auto layers = [](std::vector<std::string> settings) {
    const Job job = MakeJob({.layers = 20, .settings = std::move(settings)});
    const RequestPlacement placement{PlacementMode::kRequest, 0, 1, 2};
    return OpenSpecFor(job, RequestId(1), 0, placement, job.Segments(500, 10)).layer_list;
  };
  const auto sampled = layers({});
  EXPECT_EQ(sampled.size(), 18u);  // without the dense layers 0 and 16
  EXPECT_EQ(std::count(sampled.begin(), sampled.end(), 0u), 0);
  EXPECT_EQ(std::count(sampled.begin(), sampled.end(), 16u), 0);
  EXPECT_EQ(layers({"attention.dense_kv=HOST"}).size(), 20u);
  EXPECT_EQ(layers({"attention.no_dense_layers=true"}).size(), 20u);
}

TEST(Job, WithoutHostsEveryLayerIsResident) {
  const Job job = MakeJob({.hosts = 0, .layers = 3, .settings = {}});
  for (const auto kind : job.layer_kinds()) EXPECT_EQ(kind, Job::LayerKind::kResident);
}

TEST(Job, TheWireKnowsTheCodesOfAVector) {
  EXPECT_EQ(MakeJob({.settings = {"attention.l=33"}}).wire_shape().l, 33u);
  EXPECT_EQ(MakeJob({.settings = {"attention.estimator=FULL"}}).wire_shape().l, 0u);
}

TEST(KvPages, HandsOutEachPageOnceAndTakesThemBack) {
  KvPages pages(10);
  EXPECT_EQ(pages.free(), 10);
  std::vector<int32_t> first = pages.Take(4);
  const std::vector<int32_t> second = pages.Take(6);
  EXPECT_EQ(pages.free(), 0);
  std::set<int32_t> all(first.begin(), first.end());
  all.insert(second.begin(), second.end());
  EXPECT_EQ(all.size(), 10u);
  EXPECT_EQ(*all.begin(), 0);
  EXPECT_EQ(*all.rbegin(), 9);
  EXPECT_THROW(pages.Take(1), Error);
  EXPECT_TRUE(pages.Take(0).empty());
  pages.Return(first);
  std::vector<int32_t> again = pages.Take(4);
  std::sort(first.begin(), first.end());
  std::sort(again.begin(), again.end());
  EXPECT_EQ(again, first);
}

// Runs `steps` decode steps that take times[m - 1] seconds; how many had two micro-batches.
int StepsOfTwo(MicroBatchTuner& tuner, uint64_t batch, std::vector<double> times, int steps) {
  int two = 0;
  for (int i = 0; i < steps; ++i) {
    const uint32_t m = tuner.Choose(batch);
    EXPECT_TRUE(m == 1 || m == 2);
    two += m == 2;
    tuner.Took(m, times[m - 1]);
  }
  return two;
}

TEST(MicroBatchTuner, AFixedNumberStays) {
  MicroBatchTuner tuner(3);
  for (const uint64_t batch : {1u, 2u, 64u}) EXPECT_EQ(tuner.Choose(batch), 3u);
  tuner.Took(3, 0.1);
  EXPECT_EQ(tuner.Choose(64), 3u);
}

TEST(MicroBatchTuner, OneSequenceIsNeverCut) {
  MicroBatchTuner tuner(0);
  for (const uint64_t batch : {0u, 1u}) EXPECT_EQ(tuner.Choose(batch), 1u);
}

TEST(MicroBatchTuner, TakesWhatIsFasterAndMeasuresAgain) {
  MicroBatchTuner tuner(0);
  EXPECT_EQ(StepsOfTwo(tuner, 8, {2.0, 1.0}, 6), 3);  // both are tried
  EXPECT_EQ(StepsOfTwo(tuner, 8, {2.0, 1.0}, 200), 200);
  EXPECT_EQ(StepsOfTwo(tuner, 4, {1.0, 2.0}, 6), 3);  // another batch: measured anew
  EXPECT_EQ(StepsOfTwo(tuner, 4, {1.0, 2.0}, 200), 0);
  EXPECT_GT(StepsOfTwo(tuner, 4, {1.0, 2.0}, 1000), 0);
  EXPECT_LT(StepsOfTwo(tuner, 4, {1.0, 2.0}, 1000), 20);
}

TEST(MicroBatchTuner, ChangesItsMindWhenTimesDo) {
  MicroBatchTuner tuner(0);
  EXPECT_EQ(StepsOfTwo(tuner, 8, {1.0, 2.0}, 400), 3);
  StepsOfTwo(tuner, 8, {9.0, 5.0}, 200);  // the context has grown; it measures again
  EXPECT_EQ(StepsOfTwo(tuner, 8, {9.0, 5.0}, 300), 300);
}

}  // namespace
}  // namespace passel::engine
