#pragma once
// Attention over K and V rows, over the Simd of the including file. Vectors are kept "arranged":
// in chunks of 2·kLanes floats, padded by zeros to whole chunks, in the order in which a row
// format unpacks (even elements, then odd ones, for bf16; the natural order for int8).

namespace passel::host {
namespace {

inline constexpr uint32_t kChunk = 2 * Simd::kLanes;
inline constexpr int kSums = 16;  // dot products formed together
inline constexpr int kTile = 32;  // listed rows weighed together
// Listed rows are prefetched this far ahead: with 32 and fewer they arrive a fifth later.
inline constexpr size_t kRowsAhead = 64;
// And so far ahead from L2 into L1.
inline constexpr int kRowsNear = 4;

// The head size: known when compiled (kFixed > 0), so that loops over chunks unroll, or not.
template <uint32_t kFixed>
struct Shape {
  uint32_t d, chunks, padded;
  bool half;  // the last chunk holds kLanes elements
  explicit Shape(uint32_t head_dim)
      : d(kFixed > 0 ? kFixed : head_dim),
        chunks((d + kChunk - 1) / kChunk),
        padded(chunks * kChunk),
        half(d % kChunk != 0) {}
};

// Load gives a row's values; LoadUnscaled leaves their common scale to Times (x · scale) and Minus
// (x · scale − y), which need it less often.
struct Bf16Rows {
  static constexpr bool kInterleaved = true;
  static constexpr uint32_t kChunkBytes = 2 * kChunk;
  struct Part {
    const std::byte* p;
  };
  using KPart = Part;
  static size_t KBytes(uint32_t d) { return 2 * d; }
  static Part K(const std::byte* row, uint32_t) { return {row}; }
  static Part V(const std::byte* row, uint32_t d) { return {row + 2 * d}; }
  static F Times(Part, F x) { return x; }
  static F Minus(Part, F x, F y) { return Simd::Sub(x, y); }
  static void LoadUnscaled(Part part, uint32_t chunk, bool half, F* a, F* b) {
    Load(part, chunk, half, a, b);
  }
  static void Load(Part part, uint32_t chunk, bool half, F* a, F* b) {
    const std::byte* p = part.p + 2 * kChunk * chunk;
    if (half) {
      Simd::LoadBf16Half(p, a, b);
    } else {
      Simd::LoadBf16(p, a, b);
    }
  }
};

struct Int8Rows {
  static constexpr bool kInterleaved = false;
  static constexpr uint32_t kChunkBytes = kChunk;
  struct Part {
    const std::byte* p;
    F scale;
  };
  struct KPart : Part {
    const std::byte* half_steps;
  };
  static size_t KBytes(uint32_t d) { return 8 + d + d / 8; }
  static Part Get(const std::byte* row, size_t scale_at, size_t values_at) {
    float scale;
    __builtin_memcpy(&scale, row + scale_at, sizeof(scale));
    return {row + values_at, Simd::Set1(scale)};
  }
  static KPart K(const std::byte* row, uint32_t d) { return {Get(row, 0, 8), row + 8 + d}; }
  static Part V(const std::byte* row, uint32_t d) { return Get(row, 4, KBytes(d)); }
  static F Times(const Part& part, F x) { return Simd::Mul(x, part.scale); }
  static F Minus(const Part& part, F x, F y) { return Simd::Fms(x, part.scale, y); }
  static void LoadUnscaled(const Part& part, uint32_t chunk, bool half, F* a, F* b) {
    const std::byte* p = part.p + kChunk * chunk;
    *a = Simd::LoadInt8(p);
    *b = half ? Simd::Zero() : Simd::LoadInt8(p + Simd::kLanes);
  }
  static void LoadUnscaled(const KPart& part, uint32_t chunk, bool half, F* a, F* b) {
    LoadUnscaled(static_cast<const Part&>(part), chunk, half, a, b);
    const std::byte* bits = part.half_steps + kChunk / 8 * chunk;
    *a = Simd::AddHalves(*a, bits);
    if (!half) *b = Simd::AddHalves(*b, bits + Simd::kLanes / 8);
  }
  template <class P>
  static void Load(const P& part, uint32_t chunk, bool half, F* a, F* b) {
    LoadUnscaled(part, chunk, half, a, b);
    *a = Simd::Mul(*a, part.scale);
    *b = Simd::Mul(*b, part.scale);
  }
};

// Where element j of a vector stands when arranged.
template <class Rows>
inline uint32_t ArrangedIndex(uint32_t j) {
  if (!Rows::kInterleaved) return j;
  const uint32_t in = j % kChunk;
  return j - in + in / 2 + (in % 2) * Simd::kLanes;
}
// Whole chunks are written such that the compiler sees shuffles.
template <class Rows, class S>
inline void Arrange(const float* __restrict x, const S& s, float* __restrict out) {
  uint32_t done = 0;
  if constexpr (Rows::kInterleaved) {
    for (; done + kChunk <= s.d; done += kChunk) {
      for (uint32_t i = 0; i < Simd::kLanes; ++i) {
        out[done + i] = x[done + 2 * i];
        out[done + Simd::kLanes + i] = x[done + 2 * i + 1];
      }
    }
  }
  for (uint32_t j = done; j < s.padded; ++j) out[j] = 0;
  for (uint32_t j = done; j < s.d; ++j) out[ArrangedIndex<Rows>(j)] = x[j];
}
template <class Rows, class S>
inline void Restore(const float* __restrict arranged, const S& s, float* __restrict x) {
  uint32_t done = 0;
  if constexpr (Rows::kInterleaved) {
    for (; done + kChunk <= s.d; done += kChunk) {
      for (uint32_t i = 0; i < Simd::kLanes; ++i) {
        x[done + 2 * i] = arranged[done + i];
        x[done + 2 * i + 1] = arranged[done + Simd::kLanes + i];
      }
    }
  }
  for (uint32_t j = done; j < s.d; ++j) x[j] = arranged[ArrangedIndex<Rows>(j)];
}

inline float* Aligned(float* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63});
}

template <class S, class Body>
inline __attribute__((always_inline)) void EachChunk(const S& s, const Body& body) {
  const uint32_t whole = s.half ? s.chunks - 1 : s.chunks;
#pragma GCC unroll 4
  for (uint32_t c = 0; c < whole; ++c) body(c, false);
  if (s.half) body(whole, true);
}

// Stores the sums of 16 accumulators.
inline void StoreSums(const F* acc, float* out) {
  for (int i = 0; i < kSums; i += Simd::kLanes) Simd::Store(out + i, Simd::ReduceLanes(acc + i));
}

// dots[r·kHeads + h] = q_h·k_r for kSums / kHeads rows. q: [kHeads, padded], arranged.
template <class Rows, int kHeads, class S>
inline void DotTile(const std::byte* const* rows, const S& s, const float* q, float* dots) {
  constexpr int kRows = kSums / kHeads;
  F acc[kSums];
#pragma GCC unroll 16
  for (F& a : acc) a = Simd::Zero();
  typename Rows::KPart parts[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) parts[r] = Rows::K(rows[r], s.d);
  const auto chunk = [&](uint32_t c, bool half) __attribute__((always_inline)) {
    F qa[kHeads], qb[kHeads];
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      qa[h] = Simd::Load(q + h * s.padded + c * kChunk);
      qb[h] = Simd::Load(q + h * s.padded + c * kChunk + Simd::kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      F a, b;
      Rows::Load(parts[r], c, half, &a, &b);
#pragma GCC unroll 16
      for (int h = 0; h < kHeads; ++h) {
        F& sum = acc[r * kHeads + h];
        sum = Simd::Fma(b, qb[h], Simd::Fma(a, qa[h], sum));
      }
    }
  };
  EachChunk(s, chunk);
  StoreSums(acc, dots);
}

// dots[r] = q·k_r and norms[r] = |k_r − mean|² of 16 rows; prefetches next[r]'s K on the way.
template <class Rows, class S>
inline void DotNormTile(const std::byte* const* rows, const std::byte* const* next,
                        size_t next_bytes, const S& s, const float* q, const float* mean,
                        float* dots, float* norms) {
  F acc[kSums], squares[kSums];
  for (int r = 0; r < kSums; ++r) {
    PrefetchBytes(next[r], next_bytes);
    // Rows that begin anywhere in a cache line reach into one more.
    if (!Rows::kInterleaved) Prefetch(next[r] + next_bytes - 1);
    if (r + kRowsNear < kSums) PrefetchIntoL1(rows[r + kRowsNear], next_bytes);
    const typename Rows::KPart part = Rows::K(rows[r], s.d);
    F dot0 = Simd::Zero(), dot1 = dot0, square0 = dot0, square1 = dot0;
    const auto chunk = [&](uint32_t c, bool half) __attribute__((always_inline)) {
      F a, b;
      Rows::LoadUnscaled(part, c, half, &a, &b);
      dot0 = Simd::Fma(a, Simd::Load(q + c * kChunk), dot0);
      dot1 = Simd::Fma(b, Simd::Load(q + c * kChunk + Simd::kLanes), dot1);
      a = Rows::Minus(part, a, Simd::Load(mean + c * kChunk));
      b = Rows::Minus(part, b, Simd::Load(mean + c * kChunk + Simd::kLanes));
      square0 = Simd::Fma(a, a, square0);
      square1 = Simd::Fma(b, b, square1);
    };
    EachChunk(s, chunk);
    acc[r] = Rows::Times(part, Simd::Add(dot0, dot1));
    squares[r] = Simd::Add(square0, square1);
  }
  StoreSums(acc, dots);
  StoreSums(squares, norms);
}

// 1/√d, without a call of sqrtf that might not be compiled for this level.
inline float ScaleOf(uint32_t d) {
  float lanes[Simd::kLanes];
  Simd::Store(lanes, Simd::Sqrt(Simd::Set1(static_cast<float>(d))));
  return 1.0f / lanes[0];
}

// Raises a running maximum to `top`, rescaling den and num (arranged).
template <class S>
inline void Raise(float top, const S& s, float* max, float* den, float* num) {
  if (top <= *max) return;
  float lanes[Simd::kLanes];
  Simd::Store(lanes, Exp<Simd>(Simd::Set1(*max - top)));
  const float w = *max == kEmptyMax ? 0.0f : lanes[0];
  *max = top;
  *den *= w;
  for (uint32_t j = 0; j < s.padded; j += Simd::kLanes) {
    Simd::Store(num + j, Simd::Mul(Simd::Load(num + j), Simd::Set1(w)));
  }
}

inline constexpr float kIndex[kTile] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                        11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                        22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Listed rows that are weighed and summed together, and those to prefetch meanwhile.
struct ListTile {
  const std::byte *rows[kTile], *ahead[kTile];
  alignas(64) float weights[kTile];
  int valid;
};

// Chunks [c, c + kCount) of num += Σ_r weights[r] · v_r; num: [padded], arranged. Prefetches the
// same part of the values ahead on the way.
template <class Rows, uint32_t kCount, class S>
inline __attribute__((always_inline)) void AddValues(const ListTile& tile, uint32_t c, bool half,
                                                     const S& s, float* num) {
  F a[kCount], b[kCount];
  float* at = num + c * kChunk;
#pragma GCC unroll 4
  for (uint32_t i = 0; i < kCount; ++i) {
    a[i] = Simd::Load(at + i * kChunk);
    b[i] = Simd::Load(at + i * kChunk + Simd::kLanes);
  }
  for (int r = 0; r < tile.valid; ++r) {
    const std::byte* ahead = Rows::V(tile.ahead[r], s.d).p + c * Rows::kChunkBytes;
    PrefetchBytes(ahead, kCount * Rows::kChunkBytes);
    if (!Rows::kInterleaved) Prefetch(ahead + kCount * Rows::kChunkBytes - 1);
    if (r + kRowsNear < kTile) {
      PrefetchIntoL1(Rows::V(tile.rows[r + kRowsNear], s.d).p + c * Rows::kChunkBytes,
                     kCount * Rows::kChunkBytes);
    }
    const typename Rows::Part part = Rows::V(tile.rows[r], s.d);
    const F w = Rows::Times(part, Simd::Set1(tile.weights[r]));
#pragma GCC unroll 4
    for (uint32_t i = 0; i < kCount; ++i) {
      F x, y;
      Rows::LoadUnscaled(part, c + i, half, &x, &y);
      a[i] = Simd::Fma(w, x, a[i]);
      b[i] = Simd::Fma(w, y, b[i]);
    }
  }
#pragma GCC unroll 4
  for (uint32_t i = 0; i < kCount; ++i) {
    Simd::Store(at + i * kChunk, a[i]);
    Simd::Store(at + i * kChunk + Simd::kLanes, b[i]);
  }
}

// num += the tile's weighted values, as many chunks at a time as registers hold.
template <class Rows, class S>
inline void AddTile(const ListTile& tile, const S& s, float* num) {
  constexpr uint32_t kCount = Simd::kLanes == 16 ? 4 : 2;
  const uint32_t whole = s.half ? s.chunks - 1 : s.chunks;
  uint32_t c = 0;
#pragma GCC unroll 4
  for (; c + kCount <= whole; c += kCount) AddValues<Rows, kCount>(tile, c, false, s, num);
  for (; c < whole; ++c) AddValues<Rows, 1>(tile, c, false, s, num);
  if (s.half) AddValues<Rows, 1>(tile, c, true, s, num);
}

template <class Rows, uint32_t kFixed>
void AttendListOf(const RowsView& rows, const uint32_t* ids, size_t count, const float* q,
                  const Weighting& weighting, float* work, PartialRef partial) {
  const Shape<kFixed> s(rows.head_dim);
  float* qa = Aligned(work);
  float* mean = qa + s.padded;
  float* num = mean + s.padded;
  Arrange<Rows>(q, s, qa);
  Arrange<Rows>(partial.num, s, num);
  if (weighting.l > 0) {
    Arrange<Rows>(weighting.mean, s, mean);
  } else {
    for (uint32_t j = 0; j < s.padded; ++j) mean[j] = 0;
  }
  F q_mean = Simd::Zero(), q_square = Simd::Zero();
  for (uint32_t j = 0; j < s.padded; j += Simd::kLanes) {
    const F x = Simd::Load(qa + j);
    q_mean = Simd::Fma(x, Simd::Load(mean + j), q_mean);
    q_square = Simd::Fma(x, x, q_square);
  }
  const float q_dot_mean = Simd::ReduceAdd(q_mean);
  const float q_norm2 = Simd::ReduceAdd(q_square);
  const float scale = ScaleOf(s.d);
  const size_t k_bytes = Rows::KBytes(s.d);
  const auto fill = [&](size_t at, const std::byte** out) {
    for (size_t r = 0; r < kTile; ++r) {
      const size_t i = at + r < count ? at + r : count - 1;
      out[r] = rows.data + size_t{ids[i]} * rows.stride;
    }
  };
  for (size_t i = 0; i < kRowsAhead && i < count; ++i) {
    PrefetchBytes(rows.data + size_t{ids[i]} * rows.stride, rows.stride);
  }
  ListTile tile;
  for (size_t at = 0; at < count; at += kTile) {
    tile.valid = static_cast<int>(count - at < kTile ? count - at : kTile);
    fill(at, tile.rows);
    fill(at + kRowsAhead, tile.ahead);
    alignas(64) float dots[kTile], norms[kTile];
    for (int r = 0; r < kTile; r += kSums) {
      DotNormTile<Rows>(tile.rows + r, tile.ahead + r, k_bytes, s, qa, mean, dots + r, norms + r);
    }
    F top = Simd::Set1(kEmptyMax);
    for (int r = 0; r < kTile; r += Simd::kLanes) top = Simd::Max(top, Simd::Load(dots + r));
    // Padding repeats the last row, so it leaves the maximum alone.
    Raise(Simd::ReduceMax(top) * scale, s, partial.max, partial.den, num);
    Pair::F sum = Pair::Zero();
    for (int r = 0; r < kTile; r += Pair::kLanes) {
      const Pair::F dot = Pair::Load(dots + r);
      Pair::F w = Exp<Pair>(Pair::Sub(Pair::Mul(dot, Pair::Set1(scale)), Pair::Set1(*partial.max)));
      if (weighting.l > 0) {
        const Pair::F norm2 = Pair::Mul(Pair::Set1(q_norm2), Pair::Load(norms + r));
        const Pair::F along = Pair::Sub(dot, Pair::Set1(q_dot_mean));
        const Pair::F cosine = Pair::IfLess(
            Pair::Zero(), norm2, Pair::Mul(along, InverseSqrt<Pair>(norm2)), Pair::Zero());
        w = Pair::Mul(w, Reciprocal<Pair>(Inclusion<Pair>(cosine, weighting.k, weighting.l)));
      }
      w = Pair::IfLess(Pair::Load(kIndex + r), Pair::Set1(static_cast<float>(tile.valid)), w,
                       Pair::Zero());
      Pair::Store(tile.weights + r, w);
      sum = Pair::Add(sum, w);
    }
    *partial.den += Simd::ReduceAdd(Simd::Add(sum.a, sum.b));
    AddTile<Rows>(tile, s, num);
  }
  Restore<Rows>(num, s, partial.num);
}

template <class Rows, uint32_t kFixed>
void ScoresOf(const RowsView& rows, size_t first, size_t count, const float* q, float* work,
              float* scores) {
  const Shape<kFixed> s(rows.head_dim);
  float* qa = Aligned(work);
  Arrange<Rows>(q, s, qa);
  const float scale = ScaleOf(s.d);
  const std::byte* tile[kSums];
  alignas(64) float dots[kSums];
  for (size_t at = 0; at < count; at += kSums) {
    for (size_t r = 0; r < kSums; ++r) {
      const size_t i = at + r < count ? at + r : count - 1;
      tile[r] = rows.data + (first + i) * rows.stride;
    }
    DotTile<Rows, 1>(tile, s, qa, dots);
    for (size_t r = 0; r < kSums && at + r < count; ++r) scores[at + r] = dots[r] * scale;
  }
}

}  // namespace
}  // namespace passel::host
