#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <set>
#include <vector>

#include "runtime/base/partial.h"
#include "runtime/engine/host_link.h"
#include "runtime/engine/staging_ring.h"
#include "tests/engine/host_threads.h"
#include "tests/host_attention/reference.h"

namespace passel::engine {

namespace reference = host::reference;
using cluster::PlacementMode;
using std::chrono::milliseconds;

// A model rank without a model: K, V and queries are random, answers are judged against float64.
class WireModel {
 public:
  WireModel(const JobSpec& spec, const transport::FaultPlan& faults = {})
      : spec_(spec), hosts_(spec, faults) {
    slice_.kv_heads = spec.kv_heads;
    slice_.heads = spec.kv_heads * spec.group;
    link_ = std::make_unique<HostLink>(hosts_.job(), hosts_.channel(), slice_,
                                       [this](RankId from, const cluster::proto::Control& message) {
                                         if (message.open_reply().accepted()) opened_.insert(from);
                                       });
  }

  const Job& job() const { return hosts_.job(); }
  HostLink& link() { return *link_; }
  transport::InProcessNetwork& network() { return hosts_.network(); }
  void Cut(RankId host) { hosts_.Cut(host); }

  void PumpUntil(const std::function<bool()>& done) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (!done()) {
      ASSERT_LT(std::chrono::steady_clock::now(), end) << "no answer";
      link_->Pump(milliseconds(1));
    }
  }

  // Opens a request on every host and makes its K, V: [layer · kv_heads + head].
  HostedRequest Open(uint64_t id, PlacementMode mode, uint64_t prompt, uint64_t generated) {
    HostedRequest hosted;
    hosted.request = RequestId(id);
    hosted.placement = {mode, 0, spec_.hosts, static_cast<uint32_t>(spec_.kv_heads)};
    hosted.segments = job().Segments(prompt, generated);
    cluster::proto::Control message;
    auto& open = *message.mutable_open();
    open.set_request(id);
    open.set_prompt_tokens(prompt);
    open.set_max_tokens(generated);
    open.set_mode(static_cast<uint32_t>(mode));
    opened_.clear();
    link_->SendControlToAll(message);
    PumpUntil([&] { return opened_.size() == spec_.hosts; });
    data_.clear();
    codes_.clear();
    const uint64_t all = job().Offloaded(prompt + generated);
    const config::Attention& a = job().config.attention();
    for (int32_t i = 0; i < spec_.layers * spec_.kv_heads; ++i) {
      data_.push_back(reference::WithBf16Queries(reference::MakeData(
          id * 1000 + static_cast<uint64_t>(i), all, static_cast<uint32_t>(spec_.head_dim),
          static_cast<uint32_t>(spec_.group))));
      if (job().lsh()) codes_.push_back(reference::Hash(data_.back(), a.seed(), a.k(), a.l()));
    }
    return hosted;
  }

  void SendKv(const HostedRequest& hosted, int32_t layer, uint64_t first, uint64_t count) {
    SendKv(layer, {{&hosted, first, count, 0}});
  }
  // All of the request that was opened last, whosever they are said to be; rows are set here.
  void SendKv(int32_t layer, std::vector<KvRun> runs) {
    const size_t row = 2 * static_cast<size_t>(spec_.head_dim);
    const auto heads = static_cast<size_t>(spec_.kv_heads);
    const size_t l = job().wire_shape().l;
    uint64_t rows = 0;
    for (KvRun& run : runs) {
      run.row = rows;
      rows += run.count;
    }
    // Two slots: tokens wait for those before the last to have been taken, and for no others.
    const size_t kv_bytes = rows * heads * row * sizeof(bf16);
    const size_t bytes = kv_bytes + rows * heads * l * sizeof(uint16_t);
    if (!ring_ || slot_bytes_ < bytes) {
      slot_bytes_ = bytes;
      ring_ = std::make_unique<StagingRing>(*link_, *device_, bytes, 2);
    }
    const std::shared_ptr<std::byte> slot = ring_->Take();
    std::fill_n(slot.get(), slot_bytes_, std::byte{0xff});
    auto* kv = reinterpret_cast<bf16*>(slot.get());
    auto* codes = reinterpret_cast<uint16_t*>(slot.get() + kv_bytes);
    for (const KvRun& run : runs) {
      for (size_t h = 0; h < heads; ++h) {
        const size_t at = h * rows + run.row;
        std::copy_n(&Data(layer, h).rows[run.first_token * row], run.count * row, kv + at * row);
        if (l == 0) continue;
        std::copy_n(&codes_[Index(layer, h)].keys[run.first_token * l], run.count * l,
                    codes + at * l);
      }
    }
    link_->SendKv(layer, runs, rows, kv, l > 0 ? codes : nullptr, slot);
  }

  void SendMeans(const HostedRequest& hosted) {
    for (int32_t layer = 0; layer < spec_.layers; ++layer) {
      std::vector<float> mean;
      for (size_t h = 0; h < static_cast<size_t>(spec_.kv_heads); ++h) {
        mean.insert(mean.end(), Data(layer, h).mean.begin(), Data(layer, h).mean.end());
      }
      link_->SendKeyMean(hosted, layer, mean.data());
    }
  }

  // Asks as `rows` rows of a micro-batch that all want the same.
  void Ask(const HostedRequest& hosted, int32_t layer, uint64_t step, uint64_t tokens,
           ReplyBox* box, uint32_t rows = 1) {
    const size_t l = job().wire_shape().l;
    std::vector<bf16> q;
    std::vector<uint16_t> codes;
    std::vector<QueryRow> asking;
    for (uint32_t row = 0; row < rows; ++row) {
      asking.push_back({&hosted, tokens, !job().lsh(), row});
      for (size_t h = 0; h < static_cast<size_t>(spec_.kv_heads); ++h) {
        std::ranges::transform(Data(layer, h).q, std::back_inserter(q), ToBf16);
        if (l == 0) continue;
        const auto& queries = codes_[Index(layer, h)].queries;
        codes.insert(codes.end(), queries.begin(), queries.end());
      }
    }
    plan_ = link_->Plan(asking);
    values_.resize(link_->ReplyFloats(plan_));
    box->values = values_;
    link_->SendQuery(0, layer, step, plan_, false, q.data(), codes.data(), nullptr, box);
  }

  // Merges the partials of `box` and compares every query head with float64.
  void Judge(const ReplyBox& box, int32_t layer, uint64_t tokens) {
    const auto d = static_cast<size_t>(spec_.head_dim);
    const config::Attention& a = job().config.attention();
    for (size_t h = 0; h < static_cast<size_t>(spec_.kv_heads); ++h) {
      for (size_t g = 0; g < static_cast<size_t>(spec_.group); ++g) {
        float max = 0, den = 0;
        std::vector<float> num(d);
        const PartialRef sum{&max, &den, num.data()};
        ClearPartial(sum, d);
        for (const ReceivedPartial& p : box.partials) {
          if (p.key.kv_head != h) continue;
          const auto group = static_cast<size_t>(spec_.group);
          const float* values = &box.values[p.at];
          std::vector<bf16> rounded(d);
          std::memcpy(rounded.data(), reinterpret_cast<const bf16*>(values + 2 * group) + g * d,
                      d * sizeof(bf16));
          std::vector<float> other(d);
          std::ranges::transform(rounded, other.begin(), ToFloat);
          MergePartial(sum, values[g], values[group + g], other.data(), d);
        }
        const auto head = static_cast<uint32_t>(g);
        const auto ids = job().lsh()
                             ? reference::Sampled(codes_[Index(layer, h)], head, a.l(), 0, tokens)
                             : reference::Range(0, tokens);
        ASSERT_FALSE(ids.empty());
        sampled_ += ids.size();
        asked_ += tokens;
        const auto exact = reference::Attend(Data(layer, h), head, ids, job().lsh() ? a.k() : 0,
                                             job().lsh() ? a.l() : 0);
        // num travels in bf16.
        EXPECT_LT(reference::OutputError(exact, num.data(), den), 3e-3)
            << "layer " << layer << ", head " << h << ", " << tokens << " tokens";
        EXPECT_LT(reference::LseError(exact, max, den), 1e-3);
      }
    }
  }

  // kv: [kv_heads, count, 2, head_dim], as it was read back.
  void JudgeRows(int32_t layer, uint64_t first, uint64_t count, const std::vector<bf16>& kv) {
    if (count == 0) return;
    const size_t row = 2 * static_cast<size_t>(spec_.head_dim);
    for (size_t h = 0; h < static_cast<size_t>(spec_.kv_heads); ++h) {
      EXPECT_EQ(std::memcmp(&kv[h * count * row], &Data(layer, h).rows[first * row],
                            count * row * sizeof(bf16)),
                0)
          << "layer " << layer << ", head " << h << ", " << count << " tokens from " << first;
    }
  }

  double sampled_fraction() const {
    return static_cast<double>(sampled_) / static_cast<double>(asked_);
  }

 private:
  size_t Index(int32_t layer, size_t head) const {
    return static_cast<size_t>(layer) * static_cast<size_t>(spec_.kv_heads) + head;
  }
  const reference::Data& Data(int32_t layer, size_t head) const {
    return data_[Index(layer, head)];
  }

  JobSpec spec_;
  HostThreads hosts_;
  model::TensorSlice slice_;
  std::unique_ptr<HostLink> link_;
  std::unique_ptr<gpu::Device> device_ = gpu::MakeCpuDevice({.threads = 1});
  std::unique_ptr<StagingRing> ring_;
  size_t slot_bytes_ = 0;
  std::vector<QueryFrame> plan_;
  std::vector<float> values_;  // of the replies
  std::set<RankId> opened_;    // hosts that took the request
  uint64_t sampled_ = 0, asked_ = 0;
  std::vector<reference::Data> data_;
  std::vector<reference::Codes> codes_;
};

}  // namespace passel::engine
