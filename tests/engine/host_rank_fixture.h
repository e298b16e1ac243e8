#pragma once

#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "runtime/engine/host_rank.h"
#include "tests/cluster/joined.h"
#include "tests/engine/host_threads.h"
#include "tests/host_attention/reference.h"

namespace passel::engine {

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
  Frame ReadFrame(uint64_t step, const std::vector<cluster::ReadKvEntry>& entries) const {
    Frame f;
    f.payload = cluster::BuildReadKv(shape_, entries);
    f.header.type = FrameType::kReadKv;
    f.header.count = static_cast<uint32_t>(entries.size());
    f.header.step = step;
    f.header.part = 5;
    return f;
  }
  // Replies to reads of this step that came.
  std::vector<const Frame*> RowsOf(uint64_t step) const {
    std::vector<const Frame*> out;
    for (const Frame& f : got_) {
      if (f.header.type == FrameType::kKvRows && f.header.step == step) out.push_back(&f);
    }
    return out;
  }
  // The reply to the read of this step must be there (or come), once; with these rows, or none
  // where the status is not kOk.
  void ExpectRows(uint64_t step, const std::vector<cluster::ReadKvEntry>& entries,
                  host::Status status = host::Status::kOk) {
    Pump([&] { return !RowsOf(step).empty(); });
    if (HasFatalFailure()) return;
    const Frame& f = *RowsOf(step)[0];
    EXPECT_EQ(f.header.part, 5u);
    const std::span<const std::byte> payload(f.payload);
    std::string why;
    const auto views = cluster::ParseKvRows(shape_, f.header.count, {&payload, 1}, &why);
    ASSERT_TRUE(views) << why;
    ASSERT_EQ(views->size(), entries.size());
    const size_t row = 2 * size_t{shape_.head_dim};
    for (size_t i = 0; i < entries.size(); ++i) {
      const auto& [e, rows] = (*views)[i];
      EXPECT_EQ(e.request, entries[i].request);
      EXPECT_EQ(e.first_token, entries[i].first_token);
      EXPECT_EQ(e.kv_head, entries[i].kv_head);
      EXPECT_EQ(e.count, entries[i].count);
      EXPECT_EQ(e.status, static_cast<uint32_t>(status));
      if (status != host::Status::kOk) continue;
      ASSERT_EQ(rows.size(), e.count * row);
      EXPECT_EQ(std::memcmp(rows.data(), &data_.rows[e.first_token * row], rows.size_bytes()), 0);
    }
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

}  // namespace passel::engine
