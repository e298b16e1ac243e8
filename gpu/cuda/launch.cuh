#pragma once

#include <utility>

#include "gpu/cuda/check.h"

// Launches of a kernel behind another without the gap between them (programmatic dependent launch,
// compute capability 9): its blocks start as soon as all blocks of the kernel before have called
// LetNextKernelStart or ended, do what does not depend on it, and then wait.
namespace passel::gpu::cuda {

// Until all kernels before are through and their writes visible. Every thread of a kernel launched
// with LaunchBehind calls it before it touches what others write, and before it ends.
__device__ inline void WaitForEarlierKernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename... Parameters, typename... Arguments>
void LaunchBehind(cudaStream_t stream, dim3 grid, unsigned threads, size_t shared_bytes,
                  const char* what, void (*kernel)(Parameters...), Arguments&&... arguments) {
  int device = 0, major = 0;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
            "cudaDeviceGetAttribute");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = major >= 9 ? 1 : 0;
  CheckCuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace passel::gpu::cuda
