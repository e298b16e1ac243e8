#pragma once
// Probes over the Simd of the including file.

namespace passel::host {
namespace {

// Into the L2 cache: prefetches into L1 occupy the line buffers that loads need, and rows arrive a
// third later with them, whatever the distance (docs/performance.md). Always inlined: GCC takes a
// function that only prefetches for one without effect, and drops calls of it.
inline __attribute__((always_inline)) void Prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline __attribute__((always_inline)) void PrefetchIntoL1(const std::byte* p, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 3);
}
inline __attribute__((always_inline)) void PrefetchBytes(const std::byte* p, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) Prefetch(p + at);
}

// Counts staged ids. Ids of one bucket are distinct, buckets are not, so increments stay scalar;
// unrolled, they run at the store port's rate.
inline void CountStaged(const uint16_t* ids, size_t count, uint8_t* counters) {
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint64_t four;
    __builtin_memcpy(&four, ids + i, sizeof(four));
    ++counters[four & 0xffff];
    ++counters[(four >> 16) & 0xffff];
    ++counters[(four >> 32) & 0xffff];
    ++counters[four >> 48];
  }
  for (; i < count; ++i) ++counters[ids[i]];
}

// Appends first + the positions of `mask`'s bits; may write, and not count, 3 entries more. Few
// bits are set, how many is hard to predict: 3 are written without asking.
inline size_t TakeMask(uint64_t mask, uint32_t first, uint32_t* out) {
  constexpr uint64_t kTop = uint64_t{1} << 63;  // __builtin_ctzll(0) is undefined
  const auto count = static_cast<size_t>(__builtin_popcountll(mask));
  uint64_t left = mask;
  for (int i = 0; i < 3; ++i) {
    out[i] = first + static_cast<uint32_t>(__builtin_ctzll(left | kTop));
    left &= left - 1;
  }
  for (size_t i = 3; i < count; ++i) {
    out[i] = first + static_cast<uint32_t>(__builtin_ctzll(left));
    left &= left - 1;
  }
  return count;
}

size_t ProbeCsr(const CsrView& table, const uint16_t* codes, uint32_t limit, uint32_t base,
                const ProbeScratch& scratch, uint32_t* out) {
  // Bounds are prefetched kBoundsAhead tables before their buckets are, and those kIdsAhead before
  // they are read: each is a cache miss. Bounds are kept from then on: a branch on what has to come
  // from L2 again, behind all those prefetches, is resolved late.
  constexpr uint32_t kBoundsAhead = 96, kIdsAhead = 48, kKept = 64;
  static_assert(kKept > kIdsAhead && (kKept & (kKept - 1)) == 0);
  struct Bucket {
    const uint16_t* ids;
    size_t size;
  } kept[kKept];
  constexpr size_t kFlush = kStagedAtOnce;
  const size_t buckets = size_t{1} << table.k;
  const uint32_t l = table.l;
  uint8_t* counters = scratch.counters;
  uint16_t* staging = scratch.staging;
  const auto bounds_of = [&](uint32_t t) {
    return table.bounds + t * (buckets + 1) + (codes[t] & (buckets - 1));
  };
  for (uint32_t t = 0; t < kBoundsAhead && t < l; ++t) Prefetch(bounds_of(t));
  const auto prefetch_ids = [&](uint32_t t) {
    const uint16_t* bounds = bounds_of(t);
    const uint16_t* ids = table.ids + t * table.stride;
    kept[t % kKept] = {ids + bounds[0], bounds[1] >= bounds[0] ? size_t{bounds[1]} - bounds[0] : 0};
    // The lines that the bucket lies in, four at most: beyond, the hardware's stream prefetcher has
    // caught on. How many they are is hard to predict, so the last one is asked for again instead.
    constexpr uintptr_t kLine = 64;
    const uintptr_t first = reinterpret_cast<uintptr_t>(ids + bounds[0]) & ~(kLine - 1);
    const uintptr_t last = reinterpret_cast<uintptr_t>(ids + bounds[1]) - 1;
    for (uintptr_t line = 0; line < 4; ++line) {
      const uintptr_t at = first + line * kLine;
      Prefetch(reinterpret_cast<const void*>(at < last ? at : last));
    }
  };
  for (uint32_t t = 0; t < kIdsAhead && t < l; ++t) prefetch_ids(t);
  size_t staged = 0;
  uint32_t unsaturated = 0;  // tables counted since counters were last brought to ≤ 2
  for (uint32_t t = 0; t < l; ++t) {
    if (t + kBoundsAhead < l) Prefetch(bounds_of(t + kBoundsAhead));
    if (t + kIdsAhead < l) prefetch_ids(t + kIdsAhead);
    const auto [ids, size] = kept[t % kKept];
    if (size > kFlush) {
      CountStaged(ids, size, counters);
    } else {
      for (size_t i = 0; i < size; i += 32) Simd::Copy64(staging + staged + i, ids + i);
      staged += size;
      if (staged > kFlush) {
        CountStaged(staging, staged, counters);
        staged = 0;
      }
    }
    if (++unsaturated == 250) {
      CountStaged(staging, staged, counters);
      staged = 0;
      unsaturated = 0;
      for (uint32_t i = 0; i <= kMaxBlockTokens; i += 64) Simd::SaturateAtTwo(counters + i);
    }
  }
  CountStaged(staging, staged, counters);
  size_t count = 0;
  uint32_t i = 0;
  for (; i + 64 <= limit; i += 64) {
    count += TakeMask(Simd::TakeAboveOne(counters + i), base + i, out + count);
  }
  if (i < limit) {
    const uint64_t mask = Simd::TakeAboveOne(counters + i) & ((uint64_t{1} << (limit - i)) - 1);
    count += TakeMask(mask, base + i, out + count);
    i += 64;
  }
  for (; i < table.tokens; i += 64) Simd::TakeAboveOne(counters + i);
  return count;
}

size_t ProbeCompact(const CompactView& table, const uint16_t* codes, uint32_t limit, uint32_t base,
                    uint32_t* out) {
  size_t count = 0;
  uint32_t masks[8];
  uint32_t i = 0;
  const auto take = [&](int runs) {
    for (int r = 0; r < runs && i < limit; ++r, i += 32) {
      const uint32_t left = limit - i;
      const uint32_t mask = left >= 32 ? masks[r] : masks[r] & ((1u << left) - 1);
      count += TakeMask(mask, base + i, out + count);
    }
  };
  while (i + 256 <= table.stride && i + 128 < limit) {
    Simd::CompareCodes<8>(table.codes + i, table.stride, codes, table.l, masks);
    take(8);
  }
  while (i < limit) {
    Simd::CompareCodes<1>(table.codes + i, table.stride, codes, table.l, masks);
    take(1);
  }
  return count;
}

}  // namespace
}  // namespace passel::host
