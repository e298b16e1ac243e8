#include "runtime/engine/host_rank.h"

#include <gtest/gtest.h>

#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "runtime/base/random.h"
#include "tests/engine/host_rank_fixture.h"

namespace passel::engine {
namespace {

TEST_F(HostRankTest, AnswersAQuery) {
  Fill(1);
  Send(QueryFrame(1, 3));
  ExpectAnswer(3);
  EXPECT_EQ(Sync(), 0u);
}

TEST_F(HostRankTest, TokensMayComeInAnyOrderAndTwice) {
  Send(OpenFrame(1));
  Send(MeanFrame(1));
  Send(QueryFrame(1, 3));
  std::vector<Frame> frames = KvFrames(1);
  ASSERT_EQ(frames.size(), 2u);
  // Within one segment too: the second half first.
  const cluster::KvEntry* entry = reinterpret_cast<cluster::KvEntry*>(frames[0].payload.data());
  const uint32_t half = entry->count / 2;
  for (const uint32_t first : {half, 0u}) {
    const uint32_t count = first == 0 ? half : entry->count - half;
    const Frame f = KvFrame(1, first, count);
    Send(f);
    Send(f);
    Send(frames[1]);
  }
  ExpectAnswer(3);
  EXPECT_EQ(Sync(), 0u);
}

TEST_F(HostRankTest, RefusesWhatDoesNotFitAndSaysWhy) {
  using cluster::proto::Control;
  uint64_t request = 1;
  size_t refused = 0;
  for (; request < 2000 && refused == 0; ++request) {
    Send(OpenFrame(request));
    Pump([&] { return Replies(Control::kOpenReply).size() >= request; });
    ASSERT_FALSE(HasFatalFailure());
    const Control last = Replies(Control::kOpenReply).back();
    const auto& reply = last.open_reply();
    if (!reply.accepted()) {
      EXPECT_NE(reply.reason().find("budget"), std::string::npos) << reply.reason();
      ++refused;
    }
  }
  ASSERT_EQ(refused, 1u);
  Control release;
  release.mutable_release()->set_request(1);
  Send(ControlFrame(release));
  Fill(5000);
  Send(QueryFrame(5000, 1));
  ExpectAnswer(1);
}

// Mutations of every kind of valid frame: nothing crashes, and a good query is answered right.
TEST_F(HostRankTest, HostileFramesDoNoHarm) {
  using cluster::proto::Control;
  Fill(1);
  Control release, odd;
  release.mutable_release()->set_request(77);
  odd.mutable_stats_reply()->set_kv_bytes(1);
  std::vector<Frame> valid = KvFrames(1);
  for (const Frame& f : {MeanFrame(1), QueryFrame(1, 7), OpenFrame(2), ControlFrame(release),
                         ControlFrame(odd), ReadFrame(7, {{1, 0, 0, 9, 0}, {1, 200, 0, 1, 0}})}) {
    valid.push_back(f);
  }
  Random random(11);
  const uint64_t numbers[] = {0, 1, 2, 255, 65535, 65536, 0x7fffffff, 0x80000000, 0xffffffff};
  constexpr FrameType kTypes[] = {FrameType::kQuery,   FrameType::kPartial, FrameType::kKv,
                                  FrameType::kKeyMean, FrameType::kControl, FrameType::kReadKv,
                                  FrameType::kKvRows};
  constexpr int kRounds = 12000;
  for (int round = 0; round < kRounds; ++round) {
    Frame f = valid[random.Next() % valid.size()];
    const size_t fields = std::min<size_t>(f.payload.size() / 4, 12);
    for (uint64_t i = 0; i <= random.Next() % 3; ++i) {
      const uint64_t what = random.Next() % 8;
      if (what == 0) f.header.layer = static_cast<uint16_t>(random.Next());
      if (what == 1) f.header.count = static_cast<uint32_t>(numbers[random.Next() % 9]);
      if (what == 2) f.header.micro_batch = static_cast<uint16_t>(random.Next());
      if (what == 3) f.header.type = kTypes[random.Next() % std::size(kTypes)];
      if (what == 4) f.payload.resize(random.Next() % (f.payload.size() + 64));
      if (what == 5 && fields > 0) {  // a field of the entry
        const auto number = static_cast<uint32_t>(numbers[random.Next() % 9]);
        const size_t at = random.Next() % fields * 4;
        if (at + 4 <= f.payload.size()) std::memcpy(f.payload.data() + at, &number, 4);
      }
      if (what >= 6 && !f.payload.empty()) {
        f.payload[random.Next() % f.payload.size()] =
            std::byte(static_cast<uint8_t>(random.Next()));
      }
    }
    Control message;
    if (f.header.type == FrameType::kControl &&
        message.ParseFromArray(f.payload.data(), static_cast<int>(f.payload.size())) &&
        message.has_shutdown()) {
      continue;  // obeying it would be right
    }
    f.header.step = 1000000;
    Send(f);
    if (round % 200 == 0) Sync();
    ASSERT_FALSE(HasFatalFailure()) << "round " << round;
  }
  EXPECT_GT(Sync(), uint64_t{kRounds} / 4);
  // What the frames opened goes, so that there is room.
  for (const Control& c : Replies(Control::kOpenReply)) {
    Control message;
    message.mutable_release()->set_request(c.open_reply().request());
    Send(ControlFrame(message));
  }
  constexpr uint64_t kFresh = 0x123456789abc;
  Fill(kFresh);
  Send(QueryFrame(kFresh, 9));
  ExpectAnswer(9);
  Send(ReadFrame(9, {{kFresh, 30, 0, 99, 0}}));
  ExpectRows(9, {{kFresh, 30, 0, 99, 0}});
}

TEST_F(HostRankTest, CodesWithBitsBeyondKAreRefused) {
  Send(OpenFrame(1));
  Frame f = KvFrames(1)[0];
  f.payload.back() = std::byte{0xff};
  f.payload[f.payload.size() - 2] = std::byte{0xff};
  Send(f);
  EXPECT_EQ(Sync(), 1u);
  // Those of queries are looked at where they are used.
  Fill(2);
  Frame query = QueryFrame(2, 5);
  query.payload.back() = std::byte{0xff};
  query.payload[query.payload.size() - 2] = std::byte{0xff};
  Send(query);
  uint64_t dropped = 0;
  Pump([&] { return (dropped = Sync()) > 1; });
  EXPECT_EQ(dropped, 2u);
  Send(QueryFrame(2, 6));
  ExpectAnswer(6);
}

}  // namespace
}  // namespace passel::engine
