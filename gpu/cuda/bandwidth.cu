#include <algorithm>

#include "gpu/cuda/bandwidth.h"
#include "gpu/cuda/check.h"
#include "gpu/cuda/memory.h"

namespace passel::gpu {
namespace {

// Every thread reads 16 bytes at a time, four under way, and keeps what it cannot know to be 0.
__global__ void __launch_bounds__(512) ReadKernel(const uint4* data, size_t count, uint32_t* out) {
  uint32_t seen = 0;
  const size_t step = size_t{gridDim.x} * blockDim.x;
  size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) v[u] = __ldcs(data + i + u * step);
#pragma unroll
    for (int u = 0; u < 4; ++u) seen |= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  if (seen == 0x12345678u) *out = seen;
}

}  // namespace

double CudaReadBandwidth() {
  using cuda::CheckCuda;
  size_t free_bytes = 0, total = 0;
  if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  const size_t bytes = std::min(size_t{4} << 30, free_bytes / 2 / 64 * 64);
  const auto buffer = cuda::MakeDeviceBuffer(nullptr, bytes);
  CheckCuda(cudaMemset(buffer->data(), 0x5a, bytes), "cudaMemset");
  int device = 0, processors = 0;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
            "cudaDeviceGetAttribute");
  cudaEvent_t begin = nullptr, end = nullptr;
  CheckCuda(cudaEventCreate(&begin), "cudaEventCreate");
  CheckCuda(cudaEventCreate(&end), "cudaEventCreate");
  double best = 0;
  for (int i = 0; i < 8; ++i) {
    CheckCuda(cudaEventRecord(begin), "cudaEventRecord");
    ReadKernel<<<4 * processors, 512>>>(static_cast<const uint4*>(buffer->data()),
                                        bytes / sizeof(uint4),
                                        static_cast<uint32_t*>(buffer->data()));
    CheckCuda(cudaGetLastError(), "launch of a read");
    CheckCuda(cudaEventRecord(end), "cudaEventRecord");
    CheckCuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    CheckCuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    best = std::max(best, static_cast<double>(bytes) / (static_cast<double>(ms) * 1e-3));
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best;
}

}  // namespace passel::gpu
