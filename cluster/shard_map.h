#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
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

  // Whether the fields make sense, for one that came in a message. The others need it.
  bool Valid() const;
  // Host of segment `segment` (host_attention's PlanSegments) of a KV head. REQUEST: first_host.
  // HEAD: heads cut into min(H, kv_heads) runs of near-equal length, dealt from first_host on.
  // SEQUENCE: segments striped from first_host on.
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
  // does not fit into empty hosts. AUTO tries whole requests, then heads, then sequence blocks, and
  // takes the first that fits now: a query then has the fewest hosts to reach. Among the first
  // hosts that fit, the one that leaves the fullest host the most room.
  Verdict Place(RequestId request, const RequestDemand& demand, RequestPlacement* placement);
  // Gives the bytes back. Nothing happens where the request was never placed.
  void Release(RequestId request);

  std::span<const uint64_t> free_bytes() const { return free_; }
  uint32_t epoch() const { return epoch_; }

 private:
  // The placement of this mode that fits into `room`, with its bytes on each host; nullopt where
  // none does.
  struct Choice {
    RequestPlacement placement;
    std::vector<uint64_t> bytes;
  };
  std::optional<Choice> Choose(PlacementMode mode, const RequestDemand& demand,
                               std::span<const uint64_t> room) const;
  std::optional<Choice> ChooseAny(const RequestDemand& demand,
                                  std::span<const uint64_t> room) const;

  PlacementMode mode_;
  std::vector<uint64_t> budget_;
  std::vector<uint64_t> free_;
  std::unordered_map<RequestId, std::vector<uint64_t>> bookings_;  // bytes on each host
  uint32_t epoch_ = 1;
};

}  // namespace passel::cluster
