// Rows read back: those that were appended.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "host_attention/host_attention.h"
#include "tests/host_attention/no_memory.h"
#include "tests/host_attention/reference.h"

namespace passel::host {
namespace {

using reference::Codes;
using reference::Data;

constexpr uint32_t kK = 6, kL = 30;
constexpr uint64_t kPrompt = 2000, kGenerated = 1200;

class Read : public testing::Test {
 protected:
  Read()
      : data_(reference::MakeData(61, kPrompt + kGenerated - 100, 32, 2)),
        codes_(reference::Hash(data_, 4, kK, kL)) {
    options_ = reference::MakeOptions(data_, Estimator::kLsh, kK, kL);
    options_.block_tokens = 1100;
  }

  // The last segment stays open.
  std::unique_ptr<HostAttention> Filled(uint64_t step = 100) const {
    auto host = std::make_unique<HostAttention>(options_);
    reference::OpenOne(*host, plan_);
    reference::AppendAll(*host, data_, options_.estimator == Estimator::kLsh ? &codes_ : nullptr,
                         kL, plan_, step);
    return host;
  }

  // Spans of tokens [first, first + count), each in one segment, and where they are to go.
  std::vector<ReadSpan> Spans(uint64_t first, uint64_t count, bf16* rows) const {
    std::vector<ReadSpan> spans;
    for (const SegmentSpec& s : plan_) {
      const uint64_t begin = std::max(first, s.first_token);
      const uint64_t end = std::min(first + count, s.first_token + s.capacity);
      if (begin >= end) continue;
      spans.push_back({RequestId(1), 0, 0, begin, static_cast<uint32_t>(end - begin),
                       rows + (begin - first) * 2 * data_.d});
    }
    return spans;
  }

  void ExpectExact(HostAttention& host, uint64_t first, uint64_t count) const {
    const size_t row = 2 * data_.d;
    std::vector<bf16> got(count * row + 2, bf16{0x7b7b});
    ASSERT_EQ(reference::WaitRead(host, Spans(first, count, got.data() + 1)), Status::kOk);
    EXPECT_EQ(std::memcmp(&got[1], &data_.rows[first * row], count * row * sizeof(bf16)), 0)
        << count << " tokens from " << first;
    EXPECT_EQ(got.front().bits, 0x7b7b);
    EXPECT_EQ(got.back().bits, 0x7b7b);
  }

  const Data data_;
  const Codes codes_;
  const std::vector<SegmentSpec> plan_ = PlanSegments(kPrompt, kGenerated, 1100);
  Options options_;
};

TEST_F(Read, GivesWhatWasAppended) {
  for (const Estimator estimator : {Estimator::kLsh, Estimator::kFull}) {
    options_.estimator = estimator;
    const auto host = Filled();
    ExpectExact(*host, 0, data_.n);
    ExpectExact(*host, 0, 1);
    ExpectExact(*host, data_.n - 1, 1);
    ExpectExact(*host, 999, 2);     // the end of one segment and the beginning of the next
    ExpectExact(*host, 100, 256);   // one slice
    ExpectExact(*host, 900, 1357);  // slices that cross segments
    Random random(3);
    for (int i = 0; i < 200; ++i) {
      const uint64_t first = random.Next() % data_.n;
      ExpectExact(*host, first, 1 + random.Next() % (data_.n - first));
    }
  }
}

TEST_F(Read, ManySpansInAnyOrder) {
  const auto host = Filled();
  const size_t row = 2 * data_.d;
  std::vector<bf16> got(data_.n * row);
  std::vector<ReadSpan> spans;
  for (uint64_t at = 0; at < data_.n;) {
    for (const ReadSpan& s : Spans(at, std::min(1 + at % 7, data_.n - at), &got[at * row])) {
      spans.push_back(s);
      at += s.count;
    }
    spans.push_back({RequestId(1), 0, 0, 5, 0, nullptr});  // nothing
  }
  Random random(4);
  for (size_t i = spans.size(); i > 1; --i) std::swap(spans[i - 1], spans[random.Next() % i]);
  ASSERT_EQ(reference::WaitRead(*host, spans), Status::kOk);
  EXPECT_EQ(std::memcmp(got.data(), data_.rows.data(), got.size() * sizeof(bf16)), 0);
  EXPECT_EQ(reference::WaitRead(*host, {}), Status::kOk);
}

TEST_F(Read, GivesInt8RowsWithinTheirScale) {
  options_.kv_type = KvType::kInt8;
  const auto host = Filled();
  const uint32_t d = data_.d;
  std::vector<bf16> got(data_.n * 2 * d);
  ASSERT_EQ(reference::WaitRead(*host, Spans(0, data_.n, got.data())), Status::kOk);
  for (uint64_t i = 0; i < data_.n; ++i) {
    // Half steps of K are stored, whole ones of V; what they stand for is rounded to bf16.
    for (const uint32_t part : {0u, 1u}) {
      const bf16* want = &data_.rows[(2 * i + part) * d];
      float most = 0;
      for (uint32_t j = 0; j < d; ++j) most = std::max(most, std::fabs(ToFloat(want[j])));
      const float bound = most / 127 * (part == 0 ? 0.2501f : 0.5001f);
      for (uint32_t j = 0; j < d; ++j) {
        const float x = ToFloat(want[j]);
        ASSERT_NEAR(ToFloat(got[(2 * i + part) * d + j]), x, bound + (std::fabs(x) + bound) / 256);
      }
    }
  }
}

TEST_F(Read, RefusesWhatIsNotThereAndStartsNothing) {
  HostAttention host(options_);
  reference::OpenOne(host, plan_, {0, 2});
  const size_t row = 2 * data_.d;
  ASSERT_EQ(host.Append({RequestId(1), 0, 0, 0, 300, data_.rows.data(), codes_.keys.data()}),
            Status::kOk);
  std::vector<bf16> got(1000 * row, bf16{0x7b7b});
  const auto expect = [&](Status status, const ReadSpan& span) {
    // The first span could be read; nothing of it is.
    EXPECT_EQ(host.Read({{RequestId(1), 0, 0, 0, 300, got.data()}, span},
                        [](Status) { ADD_FAILURE() << "done was called"; }),
              status);
  };
  expect(Status::kUnknownRequest, {RequestId(2), 0, 0, 0, 1, got.data()});
  expect(Status::kNotHere, {RequestId(1), 1, 0, 0, 1, got.data()});
  expect(Status::kNotHere, {RequestId(1), 0, 1, 0, 1, got.data()});
  expect(Status::kNotHere, {RequestId(1), 0, 0, 1000, 1, got.data()});  // another host's
  expect(Status::kNotHere, {RequestId(1), 0, 0, ~uint64_t{0}, 1, got.data()});
  expect(Status::kMissingTokens, {RequestId(1), 0, 0, 300, 1, got.data()});
  expect(Status::kMissingTokens, {RequestId(1), 0, 0, 0, 1000, got.data()});
  expect(Status::kMissingTokens, {RequestId(1), 0, 0, 2000, 1, got.data()});
  expect(Status::kBadArgument, {RequestId(1), 0, 0, 0, 1001, got.data()});
  expect(Status::kBadArgument, {RequestId(1), 0, 0, 999, 0xffffffff, got.data()});
  expect(Status::kBadArgument, {RequestId(1), 0, 0, 0, 1, nullptr});
  for (const bf16 x : got) ASSERT_EQ(x.bits, 0x7b7b);
  host.Release(RequestId(1));
  expect(Status::kUnknownRequest, {RequestId(1), 0, 0, 0, 1, got.data()});
}

TEST_F(Read, GivesASharedPrefixToEachOfItsRequests) {
  const auto host = Filled();
  ASSERT_EQ(host->Share({RequestId(2), RequestId(1), {0}, {{0, 0}}}), Status::kOk);
  host->Release(RequestId(1));
  std::vector<bf16> got(1000 * 2 * data_.d);
  ASSERT_EQ(reference::WaitRead(*host, {{RequestId(2), 0, 0, 0, 1000, got.data()}}), Status::kOk);
  EXPECT_EQ(std::memcmp(got.data(), data_.rows.data(), got.size() * sizeof(bf16)), 0);
}

// The segment counts the tokens as present, but nobody copies them.
TEST_F(Read, SaysWhereRowsWereLost) {
  HostAttention host(options_);
  reference::OpenOne(host, plan_);
  for (const bool lost : {true, false}) {
    const uint64_t first = lost ? 0 : 1000;
    const auto sent = std::make_shared<reference::Sent>(data_, codes_, kL, first, 1000);
    const AppendSpan span{RequestId(1), 0, 0, first, 1000, sent->rows.data(), sent->codes.data()};
    std::shared_ptr<const void> memory = sent;
    if (lost) {
      FailNextAllocation();
      EXPECT_THROW(host.Append(span, std::move(memory)), std::bad_alloc);
    } else {
      ASSERT_EQ(host.Append(span, std::move(memory)), Status::kOk);
    }
  }
  std::vector<bf16> got(1000 * 2 * data_.d);
  EXPECT_EQ(reference::WaitRead(host, Spans(10, 20, got.data())), Status::kMissingTokens);
  EXPECT_EQ(reference::WaitRead(host, Spans(990, 20, got.data())), Status::kMissingTokens);
  ExpectExact(host, 1000, 1000);
}

// Codes that no table has make queries fail, but the rows are there.
TEST_F(Read, GivesRowsWhoseCodesAreDamaged) {
  HostAttention host(options_);
  reference::OpenOne(host, plan_);
  const auto sent = std::make_shared<reference::Sent>(data_, codes_, kL, 0, 1000);
  sent->codes[7] = 1u << kK;
  ASSERT_EQ(host.Append({RequestId(1), 0, 0, 0, 1000, sent->rows.data(), sent->codes.data()}, sent),
            Status::kOk);
  ExpectExact(host, 0, 1000);
}

}  // namespace
}  // namespace passel::host
