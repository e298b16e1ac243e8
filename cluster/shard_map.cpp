#include "cluster/shard_map.h"

#include <algorithm>
#include <limits>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"

namespace passel::cluster {
namespace {

// Run of near-equal length that a KV head falls into: HEAD cuts the heads into min(H, heads) runs.
uint32_t HeadRun(uint32_t kv_head, uint32_t hosts, uint32_t kv_heads) {
  const uint64_t runs = std::min(hosts, kv_heads);
  return static_cast<uint32_t>(kv_head * runs / kv_heads);
}

uint32_t Wrap(uint32_t first_host, uint32_t step, uint32_t hosts) {
  return static_cast<uint32_t>((uint64_t{first_host} + step) % hosts);
}

// Bytes on each host when first_host is 0; another first host rotates them. nullopt where 64 bits
// do not hold the sum.
std::optional<std::vector<uint64_t>> BytesFromHostZero(PlacementMode mode, uint32_t hosts,
                                                       const RequestDemand& demand) {
  uint64_t head_bytes = 0;
  for (const uint64_t bytes : demand.segment_bytes) {
    const auto sum = CheckedAdd(head_bytes, bytes);
    if (!sum) return std::nullopt;
    head_bytes = *sum;
  }
  if (!CheckedMul(head_bytes, demand.kv_heads)) return std::nullopt;  // bounds all that follows
  std::vector<uint64_t> out(hosts, 0);
  switch (mode) {
    case PlacementMode::kAuto:
      Check(false, "AUTO is not a placement of its own");
      break;
    case PlacementMode::kRequest:
      out[0] = head_bytes * demand.kv_heads;
      break;
    case PlacementMode::kHead:
      for (uint32_t head = 0; head < demand.kv_heads; ++head) {
        out[HeadRun(head, hosts, demand.kv_heads)] += head_bytes;
      }
      break;
    case PlacementMode::kSequence:
      for (size_t s = 0; s < demand.segment_bytes.size(); ++s) {
        out[s % hosts] += demand.segment_bytes[s] * demand.kv_heads;
      }
      break;
  }
  return out;
}

}  // namespace

bool RequestPlacement::Valid() const {
  return (mode == PlacementMode::kRequest || mode == PlacementMode::kHead ||
          mode == PlacementMode::kSequence) &&
         hosts > 0 && first_host < hosts && kv_heads > 0;
}

uint32_t RequestPlacement::Owner(uint32_t kv_head, uint32_t segment) const {
  Check(Valid() && kv_head < kv_heads, "Owner of a KV head that a valid placement has");
  switch (mode) {
    case PlacementMode::kHead:
      return Wrap(first_host, HeadRun(kv_head, hosts, kv_heads), hosts);
    case PlacementMode::kSequence:
      return Wrap(first_host, segment % hosts, hosts);
    default:
      return first_host;
  }
}

std::vector<uint32_t> RequestPlacement::HostsFor(uint32_t first, uint32_t count,
                                                 uint32_t segments) const {
  Check(Valid() && first <= kv_heads && count <= kv_heads - first,
        "HostsFor KV heads that a valid placement has");
  std::vector<uint32_t> out;
  if (count == 0 || segments == 0) return out;
  switch (mode) {
    case PlacementMode::kHead:
      for (uint32_t head = first; head < first + count; ++head) out.push_back(Owner(head, 0));
      break;
    case PlacementMode::kSequence:
      for (uint32_t s = 0; s < std::min(segments, hosts); ++s) out.push_back(Owner(first, s));
      break;
    default:
      out.push_back(first_host);
  }
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

ShardMap::ShardMap(PlacementMode mode, std::vector<uint64_t> host_budget_bytes)
    : mode_(mode), budget_(std::move(host_budget_bytes)), free_(budget_) {
  Check(budget_.size() <= std::numeric_limits<uint32_t>::max(), "host count fits 32 bits");
}

std::optional<ShardMap::Choice> ShardMap::Choose(PlacementMode mode, const RequestDemand& demand,
                                                 std::span<const uint64_t> room) const {
  const auto hosts = static_cast<uint32_t>(room.size());
  if (hosts == 0) return std::nullopt;
  const auto bytes = BytesFromHostZero(mode, hosts, demand);
  if (!bytes) return std::nullopt;
  std::vector<uint32_t> loaded;  // hosts that get anything, when first_host is 0
  for (uint32_t h = 0; h < hosts; ++h) {
    if ((*bytes)[h] > 0) loaded.push_back(h);
  }
  if (loaded.empty()) loaded.push_back(0);
  std::optional<uint32_t> best;
  uint64_t best_left = 0;
  for (uint32_t first = 0; first < hosts; ++first) {
    uint64_t left = std::numeric_limits<uint64_t>::max();  // on the host that is left with least
    bool fits = true;
    for (const uint32_t h : loaded) {
      const uint64_t have = room[Wrap(first, h, hosts)];
      if (have < (*bytes)[h]) {
        fits = false;
        break;
      }
      left = std::min(left, have - (*bytes)[h]);
    }
    if (fits && (!best || left > best_left)) {
      best = first;
      best_left = left;
    }
  }
  if (!best) return std::nullopt;
  Choice choice{{mode, *best, hosts, demand.kv_heads}, std::vector<uint64_t>(hosts, 0)};
  for (const uint32_t h : loaded) choice.bytes[Wrap(*best, h, hosts)] = (*bytes)[h];
  return choice;
}

std::optional<ShardMap::Choice> ShardMap::ChooseAny(const RequestDemand& demand,
                                                    std::span<const uint64_t> room) const {
  if (mode_ != PlacementMode::kAuto) return Choose(mode_, demand, room);
  for (const auto mode :
       {PlacementMode::kRequest, PlacementMode::kHead, PlacementMode::kSequence}) {
    if (auto choice = Choose(mode, demand, room)) return choice;
  }
  return std::nullopt;
}

ShardMap::Verdict ShardMap::Place(RequestId request, const RequestDemand& demand,
                                  RequestPlacement* placement) {
  Check(!bookings_.contains(request), "a request is placed once");
  Check(demand.kv_heads > 0, "a request has KV heads");
  auto choice = ChooseAny(demand, free_);
  if (!choice) return ChooseAny(demand, budget_) ? Verdict::kWait : Verdict::kNever;
  for (size_t h = 0; h < free_.size(); ++h) free_[h] -= choice->bytes[h];
  *placement = choice->placement;
  bookings_.emplace(request, std::move(choice->bytes));
  return Verdict::kPlaced;
}

void ShardMap::Release(RequestId request) {
  const auto it = bookings_.find(request);
  if (it == bookings_.end()) return;
  for (size_t h = 0; h < free_.size(); ++h) free_[h] += it->second[h];
  bookings_.erase(it);
}

}  // namespace passel::cluster
