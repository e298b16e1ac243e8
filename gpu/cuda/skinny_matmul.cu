// Products with few rows of activations (decode): bound by reading the weight once.
//
// A block takes 16·kTiles output features and all of k, which its warps share out in runs of 64.
// Weights go from memory to the registers that the matrix units read, without a stop in shared
// memory: the order of k inside a product is free, so a thread takes 8 neighbouring elements of a
// row, and of x the same ones. The first weights are under way before the kernel waits for x.
// When a block has asked for all of its own weights, it asks for some of those that the next
// product begins with, so that memory is not idle until then. A row's sum is formed in the same
// order whatever rows stand beside it.

#include <cuda_bf16.h>

#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"

namespace passel::gpu::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRun = 64;  // elements of k that a warp takes at a time

struct SkinnyArgs {
  const __nv_bfloat16* w;  // [features, k]
  int64_t features, k;
  Tensor x, out;  // [n, k] bf16, [n, features] f32
  bool accumulate;
  Upcoming next;
};

// By one thread of every block: the last blocks, as many as a large GPU runs at once, share it out.
__device__ inline void AskForUpcoming(const Upcoming& next) {
#if __CUDA_ARCH__ >= 900
  const unsigned sharers = min(gridDim.x, 264u), own = gridDim.x - 1 - blockIdx.x;
  const size_t share = next.bytes / sharers / 128 * 128;
  if (own >= sharers || share == 0) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                   static_cast<const char*>(next.data) + own * share),
               "r"(static_cast<uint32_t>(share))
               : "memory");
#endif
}

// Weights are read once: not to be kept in L1. Volatile: must not sink below the wait.
__device__ inline uint4 LoadWeight(const __nv_bfloat16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// c: [16, 8] += a: [16, 16] · b: [16, 8].
__device__ inline void MultiplyAdd(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// kTiles: groups of 16 features; kColumns: groups of 8 rows of x; kAhead: runs under way.
template <int kTiles, int kColumns, int kAhead>
__global__ void __launch_bounds__(kThreads, kColumns > 2 ? 1 : 2) SkinnyKernel(SkinnyArgs a) {
  __shared__ float sums[kWarps][kColumns * 8][kTiles * 16];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, piece = lane % 4 * 8;
  const int64_t first = int64_t{blockIdx.x} * kTiles * 16;
  const int64_t runs = a.k / kRun;
  const int64_t n = a.x.rows;

  const __nv_bfloat16* w_rows[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Beyond the last feature: any row, whose sums are not stored.
      const int64_t feature = min(first + m * 16 + half * 8 + row, a.features - 1);
      w_rows[m][half] = a.w + feature * a.k + piece;
    }
  }
  const __nv_bfloat16* x_rows[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t at = c * 8 + row < n ? c * 8 + row : 0;
    x_rows[c] = static_cast<const __nv_bfloat16*>(a.x.data) + at * a.x.stride + piece;
  }

  uint4 w[kAhead][kTiles][2][2], x[kAhead][kColumns][2];
  const auto load_w = [&](uint4(&to)[kTiles][2][2], int64_t run) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          to[m][half][part] = LoadWeight(w_rows[m][half] + run * kRun + part * 32);
        }
      }
    }
  };
  const auto load_x = [&](uint4(&to)[kColumns][2], int64_t run) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        to[c][part] = c * 8 + row < n
                          ? *reinterpret_cast<const uint4*>(x_rows[c] + run * kRun + part * 32)
                          : make_uint4(0, 0, 0, 0);
      }
    }
  };
  float acc[kTiles][kColumns][4] = {};
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (warp + u * kWarps < runs) load_w(w[u], warp + u * kWarps);
  }
  LetNextKernelStart();
  WaitForEarlierKernels();
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (warp + u * kWarps < runs) load_x(x[u], warp + u * kWarps);
  }
  for (int64_t base = warp; base < runs; base += kAhead * kWarps) {
    if (threadIdx.x == 0 && base + kAhead * kWarps >= runs) AskForUpcoming(a.next);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t run = base + u * kWarps;
      if (run >= runs) break;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const uint4 low = w[u][m][0][part], high = w[u][m][1][part];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const uint4 b = x[u][c][part];
            MultiplyAdd(acc[m][c], low.x, high.x, low.y, high.y, b.x, b.y);
            MultiplyAdd(acc[m][c], low.z, high.z, low.w, high.w, b.z, b.w);
          }
        }
      }
      const int64_t next = run + kAhead * kWarps;
      if (next < runs) {
        load_w(w[u], next);
        load_x(x[u], next);
      }
    }
  }

  // Element i of a product: feature row (+ 8 for i ≥ 2), row of x lane % 4 · 2 (+ 1 for odd i).
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[warp][c * 8 + lane % 4 * 2 + i % 2][m * 16 + row + i / 2 * 8] = acc[m][c][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns * 8 * kTiles * 16; i += kThreads) {
    const int c = i / (kTiles * 16), m = i % (kTiles * 16);
    if (c >= n || first + m >= a.features) continue;
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kWarps; ++v) sum += sums[v][c][m];
    float* out = F32Row(a.out, c) + first + m;
    *out = a.accumulate ? *out + sum : sum;
  }
}

template <int kTiles, int kColumns, int kAhead>
void Launch(cudaStream_t stream, const SkinnyArgs& args) {
  const auto blocks = static_cast<unsigned>((args.features + kTiles * 16 - 1) / (kTiles * 16));
  LaunchBehind(stream, dim3(blocks), kThreads, 0, "launch of MatMul",
               SkinnyKernel<kTiles, kColumns, kAhead>, args);
}

}  // namespace

bool FitsSkinnyMatMul(int64_t k, const Tensor& x) {
  return x.rows <= kMaxSkinnyRows && k % kRun == 0 && x.stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

void LaunchSkinnyMatMul(cudaStream_t stream, const void* w, int64_t features, int64_t k, Tensor x,
                        Tensor out, bool accumulate, const Upcoming& next) {
  const SkinnyArgs args{
      static_cast<const __nv_bfloat16*>(w), features, k, x, out, accumulate, next};
  if (x.rows <= 8) return Launch<1, 1, 4>(stream, args);
  if (x.rows <= 16) return Launch<2, 2, 2>(stream, args);
  return Launch<2, 4, 2>(stream, args);
}

}  // namespace passel::gpu::cuda
