// Merging and normalising partial attention results (runtime/base/partial.h).

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kThreads = 128;

// One block a (head, row) of `into`. Every thread walks the row's entries in order and keeps its
// own copy of max and den, so that no thread waits for another.
__global__ void __launch_bounds__(kThreads)
    MergeKernel(Partials into, Partials from, const int32_t* order, const int32_t* row_begin,
                const int32_t* first_heads) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  const int32_t head = static_cast<int32_t>(blockIdx.x);
  const int64_t row = blockIdx.y;
  const int32_t begin = row_begin[row], end = row_begin[row + 1];
  if (begin == end) return;
  const int64_t dim = into.num.cols / into.max.cols;
  float* num = F32Row(into.num, row) + head * dim;
  float max = F32Row(into.max, row)[head];
  float den = F32Row(into.den, row)[head];
  __syncthreads();  // thread 0 writes below what all have read here
  for (int32_t e = begin; e < end; ++e) {
    const int32_t i = order[e];
    const int64_t h = head - first_heads[i];
    if (h < 0 || h >= from.max.cols) continue;
    const float from_max = F32Row(from.max, i)[h];
    if (from_max == -INFINITY) continue;
    const float new_max = fmaxf(max, from_max);
    const float own = RescaleWeight(max, new_max), other = RescaleWeight(from_max, new_max);
    den = own * den + other * F32Row(from.den, i)[h];
    max = new_max;
    const float* from_num = F32Row(from.num, i) + h * dim;
    for (int64_t j = threadIdx.x; j < dim; j += kThreads) {
      num[j] = own * num[j] + other * from_num[j];
    }
  }
  if (threadIdx.x == 0) {
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

void LaunchMergePartials(cudaStream_t stream, Partials into, Partials from, const int32_t* order,
                         const int32_t* row_begin, const int32_t* first_heads) {
  if (from.max.rows == 0 || into.max.rows == 0) return;
  const dim3 grid(static_cast<unsigned>(into.max.cols), static_cast<unsigned>(into.max.rows));
  LaunchBehind(stream, grid, kThreads, 0, "launch of MergePartials", MergeKernel, into, from, order,
               row_begin, first_heads);
}

void LaunchNormalizePartials(cudaStream_t stream, Partials partials, Tensor out) {
  const int64_t dim = partials.num.cols / partials.max.cols;
  ForElements(stream, out.rows, out.cols, [=] __device__(int64_t i, int64_t j) {
    const float den = F32Row(partials.den, i)[j / dim];
    StoreElement(out, i, j, den > 0 ? F32Row(partials.num, i)[j] / den : 0.0f);
  });
}

}  // namespace passel::gpu::cuda
