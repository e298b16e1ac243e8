#pragma once

#include <compare>
#include <cstdint>
#include <span>
#include <vector>

#include "cluster/messages.h"
#include "cluster/shard_map.h"
#include "host_attention/host_attention.h"
#include "runtime/base/ids.h"
#include "runtime/model/transformer.h"

namespace passel::engine {

// Where a request's offloaded tokens live.
struct HostedRequest {
  RequestId request;
  cluster::RequestPlacement placement;
  std::vector<host::SegmentSpec> segments;

  // Segment that holds offloaded token `token`.
  uint32_t SegmentOf(uint64_t token) const;
};

// One row of a micro-batch, as a query asks for it.
struct QueryRow {
  const HostedRequest* hosted;
  uint64_t offloaded_tokens;
  bool exact;
  uint32_t row;
};

// What a partial answers. segment: −1 where a host merges its segments.
struct PartialKey {
  uint32_t row;
  uint32_t kv_head;
  int32_t segment;

  auto operator<=>(const PartialKey&) const = default;
};

// A query frame: runs of the KV heads of each row, and the partials that its reply must hold.
struct QueryFrame {
  uint32_t host;
  uint32_t part;  // of this host's frames
  std::vector<cluster::QueryEntry> entries;
  std::vector<PartialKey> partials;  // rising
  std::vector<uint32_t> places;      // of these among the partials of all frames, rising
};

// The frames that ask the hosts, all of them, for the rows' KV heads of `slice`: the same for every
// layer of a step, but for QueryEntry::exact. Neither a frame nor its reply passes
// cluster::kMaxPayloadBytes. `by_segment`: hosts answer each segment on its own. Throws Error{kBug}
// where the partials of one row and KV head do not fit a frame: FitsReply says so before.
std::vector<QueryFrame> PlanQueries(const cluster::WireShape& shape,
                                    const model::TensorSlice& slice, std::span<const QueryRow> rows,
                                    uint32_t hosts, bool by_segment);

// True where one reply can hold the partials of `segments` segments of a row and KV head.
bool FitsReply(const cluster::WireShape& shape, uint64_t segments);

}  // namespace passel::engine
