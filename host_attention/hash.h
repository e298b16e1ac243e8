#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "host_attention/kernels.h"

namespace passel::host {

// SimHash (DESIGN 2) on the CPU: for callers without a model rank to do it. Immutable, so it may be
// used by many threads at once.
class Hasher {
 public:
  // projections: [head_dim, k·l], column t·k + b is bit b of table t.
  Hasher(std::span<const float> projections, uint32_t head_dim, uint32_t k, uint32_t l);
  // x: [count, head_dim], minus mean [head_dim] where given (null: 0); codes: [count, l].
  void Hash(const float* x, size_t count, const float* mean, uint16_t* codes) const;

 private:
  const Kernels& kernels_;
  uint32_t head_dim_, k_, l_;
  size_t columns_;                  // k·l padded to a multiple of 32
  std::vector<float> projections_;  // [head_dim, columns]
};

}  // namespace passel::host
