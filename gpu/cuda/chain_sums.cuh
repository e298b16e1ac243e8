#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "gpu/cuda/chain_parts.cuh"
#include "gpu/cuda/copy_engine.cuh"

// How the blocks of a chain of products hand sums to each other, and to those of other ranks.
namespace passel::gpu::cuda {

// Sums on their way from block to block say themselves whether they are there: memory holds a NaN
// that no sum is, until they come, and again some time after they have been read, but before the
// end of the next product. That is faster than to write, to wait for that, and to count. Sums of
// other ranks come the same way, and are missing again at once.
constexpr uint32_t kMissing = 0xffffffff;

// Four sums of a thread, on their way between this GPU's blocks: bf16, as L2 is what tens of rows
// wait for. What a block has of a tile is so rounded once, to 2^-8 of itself at most.
struct OwnSums {
  using Four = uint2;
  static constexpr int kAtOnce = 8;
  __device__ static Four Missing() { return {kMissing, kMissing}; }
  __device__ static bool AreThere(const Four& v) { return v.x != kMissing && v.y != kMissing; }
  // No pair that is converted is missing: a NaN becomes 0x7fff.
  __device__ static Four Of(float a, float b, float c, float d) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(a, b), high = __floats2bfloat162_rn(c, d);
    return {*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
  }
  __device__ static float4 Values(const Four& v) {
    return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),
            __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u)};
  }
  __device__ static Four Load(const Four* from) {
    Four v;
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(from)
                 : "memory");
    return v;
  }
  __device__ static void Store(Four* to, const Four& v) {
    asm volatile("st.relaxed.gpu.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(to),
                 "r"(v.x), "r"(v.y), "l"(EvictLast())
                 : "memory");
  }
};

// The same between GPUs: float32, one part a rank.
struct PeerSums {
  using Four = float4;
  static constexpr int kAtOnce = 4;
  __device__ static Four Missing() {
    const float m = __uint_as_float(kMissing);
    return {m, m, m, m};
  }
  __device__ static bool AreThere(const Four& v) {
    return __float_as_uint(v.x) != kMissing && __float_as_uint(v.y) != kMissing &&
           __float_as_uint(v.z) != kMissing && __float_as_uint(v.w) != kMissing;
  }
  __device__ static Four Of(const float4& v) {
    const auto present = [](float sum) {
      return __float_as_uint(sum) == kMissing ? __uint_as_float(0x7fffffff) : sum;
    };
    return {present(v.x), present(v.y), present(v.z), present(v.w)};
  }
  __device__ static float4 Values(const Four& v) { return v; }
  __device__ static Four Load(const Four* from) {
    Four v;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
  }
  __device__ static void Store(Four* to, const Four& v) {
    asm volatile("st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
  }
};

// From one half of a tile's features to the other, among its fours.
template <int kRows>
constexpr int kToHigh = 4 * (kRows / 8) * 32;

// The sum of what lies at place(0) … place(count − 1) once it is there: two fours, one of either
// half of the features. Other GPUs' are then missing again, and may never come: where `abandoned`
// comes to be set, anything.
template <int kRows, typename Sums, typename Place>
__device__ inline void TakeSums(int count, const uint32_t* abandoned, Place place,
                                float4 (&sum)[2]) {
  constexpr bool kOfPeers = std::is_same_v<Sums, PeerSums>;
  constexpr int kAtOnce = Sums::kAtOnce;
  for (int first = 0; first < count; first += kAtOnce) {
    typename Sums::Four got[kAtOnce][2];
    typename Sums::Four* at[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      got[e][0] = got[e][1] = Sums::Missing();
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
          if (!Sums::AreThere(got[e][half]))
            got[e][half] = Sums::Load(at[e] + half * kToHigh<kRows>);
        }
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (first + e >= count) break;
        there = there && Sums::AreThere(got[e][0]) && Sums::AreThere(got[e][1]);
      }
      // A look at host memory takes longer than many of these.
      if (kOfPeers && ++looks % 1024 == 0) {
        there = there || *static_cast<const volatile uint32_t*>(abandoned) != 0;
      }
    } while (!there);
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      if (first + e >= count) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kOfPeers) Sums::Store(at[e] + half * kToHigh<kRows>, Sums::Missing());
        const float4 values = Sums::Values(got[e][half]);
        sum[half].x += values.x, sum[half].y += values.y;
        sum[half].z += values.z, sum[half].w += values.w;
      }
    }
  }
}

// Where a block's sums of a tile begin.
template <int kRows>
__device__ inline OwnSums::Four* SumsOf(const ChainArgs& args, int turn, int block, int slot) {
  return args.sums +
         ((int64_t{turn} * gridDim.x + block) * kSlots + slot) * Shape<kRows>::kTileFours;
}

// Where a lane's sums of an item are, from the beginning of a tile's.
template <int kRows>
__device__ inline int PlaceInTile(int item, int columns) {
  return (item / columns * (kRows / 8) + item % columns) * 32 + static_cast<int>(threadIdx.x) % 32;
}

// Where the sums of one item of a tile are that its i-th sharer has.
template <int kRows>
__device__ inline OwnSums::Four* PlaceOfShare(const ChainArgs& args, const Share& share, int i,
                                              int item, int columns) {
  const int slot = i == 0 ? share.first_slot : 0;
  return SumsOf<kRows>(args, share.turn, share.first_block + i, slot) +
         PlaceInTile<kRows>(item, columns);
}

// The sums of one item of a tile, of this rank alone.
template <int kRows>
__device__ inline void TakeOwnSums(const ChainArgs& args, const Share& share, int item, int columns,
                                   float4 (&sum)[2]) {
  TakeSums<kRows, OwnSums>(
      share.sharers, nullptr,
      [&](int i) { return PlaceOfShare<kRows>(args, share, i, item, columns); }, sum);
}

// They are missing again.
template <int kRows>
__device__ inline void DropOwnSums(const ChainArgs& args, const Share& share, int item,
                                   int columns) {
  for (int i = 0; i < share.sharers; ++i) {
    OwnSums::Four* at = PlaceOfShare<kRows>(args, share, i, item, columns);
    OwnSums::Store(at, OwnSums::Missing());
    OwnSums::Store(at + kToHigh<kRows>, OwnSums::Missing());
  }
}

// Where rank `from` puts its sums of an item in the inbox of rank `to`.
template <int kRows>
__device__ inline PeerSums::Four* PlaceInInbox(const ChainArgs& args, const Phase& p, int to,
                                               int from, int tile, int item, int columns) {
  return reinterpret_cast<PeerSums::Four*>(args.peers.of[to]) +
         int64_t{p.sum_turn * args.peers.ranks + from} * kMaxSummedFeatures * kMaxChainRows / 4 +
         int64_t{tile} * Shape<kRows>::kTileFours + PlaceInTile<kRows>(item, columns);
}

// This rank's sums of one item to the inboxes of all, its own last, as that is the nearest.
template <int kRows>
__device__ inline void Send(const ChainArgs& args, const Phase& p, const Share& share, int item,
                            int columns) {
  float4 sum[2] = {};
  TakeOwnSums<kRows>(args, share, item, columns, sum);
  for (int i = 1; i <= args.peers.ranks; ++i) {
    const int to = (args.peers.rank + i) % args.peers.ranks;
    PeerSums::Four* at =
        PlaceInInbox<kRows>(args, p, to, args.peers.rank, share.tile, item, columns);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PeerSums::Store(at + half * kToHigh<kRows>, PeerSums::Of(sum[half]));
    }
  }
}

}  // namespace passel::gpu::cuda
