#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "gpu/cuda/copy_engine.cuh"
#include "gpu/cuda/device_math.cuh"
#include "gpu/cuda/product_chain.h"

// What the kernel of product_chain.cu is made of: its arguments, how blocks hand sums to each
// other, and what becomes of them.
namespace passel::gpu::cuda {

constexpr int kConsumers = 256;  // two warpgroups
constexpr int kThreads =
    kConsumers + 4 * 32;  // and a warp for copies of weights, one for x, two for the norm
constexpr int kWarps = kConsumers / 32;
constexpr int kStep = 64;  // elements of k
constexpr int kHalf = 64;  // features of a warpgroup
constexpr int kTileFeatures = 2 * kHalf;
constexpr int kHalfBytes = kHalf * kStep * 2;  // of weights in a step
constexpr int kWeightBytes = 2 * kHalfBytes;   // a place in the ring of weights
constexpr int kSharedBytes = 227 * 1024;
constexpr int kReserved = 2048;  // alignment, barriers, factors
constexpr int kSlots =
    2;  // of a block and product: for its first tile and its last, which it shares
constexpr int kMostParts = 1024;  // sums of squares of a row: 4 a tile, and tiles are few
constexpr int kCounters = 64;

// A product of a chain.
struct Phase {
  CUtensorMap w, w_rest, x;
  Tensor out, normed;
  const float* norm;
  float eps;  // of the norm that x lacks the factor of; < 0: none
  int32_t features, steps, tiles, blocks;
  // Of 16 rows of weights, in a tile: 8, or another number up to 16 where every tile is one block's
  // alone; those beyond 8 are copied for themselves, from w_rest.
  int32_t groups;
  int32_t k;
  int32_t x_parts;  // sums of squares of a row of x
  int32_t parts;
  int32_t sum_turn;
  bool add, silu;
};

struct ChainArgs {
  Phase phases[kMaxChain];
  int32_t count, n;
  float* sums;         // [2, blocks, kSlots, tile]: for one product and the next
  float* squares;      // [2, kMaxChainRows, kMostParts]
  uint32_t* counters;  // first those of the phases
  uint32_t* stale;     // what the next chain counts with
  PeerInboxes peers;
};

template <int kRows>
struct Shape {
  static constexpr int kRowBytes = kRows * kStep * 2;
  static constexpr int kXStages = kRows == 64 ? 6 : 8;
  static constexpr int kStages = (kSharedBytes - kReserved - kXStages * kRowBytes) / kWeightBytes;
  static constexpr int kSumFloats = kTileFeatures * kRows;
  // Of weights, copies that a block has under way: many make all that others wait for slower, so
  // they are fewer for a product whose x is not there yet, while sums go from block to block. Where
  // the ring is full, a step goes to L2 every kPace cycles, up to kAhead of them.
  static constexpr int kUnderWay = kRows == 64 ? 8 : 7, kUnderWayEarly = kRows == 64 ? 1 : 2;
  static constexpr int kAhead = kRows == 64 ? 0 : 12, kPace = 4000;
};

// The consumers and the warps for the norm.
enum Meeting { kFactors = 2, kFinished };
template <Meeting kWhich>
__device__ inline void Meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(static_cast<int>(kWhich)), "n"(kConsumers + 64) : "memory");
}
__device__ inline void Count(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ inline void WaitForCount(const uint32_t* counter, uint32_t count) {
  uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (now < count);
}

// Sums on their way from block to block say themselves whether they are there: memory holds a NaN
// that no sum is, until they come, and again some time after they have been read, but before the
// end of the next product. That is faster than to write, to wait for that, and to count. Sums of
// other ranks come the same way, and are missing again at once.
constexpr uint32_t kMissing = 0xffffffff;
__device__ inline float4 Missing() {
  const float m = __uint_as_float(kMissing);
  return {m, m, m, m};
}
__device__ inline float Present(float sum) {
  return __float_as_uint(sum) == kMissing ? __uint_as_float(0x7fffffff) : sum;
}
__device__ inline bool AreThere(const float4& v) {
  return __float_as_uint(v.x) != kMissing && __float_as_uint(v.y) != kMissing &&
         __float_as_uint(v.z) != kMissing && __float_as_uint(v.w) != kMissing;
}
// Sums of this GPU's blocks, or of several GPUs.
enum class Scope : uint8_t { kGpu, kSystem };
template <Scope kScope>
__device__ inline float4 LoadSums(const float* from) {
  float4 v;
  if constexpr (kScope == Scope::kGpu) {
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
  } else {
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
  }
  return v;
}
template <Scope kScope>
__device__ inline void StoreSums(float* to, const float4& v) {
  if constexpr (kScope == Scope::kGpu) {
    asm volatile(
        "st.relaxed.gpu.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
        "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "l"(EvictLast())
        : "memory");
  } else {
    asm volatile("st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
  }
}

__device__ inline int32_t FirstUnit(const Phase& p, int block) {
  return p.tiles * p.steps * block / p.blocks;
}
__device__ inline int BlockOf(const Phase& p, int32_t unit) {
  return ((unit + 1) * p.blocks - 1) / (p.tiles * p.steps);
}

// A place in a ring and how often it has come around.
template <int kPlaces>
struct Ring {
  int place = 0;
  uint32_t turn = 0;
  __device__ void Advance() {
    if (++place == kPlaces) {
      place = 0;
      turn ^= 1;
    }
  }
};

// What a block finishes of a tile: items first, first + sharers, …
struct Share {
  int32_t tile = 0;
  int turn = 0;         // of the product: 0, 1, 0, 1, …
  int first_block = 0;  // of those that hold sums of it
  int sharers = 0;
  int first_slot = 0;  // where the first block has them; the others: 0
  int first = 0, items = 0;
};

__device__ inline Share ShareOf(const Phase& p, int turn, int32_t tile, int block, int columns) {
  Share s;
  s.turn = turn;
  s.tile = tile;
  s.first_block = BlockOf(p, tile * p.steps);
  s.sharers = BlockOf(p, (tile + 1) * p.steps - 1) - s.first_block + 1;
  s.first_slot = FirstUnit(p, s.first_block) / p.steps == tile ? 0 : 1;
  s.first = block - s.first_block;
  s.items = (4 * columns - s.first + s.sharers - 1) / s.sharers;
  return s;
}

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

// Sums that are the whole of a warp's features and added to nothing: group `group`, of groups
// `group` + 8, … each 16 rows of weights. There are many pieces one after another in the code,
// which is run once a product: where it is long, the processor waits for instructions, and all
// others for it.
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

// From one half of a tile's features to the other, among its sums.
template <int kRows>
constexpr int kToHigh = 4 * (kRows / 8) * 128;

// The sum of what lies at place(0) … place(count − 1) once it is there: two pieces, one of either
// half of the features. Other GPUs' are then missing again, and may never come: where `abandoned`
// comes to be set, anything.
template <int kRows, Scope kScope, typename Place>
__device__ inline void TakeSums(int count, const uint32_t* abandoned, Place place,
                                float4 (&sum)[2]) {
  constexpr int kAtOnce = 4;
  for (int first = 0; first < count; first += kAtOnce) {
    float4 got[kAtOnce][2];
    float* at[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      got[e][0] = got[e][1] = Missing();
      at[e] = place(first + e);
    }
    bool there;
    uint32_t looks = 0;
    do {
      there = true;
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (first + e >= count) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!AreThere(got[e][half]))
            got[e][half] = LoadSums<kScope>(at[e] + half * kToHigh<kRows>);
        }
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (first + e >= count) break;
        there = there && AreThere(got[e][0]) && AreThere(got[e][1]);
      }
      // A look at host memory takes longer than many of these.
      if (kScope == Scope::kSystem && ++looks % 1024 == 0) {
        there = there || *static_cast<const volatile uint32_t*>(abandoned) != 0;
      }
    } while (!there);
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      if (first + e >= count) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kScope == Scope::kSystem) {
          StoreSums<kScope>(at[e] + half * kToHigh<kRows>, Missing());
        }
        sum[half].x += got[e][half].x, sum[half].y += got[e][half].y;
        sum[half].z += got[e][half].z, sum[half].w += got[e][half].w;
      }
    }
  }
}

// Where a block's sums of a tile begin.
template <int kRows>
__device__ inline int64_t SumsBefore(int turn, int block, int slot) {
  return ((int64_t{turn} * gridDim.x + block) * kSlots + slot) * Shape<kRows>::kSumFloats;
}

// Where a lane's sums of an item are, from the beginning of a tile's.
template <int kRows>
__device__ inline int PlaceInTile(int item, int columns) {
  return (item / columns * (kRows / 8) + item % columns) * 128 +
         static_cast<int>(threadIdx.x) % 32 * 4;
}

// Where the sums of one item of a tile are that its i-th sharer has.
template <int kRows>
__device__ inline float* PlaceOfShare(const ChainArgs& args, const Share& share, int i, int item,
                                      int columns) {
  const int slot = i == 0 ? share.first_slot : 0;
  return args.sums + SumsBefore<kRows>(share.turn, share.first_block + i, slot) +
         PlaceInTile<kRows>(item, columns);
}

// The sums of one item of a tile, of this rank alone.
template <int kRows>
__device__ inline void TakeOwnSums(const ChainArgs& args, const Share& share, int item, int columns,
                                   float4 (&sum)[2]) {
  TakeSums<kRows, Scope::kGpu>(
      share.sharers, nullptr,
      [&](int i) { return PlaceOfShare<kRows>(args, share, i, item, columns); }, sum);
}

// They are missing again.
template <int kRows>
__device__ inline void DropOwnSums(const ChainArgs& args, const Share& share, int item,
                                   int columns) {
  for (int i = 0; i < share.sharers; ++i) {
    float* at = PlaceOfShare<kRows>(args, share, i, item, columns);
    StoreSums<Scope::kGpu>(at, Missing());
    StoreSums<Scope::kGpu>(at + kToHigh<kRows>, Missing());
  }
}

// Where rank `from` puts its sums of an item in an inbox.
template <int kRows>
__device__ inline int64_t PlaceInInbox(const ChainArgs& args, const Phase& p, int from, int tile,
                                       int item, int columns) {
  return int64_t{p.sum_turn * args.peers.ranks + from} * kMaxSummedFeatures * kMaxChainRows +
         int64_t{tile} * Shape<kRows>::kSumFloats + PlaceInTile<kRows>(item, columns);
}

// This rank's sums of one item to the inboxes of all, its own last, as that is the nearest.
template <int kRows>
__device__ inline void Send(const ChainArgs& args, const Phase& p, const Share& share, int item,
                            int columns) {
  float4 sum[2] = {};
  TakeOwnSums<kRows>(args, share, item, columns, sum);
  const int64_t place = PlaceInInbox<kRows>(args, p, args.peers.rank, share.tile, item, columns);
  for (int i = 1; i <= args.peers.ranks; ++i) {
    const int to = (args.peers.rank + i) % args.peers.ranks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      StoreSums<Scope::kSystem>(
          args.peers.of[to] + place + half * kToHigh<kRows>,
          {Present(sum[half].x), Present(sum[half].y), Present(sum[half].z), Present(sum[half].w)});
    }
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
  float4 sum[2] = {};
  if (p.sum_turn < 0) {
    TakeOwnSums<kRows>(args, share, item, columns, sum);
  } else {
    TakeSums<kRows, Scope::kSystem>(
        args.peers.ranks, args.peers.abandoned,
        [&](int rank) {
          return args.peers.of[args.peers.rank] +
                 PlaceInInbox<kRows>(args, p, rank, share.tile, item, columns);
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
