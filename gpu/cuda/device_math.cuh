#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "gpu/cuda/check.h"
#include "gpu/cuda/launch.cuh"
#include "gpu/device.h"

namespace passel::gpu::cuda {

// Element (i, j) of an f32 or bf16 matrix.
__device__ inline float LoadElement(const Tensor& t, int64_t i, int64_t j) {
  const int64_t at = i * t.stride + j;
  if (t.type == DType::kF32) return static_cast<const float*>(t.data)[at];
  return __bfloat162float(static_cast<const __nv_bfloat16*>(t.data)[at]);
}

__device__ inline void StoreElement(const Tensor& t, int64_t i, int64_t j, float value) {
  const int64_t at = i * t.stride + j;
  if (t.type == DType::kF32) {
    static_cast<float*>(t.data)[at] = value;
  } else {
    static_cast<__nv_bfloat16*>(t.data)[at] = __float2bfloat16_rn(value);
  }
}

__device__ inline float* F32Row(const Tensor& t, int64_t i) {
  return static_cast<float*>(t.data) + i * t.stride;
}

// Weight e^{max − new_max} of a partial when its maximum becomes new_max; 0 for the empty one.
__device__ inline float RescaleWeight(float max, float new_max) {
  return max == -INFINITY ? 0.0f : expf(max - new_max);
}

template <typename F>
__global__ void ElementsKernel(int64_t cols, int64_t block_cols, F f) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  const int64_t i = blockIdx.x;
  const int64_t end = min(cols, (int64_t{blockIdx.y} + 1) * block_cols);
  for (int64_t j = int64_t{blockIdx.y} * block_cols + threadIdx.x; j < end; j += blockDim.x) {
    f(i, j);
  }
}

// f(i, j) for every element of a rows × cols matrix.
template <typename F>
void ForElements(cudaStream_t stream, int64_t rows, int64_t cols, F f) {
  constexpr int64_t kBlockCols = 1024;
  if (rows == 0 || cols == 0) return;
  const dim3 grid(static_cast<unsigned>(rows),
                  static_cast<unsigned>((cols + kBlockCols - 1) / kBlockCols));
  const auto threads = static_cast<unsigned>(cols < 256 ? (cols + 31) / 32 * 32 : 256);
  LaunchBehind(stream, grid, threads, 0, "launch of an elementwise kernel", ElementsKernel<F>, cols,
               kBlockCols, f);
}

}  // namespace passel::gpu::cuda
