// Peers that are referred to shared memory and never say that they have read it.

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/transport/forked_ranks.h"
#include "tests/transport/shared_frames.h"
#include "tests/transport/ucx_ways.h"

namespace passel::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

class UcxUnanswered : public testing::TestWithParam<Way> {};
INSTANTIATE_TEST_SUITE_P(Ways, UcxUnanswered, testing::Values(kMemory, kSysv),
                         [](const auto& way) { return std::string(way.param.name); });

// Rank 0 refers frames to rank 1, which no longer progresses, or is dead, and so never answers.
enum class Peer { kHangs, kIsKilled };
enum class End { kClosePeer, kClose };
std::string NeverAnswered(const Way& way, Peer peer, End end) {
  const auto body = [&](ForkedRank& me) {
    constexpr int kFrames = 200;  // more than UCX queues for one that does not read
    constexpr uint64_t kBytes = 65536;
    Memory memory;
    int done = 0, lost = 0;
    auto channel = me.Start(kNonce);
    channel->SetPeerLostHandler([&](RankId, const std::string&) { ++lost; });
    const pid_t pid = getpid();
    const auto* begin = reinterpret_cast<const std::byte*>(&pid);
    const auto pids = me.Exchange({begin, begin + sizeof pid}, nullptr);
    if (me.rank() == 0) {
      memory = channel->ShareMemory(kBytes, std::vector{RankId(1)});
      SendUntilReferred(*channel, RankId(1), memory);
    }
    me.Barrier(channel.get());
    me.Barrier(nullptr);  // rank 1 no longer looks when rank 0 begins
    if (me.rank() == 1) {
      std::this_thread::sleep_for(std::chrono::seconds(20));
      raise(SIGKILL);
    }
    pid_t other = 0;
    std::memcpy(&other, pids.at(1).data(), sizeof other);

    const auto send = [&] {
      channel->Send(RankId(1), {Header(FrameType::kKv), {}, [&] { ++done; }, {memory->bytes()}});
    };
    for (int i = 0; i < kFrames; ++i) send();
    for (int i = 0; i < 2000; ++i) channel->Progress();
    me.Require(done == 0, "done ran before the peer has read");
    me.Require(channel->PendingBytes(RankId(1)) == kFrames * (kFrameHeaderBytes + kBytes),
               "bytes not pending");
    if (peer == Peer::kIsKilled) {
      kill(other, SIGKILL);
      std::this_thread::sleep_for(milliseconds(100));
      for (int i = 0; i < 2000; ++i) channel->Progress();
    }
    auto start = steady_clock::now();
    const auto took = [&](milliseconds most) {
      return std::exchange(start, steady_clock::now()) + most < start;
    };
    if (end == End::kClosePeer) {
      channel->ClosePeer(RankId(1));
      me.Until(
          *channel, [&] { return done == kFrames; }, "pending sends did not end");
      me.Require(!took(milliseconds(500)), "cancelling took too long");
      me.Require(channel->PendingBytes(RankId(1)) == 0, "bytes still pending");
      me.Require(peer == Peer::kIsKilled || lost == 0, "reported a peer that we closed");
      send();
      me.Until(
          *channel, [&] { return done == kFrames + 1; }, "a send to a lost peer did not end");
      channel->Close(kCloseTimeout);
      me.Require(!took(milliseconds(1500)), "Close waited for a closed peer");
    } else {
      channel->Close(milliseconds(300));
      me.Require(!took(milliseconds(1500)), "Close took too long");
      me.Require(done == kFrames, "Close left sends");
    }
    me.Require(done == kFrames + (end == End::kClosePeer), "done ran twice");
    kill(other, SIGKILL);
  };
  return RunForked(2, way.environment, body, {1});
}

TEST_P(UcxUnanswered, ClosePeerEndsReferralsToAHungPeerAtOnce) {
  EXPECT_EQ(NeverAnswered(GetParam(), Peer::kHangs, End::kClosePeer), "");
}
TEST_P(UcxUnanswered, ClosePeerEndsReferralsToAKilledPeer) {
  EXPECT_EQ(NeverAnswered(GetParam(), Peer::kIsKilled, End::kClosePeer), "");
}
TEST_P(UcxUnanswered, CloseEndsReferralsToAHungPeerInItsTime) {
  EXPECT_EQ(NeverAnswered(GetParam(), Peer::kHangs, End::kClose), "");
}
TEST_P(UcxUnanswered, CloseEndsReferralsToAKilledPeerInItsTime) {
  EXPECT_EQ(NeverAnswered(GetParam(), Peer::kIsKilled, End::kClose), "");
}

}  // namespace
}  // namespace passel::transport
