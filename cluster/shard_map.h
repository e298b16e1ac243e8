#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/base/ids.h"

namespace passel::cluster {

enum class PlacementMode : uint8_t { kAuto, kRequest, kHead, kSequence };

// Which host holds a block, for one request. Hosts are numbered 0 … H-1. A pure function of its
// fields; carried in the Open message, so that every rank agrees.
struct RequestPlacement {
  PlacementMode mode = PlacementMode::kRequest;  // never kAuto
  uint32_t first_host = 0;
  uint32_t hosts = 1;     // H
  uint32_t kv_heads = 1;  // of the whole model

  // Host of segment `segment` (host_attention's PlanSegments) of a KV head. REQUEST: first_host.
  // HEAD: heads cut into min(H, kv_heads) runs of near-equal length. SEQUENCE: segments striped.
  uint32_t Owner(uint32_t kv_head, uint32_t segment) const;
  // Hosts that a query of KV heads [first, first + count) must reach, rising, for a request with
  // `segments` segments.
  std::vector<uint32_t> HostsFor(uint32_t first, uint32_t count, uint32_t segments) const;
};

// What placing needs to know of a request: bytes of each of its segments, for one KV head, summed
// over layers.
struct RequestDemand {
  uint32_t kv_heads = 0;
  std::vector<uint64_t> segment_bytes;
};

// Chooses placements and keeps the hosts' ledgers. Pure logic; lives on model rank 0.
class ShardMap {
 public:
  ShardMap(PlacementMode mode, std::vector<uint64_t> host_budget_bytes);

  enum class Verdict { kPlaced, kWait, kNever };
  // kPlaced: fills `placement` and books the bytes. kWait: fits once others are released. kNever:
  // does not fit into empty hosts.
  Verdict Place(RequestId request, const RequestDemand& demand, RequestPlacement* placement);
  void Release(RequestId request);

  std::span<const uint64_t> free_bytes() const { return free_; }
  uint32_t epoch() const { return epoch_; }

 private:
  struct Booking {
    RequestId request;
    std::vector<uint64_t> bytes;  // a host
  };
  std::vector<uint64_t> BytesPerHost(const RequestPlacement& placement,
                                     const RequestDemand& demand) const;

  PlacementMode mode_;
  std::vector<uint64_t> budget_;
  std::vector<uint64_t> free_;
  std::vector<Booking> bookings_;
  uint32_t epoch_ = 1;
};

}  // namespace passel::cluster
