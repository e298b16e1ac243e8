#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "host_attention/host_attention.h"
#include "host_attention/pool.h"
#include "host_attention/segment.h"

namespace passel::host {

// The work of one Read: rows are copied behind the queries, in slices, as appended ones are.
class RowsRead : public std::enable_shared_from_this<RowsRead> {
 public:
  explicit RowsRead(std::function<void(Status)> done) : done_(std::move(done)) {}
  // span: all in `segment`, which is held until it has been read.
  Status Add(std::shared_ptr<const Segment> segment, const ReadSpan& span);
  // After all spans: copies once the segments' rows are there, then calls `done`.
  void Start(Pool& pool);

 private:
  struct Part {
    std::shared_ptr<const Segment> segment;
    uint64_t first;  // in the segment
    uint64_t count;
    bf16* rows;
    uint64_t at;  // tokens of the parts before
  };
  void Run(size_t slice);
  void Finish();

  std::function<void(Status)> done_;
  std::vector<Part> parts_;
  uint64_t tokens_ = 0;
  bool lost_rows_ = false;
  std::atomic<size_t> waiting_{1};  // for Start and for segments; at 0 copying begins
};

}  // namespace passel::host
