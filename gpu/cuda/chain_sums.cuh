#pragma once

#include <cstdint>

#include "gpu/cuda/chain_parts.cuh"
#include "gpu/cuda/copy_engine.cuh"

// How the blocks of a chain of products hand sums to each other, and to those of other ranks.
namespace passel::gpu::cuda {

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

}  // namespace passel::gpu::cuda
