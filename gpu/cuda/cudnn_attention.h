#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "gpu/device.h"

namespace passel::gpu::cuda {

// Causal attention of prefill chunks by cuDNN's fused kernels. A plan serves every chunk up to its
// number of rows and every position, as it takes both counts from device memory.
class CudnnAttention {
 public:
  explicit CudnnAttention(cudaStream_t stream);
  ~CudnnAttention();
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;

  // As Device::CausalAttention. False, and nothing done, where k and v have not the rows up to the
  // next multiple of kCausalPadding, and where this cuDNN has no kernel for the shape.
  bool Run(const AttentionShape& shape, Tensor q, Tensor k, Tensor v, int64_t start, int64_t window,
           Tensor out);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace passel::gpu::cuda
