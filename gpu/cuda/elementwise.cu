// Kernels that treat rows or elements one by one.

#include <cstring>

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kNormThreads = 512;
constexpr int kKept = 16;  // elements of a row that a thread keeps between the two passes

// One block a row: the bits of a row do not depend on the batch.
__global__ void __launch_bounds__(kNormThreads)
    AddRmsNormKernel(Tensor residual, Tensor delta, const float* weight, float eps, Tensor out) {
  __shared__ float sums[kNormThreads / 32];
  LetNextKernelStart();
  float scales[kKept];  // weights never change, so they are read before the wait
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t j = threadIdx.x + i * kNormThreads;
    scales[i] = j < residual.cols ? __ldg(weight + j) : 0.0f;
  }
  WaitForEarlierKernels();
  float* row = F32Row(residual, blockIdx.x);
  const float* add = delta.data ? F32Row(delta, blockIdx.x) : nullptr;
  float squares = 0, kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t j = threadIdx.x + i * kNormThreads;
    kept[i] = j < residual.cols ? row[j] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t j = threadIdx.x + i * kNormThreads;
    if (add && j < residual.cols) {
      kept[i] += add[j];
      row[j] = kept[i];
    }
    squares = fmaf(kept[i], kept[i], squares);
  }
  for (int64_t j = threadIdx.x + kKept * kNormThreads; j < residual.cols; j += kNormThreads) {
    float x = row[j];
    if (add) {
      x += add[j];
      row[j] = x;
    }
    squares = fmaf(x, x, squares);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kNormThreads / 32; ++w) total += sums[w];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(residual.cols) + eps);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t j = threadIdx.x + i * kNormThreads;
    if (j < residual.cols) StoreElement(out, blockIdx.x, j, kept[i] * scale * scales[i]);
  }
  for (int64_t j = threadIdx.x + kKept * kNormThreads; j < residual.cols; j += kNormThreads) {
    StoreElement(out, blockIdx.x, j, row[j] * scale * weight[j]);
  }
}

constexpr int kHeadNormWarps = 4;

// One warp a head, which reads it twice, the second time from cache.
__global__ void __launch_bounds__(32 * kHeadNormWarps)
    HeadRmsNormKernel(Tensor x, int32_t head_dim, const float* weight, float eps) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  const int64_t first =
      (int64_t{blockIdx.y} * kHeadNormWarps + static_cast<int>(threadIdx.x) / 32) * head_dim;
  if (first >= x.cols) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* head = F32Row(x, blockIdx.x) + first;
  float squares = 0;
  for (int j = lane; j < head_dim; j += 32) squares = fmaf(head[j], head[j], squares);
  for (int offset = 16; offset > 0; offset /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(head_dim) + eps);
  for (int j = lane; j < head_dim; j += 32) head[j] = head[j] * scale * weight[first + j];
}

struct PutArgs {
  uint32_t* to;
  int32_t words;
  uint32_t content[kMaxPutBytes / 4];
};

__global__ void PutKernel(const __grid_constant__ PutArgs args) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  for (int i = threadIdx.x; i < args.words; i += blockDim.x) args.to[i] = args.content[i];
}

}  // namespace

void LaunchPut(cudaStream_t stream, void* device, const void* host, size_t bytes) {
  if (bytes == 0) return;
  PutArgs args;
  args.to = static_cast<uint32_t*>(device);
  args.words = static_cast<int32_t>((bytes + 3) / 4);
  std::memcpy(args.content, host, bytes);
  LaunchBehind(stream, dim3(1), 256, 0, "launch of a small upload", PutKernel, args);
}

void LaunchEmbed(cudaStream_t stream, Tensor table, const int32_t* ids, Tensor out) {
  ForElements(stream, out.rows, out.cols, [=] __device__(int64_t i, int64_t j) {
    const int32_t id = ids[i];
    F32Row(out, i)[j] = id < 0 ? 0.0f : LoadElement(table, id, j);
  });
}

void LaunchAddRmsNorm(cudaStream_t stream, Tensor residual, Tensor delta, Tensor weight, float eps,
                      Tensor out) {
  if (residual.rows == 0) return;
  LaunchBehind(stream, dim3(static_cast<unsigned>(residual.rows)), kNormThreads, 0,
               "launch of AddRmsNorm", AddRmsNormKernel, residual, delta,
               static_cast<const float*>(weight.data), eps, out);
}

void LaunchHeadRmsNorm(cudaStream_t stream, Tensor x, int32_t head_dim, Tensor weight, float eps) {
  const int64_t heads = x.cols / head_dim;
  if (x.rows == 0 || heads == 0) return;
  const dim3 grid(static_cast<unsigned>(x.rows),
                  static_cast<unsigned>((heads + kHeadNormWarps - 1) / kHeadNormWarps));
  LaunchBehind(stream, grid, 32 * kHeadNormWarps, 0, "launch of HeadRmsNorm", HeadRmsNormKernel, x,
               head_dim, static_cast<const float*>(weight.data), eps);
}

void LaunchRopeTable(cudaStream_t stream, const int64_t* positions, int64_t n,
                     const float* inv_freq, int64_t half, float2* table) {
  ForElements(stream, n, half, [=] __device__(int64_t i, int64_t j) {
    double sine, cosine;
    sincos(static_cast<double>(positions[i]) * static_cast<double>(inv_freq[j]), &sine, &cosine);
    table[i * half + j] = make_float2(static_cast<float>(cosine), static_cast<float>(sine));
  });
}

void LaunchRope(cudaStream_t stream, Tensor x, int32_t head_dim, const float2* table) {
  const int64_t half = head_dim / 2;
  ForElements(stream, x.rows, x.cols / 2, [=] __device__(int64_t i, int64_t pair) {
    const int64_t j = pair % half;
    float* head = F32Row(x, i) + pair / half * head_dim;
    const float2 turn = table[i * half + j];
    const float a = head[j], b = head[j + half];
    head[j] = a * turn.x - b * turn.y;
    head[j + half] = b * turn.x + a * turn.y;
  });
}

void LaunchSiluMul(cudaStream_t stream, Tensor gate_up, Tensor out) {
  ForElements(stream, out.rows, out.cols, [=] __device__(int64_t i, int64_t j) {
    const float gate = F32Row(gate_up, i)[j];
    const float up = F32Row(gate_up, i)[out.cols + j];
    StoreElement(out, i, j, gate / (1.0f + expf(-gate)) * up);
  });
}

void LaunchAdd(cudaStream_t stream, Tensor into, Tensor delta) {
  ForElements(stream, into.rows, into.cols, [=] __device__(int64_t i, int64_t j) {
    F32Row(into, i)[j] += F32Row(delta, delta.rows == 1 ? 0 : i)[j];
  });
}

void LaunchSumRows(cudaStream_t stream, const float* in, int64_t rows, int64_t cols, float* out) {
  ForElements(stream, 1, cols, [=] __device__(int64_t, int64_t j) {
    float sum = in[j];
    for (int64_t i = 1; i < rows; ++i) sum += in[i * cols + j];
    out[j] = sum;
  });
}

void LaunchConvert(cudaStream_t stream, Tensor in, Tensor out) {
  ForElements(stream, in.rows, in.cols, [=] __device__(int64_t i, int64_t j) {
    StoreElement(out, i, j, LoadElement(in, i, j));
  });
}

}  // namespace passel::gpu::cuda
