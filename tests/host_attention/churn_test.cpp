// 10,000 random lives of requests: opened or refused, filled, sealed and merged underneath, begun
// with another's prefix, queried and read back, released with queries and reads in flight. Memory
// in use and reserved ends at zero.
#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "host_attention/host_attention.h"
#include "runtime/base/error.h"
#include "tests/host_attention/reference.h"

namespace passel::host {
namespace {

using reference::Codes;
using reference::Data;

constexpr uint32_t kK = 4, kL = 10;
constexpr uint64_t kBlock = 1100, kLongPrompt = 2300, kLongGenerated = 1500;
constexpr uint64_t kLives = 10000;
constexpr size_t kAlive = 6;

struct Life {
  std::vector<SegmentSpec> plan;
  uint64_t present = 0;
};

class Churn {
 public:
  Churn() : data_(reference::MakeData(77, kLongPrompt + kLongGenerated, 16, 2)) {
    codes_ = reference::Hash(data_, 5, kK, kL);
    for (uint32_t h = 0; h < data_.group; ++h) {
      std::vector<uint64_t> sampled(data_.n + 1);
      for (uint64_t i = 0; i < data_.n; ++i) {
        sampled[i + 1] = sampled[i] + reference::Sampled(codes_, h, kL, i, i + 1).size();
      }
      sampled_.push_back(std::move(sampled));
    }
    options_.head_dim = data_.d;
    options_.group = data_.group;
    options_.k = kK;
    options_.l = kL;
    options_.block_tokens = kBlock;
    options_.threads = 3;
    // Two of the longest lives fit, so that some are refused.
    for (const SegmentSpec& s : PlanSegments(kLongPrompt, kLongGenerated, kBlock)) {
      options_.memory_bytes += 2 * SegmentBytes(options_, s);
    }
    host_ = std::make_unique<HostAttention>(options_);
  }

  void Run() {
    for (uint64_t id = 1; id <= kLives; ++id) {
      Open(id);
      for (int step = 0; step < 3 && !alive_.empty(); ++step) Step();
      if (alive_.size() > kAlive) Release();
    }
    while (!alive_.empty()) Release();
    std::unique_lock lock(mutex_);
    answered_.wait(lock, [this] { return answers_ == queries_ + reads_; });
    lock.unlock();
    // Merges of released requests may still run: their memory goes with them.
    while (host_->usage().reserved_bytes != 0) std::this_thread::yield();
    EXPECT_EQ(host_->usage().kv_bytes, 0u);
    EXPECT_EQ(host_->usage().table_bytes, 0u);
    EXPECT_GT(refused_, 10u);
    EXPECT_GT(shared_, 300u);
    EXPECT_GT(queries_, kLives / 2);
    EXPECT_GT(reads_, kLives / 10);
    EXPECT_EQ(wrong_, 0u);
  }

 private:
  uint64_t Draw(uint64_t below) { return random_.Next() % below; }

  void Open(uint64_t id) {
    const bool is_long = Draw(12) == 0;
    const uint64_t prompt = Draw(is_long ? kLongPrompt : 150);
    const uint64_t generated = 1 + Draw(is_long ? kLongGenerated : 300);
    Life life;
    if (!alive_.empty() && Draw(3) == 0) Share(id, life);
    const auto prefix = static_cast<uint32_t>(life.plan.size());
    // The lives' data is the same, so a prefix is a prefix of all.
    const uint64_t first = life.present;
    const uint64_t tail = std::min(prompt, data_.n - generated - first);
    for (SegmentSpec s : PlanSegments(tail, generated, kBlock)) {
      s.first_token += first;
      life.plan.push_back(s);
    }
    OpenSpec open;
    open.request = RequestId(id);
    open.layers = 1;
    open.layer_list = {0};
    for (uint32_t s = prefix; s < life.plan.size(); ++s) open.parts.push_back({0, s, life.plan[s]});
    const uint64_t before = host_->usage().reserved_bytes;
    try {
      host_->Open(open);
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kMemory);
      EXPECT_LE(host_->usage().reserved_bytes, before);
      ++refused_;
      host_->Release(RequestId(id));
      return;
    }
    EXPECT_LE(host_->usage().reserved_bytes, options_.memory_bytes);
    EXPECT_EQ(host_->SetMean({RequestId(id), 0, 0, data_.mean}), Status::kOk);
    alive_.emplace(id, std::move(life));
  }

  // The full prompt segments that another life begins with, or some of them.
  void Share(uint64_t id, Life& life) {
    const auto it = Any();
    ShareSpec share;
    share.request = RequestId(id);
    share.from = RequestId(it->first);
    share.layer_list = {0};
    for (const SegmentSpec& s : it->second.plan) {
      const uint64_t end = s.first_token + s.capacity;
      if (!s.prompt || it->second.present < end || end > kLongPrompt || Draw(4) == 0) break;
      share.parts.push_back({0, static_cast<uint32_t>(life.plan.size())});
      life.plan.push_back(s);
      life.present = end;
    }
    if (life.plan.empty()) return;
    const uint64_t before = host_->usage().reserved_bytes;
    ASSERT_EQ(host_->Share(share), Status::kOk);
    EXPECT_LE(host_->usage().reserved_bytes, before);
    ++shared_;
  }

  std::map<uint64_t, Life>::iterator Any() {
    return std::next(alive_.begin(), static_cast<std::ptrdiff_t>(Draw(alive_.size())));
  }

  void Step() {
    const auto it = Any();
    Append(it->first, it->second);
    if (it->second.present > 0) Query(it->first, it->second);
    if (Draw(5) == 0) Read(it->first, it->second);
  }

  // The rest of the segment that is being filled, or a part of it; sometimes what is there again.
  void Append(uint64_t id, Life& life) {
    for (const SegmentSpec& s : life.plan) {
      const uint64_t end = s.first_token + s.capacity;
      if (life.present >= end) continue;
      const uint64_t count = Draw(3) == 0 ? 1 + Draw(end - life.present) : end - life.present;
      const uint64_t first =
          life.present - std::min(Draw(4) == 0 ? Draw(20) : 0, life.present - s.first_token);
      const uint64_t last = life.present + count;
      const auto tokens = static_cast<uint32_t>(last - first);
      const auto sent = std::make_shared<reference::Sent>(data_, codes_, kL, first, tokens);
      ASSERT_EQ(
          host_->Append({RequestId(id), 0, 0, first, tokens, sent->rows.data(), sent->codes.data()},
                        Draw(2) == 0 ? sent : nullptr),
          Status::kOk);
      life.present = last;
      return;
    }
  }

  // The tokens that head h of a query for so many tokens attends.
  uint64_t Expected(const Life& life, uint64_t tokens, bool exact, uint32_t h) const {
    if (exact) return tokens;
    uint64_t count = 0;
    for (const SegmentSpec& s : life.plan) {
      if (tokens <= s.first_token) break;
      const uint64_t there = std::min(tokens - s.first_token, s.capacity);
      const uint64_t whole =
          s.prompt ? (there == s.capacity ? there : 0) : there / kOpenTokens * kOpenTokens;
      count += sampled_[h][s.first_token + whole] - sampled_[h][s.first_token] + there - whole;
    }
    return count;
  }

  void Query(uint64_t id, const Life& life) {
    const uint64_t tokens = Draw(2) == 0 ? life.present : 1 + Draw(life.present);
    AttendBatch batch;
    batch.items = {reference::ItemOf(data_, &codes_, tokens)};
    batch.items[0].request = RequestId(id);
    batch.items[0].exact = Draw(5) == 0;
    std::vector<uint64_t> want;
    for (uint32_t h = 0; h < data_.group; ++h) {
      want.push_back(Expected(life, tokens, batch.items[0].exact, h));
    }
    ++queries_;
    ASSERT_EQ(host_->Attend(std::move(batch),
                            [this, want](std::vector<PartialItem> partials) {
                              const bool right =
                                  partials.size() == 1 && partials[0].sampled == want;
                              const std::lock_guard lock(mutex_);
                              wrong_ += right ? 0 : 1;
                              ++answers_;
                              answered_.notify_one();
                            }),
              Status::kOk);
  }

  // Some tokens of each segment.
  void Read(uint64_t id, const Life& life) {
    const size_t row = 2 * data_.d;
    const auto rows = std::make_shared<std::vector<bf16>>(life.present * row);
    std::vector<ReadSpan> spans;
    for (const SegmentSpec& s : life.plan) {
      const uint64_t end = std::min(life.present, s.first_token + s.capacity);
      if (s.first_token >= end) break;
      const uint64_t first = s.first_token + Draw(end - s.first_token);
      spans.push_back({RequestId(id), 0, 0, first, static_cast<uint32_t>(1 + Draw(end - first)),
                       rows->data() + first * row});
    }
    ++reads_;
    ASSERT_EQ(host_->Read(spans,
                          [this, spans, rows, row](Status status) {
                            bool right = status == Status::kOk;
                            for (const ReadSpan& s : spans) {
                              right &= std::memcmp(s.rows, &data_.rows[s.first_token * row],
                                                   s.count * row * sizeof(bf16)) == 0;
                            }
                            const std::lock_guard lock(mutex_);
                            wrong_ += right ? 0 : 1;
                            ++answers_;
                            answered_.notify_one();
                          }),
              Status::kOk);
  }

  void Release() {
    const auto it = Any();
    host_->Release(RequestId(it->first));
    EXPECT_FALSE(host_->Ready(RequestId(it->first), 0, 0, 1));
    alive_.erase(it);
  }

  const Data data_;
  Codes codes_;
  std::vector<std::vector<uint64_t>> sampled_;  // [head][i]: sampled tokens below i
  Options options_;
  Random random_{12};
  std::map<uint64_t, Life> alive_;
  uint64_t refused_ = 0, shared_ = 0, queries_ = 0, reads_ = 0;
  std::mutex mutex_;
  std::condition_variable answered_;
  uint64_t answers_ = 0, wrong_ = 0;
  std::unique_ptr<HostAttention> host_;  // last, so that its threads end first
};

TEST(HostAttentionChurn, TenThousandLivesEndAtZero) { Churn().Run(); }

}  // namespace
}  // namespace passel::host
