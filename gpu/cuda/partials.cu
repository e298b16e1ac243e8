// Merging and normalising partial attention results (runtime/base/partial.h).

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"
#include "gpu/cuda/list_argument.cuh"

namespace passel::gpu::cuda {
namespace {

constexpr int kHeadsEach = 4;  // of a block: a warp each
constexpr int kPairs = 4;      // of a lane: head_dim ≤ 256

// Elements at and at + 1 of what others than this GPU write: not kept in L1.
__device__ inline float2 LoadForeignPair(const float* at) { return {__ldcg(at), __ldcg(at + 1)}; }
__device__ inline float2 LoadForeignPair(const __nv_bfloat16* at) {
  const unsigned pair = __ldcg(reinterpret_cast<const unsigned*>(at));
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// What a lane holds of a head's partial.
struct LanePartial {
  bool there = false;
  float scalar;  // lane 0: max, lane 1: den; one request, as they lie side by side
  float2 num[kPairs];
};

// One warp a (head, row) of `into`: walks the row's entries in order, two of them asked for ahead:
// they lie in host memory, far away. They are there when this is launched, so the first ones are
// asked for before the kernels before are through. T: of from.num.
template <typename T, size_t kWords>
__global__ void __launch_bounds__(32 * kHeadsEach)
    MergeKernel(Partials into, Partials from, const __grid_constant__ ListArgument<kWords> list) {
  LetNextKernelStart();
  if (list.uploaded != nullptr) WaitForEarlierKernels();
  const int64_t head = int64_t{blockIdx.x} * kHeadsEach + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.y;
  const int64_t dim = into.num.cols / into.max.cols;
  const int32_t end = head < into.max.cols ? list[row + 1] : 0;
  int32_t next = list[row];
  // The next entry that has this head.
  const auto load = [&] {
    LanePartial part;
    while (next < end && !part.there) {
      const int64_t entry = into.max.rows + 1 + 2 * int64_t{next++};
      const int64_t from_row = list[entry], h = head - list[entry + 1];
      if (h < 0 || h >= from.max.cols) continue;
      part.there = true;
      const T* num = static_cast<const T*>(from.num.data) + from_row * from.num.stride + h * dim;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int at = 2 * lane + 64 * i;
        if (at < dim) part.num[i] = LoadForeignPair(num + at);
      }
      if (lane < 2) {
        part.scalar = __ldcg(F32Row(lane == 0 ? from.max : from.den, from_row) + h);
      }
    }
    return part;
  };
  LanePartial part = load(), ahead = load();
  if (list.uploaded == nullptr) WaitForEarlierKernels();
  if (!part.there) return;

  float* num = F32Row(into.num, row) + head * dim;
  float max = F32Row(into.max, row)[head];
  float den = F32Row(into.den, row)[head];
  __syncwarp();  // lane 0 writes below what all have read here
  float2 own[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = 2 * lane + 64 * i;
    if (at < dim) own[i] = {num[at], num[at + 1]};
  }
  for (; part.there; part = ahead, ahead = load()) {
    const float part_max = __shfl_sync(0xffffffffu, part.scalar, 0);
    if (part_max == -INFINITY) continue;
    const float new_max = fmaxf(max, part_max);
    const float weight = RescaleWeight(max, new_max);
    const float part_weight = RescaleWeight(part_max, new_max);
    den = weight * den + part_weight * __shfl_sync(0xffffffffu, part.scalar, 1);
    max = new_max;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      own[i].x = weight * own[i].x + part_weight * part.num[i].x;
      own[i].y = weight * own[i].y + part_weight * part.num[i].y;
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = 2 * lane + 64 * i;
    if (at < dim) num[at] = own[i].x, num[at + 1] = own[i].y;
  }
  if (lane == 0) {
    F32Row(into.max, row)[head] = max;
    F32Row(into.den, row)[head] = den;
  }
}

template <typename T>
void LaunchMerge(cudaStream_t stream, Partials into, Partials from, std::span<const int32_t> list,
                 const int32_t* uploaded) {
  const dim3 grid(static_cast<unsigned>((into.max.cols + kHeadsEach - 1) / kHeadsEach),
                  static_cast<unsigned>(into.max.rows));
  WithListArgument(list, uploaded, [&]<size_t kWords>(const ListArgument<kWords>& argument) {
    LaunchBehind(stream, grid, 32 * kHeadsEach, 0, "launch of MergePartials",
                 MergeKernel<T, kWords>, into, from, argument);
  });
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
                         std::span<const int32_t> list, const int32_t* uploaded) {
  if (from.num.type == DType::kBf16) {
    return LaunchMerge<__nv_bfloat16>(stream, into, from, list, uploaded);
  }
  LaunchMerge<float>(stream, into, from, list, uploaded);
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
