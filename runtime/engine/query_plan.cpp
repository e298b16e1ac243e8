#include "runtime/engine/query_plan.h"

#include <algorithm>

#include "runtime/base/error.h"

namespace passel::engine {
namespace {

constexpr uint64_t kPadding = 16;  // data of an entry is padded to 16 bytes: cluster/messages.h

// Upper bounds of what one KV head of one row adds to a query, and one partial to a reply.
uint64_t QueryBytes(const cluster::WireShape& s) {
  const uint64_t head = uint64_t{s.head_dim} * sizeof(bf16) + uint64_t{s.l} * sizeof(uint16_t);
  return sizeof(cluster::QueryEntry) + s.group * head + kPadding;
}
uint64_t PartialBytes(const cluster::WireShape& s) {
  return sizeof(cluster::PartialEntry) +
         s.group * (2 * sizeof(float) + uint64_t{s.head_dim} * sizeof(bf16)) + kPadding;
}
uint64_t MostPartials(const cluster::WireShape& s) {
  return std::min<uint64_t>(s.max_entries, cluster::kMaxPayloadBytes / PartialBytes(s));
}

// Appends the partials of one row and KV head that `host` answers with.
void AddPartials(const QueryRow& row, uint32_t kv_head, uint32_t host, bool by_segment,
                 std::vector<PartialKey>* keys) {
  const uint32_t segments = row.hosted->SegmentOf(row.offloaded_tokens - 1) + 1;
  // Segments are striped: a host that owns any owns one of the first `hosts`.
  const uint32_t looked_at =
      by_segment ? segments : std::min(segments, row.hosted->placement.hosts);
  for (uint32_t s = 0; s < looked_at; ++s) {
    if (row.hosted->placement.Owner(kv_head, s) != host) continue;
    keys->push_back({row.row, kv_head, by_segment ? static_cast<int32_t>(s) : -1});
    if (!by_segment) return;
  }
}

void SetPlaces(std::vector<QueryFrame>& frames) {
  struct Asked {
    PartialKey key;
    uint32_t* place;
    bool operator<(const Asked& other) const { return key < other.key; }
  };
  std::vector<Asked> all;
  for (QueryFrame& frame : frames) {
    frame.places.resize(frame.partials.size());
    for (size_t i = 0; i < frame.partials.size(); ++i) {
      all.push_back({frame.partials[i], &frame.places[i]});
    }
  }
  // Of equal ones, which hosts give that each have segments of it, the first host's first.
  std::stable_sort(all.begin(), all.end());
  for (size_t i = 0; i < all.size(); ++i) *all[i].place = static_cast<uint32_t>(i);
}

}  // namespace

uint32_t HostedRequest::SegmentOf(uint64_t token) const {
  const auto it =
      std::upper_bound(segments.begin(), segments.end(), token,
                       [](uint64_t t, const host::SegmentSpec& s) { return t < s.first_token; });
  Check(it != segments.begin(), "a token before the first segment");
  return static_cast<uint32_t>(it - segments.begin() - 1);
}

bool FitsReply(const cluster::WireShape& shape, uint64_t segments) {
  return segments <= MostPartials(shape);
}

std::vector<QueryFrame> PlanQueries(const cluster::WireShape& shape,
                                    const model::TensorSlice& slice, std::span<const QueryRow> rows,
                                    uint32_t hosts, bool by_segment) {
  const uint64_t most_heads =
      std::min<uint64_t>(shape.max_entries, cluster::kMaxPayloadBytes / QueryBytes(shape));
  const uint64_t most_partials = MostPartials(shape);
  const auto first = static_cast<uint32_t>(slice.first_kv_head);
  std::vector<QueryFrame> frames;
  std::vector<PartialKey> keys;
  for (uint32_t host = 0; host < hosts; ++host) {
    uint32_t part = 0;
    uint64_t heads = most_heads;  // of the last frame: full, so that a host starts its own
    for (const QueryRow& row : rows) {
      if (row.offloaded_tokens == 0) continue;
      for (uint32_t h = first; h < first + static_cast<uint32_t>(slice.kv_heads); ++h) {
        keys.clear();
        AddPartials(row, h, host, by_segment, &keys);
        if (keys.empty()) continue;
        Check(keys.size() <= most_partials, "a KV head with more segments than a reply can hold");
        if (heads == most_heads || frames.back().partials.size() + keys.size() > most_partials) {
          frames.push_back({host, part++, {}, {}, {}});
          heads = 0;
        }
        QueryFrame& frame = frames.back();
        ++heads;
        frame.partials.insert(frame.partials.end(), keys.begin(), keys.end());
        const bool joins = !frame.entries.empty() && frame.entries.back().row == row.row &&
                           frame.entries.back().first_kv_head + frame.entries.back().kv_heads == h;
        if (joins) {
          ++frame.entries.back().kv_heads;
        } else {
          frame.entries.push_back({row.hosted->request.value, row.offloaded_tokens, h, 1,
                                   row.exact ? 1u : 0u, row.row});
        }
      }
    }
  }
  SetPlaces(frames);
  return frames;
}

}  // namespace passel::engine
