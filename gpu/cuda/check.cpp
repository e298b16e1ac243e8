#include "gpu/cuda/check.h"

#include <string>

#include "runtime/base/error.h"

namespace passel::gpu::cuda {
namespace {

std::string Place(std::string_view call, const std::source_location& where) {
  return std::string(call) + " (" + where.file_name() + ":" + std::to_string(where.line()) + "): ";
}

}  // namespace

void CheckCuda(cudaError_t code, std::string_view call, std::source_location where) {
  if (code == cudaSuccess) [[likely]] {
    return;
  }
  cudaGetLastError();  // a code that is not sticky must not be reported again by the next call
  throw Error(
      code == cudaErrorMemoryAllocation ? ErrorClass::kMemory : ErrorClass::kBug,
      "CUDA: " + Place(call, where) + cudaGetErrorName(code) + ", " + cudaGetErrorString(code));
}

void CheckCublas(cublasStatus_t code, std::string_view call, std::source_location where) {
  if (code == CUBLAS_STATUS_SUCCESS) [[likely]] {
    return;
  }
  throw Error(code == CUBLAS_STATUS_ALLOC_FAILED ? ErrorClass::kMemory : ErrorClass::kBug,
              "cuBLAS: " + Place(call, where) + cublasGetStatusString(code));
}

}  // namespace passel::gpu::cuda
