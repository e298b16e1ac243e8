#include "runtime/engine/host_link.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/base/partial.h"
#include "runtime/base/random.h"
#include "runtime/engine/staging_ring.h"
#include "tests/cluster/joined.h"
#include "tests/engine/host_threads.h"
#include "tests/host_attention/reference.h"

namespace passel::engine {
namespace {

namespace reference = host::reference;
using cluster::PlacementMode;
using std::chrono::milliseconds;

// A model rank without a model: K, V and queries are random, answers are judged against float64.
class Model {
 public:
  Model(const JobSpec& spec, const transport::FaultPlan& faults = {})
      : spec_(spec), hosts_(spec, faults) {
    slice_.kv_heads = spec.kv_heads;
    slice_.heads = spec.kv_heads * spec.group;
    link_ = std::make_unique<HostLink>(hosts_.job(), hosts_.channel(), slice_,
                                       [this](RankId, const cluster::proto::Control& message) {
                                         if (message.open_reply().accepted()) ++opened_;
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
    opened_ = 0;
    link_->SendControlToAll(message);
    PumpUntil([&] { return opened_ == spec_.hosts; });
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
  uint32_t opened_ = 0;
  uint64_t sampled_ = 0, asked_ = 0;
  std::vector<reference::Data> data_;
  std::vector<reference::Codes> codes_;
};

constexpr uint64_t kPrompt = 700, kGenerated = 300;

// Prefill in chunks, then decode steps whose query runs ahead of the tokens it asks for.
void PrefillAndDecode(Model& model, PlacementMode mode, uint64_t id) {
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
    Model model(FullSpec(hosts));
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
    Model model(FullSpec(2, seed == 2),
                {.seed = seed, .max_delay = 12, .delay = 0.2, .reorder = 0.2});
    PrefillAndDecode(model, PlacementMode::kSequence, 1);
    PrefillAndDecode(model, PlacementMode::kHead, 2);
  }
}

TEST(HostLink, SampledAnswersAreThoseOfTheSampledSet) {
  Model model({.hosts = 2,
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
  Model model(FullSpec(1));
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
    Model model({.hosts = hosts,
                 .kv_heads = 2,
                 .group = 2,
                 .head_dim = 64,
                 .layers = 1,
                 .settings = {"attention.k=6", "attention.l=24", "attention.no_dense_layers=true",
                              "attention.window=16", "attention.exact_below=0",
                              "host.block_tokens=1500", "host.threads=2"}});
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
    Model model({.hosts = 2,
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
  Model model(FullSpec(2));
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
