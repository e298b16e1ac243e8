// Kernels that treat rows or elements one by one.

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kNormThreads = 512;

// One block a row: the bits of a row do not depend on the batch.
__global__ void __launch_bounds__(kNormThreads)
    AddRmsNormKernel(Tensor residual, Tensor delta, const float* weight, float eps, Tensor out) {
  __shared__ float sums[kNormThreads / 32];
  float* row = F32Row(residual, blockIdx.x);
  const float* add = delta.data ? F32Row(delta, blockIdx.x) : nullptr;
  float squares = 0;
  for (int64_t j = threadIdx.x; j < residual.cols; j += kNormThreads) {
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
  for (int64_t j = threadIdx.x; j < residual.cols; j += kNormThreads) {
    StoreElement(out, blockIdx.x, j, row[j] * scale * weight[j]);
  }
}

}  // namespace

void LaunchEmbed(cudaStream_t stream, Tensor table, const int32_t* ids, Tensor out) {
  ForElements(stream, out.rows, out.cols, [=] __device__(int64_t i, int64_t j) {
    const int32_t id = ids[i];
    F32Row(out, i)[j] = id < 0 ? 0.0f : LoadElement(table, id, j);
  });
}

void LaunchAddRmsNorm(cudaStream_t stream, Tensor residual, Tensor delta, Tensor weight, float eps,
                      Tensor out) {
  if (residual.rows == 0) return;
  AddRmsNormKernel<<<static_cast<unsigned>(residual.rows), kNormThreads, 0, stream>>>(
      residual, delta, static_cast<const float*>(weight.data), eps, out);
  CheckCuda(cudaGetLastError(), "launch of AddRmsNorm");
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
  ForElements(stream, into.rows, into.cols,
              [=] __device__(int64_t i, int64_t j) { F32Row(into, i)[j] += F32Row(delta, i)[j]; });
}

void LaunchConvert(cudaStream_t stream, Tensor in, Tensor out) {
  ForElements(stream, in.rows, in.cols, [=] __device__(int64_t i, int64_t j) {
    StoreElement(out, i, j, LoadElement(in, i, j));
  });
}

}  // namespace passel::gpu::cuda
