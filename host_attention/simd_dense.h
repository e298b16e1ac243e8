#pragma once
// Exact attention over adjacent rows, over the Simd of the including file: one pass over K and V
// for all query heads of a group, which memory bounds as long as it is asked early enough.

namespace passel::host {
namespace {

inline constexpr uint32_t kDenseTile = 32;  // rows scored before their values are summed
// Rows are prefetched this far ahead: the hardware's prefetchers do not keep up with a reader that
// computes.
inline constexpr size_t kDenseAhead = size_t{24} << 10;

// scores[h · kDenseTile + r] = q_h·k_r for as many rows as give one vector of sums.
// row: K of the first; q: [kHeads, padded], arranged.
template <class Rows, int kHeads, class S>
inline void DenseScores(const std::byte* row, size_t stride, int valid, const S& s, const float* q,
                        float* scores) {
  constexpr int kRows = Simd::kLanes / kHeads;
  F acc[Simd::kLanes];  // by head, then row
#pragma GCC unroll 16
  for (F& a : acc) a = Simd::Zero();
  typename Rows::KPart parts[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    parts[r] = Rows::K(row + static_cast<size_t>(r < valid ? r : valid - 1) * stride, s.d);
  }
  const auto chunk = [&](uint32_t c, bool half) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Prefetch(parts[r].p + c * Rows::kChunkBytes + kDenseAhead);
      F a, b;
      Rows::Load(parts[r], c, half, &a, &b);
#pragma GCC unroll 16
      for (int h = 0; h < kHeads; ++h) {
        const float* x = q + static_cast<uint32_t>(h) * s.padded + c * kChunk;
        F& sum = acc[h * kRows + r];
        sum = Simd::Fma(b, Simd::Load(x + Simd::kLanes), Simd::Fma(a, Simd::Load(x), sum));
      }
    }
  };
  EachChunk(s, chunk);
  alignas(64) float sums[Simd::kLanes];
  Simd::Store(sums, Simd::ReduceLanes(acc));
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
    __builtin_memcpy(scores + static_cast<uint32_t>(h) * kDenseTile, sums + h * kRows,
                     kRows * sizeof(float));
  }
}

// Chunks [c, c + kCount) of num_h += Σ_r weights[h · kDenseTile + r] · v_r.
template <class Rows, int kHeads, int kCount, class S>
inline __attribute__((always_inline)) void DenseValues(const std::byte* rows, size_t stride,
                                                       uint32_t valid, uint32_t c, bool half,
                                                       const S& s, const float* weights,
                                                       float* num) {
  constexpr int kVectors = 2 * kCount;
  F acc[kHeads][kVectors];
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      acc[h][v] = Simd::Load(num + static_cast<uint32_t>(h) * s.padded + c * kChunk +
                             static_cast<uint32_t>(v * Simd::kLanes));
    }
  }
  for (uint32_t r = 0; r < valid; ++r) {
    const typename Rows::Part part = Rows::V(rows + r * stride, s.d);
    F x[kVectors];
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kCount; ++i) {
      Prefetch(part.p + (c + i) * Rows::kChunkBytes + kDenseAhead);
      Rows::Load(part, c + i, half, &x[2 * i], &x[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      const F w = Simd::Set1(weights[static_cast<uint32_t>(h) * kDenseTile + r]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[h][v] = Simd::Fma(w, x[v], acc[h][v]);
    }
  }
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      Simd::Store(num + static_cast<uint32_t>(h) * s.padded + c * kChunk +
                      static_cast<uint32_t>(v * Simd::kLanes),
                  acc[h][v]);
    }
  }
}

// One tile of ≤ kDenseTile rows for kHeads heads; the state is arranged. weights: scratch,
// [kHeads, kDenseTile].
template <class Rows, int kHeads, class S>
inline void DenseTile(const std::byte* rows, size_t stride, uint32_t valid, const S& s,
                      const float* q, float scale, float* max, float* den, float* num,
                      float* weights) {
  constexpr uint32_t kRows = Simd::kLanes / kHeads;
  for (uint32_t r = 0; r < valid; r += kRows) {
    DenseScores<Rows, kHeads>(rows + r * stride, stride, static_cast<int>(valid - r), s, q,
                              weights + r);
  }
  constexpr uint32_t kWidth = Pair::kLanes;
  const uint32_t padded = (valid + kWidth - 1) / kWidth * kWidth;
  for (uint32_t h = 0; h < kHeads; ++h) {
    float* w = weights + h * kDenseTile;
    // Padding repeats the last score, so it leaves the maximum alone.
    for (uint32_t r = valid; r < padded; ++r) w[r] = w[valid - 1];
    Pair::F top = Pair::Load(w);
    for (uint32_t r = kWidth; r < padded; r += kWidth) top = Pair::Max(top, Pair::Load(w + r));
    Raise(Simd::ReduceMax(Simd::Max(top.a, top.b)) * scale, s, max + h, den + h,
          num + h * s.padded);
    Pair::F sum = Pair::Zero();
    for (uint32_t r = 0; r < padded; r += kWidth) {
      const Pair::F x = Pair::Mul(Pair::Load(w + r), Pair::Set1(scale));
      const Pair::F e = Exp<Pair>(Pair::Sub(x, Pair::Set1(max[h])));
      const Pair::F kept = Pair::IfLess(Pair::Load(kIndex + r),
                                        Pair::Set1(static_cast<float>(valid)), e, Pair::Zero());
      Pair::Store(w + r, kept);
      sum = Pair::Add(sum, kept);
    }
    den[h] += Simd::ReduceAdd(Simd::Add(sum.a, sum.b));
  }
  // As many chunks at a time as registers hold.
  constexpr uint32_t kCount = Simd::kLanes == 16 ? 2 : 1;
  const uint32_t whole = s.half ? s.chunks - 1 : s.chunks;
  uint32_t c = 0;
#pragma GCC unroll 4
  for (; c + kCount <= whole; c += kCount) {
    DenseValues<Rows, kHeads, kCount>(rows, stride, valid, c, false, s, weights, num);
  }
  for (; c < whole; ++c) {
    DenseValues<Rows, kHeads, 1>(rows, stride, valid, c, false, s, weights, num);
  }
  if (s.half) DenseValues<Rows, kHeads, 1>(rows, stride, valid, c, true, s, weights, num);
}

template <class Rows, uint32_t kFixed>
void AttendDenseOf(const RowsView& rows, size_t first, size_t count, const float* q, uint32_t heads,
                   float* work, float* max, float* den, float* num) {
  const Shape<kFixed> s(rows.head_dim);
  float* qa = Aligned(work);
  float* sums = qa + size_t{heads} * s.padded;
  float* weights = sums + size_t{heads} * s.padded;
  for (size_t h = 0; h < heads; ++h) {
    Arrange<Rows>(q + h * s.d, s, qa + h * s.padded);
    Arrange<Rows>(num + h * s.d, s, sums + h * s.padded);
  }
  const float scale = ScaleOf(s.d);
  for (size_t at = 0; at < count; at += kDenseTile) {
    const auto valid = static_cast<uint32_t>(count - at < kDenseTile ? count - at : kDenseTile);
    const std::byte* tile = rows.data + (first + at) * rows.stride;
    uint32_t h = 0;
    const auto run = [&]<int kHeads>() {
      DenseTile<Rows, kHeads>(tile, rows.stride, valid, s, qa + h * s.padded, scale, max + h,
                              den + h, sums + h * s.padded, weights);
      h += kHeads;
    };
    while (h + 4 <= heads) run.template operator()<4>();
    if (h + 2 <= heads) run.template operator()<2>();
    if (h < heads) run.template operator()<1>();
  }
  for (size_t h = 0; h < heads; ++h) Restore<Rows>(sums + h * s.padded, s, num + h * s.d);
}

}  // namespace
}  // namespace passel::host
