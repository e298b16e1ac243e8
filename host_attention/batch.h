#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
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
  // Of the calling thread.
  static Scratch& Local();

 private:
  std::vector<uint8_t> counters_;
  std::vector<uint16_t> staging_;
  std::vector<uint32_t> ids_;
  std::vector<float> scores_, work_;
};

// The work of one Attend, cut into units that any thread may run: a head's sampled tokens of a
// segment, or a tile of tokens attended exactly for all heads of the group. Units and the order in
// which they merge depend on the batch alone, so results do not depend on threads.
class Batch {
 public:
  // mean: [head_dim] of item i; the views in the order of the segments.
  struct Item {
    std::shared_ptr<const std::vector<float>> mean;
    std::vector<std::unique_ptr<SegmentView>> views;
  };
  Batch(const Options& options, const Kernels& kernels, AttendBatch batch, std::vector<Item> items);

  size_t units() const { return units_.size(); }
  void Run(size_t unit);
  // After all units: the partials, merged in order.
  std::vector<PartialItem> Finish() const;
  const std::vector<Item>& items() const { return items_; }
  // Lets go of the segments, so that a released request's memory is free before `done` runs.
  void Drop() { items_.clear(); }

 private:
  static constexpr uint32_t kAllHeads = UINT32_MAX;
  struct Unit {
    uint32_t item, view;
    uint32_t head;  // or kAllHeads: tokens [first, last), exactly
    uint32_t first, last;
    // Of one head, or of the group: [heads], [heads], [heads, head_dim].
    std::vector<float> max, den, num;
    std::vector<uint64_t> sampled;
    std::vector<uint32_t> ids;
  };
  void RunExact(Unit& unit, const SegmentView& view, const float* q);
  void RunLsh(Unit& unit, const SegmentView& view, const QueryItem& item, const float* mean);
  void RunTopK(Unit& unit, const SegmentView& view, const float* q);
  void RunOracle(Unit& unit, const SegmentView& view, const QueryItem& item);
  void Merge(const Unit& unit, PartialItem& into) const;
  PartialItem Empty(uint32_t item, int32_t segment) const;

  const Options options_;
  const Kernels& kernels_;
  const AttendBatch batch_;
  std::vector<Item> items_;
  std::vector<Unit> units_;
};

}  // namespace passel::host
