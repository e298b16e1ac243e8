#pragma once

#include <cstdint>

#include "gpu/cuda/chain_results.cuh"
#include "gpu/cuda/copy_engine.cuh"
#include "gpu/cuda/warpgroup.cuh"

// The kernel of a chain of products (product_chain.cu). Weights go by the copy engine into a ring
// of shared memory, issued by a thread that waits for room in the ring alone, so that across the
// ends of products the next weight is on its way. x goes into a ring of its own, by a thread that
// waits for the product before. Two warpgroups multiply. The work of a product, tiles of features ×
// steps of k, is cut into equal runs, one a block. A tile's sums come from the blocks that share
// it, through memory that L2 holds; each of them then finishes a part of the tile, adding in the
// order of k: bits depend on the shape alone. The norm between two products is in them: the one
// before writes x · weight and the sums of squares, the one after multiplies its sums by 1/rms.
namespace passel::gpu::cuda {

template <int kCount>
struct Parts {
  static constexpr int value = kCount;
};

// The units of a block, product by product, and of each its places in the ring of weights.
struct Units {
  const ChainArgs& args;
  int i = -1, part = 0;
  int32_t u = 0, end = 0;
  __device__ bool Next() {
    if (u < end && args.phases[i].groups > 8 && part == 0) {
      part = 1;
      return true;
    }
    part = 0;
    while (++u >= end) {
      if (++i >= args.count) return false;
      const Phase& p = args.phases[i];
      const int block = static_cast<int>(blockIdx.x);
      if (block >= p.blocks) continue;
      u = FirstUnit(p, block) - 1;
      end = FirstUnit(p, block + 1);
    }
    return true;
  }
  __device__ int32_t column() const { return u % args.phases[i].steps * kStep; }
  __device__ const CUtensorMap& map() const {
    return part == 0 ? args.phases[i].w : args.phases[i].w_rest;
  }
  // In the map.
  __device__ void Place(int32_t (&at)[4]) const {
    const Phase& p = args.phases[i];
    const int32_t group = u / p.steps * p.groups + part * 8;
    at[0] = column();
    at[1] = p.silu ? 0 : group * 16;
    at[2] = 0;
    at[3] = p.silu ? group : 0;
  }
  __device__ uint32_t bytes() const {
    const int32_t groups = args.phases[i].groups;
    return (part == 0 ? min(groups, 8) : groups - 8) * 16 * kStep * 2;
  }
};

template <int kRows>
__global__ void __launch_bounds__(kThreads, 1) ChainKernel(const __grid_constant__ ChainArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kRows>;
  extern __shared__ uint8_t dynamic[];
  uint8_t* const weights = dynamic + (1024 - SharedAddress(dynamic) % 1024) % 1024;
  uint8_t* const rows = weights + S::kStages * kWeightBytes;
  auto* const weights_full = reinterpret_cast<uint64_t*>(rows + S::kXStages * S::kRowBytes);
  uint64_t* const weights_free = weights_full + S::kStages;
  uint64_t* const rows_full = weights_free + S::kStages;
  uint64_t* const rows_free = rows_full + S::kXStages;
  auto* const factors = reinterpret_cast<float*>(rows_free + S::kXStages);
  // The product whose x is there.
  auto* const open = reinterpret_cast<int*>(factors + kRows);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int block = static_cast<int>(blockIdx.x);
  if (thread == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      InitBarrier(weights_full + i, 1);
      InitBarrier(weights_free + i, kWarps);
    }
    for (int i = 0; i < S::kXStages; ++i) {
      InitBarrier(rows_full + i, 1);
      InitBarrier(rows_free + i, kWarps);
    }
    *open = 0;
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  LetNextKernelStart();

  if (warp == kWarps) {
    if (lane == 0) {
      const uint64_t policy = EvictFirst();
      Ring<S::kStages> ring, arrived;
      int under_way = 0, ahead = 0;
      Units units{args}, early{args};
      int64_t last = clock64();
      while (units.Next()) {
        const bool early_for_x = units.i > atomicAdd(open, 0);
        while (under_way >= (early_for_x ? S::kUnderWayEarly : S::kUnderWay)) {
          WaitForParity(weights_full + arrived.place, arrived.turn);
          arrived.Advance();
          --under_way;
        }
        ++under_way;
        if (ahead == 0) {
          early.i = units.i;
          early.u = units.u;
          early.end = units.end;
          early.part = units.part;
        } else {
          --ahead;
        }
        while (!IsOverNow(weights_free + ring.place, ring.turn ^ 1)) {
          const int64_t now = clock64();
          if (now - last < S::kPace || ahead == S::kAhead || !early.Next()) continue;
          last = now;
          ++ahead;
          int32_t at[4];
          early.Place(at);
          PrefetchTile(early.map(), at);
        }
        last = clock64();
        uint64_t* full = weights_full + ring.place;
        int32_t at[4];
        units.Place(at);
        ArriveAndExpect(full, units.bytes());
        CopyTile(weights + ring.place * kWeightBytes, units.map(), at, full, policy);
        ring.Advance();
      }
    }
    WaitForEarlierKernels();
    return;
  }
  WaitForEarlierKernels();
  if (warp == kWarps + 1) {
    if (lane != 0) return;
    const uint64_t policy = EvictLast();
    Ring<S::kXStages> ring;
    Units units{args};
    int phase = 0;
    while (units.Next()) {
      if (units.part != 0) continue;
      if (units.i != phase) {
        phase = units.i;
        WaitForCount(args.counters + phase - 1, gridDim.x);
        FenceCopyEngine();  // what threads of all blocks have written is read by this copy engine
        atomicExch(open, phase);
      }
      WaitForParity(rows_free + ring.place, ring.turn ^ 1);
      ArriveAndExpect(rows_full + ring.place, S::kRowBytes);
      CopyTile(rows + ring.place * S::kRowBytes, args.phases[phase].x, 0, units.column(),
               rows_full + ring.place, policy);
      ring.Advance();
    }
    return;
  }
  if (warp >= kWarps + 2) {
    const int first_row = (warp - kWarps - 2) * 32;
    for (int i = 0; i < args.count; ++i) {
      const Phase& p = args.phases[i];
      if (block < p.blocks) {
        if (p.eps >= 0) {
          if (first_row < kRows) {
            if (lane == 0) WaitForCount(args.counters + i - 1, gridDim.x);
            __syncwarp();
            const float* squares = args.squares + (i + 1) % 2 * kMaxChainRows * kMostParts;
            MakeFactors<kRows>(p, squares + first_row, factors + first_row);
          }
          Meet<kFactors>();
        }
      }
      if (i + 1 < args.count) {
        Meet<kFinished>();
        if (thread == kConsumers + 64) Count(args.counters + i);
      }
    }
    return;
  }

  if (block == 0 && thread < kCounters) args.stale[thread] = 0;
  const int half = warp / 4;
  const int columns = (args.n + 7) / 8;
  Ring<S::kStages> ring;
  Ring<S::kXStages> x_ring;
  for (int i = 0; i < args.count; ++i) {
    const Phase& p = args.phases[i];
    float* squares = args.squares + i % 2 * kMaxChainRows * kMostParts;
    Share first_share, last_share;
    const auto for_items = [&](auto work) {
      for (int item = warp; item < first_share.items + last_share.items; item += kWarps) {
        const bool last = item >= first_share.items;
        const Share share = last ? last_share : first_share;
        const int own = last ? item - first_share.items : item;
        work(share, share.first + own * share.sharers);
      }
    };
    if (block < p.blocks) {
      const int32_t begin = FirstUnit(p, block), end = FirstUnit(p, block + 1);
      const int32_t first_tile = begin / p.steps;
      bool has_factors = p.eps < 0;
      int32_t u = begin;
      const auto run = [&](auto parts) {
        constexpr int kParts = decltype(parts)::value;
        const int32_t tile = u / p.steps;
        const int32_t tile_end = (tile + 1) * p.steps, stop = min(tile_end, end);
        // What adds or turns is finished by a tile's sharers, one or more.
        const bool whole = u == tile * p.steps && end >= tile_end && !p.add && p.turns == nullptr;
        float acc[kParts][kRows / 2] = {};
        int held = -1, x_held = -1;
        for (; u < stop; ++u) {
          WaitForParity(rows_full + x_ring.place, x_ring.turn);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            WaitForParity(weights_full + ring.place, ring.turn);
            const uint64_t a =
                TileDescriptor(weights + ring.place * kWeightBytes + half * kHalfBytes);
            const uint64_t b = TileDescriptor(rows + x_ring.place * S::kRowBytes);
            BeginProducts();
#pragma unroll
            for (int j = 0; j < kStep / 16; ++j) {
              WarpgroupMultiplyAdd(acc[part], a + 2 * j, b + 2 * j);
            }
            CommitProducts();
            WaitForProducts<1>();  // those before are through
            if (lane == 0 && held >= 0) {
              Arrive(weights_free + held);
              if (part == 0) Arrive(rows_free + x_held);
            }
            held = ring.place;
            ring.Advance();
          }
          x_held = x_ring.place;
          x_ring.Advance();
        }
        WaitForProducts<0>();
        if (lane == 0) {
          Arrive(weights_free + held);
          Arrive(rows_free + x_held);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int e = 0; e < kRows / 2; ++e) asm volatile("" : "+f"(acc[part][e])::"memory");
        }
        if (whole) {
          if (!has_factors) Meet<kFactors>();
          has_factors = true;
          StoreWhole<kParts, kRows>(args, p, factors, tile * p.groups + warp,
                                    (p.groups - warp + 7) / 8, acc);
          return;
        }
        OwnSums::Four* to = SumsOf<kRows>(args, i % 2, block, tile == first_tile ? 0 : 1) + lane;
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          if (j >= columns) break;
          const float* sums = acc[0] + j * 4;
          OwnSums::Store(to + (warp * (kRows / 8) + j) * 32,
                         OwnSums::Of(sums[0], sums[1], sums[2], sums[3]));
        }
        (tile == first_tile ? first_share : last_share) = ShareOf(p, i % 2, tile, block, columns);
      };
      if (p.groups > 8) {
        run(Parts<2>{});
      } else {
        while (u < end) run(Parts<1>{});
      }
      if (!has_factors) Meet<kFactors>();
      if (p.sum_turn >= 0) {
        for_items(
            [&](const Share& share, int item) { Send<kRows>(args, p, share, item, columns); });
      }
      for_items([&](const Share& share, int item) {
        Finish<kRows>(args, p, squares, factors, share, item, columns);
      });
    }
    if (i + 1 < args.count) {
      Meet<kFinished>();
    }
    // Only now, as nobody waits for it.
    for_items(
        [&](const Share& share, int item) { DropOwnSums<kRows>(args, share, item, columns); });
  }
#endif
}

}  // namespace passel::gpu::cuda
