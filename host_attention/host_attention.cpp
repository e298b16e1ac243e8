#include "host_attention/host_attention.h"

#include <algorithm>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "host_attention/batch.h"
#include "host_attention/isa.h"
#include "host_attention/kernels.h"
#include "host_attention/pool.h"
#include "host_attention/prefetch.h"
#include "host_attention/read.h"
#include "host_attention/request.h"
#include "host_attention/segment.h"
#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"
#include "runtime/base/recycler.h"

namespace passel::host {
namespace {

// Shared with segments, which may outlive their request while queries run.
class Account : public Usage {
 public:
  explicit Account(uint64_t budget) : budget_(budget) {}
  void AddKv(int64_t bytes) override { kv_ += bytes; }
  void AddTables(int64_t bytes) override { tables_ += bytes; }
  // Whether `bytes` more fit the budget; then they are reserved.
  bool Reserve(uint64_t bytes) {
    uint64_t reserved = reserved_;
    do {
      if (bytes > budget_ || reserved > budget_ - bytes) return false;
    } while (!reserved_.compare_exchange_weak(reserved, reserved + bytes));
    return true;
  }
  void Unreserve(uint64_t bytes) { reserved_ -= bytes; }
  MemoryUsage Get() const {
    return {budget_, reserved_, static_cast<uint64_t>(kv_.load()),
            static_cast<uint64_t>(tables_.load())};
  }

 private:
  const uint64_t budget_;
  std::atomic<uint64_t> reserved_{0};
  std::atomic<int64_t> kv_{0}, tables_{0};
};

void Expect(bool condition, const std::string& what) {
  if (!condition) throw Error(ErrorClass::kUsage, "host attention: " + what);
}

void CheckOptions(const Options& o) {
  Expect(o.head_dim > 0 && o.head_dim % 16 == 0 && o.head_dim <= 4096,
         "head_dim is " + std::to_string(o.head_dim) + "; expected a multiple of 16, at most 4096");
  Expect(o.group > 0 && o.group <= 1024, "the query heads of a KV head must be 1 … 1024");
  Expect(o.k >= 1 && o.k <= 16, "k is " + std::to_string(o.k) + "; expected 1 … 16");
  Expect(o.l >= 2 && o.l <= 1024, "l is " + std::to_string(o.l) + "; expected 2 … 1024");
  Expect(o.block_tokens >= 1 && o.block_tokens <= 65536,
         "block_tokens is " + std::to_string(o.block_tokens) + "; expected 1 … 65536");
  Expect(o.budget > 0 && o.budget <= 1, "budget must be above 0 and at most 1");
  Expect(o.threads <= 4096, "threads is " + std::to_string(o.threads) + "; expected at most 4096");
}

std::string Gigabytes(uint64_t bytes) {
  return std::to_string(bytes) + " bytes (" + std::to_string(bytes >> 20) + " MiB)";
}

}  // namespace

struct HostAttention::Impl {
  explicit Impl(const Options& o)
      : options(o),
        kernels(KernelsFor(ActiveIsa())),
        account(std::make_shared<Account>(o.memory_bytes)),
        no_mean(std::make_shared<const std::vector<float>>(o.head_dim)) {}

  Head* Find(RequestId request, uint32_t layer, uint32_t kv_head, Status* status) {
    const auto found = requests.find(request);
    if (found == requests.end()) {
      *status = Status::kUnknownRequest;
      return nullptr;
    }
    Head* const head = found->second.Find(layer, kv_head);
    *status = head == nullptr ? Status::kNotHere : Status::kOk;
    return head;
  }

  void Prefetch(const AttendBatch& batch);
  Status Prepare(const AttendBatch& batch, const QueryItem& query, Batch::Item* item);
  void Start(const std::shared_ptr<Batch>& batch,
             std::function<void(std::vector<PartialItem>)> done);

  const Options options;
  const Kernels& kernels;
  const std::shared_ptr<Account> account;
  const Mean no_mean;
  std::unordered_map<RequestId, Request> requests;
  std::vector<std::pair<const Request*, const Head*>> asked;  // of the batch that is prefetched
  Recycler<std::vector<float>> results{16, uint64_t{4} << 20, [](const std::vector<float>& v) {
                                         return v.capacity() * sizeof(float);
                                       }};
  std::unique_ptr<Pool> pool;  // last, so that its jobs end first
};

HostAttention::HostAttention(const Options& options) {
  CheckOptions(options);
  impl_ = std::make_unique<Impl>(options);
  impl_->pool = std::make_unique<Pool>(options.threads, options.pin_threads, options.spin);
}

HostAttention::~HostAttention() {
  // Background jobs of a request may post further ones; both need the pool.
  impl_->requests.clear();
}

void HostAttention::Open(const OpenSpec& spec) {
  const Options& options = impl_->options;
  uint64_t slab_bytes = 0, part_bytes = 0;
  const auto add = [](uint64_t& sum, uint64_t more) {
    const auto next = CheckedAdd(sum, more);
    if (!next) throw Error(ErrorClass::kMemory, "host attention: a request's size overflows");
    sum = *next;
  };
  for (const OpenSpec::Part& part : spec.parts) {
    Check(part.spec.capacity > 0 && part.spec.capacity <= kMaxBlockTokens,
          "a segment's capacity is 1 … 65535 tokens");
    Check(part.segment <= INT32_MAX, "segment numbers are 31-bit");
    add(slab_bytes, SegmentSlabBytes(options, part.spec));
    add(part_bytes, SegmentBytes(options, part.spec));
  }
  const auto total = CheckedMul(part_bytes, spec.layer_list.size());
  const auto slab_total = CheckedMul(slab_bytes, spec.layer_list.size());
  if (!total || !slab_total) {
    throw Error(ErrorClass::kMemory, "host attention: a request's size overflows");
  }
  if (!impl_->account->Reserve(*total)) {
    const MemoryUsage now = impl_->account->Get();
    throw Error(ErrorClass::kMemory, "request " + std::to_string(spec.request.value) + " needs " +
                                         Gigabytes(*total) + " on this host; free are " +
                                         Gigabytes(now.budget_bytes - now.reserved_bytes) +
                                         " of a budget of " + Gigabytes(now.budget_bytes));
  }
  std::optional<SlabMap> map;
  try {
    map.emplace(*slab_total);
  } catch (...) {
    impl_->account->Unreserve(*total);
    throw;
  }
  const auto open = impl_->requests.find(spec.request);
  Request added = open == impl_->requests.end() ? Request() : open->second;
  for (const uint32_t layer : spec.layer_list) {
    for (const OpenSpec::Part& part : spec.parts) {
      Head& head = added.Add(layer, part.kv_head);
      if (head.mean == nullptr) head.mean = impl_->no_mean;
      Check(head.Find(part.segment) == nullptr, "a segment is opened once");
      Slab slab = map->Take(SegmentSlabBytes(options, part.spec),
                            [account = impl_->account, bytes = SegmentBytes(options, part.spec)] {
                              account->Unreserve(bytes);
                            });
      head.segments.push_back(
          {std::make_shared<Segment>(options, part.spec, part.segment, std::move(slab),
                                     impl_->account, *impl_->pool),
           nullptr});
    }
  }
  added.Sort();
  impl_->requests[spec.request] = std::move(added);
}

Status HostAttention::Share(const ShareSpec& spec) {
  const auto open = impl_->requests.find(spec.request);
  Request added = open == impl_->requests.end() ? Request() : open->second;
  for (const uint32_t layer : spec.layer_list) {
    for (const ShareSpec::Part& part : spec.parts) {
      Status status;
      const Head* from = impl_->Find(spec.from, layer, part.kv_head, &status);
      if (from == nullptr) return status;
      const Head::Held* held = from->Find(part.segment);
      if (held == nullptr) return Status::kNotHere;
      const Segment& segment = *held->segment;
      if (!segment.spec().prompt) return Status::kBadArgument;
      if (segment.present() < segment.spec().capacity) return Status::kMissingTokens;
      Head& head = added.Add(layer, part.kv_head);
      if (head.mean == nullptr) head.mean = impl_->no_mean;
      if (head.Find(part.segment) != nullptr) return Status::kBadArgument;
      head.segments.push_back({held->segment, from->MeanOf(*held)});
    }
  }
  added.Sort();
  impl_->requests[spec.request] = std::move(added);
  return Status::kOk;
}

Status HostAttention::SetMean(const KeyMean& mean) {
  if (mean.mean.size() != impl_->options.head_dim) return Status::kBadArgument;
  Status status;
  Head* head = impl_->Find(mean.request, mean.layer, mean.kv_head, &status);
  if (head == nullptr) return status;
  head->mean = std::make_shared<const std::vector<float>>(mean.mean.begin(), mean.mean.end());
  return Status::kOk;
}

Status HostAttention::Append(const AppendSpan& span, std::shared_ptr<const void> memory) {
  Status status;
  const Head* head = impl_->Find(span.request, span.layer, span.kv_head, &status);
  if (head == nullptr) return status;
  if (span.count == 0) return Status::kOk;
  if (span.rows == nullptr) return Status::kBadArgument;
  const Head::Held* held = head->Holding(span.first_token);
  if (held == nullptr) return Status::kNotHere;
  Segment& segment = *held->segment;
  return segment.Append(span.first_token - segment.spec().first_token, span.count, span.rows,
                        span.codes, std::move(memory));
}

Status HostAttention::Read(std::vector<ReadSpan> spans, std::function<void(Status)> done) {
  const auto read = std::make_shared<RowsRead>(std::move(done));
  for (const ReadSpan& span : spans) {
    Status status;
    const Head* head = impl_->Find(span.request, span.layer, span.kv_head, &status);
    if (head == nullptr) return status;
    const Head::Held* held = head->Holding(span.first_token);
    if (held == nullptr) return Status::kNotHere;
    status = read->Add(held->segment, span);
    if (status != Status::kOk) return status;
  }
  read->Start(*impl_->pool);
  return Status::kOk;
}

bool HostAttention::Ready(RequestId request, uint32_t layer, uint32_t kv_head,
                          uint64_t offloaded_tokens) const {
  Status status;
  const Head* head = impl_->Find(request, layer, kv_head, &status);
  if (head == nullptr) return false;
  return std::all_of(head->segments.begin(), head->segments.end(), [&](const Head::Held& held) {
    const SegmentSpec& spec = held.segment->spec();
    if (offloaded_tokens <= spec.first_token) return true;
    return held.segment->present() >= std::min(offloaded_tokens - spec.first_token, spec.capacity);
  });
}

// What Prepare follows from pointer to pointer, for all queries side by side: a layer's heads have
// not been touched since the step before, and their counts of references were written by others.
void HostAttention::Impl::Prefetch(const AttendBatch& batch) {
  asked.clear();
  for (const QueryItem& query : batch.items) {
    const auto found = requests.find(query.request);
    if (found == requests.end()) return;
    asked.emplace_back(&found->second, nullptr);
    found->second.PrefetchLayer(batch.layer);
  }
  for (size_t i = 0; i < asked.size(); ++i) {
    asked[i].first->PrefetchHead(batch.layer, batch.items[i].kv_head);
  }
  for (size_t i = 0; i < asked.size(); ++i) {
    const Head* head = asked[i].first->Find(batch.layer, batch.items[i].kv_head);
    if (head == nullptr) return;
    asked[i].second = head;
    PrefetchToRead(head->segments.data());
    PrefetchToWrite(head->mean.get());
  }
  for (const auto& [request, head] : asked) {
    for (const Head::Held& held : head->segments) {
      PrefetchToWrite(held.segment.get());
      PrefetchToRead(held.segment.get());
    }
  }
  for (const auto& [request, head] : asked) {
    for (const Head::Held& held : head->segments) held.segment->PrefetchBlock();
  }
}

Status HostAttention::Impl::Prepare(const AttendBatch& batch, const QueryItem& query,
                                    Batch::Item* item) {
  Status status;
  const Head* head = Find(query.request, batch.layer, query.kv_head, &status);
  if (head == nullptr) return status;
  const bool sampling = options.estimator == Estimator::kLsh && !query.exact;
  const bool has_q = query.q != nullptr || query.q_bf16 != nullptr;
  if (!has_q || (sampling && query.codes == nullptr)) return Status::kBadArgument;
  for (const Head::Held& held : head->segments) {
    const auto& segment = held.segment;
    const SegmentSpec& spec = segment->spec();
    if (query.offloaded_tokens <= spec.first_token) continue;
    const uint64_t tokens = std::min(query.offloaded_tokens - spec.first_token, spec.capacity);
    if (segment->present() < tokens) return Status::kMissingTokens;
    SegmentView& view = item->views.emplace_back();
    if (!segment->View(tokens, sampling, &view)) return Status::kBadArgument;
    view.mean = head->MeanOf(held);
  }
  return Status::kOk;
}

Status HostAttention::Attend(AttendBatch batch,
                             std::function<void(std::vector<PartialItem>)> done) {
  impl_->Prefetch(batch);
  std::vector<Batch::Item> items(batch.items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    const Status status = impl_->Prepare(batch, batch.items[i], &items[i]);
    if (status != Status::kOk) return status;
  }
  impl_->Start(std::make_shared<Batch>(impl_->options, impl_->kernels, std::move(batch),
                                       std::move(items), impl_->results.Take()),
               std::move(done));
  return Status::kOk;
}

void HostAttention::Impl::Start(const std::shared_ptr<Batch>& batch,
                                std::function<void(std::vector<PartialItem>)> done) {
  // One count for this thread and one for every segment that is still being filled or sealed;
  // whoever brings it to 0 starts the units.
  struct Gate {
    std::atomic<size_t> waiting{1};
    std::function<void(std::vector<PartialItem>)> done;
  };
  const auto gate = std::make_shared<Gate>();
  gate->done = std::move(done);
  const auto arrive = [p = pool.get(), batch, gate] {
    if (gate->waiting.fetch_sub(1) != 1) return;
    p->ForEach(
        Pool::Lane::kForeground, batch->units(),
        [batch, ahead = p->threads()](size_t unit) {
          batch->Prefetch(unit);
          batch->Prefetch(unit + ahead);
          batch->Run(unit);
        },
        [batch, gate] {
          std::vector<PartialItem> partials = batch->Finish();
          batch->Drop();
          gate->done(std::move(partials));
        });
  };
  for (const Batch::Item& item : batch->items()) {
    for (const SegmentView& view : item.views) {
      if (!view.segment->settling()) continue;
      if (view.sampled == 0 && view.segment->sealing()) continue;  // needs no table
      gate->waiting.fetch_add(1);
      if (!view.segment->WhenSettled(arrive)) gate->waiting.fetch_sub(1);
    }
  }
  arrive();
}

bool HostAttention::Help() { return impl_->pool->Help(); }

void HostAttention::Release(RequestId request) { impl_->requests.erase(request); }

MemoryUsage HostAttention::usage() const { return impl_->account->Get(); }

}  // namespace passel::host
