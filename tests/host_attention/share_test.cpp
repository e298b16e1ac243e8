// Segments that requests share: found, weighted and accounted for as if each had its own.
#include <gtest/gtest.h>

#include <algorithm>

#include "host_attention/host_attention.h"
#include "tests/host_attention/reference.h"

namespace passel::host {
namespace {

using reference::Codes;
using reference::Data;
using reference::Wait;

constexpr uint32_t kK = 6, kL = 30;

class Share : public testing::Test {
 protected:
  Share() : data_(reference::MakeData(31, 2000, 32, 2)), codes_(reference::Hash(data_, 4, kK, kL)) {
    options_ = reference::MakeOptions(data_, Estimator::kLsh, kK, kL);
    options_.block_tokens = 1500;
    options_.deterministic = true;
    host_ = std::make_unique<HostAttention>(options_);
    plan_ = PlanSegments(3000, 100, 1500);  // the second one stays half empty
    reference::OpenOne(*host_, plan_);
    reference::AppendAll(*host_, data_, &codes_, kL, plan_);
  }

  // Request 2 has request 1's first 1,500 tokens and 400 of its own, whose mean differs.
  void OpenSecond() {
    ASSERT_EQ(host_->Share({RequestId(2), RequestId(1), {0}, {{0, 0}}}), Status::kOk);
    OpenSpec open;
    open.request = RequestId(2);
    open.layers = 1;
    open.layer_list = {0};
    open.parts = {{0, 1, tail_}};
    host_->Open(open);
    ASSERT_EQ(host_->SetMean({RequestId(2), 0, 0, own_mean_}), Status::kOk);
    ASSERT_EQ(host_->Append({RequestId(2), 0, 0, tail_.first_token, 400,
                             &data_.rows[tail_.first_token * 2 * data_.d],
                             &codes_.keys[tail_.first_token * kL]}),
              Status::kOk);
  }

  std::vector<PartialItem> Ask(uint64_t request, uint64_t tokens) {
    AttendBatch batch;
    batch.items = {reference::ItemOf(data_, &codes_, tokens)};
    batch.items[0].request = RequestId(request);
    return Wait(*host_, std::move(batch));
  }

  const Data data_;
  const Codes codes_;
  const std::vector<float> own_mean_ = std::vector<float>(32, 0.1f);
  const SegmentSpec tail_{1500, 400, true};
  Options options_;
  std::vector<SegmentSpec> plan_;
  std::unique_ptr<HostAttention> host_;
};

TEST_F(Share, GivesWhatTheOwnerGetsAndKeepsItsMean) {
  OpenSecond();
  const PartialItem want = Ask(1, 1500)[0];
  const auto got = Ask(2, 1900);
  ASSERT_EQ(got.size(), 2u);
  EXPECT_EQ(got[0].sampled, want.sampled);
  EXPECT_TRUE(std::ranges::equal(got[0].values, want.values));
  Data own = data_;
  own.mean = own_mean_;
  for (uint32_t h = 0; h < data_.group; ++h) {
    const auto ids = reference::Sampled(codes_, h, kL, 1500, 1900);
    ASSERT_FALSE(ids.empty());
    const auto exact = reference::Attend(own, h, ids, kK, kL);
    EXPECT_EQ(got[1].sampled[h], ids.size());
    EXPECT_LT(reference::OutputError(exact, &got[1].num()[h * data_.d], got[1].den()[h]), 1e-4);
    EXPECT_LT(reference::LseError(exact, got[1].max()[h], got[1].den()[h]), 1e-4);
  }
}

TEST_F(Share, MemoryCountsOnceAndGoesWithTheLastRequest) {
  const uint64_t row = 4 * data_.d;
  uint64_t first = 0;
  for (const SegmentSpec& s : plan_) first += SegmentBytes(options_, s);
  const uint64_t shared = SegmentBytes(options_, plan_[0]), tail = SegmentBytes(options_, tail_);
  EXPECT_EQ(host_->usage().reserved_bytes, first);
  OpenSecond();
  EXPECT_EQ(host_->usage().reserved_bytes, first + tail);
  EXPECT_EQ(host_->usage().kv_bytes, (2000 + 400) * row);
  const auto before = Ask(2, 1900);
  host_->Release(RequestId(1));
  EXPECT_EQ(host_->usage().reserved_bytes, shared + tail);
  EXPECT_EQ(host_->usage().kv_bytes, (1500 + 400) * row);
  const auto after = Ask(2, 1900);
  EXPECT_TRUE(std::ranges::equal(after[0].values, before[0].values));
  EXPECT_TRUE(std::ranges::equal(after[1].values, before[1].values));
  // The heir shares in turn.
  ASSERT_EQ(host_->Share({RequestId(3), RequestId(2), {0}, {{0, 0}, {0, 1}}}), Status::kOk);
  EXPECT_EQ(host_->usage().reserved_bytes, shared + tail);
  host_->Release(RequestId(2));
  EXPECT_TRUE(std::ranges::equal(Ask(3, 1900)[1].values, before[1].values));
  host_->Release(RequestId(3));
  EXPECT_EQ(host_->usage().reserved_bytes, 0u);
  EXPECT_EQ(host_->usage().kv_bytes, 0u);
  EXPECT_EQ(host_->usage().table_bytes, 0u);
}

TEST_F(Share, RefusesWhatIsNotFullOrNotThereAndChangesNothing) {
  const auto share = [&](uint64_t to, uint64_t from, std::vector<ShareSpec::Part> parts) {
    return host_->Share({RequestId(to), RequestId(from), {0}, std::move(parts)});
  };
  EXPECT_EQ(share(2, 9, {{0, 0}}), Status::kUnknownRequest);
  EXPECT_EQ(share(2, 1, {{0, 0}, {1, 0}}), Status::kNotHere);
  EXPECT_EQ(share(2, 1, {{0, 0}, {0, 7}}), Status::kNotHere);
  EXPECT_EQ(share(2, 1, {{0, 0}, {0, 1}}), Status::kMissingTokens);
  EXPECT_EQ(share(2, 1, {{0, 0}, {0, 2}}), Status::kBadArgument);  // generated
  EXPECT_EQ(share(2, 1, {{0, 0}, {0, 0}}), Status::kBadArgument);
  EXPECT_EQ(share(1, 1, {{0, 0}}), Status::kBadArgument);
  EXPECT_EQ(host_->SetMean({RequestId(2), 0, 0, data_.mean}), Status::kUnknownRequest);
  EXPECT_EQ(share(2, 1, {{0, 0}}), Status::kOk);
}

}  // namespace
}  // namespace passel::host
