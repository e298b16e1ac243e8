// K and V read back from host ranks, over the wire.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "runtime/base/random.h"
#include "runtime/engine/host_link.h"
#include "tests/cluster/joined.h"
#include "tests/engine/wire_model.h"

namespace passel::engine {
namespace {

constexpr uint64_t kPrompt = 900, kGenerated = 300;

JobSpec Spec(uint32_t hosts) {
  return {.hosts = hosts,
          .kv_heads = 3,
          .settings = {"attention.estimator=FULL", "attention.no_dense_layers=true",
                       "attention.window=16", "host.block_tokens=256", "host.threads=2",
                       "cluster.failure_timeout_s=60"}};
}
uint64_t Tokens(const WireModel& model) { return model.job().Offloaded(kPrompt); }
void SendAll(WireModel& model, const HostedRequest& hosted) {
  for (int32_t layer = 0; layer < model.job().model.layers; ++layer) {
    model.SendKv(hosted, layer, 0, Tokens(model));
  }
}

// A read, and memory for it with nothing behind it.
struct KvRead {
  std::vector<bf16> kv;
  KvBox box;

  KvRead(WireModel& model, const HostedRequest& hosted, int32_t layer, uint64_t first,
         uint64_t count)
      : kv(static_cast<size_t>(model.job().model.kv_heads) * count * 2 *
               static_cast<size_t>(model.job().model.head_dim),
           bf16{0x7b7b}) {
    model.link().ReadKv(layer, hosted, first, count, kv.data(), &box);
  }
  bool untouched() const {
    return std::ranges::all_of(kv, [](bf16 x) { return x.bits == 0x7b7b; });
  }
};

void ExpectRowsBack(WireModel& model, PlacementMode mode, uint64_t id) {
  const HostedRequest hosted = model.Open(id, mode, kPrompt, kGenerated);
  SendAll(model, hosted);
  const uint64_t tokens = Tokens(model);
  Random random(id);
  for (int round = 0; round < 10; ++round) {
    struct Asked {
      int32_t layer;
      uint64_t first, count;
      std::unique_ptr<KvRead> read;
    };
    std::vector<Asked> asked;  // all open at once
    const auto ask = [&](int32_t layer, uint64_t first, uint64_t count) {
      asked.push_back(
          {layer, first, count, std::make_unique<KvRead>(model, hosted, layer, first, count)});
    };
    if (round == 0) {
      ask(0, 0, tokens);
      ask(1, 0, tokens);
      ask(0, 0, 1);
      ask(1, tokens - 1, 1);
      ask(1, 5, 0);
    }
    for (int i = 0; i < 4; ++i) {
      const uint64_t first = random.Next() % tokens;
      ask(static_cast<int32_t>(random.Next() % 2), first, 1 + random.Next() % (tokens - first));
    }
    for (const Asked& a : asked) {
      model.PumpUntil([&] { return a.read->box.complete(); });
      ASSERT_FALSE(testing::Test::HasFatalFailure());
      model.JudgeRows(a.layer, a.first, a.count, a.read->kv);
    }
  }
}

TEST(KvRead, GivesWhatWasSentForEveryPlacement) {
  for (const uint32_t hosts : {1u, 2u, 3u}) {
    WireModel model(Spec(hosts));
    uint64_t id = 1;
    for (const auto mode :
         {PlacementMode::kRequest, PlacementMode::kHead, PlacementMode::kSequence}) {
      ExpectRowsBack(model, mode, id++);
    }
    EXPECT_EQ(model.link().dropped(), 0u);
  }
}

TEST(KvRead, DelayedAndReorderedFramesGiveTheSame) {
  for (const uint64_t seed : {1u, 2u, 3u}) {
    WireModel model(Spec(2), {.seed = seed, .max_delay = 12, .delay = 0.2, .reorder = 0.2});
    ExpectRowsBack(model, PlacementMode::kSequence, 1);
    ExpectRowsBack(model, PlacementMode::kHead, 2);
  }
}

// A reply that comes twice counts once.
TEST(KvRead, RepeatedFramesAreDropped) {
  WireModel model(Spec(2), {.seed = 5, .duplicate = 1});
  ExpectRowsBack(model, PlacementMode::kSequence, 1);
  model.PumpUntil([&] { return model.link().dropped() > 0; });
}

TEST(KvRead, WaitsForItsTokensAndHoldsUpNoOther) {
  for (const auto mode : {PlacementMode::kHead, PlacementMode::kSequence}) {
    WireModel model(Spec(2));
    const HostedRequest hosted = model.Open(1, mode, kPrompt, kGenerated);
    const uint64_t tokens = Tokens(model);
    KvRead all(model, hosted, 0, 0, tokens), late(model, hosted, 0, tokens - 1, 1);
    model.SendKv(hosted, 0, 0, 500);
    KvRead there(model, hosted, 0, 100, 400);
    model.PumpUntil([&] { return there.box.complete(); });
    model.JudgeRows(0, 100, 400, there.kv);
    model.SendKv(hosted, 0, 500, tokens - 501);
    for (int i = 0; i < 20; ++i) model.link().Pump(milliseconds(1));
    EXPECT_FALSE(all.box.complete());
    EXPECT_EQ(late.box.open(), 3u - (mode == PlacementMode::kHead ? 1 : 2));
    EXPECT_TRUE(late.untouched());
    model.SendKv(hosted, 0, tokens - 1, 1);
    model.PumpUntil([&] { return all.box.complete() && late.box.complete(); });
    model.JudgeRows(0, 0, tokens, all.kv);
    model.JudgeRows(0, tokens - 1, 1, late.kv);
    EXPECT_EQ(model.link().dropped(), 0u);
  }
}

// More than a host is asked for at once, and than it answers at once.
TEST(KvRead, LargeReadsGoInSeveralFrames) {
  WireModel model({.hosts = 1,
                   .kv_heads = 4,
                   .group = 1,
                   .head_dim = 128,
                   .layers = 1,
                   .context = 32768,
                   .settings = {"attention.estimator=FULL", "attention.no_dense_layers=true",
                                "attention.window=16", "host.block_tokens=5000", "host.threads=2",
                                "cluster.failure_timeout_s=120"}});
  constexpr uint64_t kLong = 16000;
  const HostedRequest hosted = model.Open(1, PlacementMode::kSequence, kLong, 1);
  const uint64_t tokens = model.job().Offloaded(kLong);
  model.SendKv(hosted, 0, 0, tokens);
  std::vector<std::unique_ptr<KvRead>> reads;
  for (int i = 0; i < 4; ++i) {
    reads.push_back(std::make_unique<KvRead>(model, hosted, 0, 0, tokens));
    EXPECT_GE(reads.back()->box.open(), 8u);
  }
  for (const auto& read : reads) {
    model.PumpUntil([&] { return read->box.complete(); });
    ASSERT_FALSE(HasFatalFailure());
    model.JudgeRows(0, 0, tokens, read->kv);
  }
  EXPECT_EQ(model.link().dropped(), 0u);
}

TEST(KvRead, FramesHoldOneReplyEach) {
  const cluster::WireShape shape{
      .layers = 1, .kv_heads = 8, .group = 1, .head_dim = 128, .l = 1, .max_tokens = 1u << 24};
  model::TensorSlice slice;
  slice.first_kv_head = 2;
  slice.kv_heads = 5;
  for (const uint64_t segment : {7u, 1000u, 60000u}) {
    HostedRequest hosted;
    hosted.request = RequestId(9);
    hosted.placement = {PlacementMode::kSequence, 1, 3, 8};
    hosted.segments = host::PlanSegments(100000, 500, segment);
    const uint64_t first = 13, count = 100300;
    std::vector<int> asked(count * 5);
    size_t small = 0;
    for (const KvReadFrame& f : PlanKvRead(shape, slice, hosted, first, count, 3)) {
      ASSERT_EQ(f.entries.size(), f.rows.size());
      ASSERT_LE(f.entries.size(), 512u);
      uint64_t tokens = 0;
      for (size_t i = 0; i < f.entries.size(); ++i) {
        const cluster::ReadKvEntry& e = f.entries[i];
        const uint32_t s = hosted.SegmentOf(e.first_token);
        ASSERT_EQ(s, hosted.SegmentOf(e.first_token + e.count - 1));
        ASSERT_EQ(hosted.placement.Owner(e.kv_head, s), f.host);
        ASSERT_EQ(f.rows[i], (e.kv_head - 2) * count + (e.first_token - first));
        for (uint32_t t = 0; t < e.count; ++t) ++asked[f.rows[i] + t];
        tokens += e.count;
      }
      ASSERT_LE(tokens * 512, uint64_t{4} << 20);
      small += f.entries.size() < 512 && tokens * 512 < uint64_t{2} << 20 ? 1 : 0;
      cluster::BuildReadKv(shape, f.entries);
    }
    EXPECT_TRUE(std::ranges::all_of(asked, [](int times) { return times == 1; }));
    EXPECT_LE(small, segment == 60000 ? 30u : 3u);
  }
  HostedRequest none;
  none.segments = host::PlanSegments(100, 0, 50);
  EXPECT_THROW(PlanKvRead(shape, slice, none, 90, 11, 1), Error);
}

// Forgotten reads write nothing, and nobody waits for their answers.
TEST(KvRead, ForgottenReadsAreDropped) {
  JobSpec spec = Spec(2);
  spec.settings.back() = "cluster.failure_timeout_s=2";
  WireModel model(spec);
  const HostedRequest hosted = model.Open(1, PlacementMode::kSequence, kPrompt, kGenerated);
  const uint64_t tokens = Tokens(model);
  KvRead kept(model, hosted, 0, 0, 10);
  auto gone = std::make_unique<KvRead>(model, hosted, 0, 0, tokens);
  KvRead forgotten(model, hosted, 1, 0, tokens);
  const uint64_t late = gone->box.open() + forgotten.box.open();
  gone.reset();
  forgotten.box.Forget();
  EXPECT_TRUE(forgotten.box.complete());
  SendAll(model, hosted);
  model.PumpUntil([&] { return kept.box.complete() && model.link().dropped() == late; });
  EXPECT_TRUE(forgotten.untouched());
  model.JudgeRows(0, 0, 10, kept.kv);
  // The box may be used again; nothing is left that could be overdue.
  model.link().ReadKv(1, hosted, 0, tokens, forgotten.kv.data(), &forgotten.box);
  model.PumpUntil([&] { return forgotten.box.complete(); });
  model.JudgeRows(1, 0, tokens, forgotten.kv);
  // Hosts forget what waits with its request.
  auto waits = std::make_unique<KvRead>(model, hosted, 0, tokens, 1);
  model.link().Pump(milliseconds(1));
  waits.reset();
  cluster::proto::Control release;
  release.mutable_release()->set_request(1);
  model.link().SendControlToAll(release);
  const auto end = std::chrono::steady_clock::now() + milliseconds(2500);
  while (std::chrono::steady_clock::now() < end) model.link().Pump(milliseconds(10));
  EXPECT_EQ(model.link().dropped(), late);
}

TEST(KvRead, OneThatIsNotAnsweredEndsTheWait) {
  JobSpec spec = Spec(1);
  spec.settings.back() = "cluster.failure_timeout_s=1";
  WireModel model(spec);
  const HostedRequest hosted = model.Open(1, PlacementMode::kRequest, kPrompt, kGenerated);
  KvRead waits(model, hosted, 0, 0, 1);
  try {
    model.PumpUntil([&] { return waits.box.complete(); });
    ADD_FAILURE() << "nobody noticed";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kCluster);
    EXPECT_NE(std::string(e.what()).find("unanswered"), std::string::npos) << e.what();
  }
}

TEST(KvRead, WhatAHostCannotReadEndsTheWaitWithItsName) {
  WireModel model(Spec(2));
  HostedRequest hosted = model.Open(1, PlacementMode::kSequence, kPrompt, kGenerated);
  SendAll(model, hosted);
  hosted.request = RequestId(77);
  KvRead read(model, hosted, 1, 0, 100);
  try {
    model.PumpUntil([&] { return read.box.complete(); });
    ADD_FAILURE() << "nobody noticed";
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kCluster);
    EXPECT_NE(std::string(e.what()).find("host rank 1 cannot give back K and V of request 77"),
              std::string::npos)
        << e.what();
  }
  EXPECT_TRUE(read.untouched());
}

// Rows that were not asked for, or are none, change nothing.
TEST(KvRead, ForgedRowsAreDropped) {
  WireModel model(Spec(2));
  const HostedRequest hosted = model.Open(1, PlacementMode::kRequest, kPrompt, kGenerated);
  KvRead first(model, hosted, 0, 0, 10), second(model, hosted, 0, 20, 5);  // tokens come below
  const cluster::WireShape shape = model.job().wire_shape();
  const auto entries = [](uint64_t at, uint32_t count) {
    std::vector<cluster::KvRowsEntry> out;
    for (const uint32_t head : {0u, 1u, 2u}) out.push_back({1, at, head, count, 0, 0});
    return out;
  };
  const std::vector<bf16> zeros(100 * 2 * shape.head_dim);
  const auto build = [&](std::span<const cluster::KvRowsEntry> of) {
    const std::vector<const bf16*> sources(of.size(), zeros.data());
    cluster::Pieces pieces;
    auto out = cluster::BuildKvRows(shape, of, sources, &pieces);
    return cluster::Joined(std::move(out), pieces);
  };
  using transport::FrameHeader;
  using Payload = std::vector<std::byte>;
  uint64_t sent = 0;
  const auto inject = [&](auto&& change) {
    FrameHeader h;
    h.type = transport::FrameType::kKvRows;
    h.nonce = kNonce;
    h.source = 1;
    h.step = 1;  // the second read, of one frame
    h.count = 3;
    Payload payload = build(entries(20, 5));
    change(h, payload);
    h.payload_bytes = payload.size();
    transport::SealFrameHeader(h);
    model.network().Inject(RankId(0), std::as_bytes(std::span(&h, 1)), payload);
    ++sent;
  };
  inject([](FrameHeader& h, Payload&) { h.step = 0; });
  inject([](FrameHeader& h, Payload&) { h.step = 2; });
  inject([](FrameHeader& h, Payload&) { h.step = ~uint64_t{0}; });
  inject([](FrameHeader& h, Payload&) { h.layer = 1; });
  inject([](FrameHeader& h, Payload&) { h.part = 1; });
  inject([](FrameHeader& h, Payload&) { h.part = 0xffffffff; });
  inject([](FrameHeader& h, Payload&) { h.source = 2; });
  inject([](FrameHeader& h, Payload&) { h.count = 0xffffffff; });
  inject([](FrameHeader& h, Payload&) { h.count = 2; });
  inject([](FrameHeader& h, Payload&) { h.type = transport::FrameType::kReadKv; });
  inject([](FrameHeader&, Payload& p) { p.resize(p.size() - 1); });
  inject([](FrameHeader&, Payload& p) { p.resize(p.size() + 16); });
  const auto forge = [&](auto&& change) {
    auto of = entries(20, 5);
    change(of);
    inject([&](FrameHeader& h, Payload& p) {
      h.count = static_cast<uint32_t>(of.size());
      p = build(of);
    });
  };
  using Entries = std::vector<cluster::KvRowsEntry>;
  forge([](Entries& e) { e.pop_back(); });
  forge([](Entries& e) { e.push_back(e.back()); });
  forge([](Entries& e) { std::swap(e[0], e[1]); });
  forge([](Entries& e) { e[2].request = 2; });
  forge([](Entries& e) { e[2].first_token = 21; });
  forge([](Entries& e) { e[2].count = 4; });
  forge([](Entries& e) { e[2].count = 6; });
  forge([](Entries& e) { e[1].kv_head = 0; });
  forge([](Entries& e) { e.clear(); });
  forge([](Entries& e) { e[2].count = 4, e[2].status = 3; });
  Random random(6);
  for (int i = 0; i < 2000; ++i) {
    inject([&](FrameHeader& h, Payload& p) {
      h.count = static_cast<uint32_t>(random.Next() % 4 + 1);
      p.resize(random.Next() % 4096);
      for (std::byte& b : p) b = std::byte(static_cast<uint8_t>(random.Next()));
    });
  }
  model.PumpUntil([&] { return model.link().dropped() >= sent; });
  EXPECT_EQ(model.link().dropped(), sent);
  EXPECT_EQ(first.box.open(), 1u);
  EXPECT_EQ(second.box.open(), 1u);
  EXPECT_TRUE(first.untouched() && second.untouched());
  model.SendKv(hosted, 0, 0, 30);
  model.PumpUntil([&] { return first.box.complete() && second.box.complete(); });
  model.JudgeRows(0, 0, 10, first.kv);
  model.JudgeRows(0, 20, 5, second.kv);
}

}  // namespace
}  // namespace passel::engine
