#include <algorithm>
#include <string>

#include "runtime/base/error.h"
#include "runtime/model/transformer.h"

namespace passel::model {
namespace {

struct Run {
  int32_t first, count;
};

// Run `part` of `parts` near-equal runs of [0, total), bounds at multiples of `step` where there is
// enough to give every part one.
Run Part(int32_t total, int32_t part, int32_t parts, int32_t step) {
  const int64_t units = int64_t{total} / step;
  if (units < parts) return step == 1 ? Run{0, 0} : Part(total, part, parts, 1);
  const auto bound = [&](int64_t i) {
    return i == parts ? total : static_cast<int32_t>(units * i / parts * step);
  };
  return {bound(part), bound(part + 1) - bound(part)};
}

}  // namespace

TensorSlice SliceFor(const ModelConfig& config, int32_t rank, int32_t size) {
  Check(size > 0 && rank >= 0 && rank < size, "SliceFor: rank out of range");
  const int32_t group = config.heads / config.kv_heads;
  TensorSlice slice;
  if (size <= config.kv_heads) {
    const Run kv = Part(config.kv_heads, rank, size, 1);
    slice.first_kv_head = kv.first;
    slice.kv_heads = kv.count;
    slice.first_head = kv.first * group;
    slice.heads = kv.count * group;
  } else {
    const auto kv_of = [&](int32_t r) {
      return static_cast<int32_t>(int64_t{r} * config.kv_heads / size);
    };
    const int32_t kv = kv_of(rank);
    int32_t first_rank = rank;
    while (first_rank > 0 && kv_of(first_rank - 1) == kv) --first_rank;
    int32_t end_rank = rank + 1;
    while (end_rank < size && kv_of(end_rank) == kv) ++end_rank;
    const Run heads = Part(group, rank - first_rank, end_rank - first_rank, 1);
    slice.first_kv_head = kv;
    slice.kv_heads = 1;
    slice.first_head = kv * group + heads.first;
    slice.heads = heads.count;
  }
  // The matrix products work in panels of 64 rows or columns.
  const Run ffn = Part(config.ffn, rank, size, 64);
  slice.first_ffn = ffn.first;
  slice.ffn = ffn.count;
  const Run vocab = Part(config.vocab, rank, size, 64);
  slice.first_vocab = vocab.first;
  slice.vocab = vocab.count;
  if (slice.heads == 0 || slice.ffn == 0 || slice.vocab == 0) {
    throw Error(ErrorClass::kUsage, "cluster.model_ranks is " + std::to_string(size) +
                                        ": a model of " + std::to_string(config.heads) +
                                        " heads and " + std::to_string(config.kv_heads) +
                                        " KV heads cannot be cut that fine");
  }
  return slice;
}

}  // namespace passel::model
