#pragma once

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <source_location>
#include <string_view>

namespace passel::gpu::cuda {

// Turns CUDA's codes into our errors: kMemory where the device or the driver is out of memory, kBug
// for all else, naming the call, the code and the line.
void CheckCuda(cudaError_t code, std::string_view call,
               std::source_location where = std::source_location::current());
void CheckCublas(cublasStatus_t code, std::string_view call,
                 std::source_location where = std::source_location::current());

}  // namespace passel::gpu::cuda
