#include "transport/ucx_channel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <map>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "tests/transport/forked_ranks.h"
#include "tests/transport/ucx_ways.h"

namespace passel::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Of what one rank sends to another.
uint64_t SeedOf(int32_t from, int32_t to, uint64_t step) {
  return static_cast<uint64_t>(from) * 1000003 + static_cast<uint64_t>(to) * 1009 + step;
}

// The same frame, its payload in up to `count` pieces of unequal size behind the first, some empty.
OutgoingFrame Cut(OutgoingFrame frame, size_t count) {
  std::span<const std::byte> rest = frame.payload;
  for (size_t i = 0; i <= count; ++i) {
    const auto piece =
        rest.first(i == count ? rest.size() : rest.size() / (2 + i * 7 % 5) * (i % 4 != 3));
    rest = rest.subspan(piece.size());
    if (i == 0) {
      frame.payload = piece;
    } else {
      frame.pieces.push_back(piece);
    }
  }
  return frame;
}

class Ucx : public testing::TestWithParam<Way> {};
INSTANTIATE_TEST_SUITE_P(Ways, Ucx, testing::Values(kTcp, kMemory),
                         [](const auto& way) { return std::string(way.param.name); });

TEST_P(Ucx, AllSizesBetweenAllRanksInOnePieceOrMany) {
  const auto body = [](ForkedRank& me) {
    const std::vector<uint64_t> sizes{0, 64, 8192, 131072, kMiB, 16 * kMiB};
    constexpr uint64_t kRepeats = 3;
    auto channel = me.Start(kNonce);
    uint64_t got = 0, done = 0;
    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte> p) {
      const auto expected = Payload(SeedOf(h.source, me.rank(), h.step), sizes[h.count]);
      me.Require(p.size() == expected.size(), "payload of a wrong size");
      me.Require(std::equal(p.begin(), p.end(), expected.begin()), "payload differs");
      me.Require(reinterpret_cast<uintptr_t>(p.data()) % 16 == 0, "payload not aligned");
      ++got;
    });
    uint64_t sent = 0;
    for (uint32_t s = 0; s < sizes.size(); ++s) {
      for (uint64_t r = 0; r < kRepeats; ++r) {
        for (int32_t to = 0; to < me.size(); ++to) {
          if (to == me.rank()) continue;
          const uint64_t step = s * kRepeats + r;
          auto frame = OutgoingFrame::Own(Header(FrameType::kKv, s, step),
                                          Payload(SeedOf(me.rank(), to, step), sizes[s]));
          frame = Cut(std::move(frame), r * r * 10);
          frame.done = [&done, keep = frame.done] { ++done; };
          channel->Send(RankId(to), std::move(frame));
          ++sent;
        }
      }
    }
    me.Until(
        *channel, [&] { return got == sent && done == sent; }, "frames are missing");
    me.Barrier(channel.get());
    for (int32_t to = 0; to < me.size(); ++to) {
      if (to != me.rank()) {
        me.Require(channel->PendingBytes(RankId(to)) == 0, "bytes still pending");
      }
    }
    const ChannelStats& s = channel->stats();
    me.Require(s.frames_sent == sent && s.frames_received == sent, "frames counted wrongly");
    me.Require(s.bytes_sent == s.bytes_received, "bytes counted wrongly");
    me.Require(s.dropped_malformed + s.dropped_nonce + s.dropped_epoch == 0, "frames dropped");
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(3, GetParam().environment, body), "");
}

TEST_P(Ucx, SmallFramesKeepTheirOrder) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    uint32_t next = 0;
    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte>) {
      me.Require(h.count == next++, "out of order");
    });
    for (uint32_t i = 0; i < 2000 && me.rank() == 0; ++i) {
      channel->Send(RankId(1), OutgoingFrame::Own(Header(FrameType::kQuery, i), Payload(i, i)));
    }
    if (me.rank() == 1)
      me.Until(
          *channel, [&] { return next == 2000; }, "frames are missing");
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(Ucx, DescribesWhatCarriesTheBytes) {
  const std::string expected = GetParam().described;
  const auto body = [&](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    const RankId other(1 - me.rank());
    bool got = false;
    channel->SetFrameHandler([&](const FrameHeader&, std::span<const std::byte>) { got = true; });
    channel->Send(other, {Header(FrameType::kHeartbeat), {}, {}});
    me.Until(
        *channel, [&] { return got; }, "no frame");
    const std::string is = channel->Describe(other);
    me.Require(is.find(expected) != std::string::npos, "Describe says " + is);
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(Ucx, LargeFramesWaitForReceiveMemory) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce, {.self = RankId(me.rank()), .max_receive_bytes = 16 * kMiB});
    constexpr uint64_t kFrames = 12;
    uint64_t got = 0, done = 0;
    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte> p) {
      const auto expected = Payload(h.step, 9 * kMiB);
      me.Require(std::equal(p.begin(), p.end(), expected.begin(), expected.end()), "differs");
      ++got;
    });
    const auto payload = Payload(7, 9 * kMiB);
    for (uint64_t i = 0; i < kFrames && me.rank() == 0; ++i) {
      channel->Send(RankId(1), {Header(FrameType::kKv, 0, 7), payload, [&] { ++done; }});
    }
    me.Until(
        *channel, [&] { return me.rank() == 0 ? done == kFrames : got == kFrames; },
        "frames are missing");
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(Ucx, FramesOfAnotherJobOrEpochAreDroppedAndCounted) {
  const auto body = [](ForkedRank& me) {
    // Rank 1 is of another job; rank 2 of another epoch.
    auto channel = me.Start(me.rank() == 1 ? kNonce + 1 : kNonce);
    channel->SetEpoch(me.rank() == 2 ? 5 : 6);
    uint64_t queries = 0;
    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte>) {
      if (h.type == FrameType::kQuery) ++queries;
    });
    const auto large = Payload(1, kMiB);
    if (me.rank() != 0) {
      for (int i = 0; i < 4; ++i) channel->Send(RankId(0), {Header(FrameType::kQuery), {}, {}});
      uint64_t done = 0;
      channel->Send(RankId(0), {Header(FrameType::kKv), large, [&] { ++done; }});
      me.Until(
          *channel, [&] { return done == 1; }, "a dropped large frame never completes");
    } else {
      const ChannelStats& s = channel->stats();
      me.Until(
          *channel, [&] { return s.dropped_nonce == 5 && s.dropped_epoch == 5; },
          "drops not counted");
      me.Require(queries == 0 && s.frames_received == 0, "a foreign frame was delivered");
    }
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(3, GetParam().environment, body), "");
}

TEST_P(Ucx, WaitEndsByFramePostWakeAndTimeout) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    const RankId other(1 - me.rank());
    uint64_t got = 0;
    channel->SetFrameHandler([&](const FrameHeader&, std::span<const std::byte>) { ++got; });
    channel->Send(other, {Header(FrameType::kHeartbeat), {}, {}});
    me.Until(
        *channel, [&] { return got == 1; }, "no frame");
    me.Barrier(channel.get());

    const auto start = steady_clock::now();
    const auto elapsed = [&] { return steady_clock::now() - start; };
    if (me.rank() == 0) {
      while (elapsed() < milliseconds(40)) {
        while (channel->Progress()) {
        }
        channel->Wait(milliseconds(50));  // nothing comes: ends by timeout
      }
      std::thread poster([&] {
        std::this_thread::sleep_for(milliseconds(20));
        channel->Post(other, OutgoingFrame::Own(Header(FrameType::kPartial), Payload(1, 100)));
      });
      while (channel->stats().frames_sent < 2 && elapsed() < milliseconds(15000)) {
        if (!channel->Progress()) channel->Wait(milliseconds(15000));
      }
      poster.join();
      std::thread waker([&] {
        std::this_thread::sleep_for(milliseconds(20));
        channel->Wake();
      });
      channel->Wait(milliseconds(15000));
      waker.join();
    } else {
      while (got < 2 && elapsed() < milliseconds(15000)) {
        if (!channel->Progress()) channel->Wait(milliseconds(15000));
      }
      me.Require(got == 2, "the posted frame did not come");
    }
    me.Require(elapsed() < milliseconds(10000), "a Wait was not ended");
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(Ucx, NoWakeIsLost) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    const auto start = steady_clock::now();
    constexpr uint32_t kTurns = 20'000;
    std::atomic<uint32_t> asked{0}, answered{0};
    std::thread waker([&] {
      for (uint32_t turn = 1; turn <= kTurns; ++turn) {
        while (asked < turn) std::this_thread::yield();
        // Before the owner waits, while it goes to sleep, or when it sleeps.
        const auto then = steady_clock::now() + std::chrono::nanoseconds(turn * 607 % 8000);
        while (steady_clock::now() < then) {
        }
        answered = turn;
        channel->Wake();
      }
    });
    for (uint32_t turn = 1; turn <= kTurns; ++turn) {
      asked = turn;
      while (answered < turn) {
        if (!channel->Progress()) channel->Wait(milliseconds(20000));
      }
    }
    waker.join();
    me.Require(steady_clock::now() - start < milliseconds(15000), "a Wait was not ended");
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(Ucx, PostsFromManyThreads) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    constexpr uint32_t kThreads = 3, kFrames = 300;
    std::vector<uint32_t> next(kThreads, 0);
    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte> p) {
      me.Require(h.count < kThreads && h.step == next[h.count]++, "out of order");
      me.Require(p.size() == h.step * 16, "wrong size");
    });
    std::vector<std::thread> threads;
    for (uint32_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (uint32_t i = 0; i < kFrames; ++i) {
          channel->Post(RankId(1 - me.rank()),
                        OutgoingFrame::Own(Header(FrameType::kQuery, t, i), Payload(i, i * 16)));
        }
      });
    }
    const auto all = [&] {
      return std::accumulate(next.begin(), next.end(), 0u) == kThreads * kFrames;
    };
    me.Until(*channel, all, "frames are missing");
    for (auto& t : threads) t.join();
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(Ucx, CloseFlushesWhatWasSent) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    uint64_t got = 0;
    channel->SetFrameHandler([&](const FrameHeader&, std::span<const std::byte>) { ++got; });
    if (me.rank() == 0) {
      for (int i = 0; i < 50; ++i) {
        channel->Send(RankId(1), OutgoingFrame::Own(Header(FrameType::kControl), Payload(1, 4096)));
      }
      channel->Send(RankId(1), OutgoingFrame::Own(Header(FrameType::kKv), Payload(2, 4 * kMiB)));
    } else {
      me.Until(
          *channel, [&] { return got == 51; }, "frames sent before Close are missing");
    }
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(Ucx, ClosePeerCancelsPendingSendsAtOnce) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    bool met = false;
    channel->SetFrameHandler([&](const FrameHeader&, std::span<const std::byte>) { met = true; });
    channel->Send(RankId(1 - me.rank()), {Header(FrameType::kHeartbeat), {}, {}});
    me.Until(
        *channel, [&] { return met; }, "no frame");
    me.Barrier(channel.get());
    if (me.rank() == 1) {  // hangs: does not progress, then dies
      std::this_thread::sleep_for(milliseconds(700));
      raise(SIGKILL);
    }
    const auto payload = Payload(1, 16 * kMiB);
    int done = 0, lost = 0;
    channel->SetPeerLostHandler([&](RankId, const std::string&) { ++lost; });
    for (int i = 0; i < 4; ++i) {
      channel->Send(RankId(1), {Header(FrameType::kKv), payload, [&] { ++done; }});
    }
    for (int i = 0; i < 100; ++i) channel->Progress();
    me.Require(done < 4, "a hung peer has received everything");
    const auto start = steady_clock::now();
    channel->ClosePeer(RankId(1));
    me.Until(
        *channel, [&] { return done == 4; }, "pending sends did not end");
    me.Require(steady_clock::now() - start < milliseconds(500), "cancelling took too long");
    me.Require(channel->PendingBytes(RankId(1)) == 0, "bytes still pending");
    me.Require(lost == 0, "reported a peer that we closed");
    channel->Send(RankId(1), {Header(FrameType::kKv), payload, [&] { ++done; }});
    me.Until(
        *channel, [&] { return done == 5; }, "a send to a lost peer did not end");
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body, {1}), "");
}

TEST(UcxTcp, AKilledPeerIsLostAndTheOthersGoOn) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    uint64_t got = 0;
    std::map<int32_t, int> lost;
    channel->SetFrameHandler([&](const FrameHeader&, std::span<const std::byte>) { ++got; });
    channel->SetPeerLostHandler([&](RankId r, const std::string&) { ++lost[r.value]; });
    for (int32_t to = 0; to < 3; ++to) {
      if (to != me.rank()) channel->Send(RankId(to), {Header(FrameType::kHeartbeat), {}, {}});
    }
    me.Until(
        *channel, [&] { return got == 2; }, "no frames");
    me.Barrier(channel.get());
    if (me.rank() == 2) raise(SIGKILL);
    // Rank 0 has a large send under way, rank 1 is idle.
    const auto payload = Payload(1, 16 * kMiB);
    int done = 0;
    if (me.rank() == 0) {
      channel->Send(RankId(2), {Header(FrameType::kKv), payload, [&] { ++done; }});
    }
    const auto start = steady_clock::now();
    me.Until(
        *channel, [&] { return lost.count(2) == 1; }, "the dead rank was not noticed");
    me.Require(steady_clock::now() - start < milliseconds(5000), "noticed too late");
    if (me.rank() == 0)
      me.Until(
          *channel, [&] { return done == 1; }, "its send did not end");
    me.Require(channel->peer_state(RankId(2)) == PeerState::kLost, "not marked lost");
    me.Require(channel->peer_state(RankId(1 - me.rank())) == PeerState::kConnected, "both lost");
    channel->Send(RankId(1 - me.rank()),
                  OutgoingFrame::Own(Header(FrameType::kKv), Payload(3, 2 * kMiB)));
    me.Until(
        *channel, [&] { return got == 3; }, "survivors do not hear each other");
    me.Require(lost == std::map<int32_t, int>{{2, 1}}, "reported more than once");
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(3, kTcp.environment, body, {2}), "");
}

}  // namespace
}  // namespace passel::transport
