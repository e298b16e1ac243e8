// Frames whose pieces lie in shared memory, between real processes.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/transport/forked_ranks.h"
#include "tests/transport/shared_frames.h"
#include "tests/transport/ucx_ways.h"

namespace passel::transport {
namespace {

using std::chrono::steady_clock;
// Memory of one frame at a time, its first area ordinary and the others shared.
class Slot {
 public:
  Slot(size_t ordinary_bytes, std::vector<std::span<std::byte>> shared)
      : ordinary_(ordinary_bytes), areas_(std::move(shared)) {
    areas_.insert(areas_.begin(), std::span(ordinary_));
  }
  Slot(const Slot&) = delete;
  Slot(Slot&&) = default;

  // Writes Payload(seed) into random pieces of the areas. The first piece is ordinary; some of the
  // others are empty, and some end where their area does.
  OutgoingFrame Fill(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<std::span<std::byte>> left = areas_;
    std::vector<std::span<std::byte>> pieces;
    size_t bytes = 0;
    for (size_t count = 2 + random() % 12; pieces.size() < count;) {
      auto& area = left[pieces.empty() ? 0 : random() % left.size()];
      const size_t kind = random() % 4;
      const size_t size = pieces.empty() ? 1 + random() % 2000
                          : kind == 0    ? 0
                          : kind == 1    ? area.size()
                                         : random() % (area.size() / 2 + 1);
      pieces.push_back(area.first(size));
      area = area.subspan(size);
      bytes += size;
    }
    const auto content = Payload(seed, bytes);
    auto from = content.begin();
    for (const auto& piece : pieces) {
      std::copy_n(from, piece.size(), piece.begin());
      from += static_cast<ptrdiff_t>(piece.size());
    }
    OutgoingFrame frame{Header(FrameType::kKv, static_cast<uint32_t>(bytes), seed), pieces[0]};
    frame.pieces.assign(pieces.begin() + 1, pieces.end());
    return frame;
  }
  void Spoil() {
    for (const auto& area : areas_) std::fill(area.begin(), area.end(), std::byte{0xee});
  }

 private:
  std::vector<std::byte> ordinary_;
  std::vector<std::span<std::byte>> areas_;
};

// The `index`-th of `count` parts.
std::span<std::byte> PartOf(std::span<std::byte> all, size_t index, size_t count) {
  const size_t begin = all.size() * index / count;
  return all.subspan(begin, all.size() * (index + 1) / count - begin);
}

std::string NameOf(const testing::TestParamInfo<Way>& way) { return way.param.name; }

class UcxSharingWays : public testing::TestWithParam<Way> {};
INSTANTIATE_TEST_SUITE_P(Ways, UcxSharingWays, testing::Values(kTcp, kMemory, kSysv), NameOf);
// Where peers fetch.
class UcxFetching : public testing::TestWithParam<Way> {};
INSTANTIATE_TEST_SUITE_P(Ways, UcxFetching, testing::Values(kMemory, kSysv), NameOf);

TEST_P(UcxSharingWays, PiecesHereAndThereArriveBeforeTheirMemoryIsWrittenAgain) {
  const bool fetched = GetParam().described != kTcp.described;
  const auto body = [&](ForkedRank& me) {
    constexpr uint64_t kFrames = 300;  // to each
    constexpr size_t kSlots = 6;       // for each
    const RankId peers[] = {RankId((me.rank() + 1) % 3), RankId((me.rank() + 2) % 3)};
    std::vector<Memory> memory;
    std::vector<Slot> slots;
    std::vector<uint64_t> sent(2), runs(2 * kFrames);
    std::set<uint64_t> got;
    std::function<void(size_t)> send;
    auto channel = me.Start(kNonce);

    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte> p) {
      me.Require(reinterpret_cast<uintptr_t>(p.data()) % 16 == 0, "payload not aligned");
      if (h.type == FrameType::kControl) return;
      const auto expected = Payload(h.step, h.count);
      me.Require(p.size() == expected.size(), "payload of a wrong size");
      me.Require(std::memcmp(p.data(), expected.data(), p.size()) == 0, "payload differs");
      me.Require(got.insert(h.step).second, "a frame came twice");
    });
    // The last of them is for one peer only.
    memory.push_back(channel->ShareMemory(kMiB, peers));
    memory.push_back(channel->ShareMemory(300'000, peers));
    memory.push_back(channel->ShareMemory(kMiB + 4321, std::span(peers).first(1)));
    for (const Memory& m : memory) me.Require(m != nullptr, "no shared memory");
    me.Require(memory[2]->bytes().size() == kMiB + 4321, "shared memory of a wrong size");
    for (const RankId peer : peers) {
      if (fetched) SendUntilReferred(*channel, peer, memory[0]);
    }
    // In some, more may be ordinary than travels with a referral.
    for (size_t i = 0; i < 2 * kSlots; ++i) {
      std::vector<std::span<std::byte>> shared;
      for (const Memory& m : memory) shared.push_back(PartOf(m->bytes(), i, 2 * kSlots));
      slots.emplace_back(i % 3 == 0 ? 80'000 : 40'000, std::move(shared));
    }
    send = [&](size_t slot) {
      const size_t to = slot / kSlots;
      if (sent[to] == kFrames) return;
      const size_t frame_of_all = to * kFrames + sent[to]++;
      auto frame = slots[slot].Fill(static_cast<uint64_t>(me.rank()) * 1'000'000 + frame_of_all);
      frame.done = [&, slot, frame_of_all] {
        ++runs[frame_of_all];
        slots[slot].Spoil();
        send(slot);
      };
      channel->Send(peers[to], std::move(frame));
    };
    for (size_t i = 0; i < slots.size(); ++i) send(i);

    const auto all_done = [&] {
      return std::all_of(runs.begin(), runs.end(), [](uint64_t n) { return n > 0; });
    };
    me.Until(
        *channel, [&] { return got.size() == 2 * kFrames && all_done(); }, "frames are missing");
    me.Barrier(channel.get());
    me.Require(std::count(runs.begin(), runs.end(), 1u) == 2 * kFrames, "done ran twice");
    for (const RankId peer : peers) {
      me.Require(channel->PendingBytes(peer) == 0, "bytes still pending");
    }
    const ChannelStats& s = channel->stats();
    me.Require(fetched ? s.frames_referred > kFrames : s.frames_referred == 0,
               "referred: " + std::to_string(s.frames_referred));
    me.Require(s.dropped_malformed + s.dropped_nonce + s.dropped_epoch + s.dropped_overflow == 0,
               "frames dropped");
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(3, GetParam().environment, body), "");
}

// What a handler keeps stays as it was sent, whatever else comes, and its sender waits until
// another thread has let go of it.
TEST_P(UcxSharingWays, KeptPiecesStayUntilTheyAreReleased) {
  const bool fetched = GetParam().described != kTcp.described;
  const auto body = [&](ForkedRank& me) {
    // In shared memory; and whole, in a message of UCX's and of more than that.
    constexpr size_t kKinds = 3, kSizes[kKinds] = {50'000, 100, 200'000};
    constexpr uint64_t kRounds = 40, kFrames = kRounds * kKinds, kAtOnce = 12;
    struct Kept {
      uint64_t seed;
      size_t bytes;
      std::vector<std::span<const std::byte>> pieces;
      std::shared_ptr<const void> memory;
    };
    std::vector<Kept> kept;
    uint64_t got = 0, done = 0, released = 0;
    std::atomic<uint64_t> checked = 0, wrong = 0;
    Memory memory;
    auto channel = me.Start(kNonce);
    channel->SetFrameHandler([&](const FrameHeader& h, IncomingPayload& p) {
      if (h.type == FrameType::kHeartbeat) released = h.step;
      if (h.type != FrameType::kKv) return;
      Kept& k = kept.emplace_back(Kept{h.step, h.count, {}, p.Keep()});
      k.pieces.assign(p.pieces().begin(), p.pieces().end());
      ++got;
    });
    if (me.rank() == 0) {
      memory = channel->ShareMemory(kRounds * kSizes[0], std::vector{RankId(1)});
      if (fetched) SendUntilReferred(*channel, RankId(1), memory);
      std::vector<std::vector<std::byte>> contents;
      for (uint64_t i = 0; i < kFrames; ++i) contents.push_back(Payload(i, kSizes[i % kKinds]));
      for (uint64_t i = 0; i < kFrames; ++i) {
        FrameHeader h = Header(FrameType::kKv, static_cast<uint32_t>(contents[i].size()), i);
        OutgoingFrame frame{h, contents[i], [&] { ++done; }};
        if (i % kKinds == 0) {
          const auto part = PartOf(memory->bytes(), i / kKinds, kRounds);
          std::copy(contents[i].begin(), contents[i].end(), part.begin());
          frame.payload = {};
          frame.pieces = {part.first(30'000), part.subspan(30'000)};
          frame.done = [&, part] {
            std::fill(part.begin(), part.end(), std::byte{0xee});
            ++done;
          };
        }
        channel->Send(RankId(1), std::move(frame));
      }
      me.Until(
          *channel,
          [&] {
            // Of those in shared memory, none is through that was not released.
            me.Require(!fetched || done <= released + kFrames - kRounds, "done too early");
            return done == kFrames;
          },
          "sends do not end");
    } else {
      while (checked < kFrames) {
        me.Until(
            *channel, [&] { return got >= std::min(kFrames, checked + kAtOnce); }, "none comes");
        std::thread other([&, taken = std::exchange(kept, {})]() mutable {
          for (Kept& k : taken) {
            const auto expected = Payload(k.seed, k.bytes);
            std::vector<std::byte> all;
            for (const auto& piece : k.pieces) all.insert(all.end(), piece.begin(), piece.end());
            wrong += all != expected;
            ++checked;
            k.memory.reset();
          }
        });
        other.join();
        channel->Send(RankId(0), {Header(FrameType::kHeartbeat, 0, checked), {}});
      }
      me.Require(wrong == 0, "kept pieces differ");
    }
    me.Barrier(channel.get());
    const ChannelStats& s = channel->stats();
    me.Require(s.dropped_malformed + s.dropped_overflow == 0, "frames dropped");
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(UcxFetching, ReferralsOfMoreThanReceiveMemoryArrive) {
  const auto body = [](ForkedRank& me) {
    constexpr uint64_t kFrames = 12, kBytes = 9 * kMiB;
    const auto content = Payload(7, kBytes);
    Memory memory;
    uint64_t got = 0, done = 0;
    auto channel = me.Start(kNonce, {.self = RankId(me.rank()), .max_receive_bytes = 16 * kMiB});
    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte> p) {
      if (h.type == FrameType::kControl) return;
      me.Require(std::equal(p.begin(), p.end(), content.begin(), content.end()), "differs");
      ++got;
    });
    if (me.rank() == 0) {
      memory = channel->ShareMemory(kBytes, std::vector{RankId(1)});
      std::copy(content.begin(), content.end(), memory->bytes().begin());
      SendUntilReferred(*channel, RankId(1), memory);
      const uint64_t before = channel->stats().frames_referred;
      for (uint64_t i = 0; i < kFrames; ++i) {
        channel->Send(RankId(1), {Header(FrameType::kKv), {}, [&] { ++done; }, {memory->bytes()}});
      }
      me.Until(
          *channel, [&] { return done == kFrames; }, "sends do not end");
      me.Require(channel->stats().frames_referred == before + kFrames, "not referred");
    } else {
      me.Until(
          *channel, [&] { return got == kFrames; }, "frames are missing");
    }
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

// Both close with a frame under way that the other has yet to fetch.
TEST_P(UcxFetching, RanksThatCloseDoNotWaitForEachOther) {
  const auto body = [](ForkedRank& me) {
    auto channel = me.Start(kNonce);
    const RankId other(1 - me.rank());
    const Memory memory = channel->ShareMemory(65536, std::vector{other});
    SendUntilReferred(*channel, other, memory);
    me.Barrier(channel.get());
    int done = 0;
    channel->Send(other, {Header(FrameType::kKv), {}, [&] { ++done; }, {memory->bytes()}});
    const auto start = steady_clock::now();
    channel->Close(kCloseTimeout);
    me.Require(steady_clock::now() - start < kCloseTimeout / 2, "Close waited for its time-out");
    me.Require(done == 1, "the send did not end");
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(UcxSharingWays, MemoryIsReleasedAndSharedAnewAndOutlivesTheChannel) {
  const bool fetched = GetParam().described != kTcp.described;
  const auto body = [&](ForkedRank& me) {
    constexpr uint64_t kRounds = 90, kFrames = 3;  // more rounds than regions that a peer reads
    Memory memory, before;
    uint64_t answers = 0, done = 0, sent = 0;
    auto channel = me.Start(kNonce);
    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte> p) {
      if (h.type == FrameType::kHeartbeat) {
        ++answers;
        return;
      }
      const auto expected = Payload(h.step, h.count);
      me.Require(std::equal(p.begin(), p.end(), expected.begin(), expected.end()), "differs");
      channel->Send(RankId(0), {Header(FrameType::kHeartbeat), {}, {}});
    });
    for (uint64_t round = 0; round < kRounds && me.rank() == 0; ++round) {
      const size_t bytes = round % 2 == 0 ? 50'000 : 300'000;
      // Two exist at a time.
      before = std::exchange(memory, channel->ShareMemory(bytes, std::vector{RankId(1)}));
      me.Require(memory != nullptr, "no shared memory");
      for (uint64_t i = 0; i < kFrames; ++i) {
        const auto content = Payload(++sent, bytes + 10);
        std::copy_n(content.begin(), bytes, memory->bytes().begin());
        channel->Send(RankId(1), {Header(FrameType::kKv, static_cast<uint32_t>(bytes) + 10, sent),
                                  {},
                                  [&] { ++done; },
                                  {memory->bytes(), std::span(content).last(10)}});
        // A frame that was answered came behind the answer to the offer.
        me.Until(
            *channel, [&] { return answers == sent && done == sent; }, "a frame is missing");
      }
    }
    me.Barrier(channel.get());
    const ChannelStats& s = channel->stats();
    if (me.rank() == 0) {
      me.Require(s.frames_sent == sent, "frames counted wrongly");
      me.Require(fetched ? s.frames_referred > kRounds : s.frames_referred == 0,
                 "referred: " + std::to_string(s.frames_referred));
    }
    channel->Close(kCloseTimeout);
    channel.reset();
    for (Memory* left : {&before, &memory}) {
      if (*left == nullptr) continue;
      const auto bytes = (*left)->bytes();
      std::fill(bytes.begin(), bytes.end(), std::byte{1});
      me.Require(std::count(bytes.begin(), bytes.end(), std::byte{1}) == ssize_t(bytes.size()),
                 "the memory is gone");
      left->reset();
    }
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

TEST_P(UcxFetching, ReferralsOfAnotherEpochAreDroppedCountedAndEnd) {
  const auto body = [](ForkedRank& me) {
    constexpr uint64_t kFrames = 20, kBytes = 200'000;
    Memory memory;
    uint64_t got = 0, done = 0;
    auto channel = me.Start(kNonce);
    channel->SetEpoch(me.rank() == 0 ? 5 : 6);
    channel->SetFrameHandler([&](const FrameHeader& h, std::span<const std::byte> p) {
      if (h.type == FrameType::kControl) return;
      const auto expected = Payload(h.step, kBytes);
      me.Require(h.epoch == 6, "a frame of another epoch was delivered");
      me.Require(std::equal(p.begin(), p.end(), expected.begin(), expected.end()), "differs");
      ++got;
    });
    const ChannelStats& s = channel->stats();
    if (me.rank() == 0) {
      const auto content = Payload(3, kBytes);
      memory = channel->ShareMemory(kBytes, std::vector{RankId(1)});
      std::copy(content.begin(), content.end(), memory->bytes().begin());
      SendUntilReferred(*channel, RankId(1), memory);
      const uint64_t before = s.frames_referred;
      for (const uint64_t frames : {kFrames, 2 * kFrames}) {
        while (channel->PendingBytes(RankId(1)) < kFrames * kBytes) {
          channel->Send(RankId(1),
                        {Header(FrameType::kKv, 0, 3), {}, [&] { ++done; }, {memory->bytes()}});
        }
        me.Until(
            *channel, [&] { return done == frames; }, "dropped frames do not end");
        me.Require(s.frames_referred == before + frames, "not referred");
        channel->SetEpoch(6);
      }
    } else {
      me.Until(
          *channel, [&] { return got == kFrames; }, "frames are missing");
      me.Require(s.dropped_epoch == kFrames, "drops not counted");
      me.Require(s.dropped_malformed == 0, "counted as something else");
    }
    me.Barrier(channel.get());
    channel->Close(kCloseTimeout);
  };
  EXPECT_EQ(RunForked(2, GetParam().environment, body), "");
}

}  // namespace
}  // namespace passel::transport
