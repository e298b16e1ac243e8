#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "host_attention/host_attention.h"
#include "host_attention/pool.h"
#include "host_attention/prefetch.h"
#include "host_attention/tables.h"

namespace passel::host {

// Tokens that one background slice copies: some hundred KB.
inline constexpr uint32_t kTokensPerCopy = 256;

// Zeroed memory of one segment: whole pages, a part of its Open's mapping. Goes back to the system
// with its owner, whatever becomes of the rest; then `on_free` runs.
class Slab {
 public:
  Slab(Slab&& other) noexcept;
  ~Slab();
  Slab& operator=(Slab&&) = delete;
  std::byte* data() const { return data_; }

 private:
  friend class SlabMap;
  Slab(std::byte* data, uint64_t bytes, std::function<void()> on_free);

  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
  std::function<void()> on_free_;
};

// The mapping of one Open (huge pages where allowed), from which its slabs are cut, in order.
class SlabMap {
 public:
  // bytes: of all slabs, whole pages. Throws Error{kMemory} where the system refuses.
  explicit SlabMap(uint64_t bytes);
  ~SlabMap();  // what was not taken goes back
  SlabMap(const SlabMap&) = delete;
  SlabMap& operator=(const SlabMap&) = delete;
  Slab Take(uint64_t bytes, std::function<void()> on_free);

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0, taken_ = 0;
};

// Bytes of a segment's slab; the rest of SegmentBytes is allocated as tokens come.
uint64_t SegmentSlabBytes(const Options& options, const SegmentSpec& spec);

// What a query reads of a segment; holds alive what it names. Token numbers are the segment's own.
class Segment;
struct SegmentView {
  std::shared_ptr<const Segment> segment;
  RowsView rows;
  std::vector<std::shared_ptr<const TableBlock>> blocks;
  std::shared_ptr<const std::vector<float>> mean;  // [head_dim], of its keys when they were hashed
  uint32_t sampled = 0;                            // tokens [0, sampled) are sampled
  uint32_t limit = 0;                              // tokens [sampled, limit) are attended exactly
};

// One segment's rows and tables. Append, View and WhenSettled are called by one thread; copying,
// sealing and merging run in the pool. The last two change only which structure finds the tokens,
// never which are found.
class Segment : public std::enable_shared_from_this<Segment> {
 public:
  Segment(const Options& options, const SegmentSpec& spec, uint32_t number, Slab slab,
          std::shared_ptr<Usage> usage, Pool& pool);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  uint32_t number() const { return number_; }
  const SegmentSpec& spec() const { return spec_; }
  // Tokens appended; some may still be on their way: see settling.
  uint64_t present() const { return present_; }
  // As HostAttention::Append, for tokens [first, first + count) of this segment.
  Status Append(uint64_t first, uint32_t count, const bf16* rows, const uint16_t* codes,
                std::shared_ptr<const void> memory);
  // Of tokens that are present and, where segments settle, have.
  const RowsView& rows() const { return rows_; }
  // tokens ≤ present(). Where `sampling`, codes must have come with the tokens: else false.
  bool View(uint64_t tokens, bool sampling, SegmentView* view) const;
  // For View of a prompt's segment.
  void PrefetchBlock() const { PrefetchToWrite(prompt_.get()); }
  // Whether tokens are being copied or tables sealed, which begins in Append.
  bool settling() const { return settling_.load(std::memory_order_acquire); }
  // Whether tables are being sealed, and all rows are there.
  bool sealing() const { return sealing_.load(std::memory_order_acquire); }
  // Runs `then` on a pool thread once all that is done; false, and does not, where it is.
  bool WhenSettled(std::function<void()> then) const;
  // Whether codes that were copied were out of range, or could not be copied.
  bool damaged() const { return damaged_.load(std::memory_order_relaxed); }
  // Whether rows could not be copied either. Of the thread that appends.
  bool lost_rows() const { return lost_rows_; }

 private:
  enum class Codes : uint8_t { kUnknown, kPresent, kAbsent };
  using Blocks = std::vector<std::shared_ptr<const TableBlock>>;
  void StoreRows(uint64_t first, uint32_t count, const bf16* rows);
  void AddCodes(uint64_t index, uint32_t count, const uint16_t* codes);
  // In the pool, from memory that others may write to.
  void StartCopy(uint64_t first, uint32_t count, const bf16* rows, const uint16_t* codes,
                 std::shared_ptr<const void> memory);
  void Copy(uint64_t first, uint32_t count, const bf16* rows, const uint16_t* codes);
  // Around what must be done before a query; the last to end seals, where that is due. `self` is
  // let go of before queries go on, which may be the last to have the segment.
  void BeginWork();
  static void EndWork(std::shared_ptr<Segment> self);
  void StartSeal();
  void StartMerge();
  // The blocks to be merged into one next; empty if none are. Under the mutex.
  Blocks DueMerge() const;

  const Options options_;
  const SegmentSpec spec_;
  const uint32_t number_;
  const Slab slab_;
  const std::shared_ptr<Usage> usage_;
  Pool& pool_;
  RowsView rows_;
  std::byte* row_data_ = nullptr;
  uint64_t present_ = 0;
  bool lost_rows_ = false;
  Codes codes_ = Codes::kUnknown;
  std::shared_ptr<TableBlock> prompt_;  // in the slab
  std::shared_ptr<TableBlock> open_;    // the run of kOpenTokens that is being filled

  mutable std::mutex mutex_;  // guards what follows
  mutable std::vector<std::function<void()>> waiting_;
  size_t work_ = 0;                                     // copies and seals under way
  bool seal_due_ = false;                               // once they are through
  std::atomic<bool> settling_{false}, sealing_{false};  // written under the mutex
  std::atomic<bool> damaged_{false};
  bool merging_ = false;
  Blocks blocks_;  // of a generated segment, adjacent from token 0
};

}  // namespace passel::host
