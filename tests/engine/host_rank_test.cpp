#include "runtime/engine/host_rank.h"

#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <vector>

#include "runtime/base/random.h"
#include "tests/cluster/joined.h"
#include "tests/engine/host_threads.h"
#include "tests/host_attention/reference.h"

namespace passel::engine {
namespace {

using std::chrono::milliseconds;
using transport::FrameHeader;
using transport::FrameType;

struct Frame {
  FrameHeader header;
  std::vector<std::byte> payload;
};

// One LSH host rank, and rank 0's raw end of the wire.
class HostRankTest : public testing::Test {
 protected:
  static constexpr uint64_t kPrompt = 320;

  HostRankTest()
      : hosts_({.settings = {"attention.k=6", "attention.l=16", "attention.exact_below=0",
                             "attention.no_dense_layers=true", "attention.window=16",
                             "host.block_tokens=256", "host.threads=1"}},
               {}),
        shape_(hosts_.job().wire_shape()),
        tokens_(hosts_.job().Offloaded(kPrompt)),
        data_(host::reference::WithBf16Queries(
            host::reference::MakeData(1, tokens_, shape_.head_dim, shape_.group))),
        codes_(host::reference::Hash(data_, hosts_.job().config.attention().seed(), Bits(),
                                     shape_.l)) {
    spdlog::set_level(spdlog::level::off);  // thousands of warnings, all meant
    hosts_.channel().SetFrameHandler([this](const FrameHeader& h, std::span<const std::byte> p) {
      got_.push_back({h, {p.begin(), p.end()}});
    });
  }
  ~HostRankTest() override { spdlog::set_level(spdlog::level::info); }

  void Send(const Frame& frame) {
    hosts_.channel().Send(RankId(1), transport::OutgoingFrame::Own(frame.header, frame.payload));
  }
  void Pump(const std::function<bool()>& done) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (!done() && std::chrono::steady_clock::now() < end) {
      if (!hosts_.channel().Progress()) hosts_.channel().Wait(milliseconds(5));
    }
    ASSERT_TRUE(done()) << "no answer";
  }
  // Control messages of this kind that came, in order.
  std::vector<cluster::proto::Control> Replies(cluster::proto::Control::KindCase kind) const {
    std::vector<cluster::proto::Control> out;
    for (const Frame& f : got_) {
      cluster::proto::Control message;
      if (f.header.type == FrameType::kControl &&
          message.ParseFromArray(f.payload.data(), static_cast<int>(f.payload.size())) &&
          message.kind_case() == kind) {
        out.push_back(message);
      }
    }
    return out;
  }
  // Waits until the host has been through all that was sent; how many frames it has dropped.
  uint64_t Sync() {
    using cluster::proto::Control;
    const size_t before = Replies(Control::kStatsReply).size();
    Control query;
    query.mutable_stats_query();
    hosts_.SendControl(RankId(1), query);
    Pump([&] { return Replies(Control::kStatsReply).size() > before; });
    return Replies(Control::kStatsReply).back().stats_reply().dropped_frames();
  }

  static Frame ControlFrame(const cluster::proto::Control& message) {
    Frame f;
    f.header.type = FrameType::kControl;
    f.header.count = 1;
    f.payload.resize(message.ByteSizeLong());
    message.SerializeToArray(f.payload.data(), static_cast<int>(f.payload.size()));
    return f;
  }
  static Frame OpenFrame(uint64_t request) {
    cluster::proto::Control message;
    auto& open = *message.mutable_open();
    open.set_request(request);
    open.set_prompt_tokens(kPrompt);
    open.set_max_tokens(20);
    open.set_mode(static_cast<uint32_t>(cluster::PlacementMode::kRequest));
    return ControlFrame(message);
  }
  uint32_t Bits() const { return hosts_.job().config.attention().k(); }
  // Frames that bring the tokens of KV head 0, layer 0.
  std::vector<Frame> KvFrames(uint64_t request) const {
    std::vector<Frame> out;
    for (const host::SegmentSpec& s : hosts_.job().Segments(kPrompt, 20)) {
      if (!s.prompt) continue;
      out.push_back(KvFrame(request, s.first_token, static_cast<uint32_t>(s.capacity)));
    }
    return out;
  }
  Frame KvFrame(uint64_t request, uint64_t first, uint32_t count) const {
    const cluster::KvEntry entry{request, first, 0, count, 1, 0};
    const cluster::KvSource source{&data_.rows[first * 2 * shape_.head_dim],
                                   &codes_.keys[first * shape_.l]};
    cluster::Pieces pieces;
    Frame f;
    auto entries = cluster::BuildKv(shape_, {&entry, 1}, {&source, 1}, &pieces);
    f.payload = cluster::Joined(std::move(entries), pieces);
    f.header.type = FrameType::kKv;
    f.header.count = 1;
    return f;
  }
  Frame MeanFrame(uint64_t request) const {
    const cluster::KeyMeanEntry entry{request, 0, 0};
    std::vector<std::span<float>> spaces;
    Frame f;
    f.payload = cluster::BuildKeyMean(shape_, {&entry, 1}, &spaces);
    std::copy(data_.mean.begin(), data_.mean.end(), spaces[0].begin());
    f.header.type = FrameType::kKeyMean;
    f.header.count = 1;
    return f;
  }
  Frame QueryFrame(uint64_t request, uint64_t step) const {
    const cluster::QueryEntry entry{request, tokens_, 0, 1, 0, 0};
    std::vector<bf16> q;
    std::ranges::transform(data_.q, std::back_inserter(q), ToBf16);
    const cluster::QuerySource source{q.data(), codes_.queries.data()};
    cluster::Pieces pieces;
    Frame f;
    auto entries = cluster::BuildQuery(shape_, {&entry, 1}, {&source, 1}, &pieces);
    f.payload = cluster::Joined(std::move(entries), pieces);
    f.header.type = FrameType::kQuery;
    f.header.count = 1;
    f.header.step = step;
    return f;
  }
  void Fill(uint64_t request) {
    Send(OpenFrame(request));
    for (const Frame& f : KvFrames(request)) Send(f);
    Send(MeanFrame(request));
  }
  // The answer to the query of this step must be there (or come), once, and be right.
  void ExpectAnswer(uint64_t step) {
    const auto answer = [&]() -> const Frame* {
      for (const Frame& f : got_) {
        if (f.header.type == FrameType::kPartial && f.header.step == step) return &f;
      }
      return nullptr;
    };
    Pump([&] { return answer() != nullptr; });
    if (HasFatalFailure()) return;
    std::string why;
    const Frame& f = *answer();
    const std::span<const std::byte> payload(f.payload);
    const auto views = cluster::ParsePartial(shape_, f.header.count, {&payload, 1}, &why);
    ASSERT_TRUE(views) << why;
    ASSERT_EQ(views->size(), 1u);
    const auto& v = (*views)[0];
    for (uint32_t g = 0; g < shape_.group; ++g) {
      const auto ids = host::reference::Sampled(codes_, g, shape_.l, 0, tokens_);
      const auto exact = host::reference::Attend(data_, g, ids, Bits(), shape_.l);
      std::vector<float> num(shape_.head_dim);
      std::ranges::transform(v.num.subspan(size_t{g} * num.size(), num.size()), num.begin(),
                             ToFloat);
      EXPECT_LT(host::reference::OutputError(exact, num.data(), v.den[g]), 3e-3);
      EXPECT_LT(host::reference::LseError(exact, v.max[g], v.den[g]), 1e-3);
    }
  }

  HostThreads hosts_;
  const cluster::WireShape shape_;
  const uint64_t tokens_;
  const host::reference::Data data_;
  const host::reference::Codes codes_;
  std::vector<Frame> got_;
};

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
  for (const Frame& f :
       {MeanFrame(1), QueryFrame(1, 7), OpenFrame(2), ControlFrame(release), ControlFrame(odd)}) {
    valid.push_back(f);
  }
  Random random(11);
  const uint64_t numbers[] = {0, 1, 2, 255, 65535, 65536, 0x7fffffff, 0x80000000, 0xffffffff};
  constexpr int kRounds = 12000;
  for (int round = 0; round < kRounds; ++round) {
    Frame f = valid[random.Next() % valid.size()];
    const size_t fields = std::min<size_t>(f.payload.size() / 4, 12);
    for (uint64_t i = 0; i <= random.Next() % 3; ++i) {
      const uint64_t what = random.Next() % 8;
      if (what == 0) f.header.layer = static_cast<uint16_t>(random.Next());
      if (what == 1) f.header.count = static_cast<uint32_t>(numbers[random.Next() % 9]);
      if (what == 2) f.header.micro_batch = static_cast<uint16_t>(random.Next());
      if (what == 3) f.header.type = static_cast<FrameType>(1 + random.Next() % 5);
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
