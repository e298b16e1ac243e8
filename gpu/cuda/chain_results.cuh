#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "gpu/cuda/chain_sums.cuh"
#include "gpu/cuda/device_math.cuh"

// What becomes of the sums of a chain's products: SiLU, the residual sum, and the norm between two.
namespace passel::gpu::cuda {

// What a warp's sums of the gates of 8 features and of their ups, × 8 rows of x, become; a thread
// has both. They are turned around within the warp, so that a thread has two neighbours: of row
// lane / 4, features lane % 4 · 2 and behind.
__device__ inline uint32_t Silu(const float4& sums, float2 factor) {
  const auto silu = [](float gate, float up) {
    return up * __fdividef(gate, 1.0f + __expf(-gate));
  };
  const __nv_bfloat162 of_rows = __floats2bfloat162_rn(silu(sums.x * factor.x, sums.z * factor.x),
                                                       silu(sums.y * factor.y, sums.w * factor.y));
  uint32_t of_features;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
               : "=r"(of_features)
               : "r"(*reinterpret_cast<const uint32_t*>(&of_rows)));
  return of_features;
}

// Where a lane puts what Silu gives of a group of 8 features and the first column of 8 rows of x.
__device__ inline __nv_bfloat16* SiluPlace(const Phase& p, int32_t group) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return static_cast<__nv_bfloat16*>(p.out.data) + lane / 4 * p.out.stride + group * 8 +
         lane % 4 * 2;
}

// 1/rms of rows row and row + 1, or 1.
__device__ inline float2 FactorsOf(const Phase& p, const float* factors, int row) {
  return p.eps >= 0 ? *reinterpret_cast<const float2*>(factors + row) : float2{1, 1};
}

// Sums over all of k that nothing is added to: of the groups `group`, `group` + 8, …, `parts` of
// them, each 16 rows of weights. There are many pieces one after another in the code, which runs
// once a product: where it is long, the processor waits for instructions, and all others for it.
template <int kParts, int kRows>
__device__ inline void StoreWhole(const ChainArgs& args, const Phase& p, const float* factors,
                                  int32_t group, int parts, const float (&acc)[kParts][kRows / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = lane % 4 * 2;
  const auto sums = [&](int part, int j) {
    return float4{acc[part][j * 4], acc[part][j * 4 + 1], acc[part][j * 4 + 2],
                  acc[part][j * 4 + 3]};
  };
  if (p.silu) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part >= parts || (group + part * 8) * 8 >= p.features) break;
      __nv_bfloat16* to = SiluPlace(p, group + part * 8);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        if (j * 8 >= args.n) break;
        const uint32_t two = Silu(sums(part, j), FactorsOf(p, factors, j * 8 + first_row));
        if (j * 8 + lane / 4 < args.n) *reinterpret_cast<uint32_t*>(to) = two;
        to += 8 * p.out.stride;
      }
    }
    return;
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int32_t feature = (group + part * 8) * 16 + lane / 4;
    if (part >= parts) break;
    float* to = F32Row(p.out, first_row) + feature;
    const bool low = feature < p.features, high = feature + 8 < p.features;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const int row = j * 8 + first_row;
      if (row >= args.n) break;
      const float4 v = sums(part, j);
      const float2 factor = FactorsOf(p, factors, row);
      float* next = to + p.out.stride;
      if (low) to[0] = v.x * factor.x;
      if (high) to[8] = v.z * factor.x;
      if (row + 1 < args.n) {
        if (low) next[0] = v.y * factor.y;
        if (high) next[8] = v.w * factor.y;
      }
      to += 8 * p.out.stride;
    }
  }
}

// What becomes of shared ones, of products but those of SiLU.
struct Piece {
  int feature = 0, row = 0;  // of the thread's first sum
  float before[4] = {}, weight[2] = {};

  // `group`: which 16.
  __device__ void Load(const ChainArgs& args, const Phase& p, int32_t group, int column) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    row = column * 8 + lane % 4 * 2;
    feature = group * 16 + lane / 4;
    if (!p.add) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int f = feature + i / 2 * 8;
      if (f < p.features && row + i % 2 < args.n)
        before[i] = __ldcg(F32Row(p.out, row + i % 2) + f);
      if (p.norm != nullptr && i % 2 == 0 && f < p.features) weight[i / 2] = __ldg(p.norm + f);
    }
  }

  // Adds its squares to `square`, of rows row and row + 1.
  __device__ void Store(const ChainArgs& args, const Phase& p, const float* factors, float4 sums,
                        float (&square)[2]) const {
    float v[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.eps >= 0) v[i] *= factors[row + i % 2];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int f = feature + i / 2 * 8;
      if (f >= p.features || row + i % 2 >= args.n) continue;
      const float value = before[i] + v[i];
      F32Row(p.out, row + i % 2)[f] = value;
      if (p.norm == nullptr) continue;
      square[i % 2] = fmaf(value, value, square[i % 2]);
      static_cast<__nv_bfloat16*>(p.normed.data)[(row + i % 2) * p.normed.stride + f] =
          __float2bfloat16_rn(value * weight[i / 2]);
    }
  }
};

// RoPE of a thread's sums of two pieces, 64 features apart.
struct Turn {
  float2 of[4] = {};  // of the sums x, y, z, w

  __device__ void Load(const ChainArgs& args, const Phase& p, const Piece& piece) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = piece.row + i % 2, pair = piece.feature % kTurnedHead + i / 2 * 8;
      if (row < args.n) of[i] = __ldcg(p.turns + row * (kTurnedHead / 2) + pair);
    }
  }
  __device__ void Apply(float4 (&sum)[2]) const {
    const auto turn = [](float& a, float& b, float2 by) {
      const float first = a * by.x - b * by.y;
      b = b * by.x + a * by.y;
      a = first;
    };
    turn(sum[0].x, sum[1].x, of[0]);
    turn(sum[0].y, sum[1].y, of[1]);
    turn(sum[0].z, sum[1].z, of[2]);
    turn(sum[0].w, sum[1].w, of[3]);
  }
};

// By a warp, of one piece or two.
__device__ inline void StoreSquares(float* squares, int part, int row, float (&square)[2]) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    square[0] += __shfl_xor_sync(0xffffffffu, square[0], offset);
    square[1] += __shfl_xor_sync(0xffffffffu, square[1], offset);
  }
  if (threadIdx.x % 32 < 4) {
    float* to = squares + part * kMaxChainRows + row;
    to[0] = square[0];
    to[1] = square[1];
  }
}

// One item of a tile: two pieces, of the same rows of x, one of either half of the features.
template <int kRows>
__device__ inline void Finish(const ChainArgs& args, const Phase& p, float* squares,
                              const float* factors, const Share& share, int item, int columns) {
  const int quarter = item / columns, column = item % columns;
  Piece pieces[2];
  const auto group_of = [&](int half) { return share.tile * 8 + half * 4 + quarter; };
#pragma unroll
  for (int half = 0; half < 2; ++half) pieces[half].Load(args, p, group_of(half), column);
  const bool turned = pieces[0].feature < p.turned;
  Turn turn;
  if (turned) turn.Load(args, p, pieces[0]);
  float4 sum[2] = {};
  if (p.sum_turn < 0) {
    TakeOwnSums<kRows>(args, share, item, columns, sum);
  } else {
    TakeSums<kRows, PeerSums>(
        args.peers.ranks, args.peers.abandoned,
        [&](int rank) {
          return PlaceInInbox<kRows>(args, p, args.peers.rank, rank, share.tile, item, columns);
        },
        sum);
  }
  if (p.silu) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float2 factor = FactorsOf(p, factors, column * 8 + lane % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t two = Silu(sum[half], factor);
      __nv_bfloat16* to = SiluPlace(p, group_of(half)) + column * 8 * p.out.stride;
      if (group_of(half) * 8 < p.features && column * 8 + lane / 4 < args.n) {
        *reinterpret_cast<uint32_t*>(to) = two;
      }
    }
    return;
  }
  if (turned) turn.Apply(sum);
  float square[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) pieces[half].Store(args, p, factors, sum[half], square);
  if (p.norm != nullptr) {
    StoreSquares(squares, share.tile * 4 + quarter, pieces[0].row, square);
  }
}

// factors[row] = 1/rms of up to 32 rows, by a warp: four rows a thread, the parts shared out.
template <int kRows>
__device__ inline void MakeFactors(const Phase& p, const float* squares, float* factors) {
  constexpr int kFours = (kRows < 32 ? kRows : 32) / 4, kGroups = 32 / kFours, kAtOnce = 16;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float* from = squares + lane % kFours * 4;
  float sum[4] = {};
  for (int first = lane / kFours; first < p.x_parts; first += kAtOnce * kGroups) {
    float4 squares_of[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      const int part = first + e * kGroups;
      squares_of[e] = part < p.x_parts
                          ? __ldcg(reinterpret_cast<const float4*>(from + part * kMaxChainRows))
                          : float4{};
    }
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      sum[0] += squares_of[e].x, sum[1] += squares_of[e].y;
      sum[2] += squares_of[e].z, sum[3] += squares_of[e].w;
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
#pragma unroll
    for (int offset = kFours; offset < 32; offset *= 2) {
      sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], offset);
    }
    if (lane < kFours) {
      factors[lane * 4 + e] = 1.0f / sqrtf(sum[e] / static_cast<float>(p.k) + p.eps);
    }
  }
}

}  // namespace passel::gpu::cuda
