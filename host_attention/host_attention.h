#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/bf16.h"
#include "runtime/base/ids.h"
#include "runtime/base/partial.h"

namespace passel::host {

enum class Estimator : uint8_t { kFull, kLsh, kTopK, kOracleSample };
enum class KvType : uint8_t { kBf16, kInt8 };

// What one host rank computes; the same on every host rank of a job.
struct Options {
  Estimator estimator = Estimator::kLsh;
  uint32_t head_dim = 0;  // a multiple of 16
  uint32_t group = 1;     // query heads per KV head
  uint32_t k = 10;        // bits a table, ≤ 16
  uint32_t l = 150;       // tables, ≤ 1,024
  KvType kv_type = KvType::kBf16;
  uint64_t block_tokens = 49152;  // ≤ 65,536
  uint64_t memory_bytes = 0;      // budget of everything below
  uint32_t threads = 0;           // 0: the affinity mask's
  bool deterministic = false;     // partials per block, in block order, fixed ISA level
  uint64_t seed = 0;              // ORACLE_SAMPLE
  double budget = 0.02;           // TOPK, ORACLE_SAMPLE: tokens taken, as a fraction of a segment's
  bool pin_threads = false;       // one core each; only where no other rank shares the cores
  std::chrono::microseconds spin{0};  // for which an idle thread looks for work before it sleeps
};

// A segment: a run of tokens of one (request, layer, KV head) that lives on one host. Token numbers
// count offloaded tokens from 0. Prompt segments are sealed when full. Generated segments grow:
// open end, then small blocks, then larger ones, at points that depend on the token count alone.
struct SegmentSpec {
  uint64_t first_token = 0;
  uint64_t capacity = 0;
  bool prompt = false;
};
// The segments of a request whose prompt leaves `prompt_tokens` offloaded tokens and which may
// generate up to `generated_tokens` more; a pure function, known to every rank. Prompt segments are
// of equal size (±1), at most block_tokens.
std::vector<SegmentSpec> PlanSegments(uint64_t prompt_tokens, uint64_t generated_tokens,
                                      uint64_t block_tokens);
// Bytes that a segment needs at most, all in (rows, tables, scratch); what Open reserves.
uint64_t SegmentBytes(const Options& options, const SegmentSpec& spec);

struct OpenSpec {
  RequestId request;
  uint32_t layers = 0;  // offloaded layers are numbered by the model; any layer below this may come
  // The (KV head, segment number) pairs that this host holds, for each layer in `layer_list`.
  std::vector<uint32_t> layer_list;
  struct Part {
    uint32_t kv_head;
    uint32_t segment;
    SegmentSpec spec;
  };
  std::vector<Part> parts;
};

// Prompt segments of request `from` that become segments of `request` too, under the same numbers
// and tokens: a common prefix, held once.
struct ShareSpec {
  RequestId request, from;
  std::vector<uint32_t> layer_list;
  struct Part {
    uint32_t kv_head;
    uint32_t segment;
  };
  std::vector<Part> parts;  // in each layer of `layer_list`
};

// Of the keys of segments that the request opened; a shared segment keeps the one it was hashed
// with.
struct KeyMean {
  RequestId request;
  uint32_t layer, kv_head;
  std::span<const float> mean;  // [head_dim]
};

// Tokens [first_token, first_token + count) of one (request, layer, KV head); all in one segment.
// Idempotent: tokens that are there already are ignored.
struct AppendSpan {
  RequestId request;
  uint32_t layer, kv_head;
  uint64_t first_token;
  uint32_t count;
  const bf16* rows;       // [count, 2, head_dim]: K then V of each token
  const uint16_t* codes;  // [count, l]; null where the estimator needs none
};

// Tokens [first_token, first_token + count) of one (request, layer, KV head), to be read back; all
// in one segment.
struct ReadSpan {
  RequestId request;
  uint32_t layer, kv_head;
  uint64_t first_token;
  uint32_t count;
  bf16* rows;  // [count, 2, head_dim]: K then V of each token; written until the read is done
};

// Which tokens are sampled depends on offloaded_tokens alone: of a prompt segment all or, where it
// ends beyond offloaded_tokens, none; of a generated one the whole runs of kOpenTokens. The others
// are attended exactly.
inline constexpr uint32_t kOpenTokens = 256;
struct QueryItem {
  RequestId request;
  uint32_t kv_head;
  uint64_t offloaded_tokens;  // tokens [0, this) are attended, those of them that live here
  bool exact;                 // short context or dense layer: u = 1 for all
  const float* q;             // [group, head_dim]
  // [group, l]; null where exact. Others may write to them: the threads copy a head's before they
  // judge and use them.
  const uint16_t* codes;
  const bf16* q_bf16 = nullptr;  // the query, where q is null
};

enum class Status : uint8_t {
  kOk,
  kUnknownRequest,  // never opened, or released
  kNotHere,         // no such segment on this host
  kMissingTokens,   // asked for tokens that have not been appended
  kBadArgument,
};

// Result of one QueryItem over one segment (deterministic) or all of this host's (segment = −1).
struct PartialItem {
  uint32_t item;  // index of the QueryItem
  int32_t segment;
  Status status = Status::kOk;    // kBadArgument: a code was out of range; values say nothing
  std::vector<uint64_t> sampled;  // [group] tokens that contributed
  std::span<float> values;        // max, den and num, one behind the other
  std::shared_ptr<float> memory;  // that holds them, with those of the batch's other partials
  // [group] the tokens, ascending within a segment; only where AttendBatch::collect_ids is set.
  std::vector<std::vector<uint64_t>> ids;

  // [group], [group] and [group, head_dim].
  std::span<const float> max() const { return values.first(sampled.size()); }
  std::span<const float> den() const { return values.subspan(sampled.size(), sampled.size()); }
  // Not where bf16_num.
  std::span<const float> num() const { return values.subspan(2 * sampled.size()); }
};

struct AttendBatch {
  uint32_t layer = 0;
  std::vector<QueryItem> items;
  bool collect_ids = false;
  // num comes rounded to bf16, two to a float of PartialItem::values.
  bool bf16_num = false;
  // Where set, gives the memory of the partials' values; called once, by Attend.
  std::function<std::shared_ptr<float>(size_t floats)> memory;
  // Thread time spent finding tokens and attending to them is added here, where set; to be read
  // once the batch is done.
  struct Times {
    std::atomic<uint64_t> probe_ns{0}, attend_ns{0};
  };
  Times* times = nullptr;
};

struct MemoryUsage {
  uint64_t budget_bytes = 0;
  uint64_t reserved_bytes = 0;
  uint64_t kv_bytes = 0;     // in use by K and V rows
  uint64_t table_bytes = 0;  // in use by tables, and by codes of tokens not yet in one
};

// The KV cache, LSH tables and attention of one host rank. Open, Share, SetMean, Append, Read,
// Release and Attend are called by one thread; the work of Attend, copying, sealing and merging
// runs on `threads` threads of its own. Hot calls return a status and never throw.
class HostAttention {
 public:
  explicit HostAttention(const Options& options);
  ~HostAttention();

  // Reserves all memory the request may come to need here. Throws Error{kMemory}, naming need and
  // budget; nothing is reserved then. A request may be opened again with further parts.
  void Open(const OpenSpec& spec);
  // All of `spec` or, where the status is not kOk, nothing. The segments are full (kMissingTokens)
  // and immutable, and count once, until the last request that has them is released, in any order;
  // their mean comes with them. `request` may be new; what follows the prefix, it opens.
  Status Share(const ShareSpec& spec);
  // Before queries that need it; without, keys count as hashed uncentred (mean 0).
  Status SetMean(const KeyMean& mean);
  // Appended in order: a gap gives kMissingTokens. The rows and codes are copied before this
  // returns or, where `memory` is given and they are many, by the threads, which then let go of it.
  // Others may write to what it holds: codes that are out of range when they are copied give
  // kBadArgument or, where threads copy them, make queries of the segment fail
  // (PartialItem::status). All spans of a segment have codes or none has; a segment
  // without is only attended exactly.
  Status Append(const AppendSpan& span, std::shared_ptr<const void> memory = nullptr);
  // Starts to copy what was appended, int8 rows as what they stand for; `done` runs on one of the
  // threads, with kMissingTokens where a segment lost rows for want of memory. Where the status is
  // not kOk, nothing is started: kMissingTokens until the tokens are there.
  Status Read(std::vector<ReadSpan> spans, std::function<void(Status)> done);
  // Whether a query for this many tokens can be answered now (all rows of this host's segments
  // below it are there; copying and sealing, where due, are waited for inside Attend).
  bool Ready(RequestId request, uint32_t layer, uint32_t kv_head, uint64_t offloaded_tokens) const;
  // Starts; `done` runs on one of those threads, or in Help. The batch's q and codes are valid
  // until then. Where the status is not kOk, nothing is started: kMissingTokens until the tokens
  // are there.
  Status Attend(AttendBatch batch, std::function<void(std::vector<PartialItem>)> done);
  // Runs one unit of a batch's work on this thread, where some is waiting: false if there is none.
  // A unit takes some hundred microseconds at most.
  bool Help();
  // Also while queries or reads of the request run: memory goes when they are done.
  void Release(RequestId request);
  MemoryUsage usage() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace passel::host
