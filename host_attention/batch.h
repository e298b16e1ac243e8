#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "host_attention/host_attention.h"
#include "host_attention/kernels.h"
#include "host_attention/segment.h"

namespace passel::host {

// Memory of one worker thread.
class Scratch {
 public:
  Scratch();
  ProbeScratch probe() { return {counters_.data(), staging_.data()}; }
  // Room for a segment's tokens.
  uint32_t* ids() { return ids_.data(); }
  float* scores() { return scores_.data(); }
  // Grows as needed.
  float* work(size_t floats);
  float* query(size_t floats);
  uint16_t* codes(size_t count);
  // Of the calling thread.
  static Scratch& Local();

 private:
  std::vector<uint8_t> counters_;
  std::vector<uint16_t> staging_;
  std::vector<uint32_t> ids_;
  std::vector<float> scores_, work_, query_;
  std::vector<uint16_t> codes_;
};

// The work of one Attend, cut into units that any thread may run: a head's sampled tokens of a
// segment, or a tile of tokens attended exactly for all heads of the group. Units and the order in
// which they merge depend on the batch alone, so results do not depend on threads.
class Batch {
 public:
  struct Item {
    std::vector<SegmentView> views;  // in the order of the segments
  };
  // results: memory for what units find.
  Batch(const Options& options, const Kernels& kernels, AttendBatch batch, std::vector<Item> items,
        std::shared_ptr<std::vector<float>> results);

  size_t units() const { return units_.size(); }
  void Run(size_t unit);
  // Asks memory for what `unit`, if there is one, reads of its query: others have written that.
  void Prefetch(size_t unit) const;
  // After all units: the partials, in order.
  std::vector<PartialItem> Finish() { return std::move(partials_); }
  const std::vector<Item>& items() const { return items_; }
  // Lets go of the segments, so that a released request's memory is free before `done` runs.
  void Drop();

 private:
  static constexpr uint32_t kAllHeads = UINT32_MAX;
  // `out`: where in results_ its partials stand: of one head, or of the group; [heads], [heads],
  // [heads, head_dim].
  struct Unit {
    uint32_t item, view;
    uint32_t head;  // or kAllHeads: tokens [first, last), exactly
    uint32_t first, last;
    size_t out;
  };
  // An item's units, units_[first … last); the last of them to end merges all into its partials,
  // partials_[partial …).
  struct Result {
    size_t first = 0, last = 0, partial = 0;
    std::atomic<size_t> left{0};
  };
  struct Partials {
    float *max, *den, *num;
  };
  size_t HeadsOf(const Unit& unit) const { return unit.head == kAllHeads ? options_.group : 1; }
  size_t FloatsOf(size_t heads) const { return heads * (options_.head_dim + 2); }
  Partials PartialsOf(const Unit& unit);
  // Of its heads, in float32, until the next call by this thread.
  const float* QueryOf(const Unit& unit) const;
  // Of its head, a copy until the next call by this thread; null where one is out of range.
  const uint16_t* CodesOf(const Unit& unit) const;
  void MakePartials();
  void RunUnit(size_t index, const Partials& out);
  void RunExact(size_t index, const SegmentView& view, const float* q, const Partials& out);
  void RunLsh(size_t index, const SegmentView& view, const Partials& out);
  void RunTopK(size_t index, const SegmentView& view, const float* q, const Partials& out);
  void RunOracle(size_t index, const SegmentView& view, const QueryItem& item, const Partials& out);
  void MergeItem(uint32_t item);
  void MergeUnits(size_t first, size_t last, PartialItem& into);
  void Count(size_t unit, PartialItem& into);

  const Options options_;
  const Kernels& kernels_;
  const AttendBatch batch_;
  std::vector<Item> items_;
  std::vector<Unit> units_;
  // What units find; each writes its own part, so that none is touched before.
  std::shared_ptr<std::vector<float>> results_;
  static constexpr uint64_t kRefused = UINT64_MAX;
  std::vector<uint64_t> sampled_;           // tokens, by unit; or kRefused
  std::vector<std::vector<uint32_t>> ids_;  // by unit, where they are collected
  std::vector<Result> merged_;              // by item
  std::vector<PartialItem> partials_;
};

}  // namespace passel::host
