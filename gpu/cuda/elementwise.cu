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

constexpr int kPutThreads = 256;

template <size_t kBytes>
struct PutArgs {
  uint32_t* to;
  int32_t words;
  uint32_t content[kBytes / 4];
};

template <size_t kBytes>
__global__ void PutKernel(const __grid_constant__ PutArgs<kBytes> args) {
  LetNextKernelStart();
  WaitForEarlierKernels();
  const auto i = static_cast<int32_t>(blockIdx.x * kPutThreads + threadIdx.x);
  if (i < args.words) args.to[i] = args.content[i];
}

template <size_t kBytes>
void Put(cudaStream_t stream, void* device, const void* host, size_t bytes) {
  PutArgs<kBytes> args;
  args.to = static_cast<uint32_t*>(device);
  args.words = static_cast<int32_t>((bytes + 3) / 4);
  std::memcpy(args.content, host, bytes);
  const dim3 grid(static_cast<unsigned>((args.words + kPutThreads - 1) / kPutThreads));
  LaunchBehind(stream, grid, kPutThreads, 0, "launch of a small upload", PutKernel<kBytes>, args);
}

}  // namespace

void LaunchPut(cudaStream_t stream, void* device, const void* host, size_t bytes) {
  if (bytes == 0) return;
  // All of an argument is copied, used or not.
  if (bytes <= 3840) return Put<3840>(stream, device, host, bytes);
  if (bytes <= 9600) return Put<9600>(stream, device, host, bytes);
  Put<kMaxPutBytes>(stream, device, host, bytes);
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
  struct Pairs {
    Four first, second;
  };
  const int64_t half = head_dim / 2;
  ForFours(
      stream, x.rows, x.cols / head_dim, half,
      [=] __device__(int64_t i, int64_t h, int64_t j, int count) {
        const int64_t at = h * head_dim + j;
        const Four a = LoadFour(x, i, at, count), b = LoadFour(x, i, at + half, count);
        Pairs turned{};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (k >= count) break;
          const float2 turn = table[i * half + j + k];
          turned.first.value[k] = a.value[k] * turn.x - b.value[k] * turn.y;
          turned.second.value[k] = b.value[k] * turn.x + a.value[k] * turn.y;
        }
        return turned;
      },
      [=] __device__(int64_t i, int64_t h, int64_t j, int count, const Pairs& turned) {
        StoreFour(x, i, h * head_dim + j, count, turned.first);
        StoreFour(x, i, h * head_dim + j + half, count, turned.second);
      });
}

void LaunchSiluMul(cudaStream_t stream, Tensor gate_up, Tensor out) {
  ForFours(
      stream, out.rows, 1, out.cols,
      [=] __device__(int64_t i, int64_t, int64_t j, int count) {
        const Four gate = LoadFour(gate_up, i, j, count);
        Four product = LoadFour(gate_up, i, out.cols + j, count);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          product.value[k] *= gate.value[k] / (1.0f + expf(-gate.value[k]));
        }
        return product;
      },
      [=] __device__(int64_t i, int64_t, int64_t j, int count, const Four& product) {
        StoreFour(out, i, j, count, product);
      });
}

void LaunchAdd(cudaStream_t stream, Tensor into, Tensor delta) {
  ForFours(
      stream, into.rows, 1, into.cols,
      [=] __device__(int64_t i, int64_t, int64_t j, int count) {
        Four sum = LoadFour(into, i, j, count);
        const Four more = LoadFour(delta, delta.rows == 1 ? 0 : i, j, count);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.value[k] += more.value[k];
        return sum;
      },
      [=] __device__(int64_t i, int64_t, int64_t j, int count, const Four& sum) {
        StoreFour(into, i, j, count, sum);
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
  ForFours(
      stream, in.rows, 1, in.cols,
      [=] __device__(int64_t i, int64_t, int64_t j, int count) {
        return LoadFour(in, i, j, count);
      },
      [=] __device__(int64_t i, int64_t, int64_t j, int count, const Four& four) {
        StoreFour(out, i, j, count, four);
      });
}

}  // namespace passel::gpu::cuda
