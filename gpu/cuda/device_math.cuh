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

// Up to four neighbouring elements of a row; 0 beyond `count`.
struct Four {
  float value[4];
};

__device__ inline Four LoadFour(const Tensor& t, int64_t i, int64_t j, int count) {
  Four four;
  if (t.type == DType::kF32) {
    const float* from = F32Row(t, i) + j;
    if (count == 4 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      return {{v.x, v.y, v.z, v.w}};
    }
  } else {
    const auto* from = static_cast<const __nv_bfloat16*>(t.data) + i * t.stride + j;
    if (count == 4 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      return {{__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),
               __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u)}};
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) four.value[k] = k < count ? LoadElement(t, i, j + k) : 0.0f;
  return four;
}

__device__ inline void StoreFour(const Tensor& t, int64_t i, int64_t j, int count,
                                 const Four& four) {
  const float* v = four.value;
  if (t.type == DType::kF32) {
    float* to = F32Row(t, i) + j;
    if (count == 4 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
      return;
    }
  } else {
    auto* to = static_cast<__nv_bfloat16*>(t.data) + i * t.stride + j;
    if (count == 4 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
      const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v[0], v[1]),
                                       __floats2bfloat162_rn(v[2], v[3])};
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < count) StoreElement(t, i, j + k, v[k]);
  }
}

constexpr int kFoursThreads = 256;
constexpr int kFoursBlocks = 264;  // at most: they have room beside the blocks of a product

// A thread has four fours under way.
template <typename Load, typename Store>
__global__ void __launch_bounds__(kFoursThreads)
    FoursKernel(uint32_t fours, uint32_t heads, uint32_t dim, Load load, Store store) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  const uint32_t of_head = (dim + 3) / 4, step = gridDim.x * kFoursThreads;
  constexpr int kEach = 4;
  for (uint32_t first = blockIdx.x * kFoursThreads + threadIdx.x; first < fours;
       first += kEach * step) {
    decltype(load(int64_t{}, int64_t{}, int64_t{}, int{})) values[kEach];
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const uint32_t at = first + e * step;
        if (at >= fours) break;
        const uint32_t head = at / of_head, j = at % of_head * 4;
        const int count = static_cast<int>(min(dim - j, 4u));
        const int64_t i = head / heads, h = head % heads;
        if (pass == 0) {
          values[e] = load(i, h, j, count);
        } else {
          store(i, h, j, count, values[e]);
        }
      }
    }
  }
}

// store(i, h, j, count, load(i, h, j, count)) for all runs of up to 4 elements from j on of every
// one of the `heads` heads of `dim` elements of all rows i.
template <typename Load, typename Store>
void ForFours(cudaStream_t stream, int64_t rows, int64_t heads, int64_t dim, Load load,
              Store store) {
  const int64_t fours = rows * heads * ((dim + 3) / 4);
  if (fours == 0) return;
  const int64_t blocks = (fours + kFoursThreads - 1) / kFoursThreads;
  const dim3 grid(static_cast<unsigned>(blocks < kFoursBlocks ? blocks : kFoursBlocks));
  LaunchBehind(stream, grid, kFoursThreads, 0, "launch of an elementwise kernel",
               FoursKernel<Load, Store>, static_cast<uint32_t>(fours), static_cast<uint32_t>(heads),
               static_cast<uint32_t>(dim), load, store);
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
