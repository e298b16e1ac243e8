#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "host_attention/prefetch.h"
#include "host_attention/segment.h"

namespace passel::host {

using Mean = std::shared_ptr<const std::vector<float>>;

// One (layer, KV head) of a request.
struct Head {
  struct Held {
    std::shared_ptr<Segment> segment;
    Mean mean;  // of a shared segment; null: the head's
  };
  std::vector<Held> segments;  // by number, so by first token
  Mean mean;

  const Held* Find(uint32_t number) const {
    const auto found = std::find_if(segments.begin(), segments.end(), [&](const Held& held) {
      return held.segment->number() == number;
    });
    return found == segments.end() ? nullptr : &*found;
  }
  // The segment that has room for token `token`; null where none of here does.
  const Held* Holding(uint64_t token) const {
    const auto found = std::find_if(segments.begin(), segments.end(), [&](const Held& held) {
      const SegmentSpec& spec = held.segment->spec();
      return token >= spec.first_token && token - spec.first_token < spec.capacity;
    });
    return found == segments.end() ? nullptr : &*found;
  }
  const Mean& MeanOf(const Held& held) const { return held.mean != nullptr ? held.mean : mean; }
  void Sort() {
    std::sort(segments.begin(), segments.end(), [](const Held& a, const Held& b) {
      return a.segment->number() < b.segment->number();
    });
  }
};

// By layer, then KV head: a query looks up each of its heads. What is not here has no segments.
class Request {
 public:
  const Head* Find(uint32_t layer, uint32_t kv_head) const {
    if (layer >= layers_.size() || kv_head >= layers_[layer].size()) return nullptr;
    const Head& head = layers_[layer][kv_head];
    return head.segments.empty() ? nullptr : &head;
  }
  // For Find: first the one, then the other.
  void PrefetchLayer(uint32_t layer) const {
    if (layer < layers_.size()) PrefetchToRead(&layers_[layer]);
  }
  void PrefetchHead(uint32_t layer, uint32_t kv_head) const {
    if (layer < layers_.size() && kv_head < layers_[layer].size()) {
      PrefetchToRead(&layers_[layer][kv_head]);
    }
  }
  Head* Find(uint32_t layer, uint32_t kv_head) {
    return const_cast<Head*>(std::as_const(*this).Find(layer, kv_head));
  }
  // To be given a segment.
  Head& Add(uint32_t layer, uint32_t kv_head) {
    if (layer >= layers_.size()) layers_.resize(layer + size_t{1});
    std::vector<Head>& heads = layers_[layer];
    if (kv_head >= heads.size()) heads.resize(kv_head + size_t{1});
    return heads[kv_head];
  }
  void Sort() {
    for (std::vector<Head>& heads : layers_) {
      for (Head& head : heads) head.Sort();
    }
  }

 private:
  std::vector<std::vector<Head>> layers_;
};

}  // namespace passel::host
