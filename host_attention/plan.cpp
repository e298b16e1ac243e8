#include <algorithm>

#include "host_attention/host_attention.h"
#include "host_attention/kernels.h"
#include "host_attention/segment.h"
#include "host_attention/tables.h"
#include "runtime/base/checked_math.h"

namespace passel::host {
namespace {

// A slab is whole pages, so that it can be given back alone.
constexpr uint64_t kPage = 4096;

uint64_t RowBytes(const Options& options, const SegmentSpec& spec) {
  return RoundUp(spec.capacity * RowStride(options.kv_type, options.head_dim) + 64, 64);
}

uint64_t PromptTableBytes(const Options& options, uint32_t tokens) {
  return RoundUp(IdBytes(tokens, options.l), 64) + BoundBytes(tokens, options.k, options.l);
}

// At most: every token's ids in the blocks and, during a merge, once more; bounds of one block of
// each size and of the merged one; the open end.
uint64_t GeneratedTableBytes(const Options& options, uint32_t tokens) {
  uint64_t bytes = 2 * IdBytes(tokens, options.l) + IdBytes(kOpenTokens, options.l);
  uint64_t largest_bounds = 0;
  for (uint32_t size = kOpenTokens; size <= tokens; size *= 2) {
    const uint64_t bounds = BoundBytes(size, options.k, options.l);
    bytes += bounds + 2 * kTableSlack;
    largest_bounds = std::max(largest_bounds, bounds);
  }
  return bytes + largest_bounds;
}

}  // namespace

std::vector<SegmentSpec> PlanSegments(uint64_t prompt_tokens, uint64_t generated_tokens,
                                      uint64_t block_tokens) {
  const uint64_t block = std::clamp<uint64_t>(block_tokens, 1, kMaxBlockTokens);
  std::vector<SegmentSpec> plan;
  const uint64_t prompts = CeilDiv(prompt_tokens, block);
  uint64_t first = 0;
  for (uint64_t i = 0; i < prompts; ++i) {
    const uint64_t size = prompt_tokens / prompts + (i < prompt_tokens % prompts ? 1 : 0);
    plan.push_back({first, size, true});
    first += size;
  }
  for (uint64_t left = generated_tokens; left > 0;) {
    const uint64_t size = std::min(left, block);
    plan.push_back({first, size, false});
    first += size;
    left -= size;
  }
  return plan;
}

uint64_t SegmentSlabBytes(const Options& options, const SegmentSpec& spec) {
  uint64_t bytes = RowBytes(options, spec);
  if (options.estimator == Estimator::kLsh && spec.prompt) {
    bytes += PromptTableBytes(options, static_cast<uint32_t>(spec.capacity));
  }
  return RoundUp(bytes, kPage);
}

uint64_t SegmentBytes(const Options& options, const SegmentSpec& spec) {
  uint64_t bytes = SegmentSlabBytes(options, spec);
  if (options.estimator == Estimator::kLsh && !spec.prompt) {
    bytes += GeneratedTableBytes(options, static_cast<uint32_t>(spec.capacity));
  }
  return bytes;
}

}  // namespace passel::host
