#include "runtime/engine/host_link.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/base/random.h"
#include "tests/cluster/joined.h"
#include "tests/engine/wire_model.h"

namespace passel::engine {
namespace {

constexpr uint64_t kPrompt = 700, kGenerated = 300;

// Prefill in chunks, then decode steps whose query runs ahead of the tokens it asks for.
void PrefillAndDecode(WireModel& model, PlacementMode mode, uint64_t id) {
  const HostedRequest hosted = model.Open(id, mode, kPrompt, kGenerated);
  const uint64_t prompt = model.job().Offloaded(kPrompt);
  const auto layers = static_cast<int32_t>(model.job().model.layers);
  for (int32_t layer = 0; layer < layers; ++layer) {
    for (uint64_t at = 0; at < prompt; at += 150) {
      model.SendKv(hosted, layer, at, std::min<uint64_t>(150, prompt - at));
    }
  }
  for (uint64_t step = 0; step < 40; ++step) {
    const uint64_t tokens = prompt + step * 7;
    for (int32_t layer = 0; layer < layers; ++layer) {
      ReplyBox box;
      model.Ask(hosted, layer, id * 1000 + step, tokens, &box);
      EXPECT_GE(box.answered.size(), 1u);
      if (step > 0) {
        for (uint64_t t = tokens - 7; t < tokens; ++t) model.SendKv(hosted, layer, t, 1);
      }
      model.PumpUntil([&] { return box.complete(); });
      if (testing::Test::HasFatalFailure()) return;
      model.Judge(box, layer, tokens);
    }
  }
  cluster::proto::Control release;
  release.mutable_release()->set_request(id);
  model.link().SendControlToAll(release);
}

JobSpec FullSpec(uint32_t hosts, bool deterministic = false) {
  return {.hosts = hosts,
          .kv_heads = 3,
          .settings = {"attention.estimator=FULL", "attention.no_dense_layers=true",
                       "attention.window=16", "host.block_tokens=256", "host.threads=2",
                       deterministic ? "engine.deterministic=true" : "engine.max_batch=4"}};
}

TEST(HostLink, FullAnswersAreExactForEveryPlacement) {
  for (const uint32_t hosts : {1u, 2u, 3u}) {
    WireModel model(FullSpec(hosts));
    uint64_t id = 1;
    for (const auto mode :
         {PlacementMode::kRequest, PlacementMode::kHead, PlacementMode::kSequence}) {
      PrefillAndDecode(model, mode, id++);
    }
    EXPECT_EQ(model.link().dropped(), 0u);
  }
}

TEST(HostLink, DelayedAndReorderedFramesGiveTheSameAnswers) {
  for (const uint64_t seed : {1u, 2u, 3u}) {
    WireModel model(FullSpec(2, seed == 2),
                    {.seed = seed, .max_delay = 12, .delay = 0.2, .reorder = 0.2});
    PrefillAndDecode(model, PlacementMode::kSequence, 1);
    PrefillAndDecode(model, PlacementMode::kHead, 2);
  }
}

TEST(HostLink, SampledAnswersAreThoseOfTheSampledSet) {
  WireModel model({.hosts = 2,
                   .settings = {"attention.k=6", "attention.l=24", "attention.exact_below=0",
                                "attention.no_dense_layers=true", "attention.window=16",
                                "host.block_tokens=256", "host.threads=2"}},
                  {.seed = 4, .max_delay = 8, .delay = 0.3});
  const HostedRequest hosted = model.Open(1, PlacementMode::kSequence, 1500, 1);
  const uint64_t tokens = model.job().Offloaded(1500);
  for (int32_t layer = 0; layer < 2; ++layer) model.SendKv(hosted, layer, 0, tokens);
  model.SendMeans(hosted);
  for (int32_t layer = 0; layer < 2; ++layer) {
    ReplyBox box;
    model.Ask(hosted, layer, 1, tokens, &box);
    EXPECT_EQ(box.answered.size(), 2u);
    model.PumpUntil([&] { return box.complete(); });
    ASSERT_FALSE(HasFatalFailure());
    model.Judge(box, layer, tokens);
  }
  EXPECT_GT(model.sampled_fraction(), 0.0);
  EXPECT_LT(model.sampled_fraction(), 0.5);
}

// Answers that were not asked for, or are none, change nothing.
TEST(HostLink, ForgedPartialsAreDropped) {
  WireModel model(FullSpec(1));
  const HostedRequest hosted = model.Open(1, PlacementMode::kRequest, kPrompt, kGenerated);
  const uint64_t tokens = model.job().Offloaded(kPrompt);
  ReplyBox box;
  model.Ask(hosted, 0, 5, tokens, &box);  // its tokens come below: no true answer before

  const cluster::WireShape shape = model.job().wire_shape();
  const cluster::PartialEntry entry{1, 0, 0, 0, -1, 0};
  const std::vector<float> zeros(shape.group * (shape.head_dim + 2));
  const auto build = [&](std::span<const cluster::PartialEntry> entries) {
    const std::vector<const void*> sources(entries.size(), zeros.data());
    cluster::Pieces pieces;
    auto out = cluster::BuildPartial(shape, entries, sources, &pieces);
    return cluster::Joined(std::move(out), pieces);
  };
  const auto valid = build({&entry, 1});
  Random random(6);
  uint64_t sent = 0;
  const auto inject = [&](auto&& change) {
    transport::FrameHeader h;
    h.type = transport::FrameType::kPartial;
    h.nonce = kNonce;
    h.source = 1;
    h.step = 5;
    h.count = 1;
    auto payload = valid;
    change(h, payload);
    h.payload_bytes = payload.size();
    transport::SealFrameHeader(h);
    model.network().Inject(RankId(0), std::as_bytes(std::span(&h, 1)), payload);
    ++sent;
  };
  using transport::FrameHeader;
  using Payload = std::vector<std::byte>;
  inject([](FrameHeader& h, Payload&) { h.step = 4; });
  inject([](FrameHeader& h, Payload&) { h.layer = 1; });
  inject([](FrameHeader& h, Payload&) { h.layer = 65535; });
  inject([](FrameHeader& h, Payload&) { h.micro_batch = 65535; });
  inject([](FrameHeader& h, Payload&) { h.part = 1; });
  inject([](FrameHeader& h, Payload&) { h.count = 0xffffffff; });
  // A partial of one KV head where three were asked for, of a row or of segments that were not.
  inject([](FrameHeader&, Payload&) {});
  const auto forge = [&](std::vector<cluster::PartialEntry> entries) {
    inject([&](FrameHeader& h, Payload& p) {
      h.count = static_cast<uint32_t>(entries.size());
      p = build(entries);
    });
  };
  forge({{1, 0, 0, 0, -1, 0}, {1, 0, 0, 1, -1, 0}, {1, 0, 0, 1, -1, 0}});
  forge({{1, 0, 0, 0, -1, 0}, {1, 0, 0, 1, -1, 0}, {1, 0, 1, 2, -1, 0}});
  forge({{1, 0, 0, 0, 0, 0}, {1, 0, 0, 1, 0, 0}, {1, 0, 0, 2, 0, 0}});
  inject([](FrameHeader& h, Payload&) { h.count = 2; });
  inject([](FrameHeader&, Payload& p) { p.resize(p.size() - 1); });
  inject([](FrameHeader&, Payload& p) { p.resize(p.size() + 16); });
  inject([](FrameHeader& h, Payload&) { h.type = transport::FrameType::kQuery; });
  inject([](FrameHeader& h, Payload&) { h.type = transport::FrameType::kKv; });
  inject([&](FrameHeader& h, Payload& p) {
    h.type = transport::FrameType::kControl;
    p.assign(50, std::byte{0xff});
  });
  for (int i = 0; i < 2000; ++i) {
    inject([&](FrameHeader& h, Payload& p) {
      h.count = static_cast<uint32_t>(random.Next() % 4 + 1);
      p.resize(random.Next() % 4096);
      for (std::byte& b : p) b = std::byte(static_cast<uint8_t>(random.Next()));
    });
  }
  model.PumpUntil([&] { return model.link().dropped() >= sent; });
  EXPECT_EQ(box.open, 1u);
  for (const ReceivedPartial& p : box.partials) EXPECT_EQ(p.key, PartialKey());
  model.SendKv(hosted, 0, 0, tokens);
  model.PumpUntil([&] { return box.complete(); });
  model.Judge(box, 0, tokens);
}

// Frames that threads store, of two requests at once, and in any order.
TEST(HostLink, LargeFramesOfSeveralRequestsInAnyOrder) {
  for (const uint32_t hosts : {1u, 2u}) {
    WireModel model(
        {.hosts = hosts,
         .kv_heads = 2,
         .group = 2,
         .head_dim = 64,
         .layers = 1,
         .settings = {"attention.k=6", "attention.l=24", "attention.no_dense_layers=true",
                      "attention.window=16", "attention.exact_below=0", "host.block_tokens=1500",
                      "host.threads=2"}});
    const HostedRequest other = model.Open(1, PlacementMode::kSequence, 4000, 1);
    const HostedRequest hosted = model.Open(2, PlacementMode::kSequence, 4000, 1);
    const uint64_t tokens = model.job().Offloaded(4000);
    model.SendMeans(hosted);
    ReplyBox box;
    model.Ask(hosted, 0, 1, tokens, &box);
    // What the other one lacks holds nothing up.
    model.SendKv(0, {{&other, 1000, 900, 0}, {&hosted, 0, 1000, 0}});
    model.SendKv(0, {{&hosted, 2000, tokens - 2000, 0}, {&other, 3000, 400, 0}});
    for (int i = 0; i < 20; ++i) model.link().Pump(milliseconds(1));
    EXPECT_FALSE(box.complete());
    model.SendKv(0, {{&hosted, 900, 1200, 0}});
    model.PumpUntil([&] { return box.complete(); });
    ASSERT_FALSE(HasFatalFailure());
    model.Judge(box, 0, tokens);
    // Tokens one by one, more than a frame has entries for.
    std::vector<KvRun> runs;
    for (uint64_t t = 0; t < 1000; ++t) runs.push_back({&other, t, 1, 0});
    model.SendKv(0, runs);
    model.SendKv(0, {{&other, 1900, 1100, 0}, {&other, 3400, tokens - 3400, 0}});
    model.Ask(other, 0, 2, tokens, &box);
    model.PumpUntil([&] { return box.complete(); });
    EXPECT_EQ(model.link().dropped(), 0u);
  }
}

// A batch whose queries, and then one whose replies, pass what one frame holds.
TEST(HostLink, LargeBatchesGoInSeveralFrames) {
  for (const bool by_segment : {false, true}) {
    WireModel model(
        {.hosts = 2,
         .kv_heads = 4,
         .group = 8,
         .head_dim = 128,
         .layers = 1,
         .settings = {"attention.estimator=FULL", "attention.no_dense_layers=true",
                      "attention.window=16", "host.block_tokens=256", "host.threads=2",
                      "cluster.failure_timeout_s=120",
                      by_segment ? "engine.deterministic=true" : "engine.max_batch=4"}});
    // Many partials, of many segments or of many rows.
    const uint64_t prompt = by_segment ? 2500 : 400;
    const HostedRequest hosted = model.Open(1, PlacementMode::kSequence, prompt, 1);
    const uint64_t tokens = model.job().Offloaded(prompt);
    model.SendKv(hosted, 0, 0, tokens);
    const uint32_t rows = by_segment ? 440 : 2200;
    ReplyBox box;
    model.Ask(hosted, 0, 1, tokens, &box, rows);
    EXPECT_GT(box.answered.size(), 2u);
    model.PumpUntil([&] { return box.complete(); });
    ASSERT_FALSE(HasFatalFailure());
    const size_t partials = by_segment ? hosted.SegmentOf(tokens - 1) + 1 : 2;
    EXPECT_EQ(box.partials.size(), rows * 4 * partials);
    // Every row asks the same: the last one's answer is that of the first.
    std::erase_if(box.partials, [&](const ReceivedPartial& p) { return p.key.row != rows - 1; });
    model.Judge(box, 0, tokens);
  }
}

TEST(HostLink, AHostThatIsCutOffEndsTheWaitWithItsName) {
  WireModel model(FullSpec(2));
  model.Cut(RankId(2));
  try {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (std::chrono::steady_clock::now() < end) model.link().Pump(milliseconds(1));
    ADD_FAILURE() << "nobody noticed";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kCluster);
    EXPECT_NE(std::string(e.what()).find("host rank 2 on here is lost"), std::string::npos)
        << e.what();
  }
}

}  // namespace
}  // namespace passel::engine
