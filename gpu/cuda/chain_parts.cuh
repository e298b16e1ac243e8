#pragma once

#include <cuda.h>

#include <cstdint>

#include "gpu/cuda/product_chain.h"

// What the kernel of a chain of products works on, and how its blocks share the work.
namespace passel::gpu::cuda {

constexpr int kConsumers = 256;  // two warpgroups
constexpr int kThreads =
    kConsumers + 4 * 32;  // and a warp for copies of weights, one for x, two for the norm
constexpr int kWarps = kConsumers / 32;
constexpr int kStep = 64;  // elements of k
constexpr int kHalf = 64;  // features of a warpgroup
constexpr int kTileFeatures = 2 * kHalf;
static_assert(kTileFeatures == kTurnedHead);
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
  const float2* turns;
  int32_t turned;
  bool add, silu;
};

struct ChainArgs {
  Phase phases[kMaxChain];
  int32_t count, n;
  uint2* sums;         // [2, blocks, kSlots, tile] bf16: for one product and the next
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
  static constexpr int kTileFours = kTileFeatures * kRows / 4;
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

}  // namespace passel::gpu::cuda
