// Merging and normalising partial attention results (runtime/base/partial.h).

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kHeadsEach = 4;  // of a block: a warp each

// Elements at and at + 1.
template <typename T>
__device__ inline float2 LoadPair(const T* at) {
  if constexpr (sizeof(T) == sizeof(float)) return {at[0], at[1]};
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at));
}

// One warp a (head, row) of `into`: walks the row's entries in order. What it reads may be host
// memory, far away: max, den and num of an entry are asked for together. T: of from.num.
template <typename T>
__global__ void __launch_bounds__(32 * kHeadsEach)
    MergeKernel(Partials into, Partials from, const MergeEntry* entries, const int32_t* row_begin) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  const int64_t head = int64_t{blockIdx.x} * kHeadsEach + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.y;
  if (head >= into.max.cols) return;
  const int32_t begin = row_begin[row], end = row_begin[row + 1];
  if (begin == end) return;
  const int64_t dim = into.num.cols / into.max.cols;
  float* num = F32Row(into.num, row) + head * dim;
  float max = F32Row(into.max, row)[head];
  float den = F32Row(into.den, row)[head];
  __syncwarp();             // lane 0 writes below what all have read here
  constexpr int kEach = 4;  // pairs of a lane: head_dim ≤ 256
  float2 own[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = 2 * lane + 64 * i;
    own[i] = at < dim ? LoadPair(num + at) : float2{};
  }
  for (int32_t e = begin; e < end; ++e) {
    const MergeEntry entry = entries[e];
    const int64_t h = head - entry.first_head;
    if (h < 0 || h >= from.max.cols) continue;
    const T* from_num =
        static_cast<const T*>(from.num.data) + entry.from_row * from.num.stride + h * dim;
    float2 other[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = 2 * lane + 64 * i;
      other[i] = at < dim ? LoadPair(from_num + at) : float2{};
    }
    const float from_max = F32Row(from.max, entry.from_row)[h];
    const float from_den = F32Row(from.den, entry.from_row)[h];
    if (from_max == -INFINITY) continue;
    const float new_max = fmaxf(max, from_max);
    const float weight = RescaleWeight(max, new_max);
    const float from_weight = RescaleWeight(from_max, new_max);
    den = weight * den + from_weight * from_den;
    max = new_max;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      own[i].x = weight * own[i].x + from_weight * other[i].x;
      own[i].y = weight * own[i].y + from_weight * other[i].y;
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = 2 * lane + 64 * i;
    if (at < dim) num[at] = own[i].x, num[at + 1] = own[i].y;
  }
  if (lane == 0) {
    F32Row(into.max, row)[head] = max;
    F32Row(into.den, row)[head] = den;
  }
}

}  // namespace

void LaunchClearPartials(cudaStream_t stream, Partials partials) {
  ForElements(stream, partials.num.rows, partials.num.cols, [=] __device__(int64_t i, int64_t j) {
    F32Row(partials.num, i)[j] = 0.0f;
    if (j < partials.max.cols) {
      F32Row(partials.max, i)[j] = -INFINITY;
      F32Row(partials.den, i)[j] = 0.0f;
    }
  });
}

void LaunchMergePartials(cudaStream_t stream, Partials into, Partials from,
                         const MergeEntry* entries, const int32_t* row_begin) {
  if (from.max.rows == 0 || into.max.rows == 0) return;
  const dim3 grid(static_cast<unsigned>((into.max.cols + kHeadsEach - 1) / kHeadsEach),
                  static_cast<unsigned>(into.max.rows));
  const auto launch = [&](auto kernel) {
    LaunchBehind(stream, grid, 32 * kHeadsEach, 0, "launch of MergePartials", kernel, into, from,
                 entries, row_begin);
  };
  if (from.num.type == DType::kBf16) return launch(MergeKernel<__nv_bfloat16>);
  launch(MergeKernel<float>);
}

void LaunchNormalizePartials(cudaStream_t stream, Partials partials, Tensor out) {
  const int64_t dim = partials.num.cols / partials.max.cols;
  ForFours(
      stream, out.rows, partials.max.cols, dim,
      [=] __device__(int64_t i, int64_t h, int64_t j, int count) {
        const float den = F32Row(partials.den, i)[h];
        Four quotient = LoadFour(partials.num, i, h * dim + j, count);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          quotient.value[k] = den > 0 ? quotient.value[k] / den : 0.0f;
        }
        return quotient;
      },
      [=] __device__(int64_t i, int64_t h, int64_t j, int count, const Four& quotient) {
        StoreFour(out, i, h * dim + j, count, quotient);
      });
}

}  // namespace passel::gpu::cuda
