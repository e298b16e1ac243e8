// Merging and normalising partial attention results (runtime/base/partial.h).

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"
#include "gpu/cuda/list_argument.cuh"

namespace passel::gpu::cuda {
namespace {

constexpr int kHeadsEach = 4;  // of a block: a warp each
constexpr int kFours = 2;      // of a lane: head_dim ≤ 256

// Up to four neighbouring elements of what others than this GPU write: not kept in L1. kAligned:
// always four, by one request. No branch then, behind which the next requests would wait.
template <bool kAligned>
__device__ inline Four LoadForeignFour(const float* at, int count) {
  if constexpr (kAligned) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(at));
    return {{v.x, v.y, v.z, v.w}};
  }
  Four four{};
  for (int k = 0; k < count; ++k) four.value[k] = __ldcg(at + k);
  return four;
}
template <bool kAligned>
__device__ inline Four LoadForeignFour(const __nv_bfloat16* at, int count) {
  if constexpr (kAligned) {
    const uint2 v = __ldcg(reinterpret_cast<const uint2*>(at));
    return {{__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),
             __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u)}};
  }
  Four four{};
  for (int k = 0; k < count; ++k) {
    const unsigned short bits = __ldcg(reinterpret_cast<const unsigned short*>(at) + k);
    four.value[k] = __uint_as_float(unsigned{bits} << 16);
  }
  return four;
}

// What a lane holds of a head's partial.
struct LanePartial {
  bool there = false;
  float scalar;  // lane 0: max, lane 1: den; one request, as they lie side by side
  Four num[kFours];
};

// One warp a (head, row) of `into`: walks the row's entries in order, two of them asked for ahead:
// they lie in host memory, far away. They are there when this is launched, so the first ones are
// asked for before the kernels before are through. T: of from.num.
template <typename T, bool kAligned, size_t kWords>
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
  const auto count_at = [&](int at) { return static_cast<int>(min(dim - at, int64_t{4})); };
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
      for (int i = 0; i < kFours; ++i) {
        const int at = 4 * lane + 128 * i;
        if (at < dim) part.num[i] = LoadForeignFour<kAligned>(num + at, count_at(at));
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

  float max = F32Row(into.max, row)[head];
  float den = F32Row(into.den, row)[head];
  __syncwarp();  // lane 0 writes below what all have read here
  Four own[kFours];
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int at = 4 * lane + 128 * i;
    if (at < dim) own[i] = LoadFour(into.num, row, head * dim + at, count_at(at));
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
    for (int i = 0; i < kFours; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        own[i].value[k] = weight * own[i].value[k] + part_weight * part.num[i].value[k];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int at = 4 * lane + 128 * i;
    if (at < dim) StoreFour(into.num, row, head * dim + at, count_at(at), own[i]);
  }
  if (lane == 0) {
    F32Row(into.max, row)[head] = max;
    F32Row(into.den, row)[head] = den;
  }
}

template <typename T, bool kAligned>
void LaunchMerge(cudaStream_t stream, Partials into, Partials from, std::span<const int32_t> list,
                 const int32_t* uploaded) {
  const dim3 grid(static_cast<unsigned>((into.max.cols + kHeadsEach - 1) / kHeadsEach),
                  static_cast<unsigned>(into.max.rows));
  WithListArgument(list, uploaded, [&]<size_t kWords>(const ListArgument<kWords>& argument) {
    LaunchBehind(stream, grid, 32 * kHeadsEach, 0, "launch of MergePartials",
                 MergeKernel<T, kAligned, kWords>, into, from, argument);
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
  const auto launch = [&]<typename T>(T) {
    const bool aligned = reinterpret_cast<uintptr_t>(from.num.data) % (4 * sizeof(T)) == 0 &&
                         from.num.stride % 4 == 0 && into.num.cols / into.max.cols % 4 == 0;
    if (aligned) return LaunchMerge<T, true>(stream, into, from, list, uploaded);
    LaunchMerge<T, false>(stream, into, from, list, uploaded);
  };
  if (from.num.type == DType::kBf16) return launch(__nv_bfloat16{});
  launch(float{});
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
