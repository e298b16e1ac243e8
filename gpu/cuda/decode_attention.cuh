#pragma once

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

// What the kernels of decode attention share.
namespace passel::gpu::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = 32 * kDecodeWarps;

struct DecodeArgs {
  Tensor q;
  const __nv_bfloat16* pool;
  const int32_t* pages;
  const DecodeRow* rows;
  AttentionShape shape;
  float* scratch;
  Partials out;
};

// Max, den and num of a query head, of a split (in scratch) or of the whole row (in out).
struct HeadResult {
  float* max;
  float* den;
  float* num;
};

__device__ inline HeadResult SplitResult(const DecodeArgs& a, int64_t partial, int32_t head) {
  float* base = a.scratch + (partial * a.shape.heads + head) * (a.shape.head_dim + 2);
  return {base, base + 1, base + 2};
}

__device__ inline HeadResult RowResult(const DecodeArgs& a, int64_t row, int32_t head) {
  return {F32Row(a.out.max, row) + head, F32Row(a.out.den, row) + head,
          F32Row(a.out.num, row) + int64_t{head} * a.shape.head_dim};
}

// On the matrix units, where FitsMatrixDecode: the splits of the rows that are not short
// (decode_matrix.cu).
__host__ __device__ inline bool IsShort(int64_t tokens) { return tokens <= kMaxShortTokens; }
bool FitsMatrixDecode(const AttentionShape& shape);
void LaunchMatrixSplits(cudaStream_t stream, const DecodeArgs& args, int32_t max_splits);

}  // namespace passel::gpu::cuda
