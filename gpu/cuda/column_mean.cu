// Column means in float64: blocks of rows first, then over the blocks, in a fixed order.

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kBlockRows = 512;
constexpr int kLanes = 8;  // rows summed side by side in a block of 32 columns

int64_t BlocksOfRows(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

__global__ void __launch_bounds__(32 * kLanes) SumRows(Tensor x, double* sums) {
  __shared__ double parts[kLanes][32];
  const int64_t j = int64_t{blockIdx.y} * 32 + threadIdx.x;
  const int64_t begin = int64_t{blockIdx.x} * kBlockRows;
  const int64_t end = min(x.rows, begin + kBlockRows);
  double sum = 0;
  if (j < x.cols) {
    for (int64_t i = begin + threadIdx.y; i < end; i += kLanes) {
      sum += static_cast<double>(LoadElement(x, i, j));
    }
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && j < x.cols) {
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += parts[lane][threadIdx.x];
    sums[blockIdx.x * x.cols + j] = total;
  }
}

}  // namespace

size_t ColumnMeanScratch(int64_t rows, int64_t cols) {
  return static_cast<size_t>(BlocksOfRows(rows) * cols) * sizeof(double);
}

void LaunchColumnMean(cudaStream_t stream, Tensor x, Tensor mean, double* sums) {
  const int64_t blocks = BlocksOfRows(x.rows);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((x.cols + 31) / 32));
  SumRows<<<grid, dim3(32, kLanes), 0, stream>>>(x, sums);
  CheckCuda(cudaGetLastError(), "launch of ColumnMean");
  const int64_t rows = x.rows;
  ForElements(stream, 1, x.cols, [=] __device__(int64_t, int64_t j) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[b * mean.cols + j];
    F32Row(mean, 0)[j] = static_cast<float>(total / static_cast<double>(rows));
  });
}

}  // namespace passel::gpu::cuda
