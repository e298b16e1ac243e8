#include "transport/in_process.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/random.h"

namespace passel::transport {
namespace {

using std::chrono::milliseconds;

constexpr uint64_t kNonce = 0x1122334455667788;

FrameHeader Header(FrameType type, uint32_t count = 0) {
  FrameHeader h;
  h.type = type;
  h.count = count;
  return h;
}

// Payload that says which frame it belongs to: `number` throughout.
std::vector<std::byte> Payload(uint32_t number, size_t words) {
  std::vector<uint32_t> v(words, number);
  const auto bytes = std::as_bytes(std::span(v));
  return {bytes.begin(), bytes.end()};
}

// A network whose channels note what they receive.
struct Ranks {
  struct Got {
    FrameHeader header;
    std::vector<std::byte> payload;
  };

  explicit Ranks(uint32_t n, const FaultPlan& faults = {})
      : network(n, kNonce, faults), got(n), lost(n) {
    for (uint32_t r = 0; r < n; ++r) {
      channels.push_back(network.MakeChannel(RankId(static_cast<int32_t>(r))));
      channels[r]->SetFrameHandler([this, r](const FrameHeader& h, std::span<const std::byte> p) {
        got[r].push_back({h, {p.begin(), p.end()}});
      });
      channels[r]->SetPeerLostHandler(
          [this, r](RankId peer, const std::string& reason) { lost[r][peer.value] += reason; });
    }
  }
  ~Ranks() {
    for (auto& c : channels) c->Close(milliseconds(0));
  }
  void ProgressAll(int times = 40) {
    for (int i = 0; i < times; ++i) {
      for (auto& c : channels) c->Progress();
    }
  }
  void SendMany(uint32_t frames, size_t words = 16) {
    for (uint32_t i = 0; i < frames; ++i) {
      channels[0]->Send(RankId(1),
                        OutgoingFrame::Own(Header(FrameType::kQuery, i), Payload(i, words)));
      ProgressAll(1);
    }
    ProgressAll();
  }
  std::vector<uint32_t> Order(size_t rank) const {
    std::vector<uint32_t> out;
    for (const Got& g : got[rank]) out.push_back(g.header.count);
    return out;
  }

  InProcessNetwork network;
  std::vector<std::unique_ptr<Channel>> channels;
  std::vector<std::vector<Got>> got;
  std::vector<std::map<int32_t, std::string>> lost;
};

TEST(InProcess, PiecesArriveAsOnePayload) {
  Ranks ranks(2);
  const auto whole = Payload(1, 100);
  const std::span<const std::byte> all(whole);
  OutgoingFrame frame{Header(FrameType::kQuery), all.first(64), {}};
  frame.pieces = {all.subspan(64, 300), all.subspan(364, 0), all.subspan(364)};
  EXPECT_EQ(frame.payload_bytes(), whole.size());
  ranks.channels[0]->Send(RankId(1), frame);
  ranks.ProgressAll();
  ASSERT_EQ(ranks.got[1].size(), 1u);
  EXPECT_EQ(ranks.got[1][0].payload, whole);
  EXPECT_EQ(ranks.channels[0]->stats().bytes_sent, kFrameHeaderBytes + whole.size());
  // Judged by all of it.
  frame.pieces.assign(40, all);
  frame.header.type = FrameType::kHeartbeat;
  EXPECT_THROW(ranks.channels[0]->Send(RankId(1), frame), Error);
}

TEST(InProcess, DeliversAllSizesBetweenAllRanks) {
  Ranks ranks(3);
  for (const size_t words : {0u, 16u, 2048u, 262144u, 4194304u}) {
    for (auto& r : ranks.got) r.clear();
    for (int32_t from = 0; from < 3; ++from) {
      for (int32_t to = 0; to < 3; ++to) {
        if (from == to) continue;
        const auto n = static_cast<uint32_t>(10 * from + to);
        ranks.channels[from]->Send(
            RankId(to), OutgoingFrame::Own(Header(FrameType::kKv, n), Payload(n, words)));
      }
    }
    ranks.ProgressAll(2);
    for (int32_t to = 0; to < 3; ++to) {
      ASSERT_EQ(ranks.got[to].size(), 2u);
      for (const auto& g : ranks.got[to]) {
        EXPECT_EQ(g.header.count, static_cast<uint32_t>(10 * g.header.source + to));
        EXPECT_EQ(g.payload, Payload(g.header.count, words));
      }
    }
  }
  EXPECT_EQ(ranks.channels[0]->stats().frames_sent, 10u);
  EXPECT_EQ(ranks.channels[0]->stats().frames_received, 10u);
  EXPECT_EQ(ranks.channels[0]->stats().bytes_sent, ranks.channels[0]->stats().bytes_received);
}

TEST(InProcess, DoneRunsOnceInALaterProgressAndEndsPending) {
  Ranks ranks(2);
  int done = 0;
  const auto payload = Payload(1, 100);
  ranks.channels[0]->Send(RankId(1), {Header(FrameType::kQuery), payload, [&] { ++done; }});
  EXPECT_EQ(done, 0);
  EXPECT_EQ(ranks.channels[0]->PendingBytes(RankId(1)), 400u + kFrameHeaderBytes);
  ranks.ProgressAll(3);
  EXPECT_EQ(done, 1);
  EXPECT_EQ(ranks.channels[0]->PendingBytes(RankId(1)), 0u);
}

TEST(InProcess, TooLargeAndUnknownRankAreBugs) {
  Ranks ranks(2);
  EXPECT_THROW(ranks.channels[0]->Send(
                   RankId(1), OutgoingFrame::Own(Header(FrameType::kControl), Payload(0, 262145))),
               Error);
  EXPECT_THROW(ranks.channels[0]->Send(RankId(2), {Header(FrameType::kControl), {}, {}}), Error);
  EXPECT_THROW(ranks.channels[0]->Send(RankId(0), {Header(FrameType::kControl), {}, {}}), Error);
}

TEST(InProcess, DelayKeepsOrder) {
  Ranks ranks(2, {.seed = 5, .delay = 0.5});
  ranks.SendMany(300);
  const auto order = ranks.Order(1);
  ASSERT_EQ(order.size(), 300u);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
}

TEST(InProcess, DelayIsCountedInProgressCalls) {
  Ranks ranks(2, {.seed = 5, .max_delay = 1, .delay = 1});
  ranks.channels[0]->Send(RankId(1), {Header(FrameType::kHeartbeat), {}, {}});
  ranks.channels[0]->Send(RankId(1), {Header(FrameType::kHeartbeat), {}, {}});
  ranks.channels[1]->Progress();
  EXPECT_EQ(ranks.got[1].size(), 2u);
  Ranks late(2, {.seed = 5, .max_delay = 50, .delay = 1});
  for (int i = 0; i < 20; ++i) {
    late.channels[0]->Send(RankId(1), {Header(FrameType::kHeartbeat), {}, {}});
  }
  late.channels[1]->Progress();
  EXPECT_LT(late.got[1].size(), 20u);
  late.ProgressAll(50);
  EXPECT_EQ(late.got[1].size(), 20u);
}

TEST(InProcess, ReorderLosesNothing) {
  Ranks ranks(2, {.seed = 6, .reorder = 0.3});
  ranks.SendMany(300);
  auto order = ranks.Order(1);
  ASSERT_EQ(order.size(), 300u);
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
  std::sort(order.begin(), order.end());
  for (uint32_t i = 0; i < 300; ++i) EXPECT_EQ(order[i], i);
}

TEST(InProcess, DropAndDuplicate) {
  Ranks dropping(2, {.seed = 7, .drop = 0.25});
  dropping.SendMany(400);
  EXPECT_GT(dropping.got[1].size(), 250u);
  EXPECT_LT(dropping.got[1].size(), 350u);
  EXPECT_EQ(dropping.channels[0]->PendingBytes(RankId(1)), 0u);
  Ranks doubling(2, {.seed = 7, .duplicate = 0.25});
  doubling.SendMany(400);
  EXPECT_GT(doubling.got[1].size(), 450u);
  EXPECT_LT(doubling.got[1].size(), 550u);
}

TEST(InProcess, CorruptHeadersAreNeverDelivered) {
  Ranks ranks(2, {.seed = 8, .corrupt_header = 0.5});
  ranks.SendMany(1000);
  const ChannelStats& s = ranks.channels[1]->stats();
  EXPECT_GT(s.dropped_malformed, 400u);
  EXPECT_EQ(s.dropped_malformed + ranks.got[1].size(), 1000u);
  for (const auto& g : ranks.got[1]) EXPECT_EQ(g.payload, Payload(g.header.count, 16));
}

TEST(InProcess, CorruptPayloadsArriveAndTruncatedOnesDoNot) {
  Ranks ranks(2, {.seed = 9, .corrupt_payload = 0.5});
  ranks.SendMany(400);
  ASSERT_EQ(ranks.got[1].size(), 400u);
  const auto bad = std::count_if(ranks.got[1].begin(), ranks.got[1].end(), [](const auto& g) {
    return g.payload != Payload(g.header.count, 16);
  });
  EXPECT_GT(bad, 150);
  EXPECT_LT(bad, 250);
  Ranks cutting(2, {.seed = 9, .truncate = 0.5});
  cutting.SendMany(400);
  EXPECT_GT(cutting.channels[1]->stats().dropped_malformed, 150u);
  EXPECT_EQ(cutting.channels[1]->stats().dropped_malformed + cutting.got[1].size(), 400u);
}

TEST(InProcess, TheSameSeedGivesTheSameFaults) {
  const auto run = [](uint64_t seed) {
    Ranks ranks(2, {.seed = seed,
                    .delay = 0.2,
                    .reorder = 0.2,
                    .drop = 0.2,
                    .duplicate = 0.2,
                    .corrupt_header = 0.1,
                    .corrupt_payload = 0.1});
    ranks.SendMany(300);
    std::vector<std::vector<std::byte>> out;
    for (const auto& g : ranks.got[1]) out.push_back(g.payload);
    return out;
  };
  EXPECT_EQ(run(1), run(1));
  EXPECT_NE(run(1), run(2));
}

TEST(InProcess, OtherEpochsAreDroppedAndCounted) {
  Ranks ranks(2);
  ranks.channels[1]->SetEpoch(4);
  ranks.channels[0]->Send(RankId(1), {Header(FrameType::kQuery), {}, {}});
  ranks.channels[0]->Send(RankId(1), {Header(FrameType::kHeartbeat), {}, {}});
  ranks.ProgressAll(2);
  ASSERT_EQ(ranks.got[1].size(), 1u);
  EXPECT_EQ(ranks.got[1][0].header.type, FrameType::kHeartbeat);
  EXPECT_EQ(ranks.channels[1]->stats().dropped_epoch, 1u);
  ranks.channels[0]->SetEpoch(4);
  ranks.channels[0]->Send(RankId(1), {Header(FrameType::kQuery), {}, {}});
  ranks.ProgressAll(2);
  EXPECT_EQ(ranks.got[1].size(), 2u);
}

TEST(InProcess, HostileBytesDoNoHarm) {
  Ranks ranks(2);
  Random random(10);
  FrameHeader valid = Header(FrameType::kControl);
  valid.nonce = kNonce;
  valid.source = 0;
  constexpr int kRounds = 20000;
  for (int i = 0; i < kRounds; ++i) {
    std::vector<std::byte> payload(random.Next() % 200);
    valid.payload_bytes = payload.size();
    SealFrameHeader(valid);
    std::vector<std::byte> header(kFrameHeaderBytes);
    std::memcpy(header.data(), &valid, header.size());
    const uint64_t flips = random.Next() % 3;  // none: a valid frame
    for (uint64_t f = 0; f < flips; ++f) {
      header[random.Next() % header.size()] = std::byte(static_cast<uint8_t>(random.Next()));
    }
    if (random.Next() % 8 == 0) header.resize(random.Next() % 100);
    ranks.network.Inject(RankId(1), header, payload);
    if (i % 64 == 0) ranks.channels[1]->Progress();
  }
  ranks.ProgressAll(2);
  const ChannelStats& s = ranks.channels[1]->stats();
  EXPECT_EQ(s.frames_received + s.dropped_malformed + s.dropped_nonce + s.dropped_epoch,
            uint64_t{kRounds});
  EXPECT_GT(s.frames_received, uint64_t{kRounds} / 4);
  for (const auto& g : ranks.got[1]) ASSERT_EQ(g.header.payload_bytes, g.payload.size());
}

TEST(InProcess, ACutRankIsLostToAllOnceAndItsFramesAreGone) {
  Ranks ranks(3);
  bool done = false;
  ranks.channels[1]->Send(RankId(0), {Header(FrameType::kQuery), {}, {}});
  ranks.network.Cut(RankId(1));
  ranks.channels[2]->Send(RankId(1), {Header(FrameType::kQuery), {}, [&] { done = true; }});
  ranks.ProgressAll(5);
  EXPECT_TRUE(ranks.got[0].empty());
  EXPECT_EQ(ranks.lost[0], (std::map<int32_t, std::string>{{1, "cut"}}));
  EXPECT_EQ(ranks.lost[2], (std::map<int32_t, std::string>{{1, "cut"}}));
  EXPECT_EQ(ranks.channels[0]->peer_state(RankId(1)), PeerState::kLost);
  EXPECT_EQ(ranks.channels[0]->peer_state(RankId(2)), PeerState::kConnected);
  EXPECT_TRUE(done);
  ranks.channels[0]->Send(RankId(2), {Header(FrameType::kQuery), {}, {}});
  ranks.ProgressAll(2);
  EXPECT_EQ(ranks.got[2].size(), 1u);
}

TEST(InProcess, ASilentRankIsNotReported) {
  Ranks ranks(2);
  ranks.network.Silence(RankId(1));
  ranks.channels[0]->Send(RankId(1), {Header(FrameType::kHeartbeat), {}, {}});
  ranks.channels[1]->Send(RankId(0), {Header(FrameType::kHeartbeat), {}, {}});
  ranks.ProgressAll(5);
  EXPECT_TRUE(ranks.got[0].empty());
  EXPECT_TRUE(ranks.got[1].empty());
  EXPECT_TRUE(ranks.lost[0].empty());
  EXPECT_EQ(ranks.channels[0]->peer_state(RankId(1)), PeerState::kConnected);
}

TEST(InProcess, ClosePeerIsSeenByTheOtherOnly) {
  Ranks ranks(2);
  ranks.channels[1]->Send(RankId(0), {Header(FrameType::kQuery), {}, {}});
  ranks.channels[0]->ClosePeer(RankId(1));
  ranks.ProgressAll(3);
  EXPECT_TRUE(ranks.got[0].empty());
  EXPECT_TRUE(ranks.lost[0].empty());
  EXPECT_EQ(ranks.lost[1].size(), 1u);
  EXPECT_EQ(ranks.channels[0]->peer_state(RankId(1)), PeerState::kLost);
}

TEST(InProcess, CloseFlushesBeforeThePeerIsLost) {
  Ranks ranks(2, {.seed = 3, .delay = 1});
  for (uint32_t i = 0; i < 10; ++i) {
    ranks.channels[0]->Post(RankId(1), {Header(FrameType::kControl, i), {}, {}});
  }
  ranks.channels[0]->Close(milliseconds(100));
  for (int i = 0; i < 30; ++i) ranks.channels[1]->Progress();
  EXPECT_EQ(ranks.got[1].size(), 10u);
  EXPECT_EQ(ranks.lost[1].size(), 1u);
}

TEST(InProcess, WaitEndsByTimeoutFrameAndWake) {
  Ranks ranks(2);
  Channel& waiting = *ranks.channels[1];
  EXPECT_FALSE(waiting.Progress());
  const auto start = std::chrono::steady_clock::now();
  waiting.Wait(milliseconds(20));
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(15));

  std::thread waker([&] {
    std::this_thread::sleep_for(milliseconds(5));
    waiting.Wake();
  });
  waiting.Wait(milliseconds(30000));
  waker.join();
  EXPECT_TRUE(waiting.Progress());
  ranks.channels[0]->Send(RankId(1), {Header(FrameType::kHeartbeat), {}, {}});
  waiting.Wait(milliseconds(30000));
  EXPECT_LT(std::chrono::steady_clock::now() - start, milliseconds(20000));
  EXPECT_TRUE(waiting.Progress());
  EXPECT_EQ(ranks.got[1].size(), 1u);
}

TEST(InProcess, PostsFromManyThreadsAllArriveInTheOrderOfEachThread) {
  Ranks ranks(2);
  constexpr uint32_t kThreads = 4, kFrames = 500;
  std::atomic<uint32_t> done{0};
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (uint32_t i = 0; i < kFrames; ++i) {
        OutgoingFrame f =
            OutgoingFrame::Own(Header(FrameType::kPartial, t * kFrames + i), Payload(i, 8));
        f.done = [&done, keep = f.done] { ++done; };
        ranks.channels[0]->Post(RankId(1), std::move(f));
      }
    });
  }
  // The owners of both channels, each its own thread.
  std::thread receiver([&] {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (ranks.got[1].size() < kThreads * kFrames && std::chrono::steady_clock::now() < end) {
      if (!ranks.channels[1]->Progress()) ranks.channels[1]->Wait(milliseconds(10));
    }
  });
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (done < kThreads * kFrames && std::chrono::steady_clock::now() < end) {
    if (!ranks.channels[0]->Progress()) ranks.channels[0]->Wait(milliseconds(10));
  }
  for (auto& t : threads) t.join();
  receiver.join();
  ASSERT_EQ(ranks.got[1].size(), kThreads * kFrames);
  std::vector<uint32_t> next(kThreads, 0);
  for (const auto& g : ranks.got[1]) {
    const uint32_t t = g.header.count / kFrames;
    EXPECT_EQ(g.header.count % kFrames, next[t]++);
  }
  EXPECT_EQ(ranks.channels[0]->PendingBytes(RankId(1)), 0u);
}

}  // namespace
}  // namespace passel::transport
