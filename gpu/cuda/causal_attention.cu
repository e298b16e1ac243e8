// Causal attention of prefill chunks on the matrix units, in the manner of FlashAttention-2 (Dao
// 2023): a block takes 128 queries of a head, 32 a warp, and walks the keys in tiles of 64 with an
// online softmax. Q and the weights of V are rounded to bf16; sums are float32. Tiles of keys lie
// at multiples of 64, so a row's bits do not depend on how the prompt was cut into chunks.

#include "gpu/cuda/async_copy.cuh"
#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/kernels.h"
#include "gpu/cuda/matrix_units.cuh"

namespace passel::gpu::cuda {
namespace {

constexpr int kKeys = 64;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

struct CausalArgs {
  AttentionShape shape;
  Tensor q, k, v, out;
  int64_t start, window;
};

__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// kRowTiles: groups of 16 queries of a warp; a tile of keys read from shared memory serves them
// all. Shared memory of a block: rows padded by 16 bytes, so that ldmatrix meets no bank twice.
template <int kDim, int kRowTiles>
struct Layout {
  static constexpr int kQueries = 16 * kWarps * kRowTiles;
  static constexpr int kStages = kDim <= 128 ? 2 : 1;
  static constexpr int kStride = kDim + 8;
  static constexpr size_t kBytes =
      sizeof(__nv_bfloat16) * kStride * (kQueries + kStages * 2 * kKeys);
};

// Keys [first, first + kKeys) of one KV head to shared memory; zeros beyond `end` and head_dim.
template <int kDim, int kStride>
__device__ inline void LoadKeys(__nv_bfloat16* shared, const Tensor& t, int64_t first, int64_t end,
                                int64_t col, int32_t head_dim) {
  constexpr int kChunks = kDim / 8;
  const auto* base = static_cast<const __nv_bfloat16*>(t.data);
#pragma unroll
  for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks * 8;
    const bool inside = first + row < end && chunk < head_dim;
    CopyAsync16(shared + row * kStride + chunk,
                inside ? base + (first + row) * t.stride + col + chunk : base, inside);
  }
}

// kDim: head_dim, padded.
template <int kDim, int kRowTiles>
__global__ void __launch_bounds__(kThreads) CausalKernel(CausalArgs a) {
  using L = Layout<kDim, kRowTiles>;
  constexpr int kStride = L::kStride, kStages = L::kStages, kQueries = L::kQueries;
  extern __shared__ __align__(16) __nv_bfloat16 shared[];
  __nv_bfloat16* q_tile = shared;
  __nv_bfloat16* k_tiles = q_tile + kQueries * kStride;
  __nv_bfloat16* v_tiles = k_tiles + kStages * kKeys * kStride;

  const int32_t head_dim = a.shape.head_dim;
  const int32_t head = static_cast<int32_t>(blockIdx.y);
  const int64_t q_col = int64_t{head} * head_dim;
  const int64_t kv_col = int64_t{head / (a.shape.heads / a.shape.kv_heads)} * head_dim;
  // The longest rows first: what is left over at the end is short.
  const int64_t first = int64_t{gridDim.x - 1 - blockIdx.x} * kQueries;
  const int64_t last = min(first + kQueries, a.q.rows) - 1;
  const int64_t key_end = a.start + a.q.rows;
  const int64_t first_seen = a.window > 0 ? max(int64_t{0}, a.start + first + 1 - a.window) : 0;
  const int64_t tile_begin = first_seen / kKeys;
  const int64_t tile_end = (a.start + last) / kKeys + 1;

  for (int i = threadIdx.x; i < kQueries * kDim; i += kThreads) {
    const int row = i / kDim, col = i % kDim;
    const bool inside = first + row < a.q.rows && col < head_dim;
    q_tile[row * kStride + col] =
        __float2bfloat16_rn(inside ? F32Row(a.q, first + row)[q_col + col] : 0.0f);
  }
  const auto load = [&](int64_t tile) {
    const int64_t stage = tile % kStages * kKeys * kStride;
    LoadKeys<kDim, kStride>(k_tiles + stage, a.k, tile * kKeys, key_end, kv_col, head_dim);
    LoadKeys<kDim, kStride>(v_tiles + stage, a.v, tile * kKeys, key_end, kv_col, head_dim);
    CommitCopies();
  };
  if (kStages == 2) load(tile_begin);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t warp_first = first + warp * 16 * kRowTiles;
  const __nv_bfloat16* q_row =
      q_tile + (warp * 16 * kRowTiles + lane % 16) * kStride + lane / 16 * 8;
  // This lane has rows lane / 4 and lane / 4 + 8 of each group of 16.
  const auto row_of = [&](int m, int r) { return warp_first + m * 16 + lane / 4 + r * 8; };
  const float scale = a.shape.scale * 1.44269504f;  // the exponentials are to base 2
  float out[kRowTiles][kDim / 8][4] = {};
  float max[kRowTiles][2], den[kRowTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) max[m][0] = max[m][1] = -INFINITY;

  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if (kStages == 1) {
      load(tile);
      WaitForCopies<0>();
    } else if (tile + 1 < tile_end) {
      load(tile + 1);
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();
    const __nv_bfloat16* k_tile = k_tiles + tile % kStages * kKeys * kStride;
    const __nv_bfloat16* v_tile = v_tiles + tile % kStages * kKeys * kStride;

    const int64_t key = tile * kKeys;
    // Keys that all queries of this warp come before are for other warps.
    if (key <= a.start + warp_first + 16 * kRowTiles - 1) {
      float s[kRowTiles][kKeys / 8][4] = {};
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t q[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) LoadTiles(q[m], q_row + m * 16 * kStride + d);
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t k[4];
          LoadTiles(k,
                    k_tile + (n * 16 + lane % 8 + lane / 16 * 8) * kStride + d + lane / 8 % 2 * 8);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            MultiplyAdd(s[m][2 * n], q[m], k[0], k[1]);
            MultiplyAdd(s[m][2 * n + 1], q[m], k[2], k[3]);
          }
        }
      }

      const bool edge = key + kKeys - 1 > a.start + warp_first ||
                        (a.window > 0 && key <= a.start + last - a.window);
      if (edge) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int64_t at = key + n * 8 + lane % 4 * 2 + c % 2;
              const int64_t position = a.start + row_of(m, c / 2);
              if (at > position || (a.window > 0 && at <= position - a.window)) {
                s[m][n][c] = -INFINITY;
              }
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float new_max = max[m][r];
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
            new_max = fmaxf(new_max, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
          }
          new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));
          new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));
          // A row that has seen no key yet: any finite maximum keeps its weights 0.
          const float base = new_max == -INFINITY ? 0.0f : new_max * scale;
          const float shrink = exp2f(max[m][r] * scale - base);
          max[m][r] = new_max;
          den[m][r] *= shrink;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int c = 2 * r; c < 2 * r + 2; ++c) {
              s[m][n][c] = exp2f(fmaf(s[m][n][c], scale, -base));
              den[m][r] += s[m][n][c];
            }
          }
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) {
            out[m][d][2 * r] *= shrink;
            out[m][d][2 * r + 1] *= shrink;
          }
        }
      }

#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t p[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = &s[m][2 * n + i / 2][i % 2 * 2];
            p[m][i] = PackBf16(pair[0], pair[1]);
          }
        }
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          uint32_t v[4];
          LoadTilesTransposed(v, v_tile + (n * 16 + lane % 16) * kStride + d * 16 + lane / 16 * 8);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            MultiplyAdd(out[m][2 * d], p[m], v[0], v[1]);
            MultiplyAdd(out[m][2 * d + 1], p[m], v[2], v[3]);
          }
        }
      }
    }
    __syncthreads();  // before the next copies overwrite what was read here
  }

#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      den[m][r] += __shfl_xor_sync(0xffffffffu, den[m][r], 1);
      den[m][r] += __shfl_xor_sync(0xffffffffu, den[m][r], 2);
      const int64_t row = row_of(m, r);
      if (row >= a.q.rows) continue;
      const float inverse = 1.0f / den[m][r];
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int col = d * 8 + lane % 4 * 2 + c;
          if (col < head_dim) {
            StoreElement(a.out, row, q_col + col, out[m][d][2 * r + c] * inverse);
          }
        }
      }
    }
  }
}

template <int kDim, int kRowTiles>
void Launch(cudaStream_t stream, const CausalArgs& args) {
  using L = Layout<kDim, kRowTiles>;
  CheckCuda(cudaFuncSetAttribute(CausalKernel<kDim, kRowTiles>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(L::kBytes)),
            "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>((args.q.rows + L::kQueries - 1) / L::kQueries),
                  static_cast<unsigned>(args.shape.heads));
  CausalKernel<kDim, kRowTiles><<<grid, kThreads, L::kBytes, stream>>>(args);
  CheckCuda(cudaGetLastError(), "launch of CausalAttention");
}

// As many queries a warp as registers and this GPU's shared memory allow.
template <int kDim>
void LaunchLargest(cudaStream_t stream, const CausalArgs& args) {
  int device = 0, shared = 0;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            "cudaDeviceGetAttribute");
  if constexpr (kDim <= 128) {
    if (Layout<kDim, 2>::kBytes <= static_cast<size_t>(shared))
      return Launch<kDim, 2>(stream, args);
  }
  Launch<kDim, 1>(stream, args);
}

}  // namespace

void LaunchCausalAttention(cudaStream_t stream, const AttentionShape& shape, Tensor q, Tensor k,
                           Tensor v, int64_t start, int64_t window, Tensor out) {
  if (q.rows == 0) return;
  const CausalArgs args{shape, q, k, v, out, start, window};
  const int32_t dim = shape.head_dim;
  if (dim <= 32) return LaunchLargest<32>(stream, args);
  if (dim <= 64) return LaunchLargest<64>(stream, args);
  if (dim <= 96) return LaunchLargest<96>(stream, args);
  if (dim <= 128) return LaunchLargest<128>(stream, args);
  return LaunchLargest<256>(stream, args);
}

}  // namespace passel::gpu::cuda
