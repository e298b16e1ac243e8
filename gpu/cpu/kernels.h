#pragma once

#include <cstdint>
#include <string_view>

#include "runtime/base/bf16.h"

namespace passel::gpu::cpu {

// The CPU backend's own vector loops, one set per instruction set. All sets meet the same
// tolerances; bits may differ between them, so a job runs one.
struct Kernels {
  const char* name;  // "scalar", "avx2", "avx512"

  void (*to_bf16)(const float* in, bf16* out, int64_t n);
  void (*to_f32)(const bf16* in, float* out, int64_t n);
  // residual += delta (where not null); out = residual / √(mean(residual²) + eps) · weight. `out`
  // may be `residual`.
  void (*add_rms_norm)(float* residual, const float* delta, const float* weight, float eps,
                       int64_t n, float* out);
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t n);
  // (x[j], x[half + j]) rotated by the angle of cosine c[j], sine s[j].
  void (*rotate)(float* x, const float* c, const float* s, int64_t half);
  // One row of scores, of which [begin, end) count: p[j] = e^{scale·s[j] − m'}, 0 elsewhere, in
  // place over `width` (a multiple of 16) elements, with m' = max(m, scale·s). Updates m and den
  // (den ← den·e^{m − m'} + Σp); returns e^{m − m'}, by which earlier sums shrink.
  float (*softmax_row)(float* s, int64_t begin, int64_t end, int64_t width, float scale, float* m,
                       float* den);
  // acc = acc · a + x.
  void (*scale_add)(float* acc, float a, const float* x, int64_t n);
  // Attends `tokens` (≤ 64) tokens for `group` query heads of one KV head, adding to their
  // partials. q: [group, head_dim], scaled; kv: token t's K row at kv + t·token_stride, V row
  // head_dim behind; max, den: [group]; num: [group, head_dim]. head_dim is a multiple of 16.
  void (*attend_page)(const float* q, const bf16* kv, int64_t token_stride, int64_t tokens,
                      int64_t group, int64_t head_dim, float* max, float* den, float* num);
  // Bit j: c[j] > 0, for 64 values.
  uint64_t (*positive_mask)(const float* c);
};

// The best set this machine runs, or the one that `forced` ("scalar", "avx2", "avx512"; empty:
// none) names. Throws Error{kUsage} for a name that is unknown or that this machine lacks.
const Kernels& SelectKernels(std::string_view forced);

}  // namespace passel::gpu::cpu
