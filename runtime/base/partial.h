#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

namespace passel {

// The partial attention result of one query over a subset A of tokens (DESIGN: estimator):
//   max = max_i s_i,  den = Σ e^{s_i − max},  num = Σ e^{s_i − max} v_i,  i ∈ A
// with natural logarithms throughout. Exact and sampled partials merge alike. The empty partial is
// (−∞, 0, 0). `num` has head_dim elements.
struct PartialRef {
  float* max;
  float* den;
  float* num;
};

inline constexpr float kEmptyMax = -std::numeric_limits<float>::infinity();

inline void ClearPartial(PartialRef p, size_t head_dim) {
  *p.max = kEmptyMax;
  *p.den = 0;
  for (size_t j = 0; j < head_dim; ++j) p.num[j] = 0;
}

// into ← into ∪ from (the subsets must be disjoint). Merging two empty partials gives the empty
// one.
inline void MergePartial(PartialRef into, float max, float den, const float* num, size_t head_dim) {
  if (max == kEmptyMax) return;
  if (max <= *into.max) {
    const float w = std::exp(max - *into.max);
    *into.den += w * den;
    for (size_t j = 0; j < head_dim; ++j) into.num[j] += w * num[j];
  } else {
    const float w = *into.max == kEmptyMax ? 0.0f : std::exp(*into.max - max);
    *into.max = max;
    *into.den = w * *into.den + den;
    for (size_t j = 0; j < head_dim; ++j) into.num[j] = w * into.num[j] + num[j];
  }
}

}  // namespace passel
