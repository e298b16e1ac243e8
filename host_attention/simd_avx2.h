#pragma once
// 8-lane float32 operations for kernels_simd.h. Only kernels_avx2.cpp may include this, under its
// target pragma; internal linkage as in simd_avx512.h.

#include <immintrin.h>

namespace passel::host {
namespace {

struct Simd {
  using F = __m256;
  static constexpr int kLanes = 8;

  static F Zero() { return _mm256_setzero_ps(); }
  static F Set1(float x) { return _mm256_set1_ps(x); }
  static F Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F Fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  // Within 11 bits.
  static F RoughReciprocal(F a) { return _mm256_rcp_ps(a); }
  static F RoughInverseSqrt(F a) { return _mm256_rsqrt_ps(a); }
  static F Sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F Abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // a < b ? x : y, lane by lane.
  static F IfLess(F a, F b, F x, F y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static F Round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 2^n for integral n in [−126, 127].
  static F Pow2(F n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  }
  // x = m · 2^e with m in [0.5, 1), for normal x > 0.
  static F Mantissa(F x, F* e) {
    const __m256i bits = _mm256_castps_si256(x);
    *e = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
    return _mm256_castsi256_ps(_mm256_or_si256(
        _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f000000)));
  }
  static float ReduceMax(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float ReduceAdd(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  // Lane i of the result is the sum of the lanes of v[i].
  static F ReduceLanes(const F* v) {
    const F a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const F b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return Add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  // 16 bf16 as even and odd elements: the upper halves of 32-bit words are float32 already.
  static void LoadBf16(const void* p, F* even, F* odd) {
    const __m256i x = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-65536)));
  }
  // The same for the last 8 of a row; upper lanes are zero.
  static void LoadBf16Half(const void* p, F* even, F* odd) {
    const __m256i x = _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-65536)));
  }
  static F LoadInt8(const void* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
  // Adds 0.5 to each lane whose bit, of 8 at `bits`, is set.
  static F AddHalves(F a, const void* bits) {
    const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(*static_cast<const uint8_t*>(bits));
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(all, own), own);
    return _mm256_add_ps(a, _mm256_and_ps(_mm256_castsi256_ps(set), _mm256_set1_ps(0.5f)));
  }
  // Bit i: lane i > 0.
  static uint32_t PositiveBits(F a) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, Zero(), _CMP_GT_OQ)));
  }

  // The bytes of a 64-byte line of counters above 1, as bits; the line is cleared.
  static uint64_t TakeAboveOne(uint8_t* line) {
    uint64_t mask = 0;
    for (int half = 0; half < 2; ++half) {
      auto* p = reinterpret_cast<__m256i*>(line + 32 * half);
      const __m256i x = _mm256_loadu_si256(p);
      const __m256i two = _mm256_set1_epi8(2);
      const __m256i above = _mm256_cmpeq_epi8(_mm256_max_epu8(x, two), x);
      mask |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(above))} << (32 * half);
      _mm256_storeu_si256(p, _mm256_setzero_si256());
    }
    return mask;
  }
  static void SaturateAtTwo(uint8_t* line) {
    for (int half = 0; half < 2; ++half) {
      auto* p = reinterpret_cast<__m256i*>(line + 32 * half);
      _mm256_storeu_si256(p, _mm256_min_epu8(_mm256_loadu_si256(p), _mm256_set1_epi8(2)));
    }
  }
  static void Copy64(uint16_t* to, const uint16_t* from) {
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * half),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16 * half)));
    }
  }
  // For 32·kRuns tokens: which share ≥ 2 codes. codes: [l] broadcast; table[t·stride + i].
  template <int kRuns>
  static void CompareCodes(const uint16_t* table, size_t stride, const uint16_t* codes, uint32_t l,
                           uint32_t* masks) {
    __m256i agreeing[2 * kRuns];
    for (__m256i& x : agreeing) x = _mm256_setzero_si256();
    for (size_t t = 0; t < l; ++t) {
      const __m256i code = _mm256_set1_epi16(static_cast<int16_t>(codes[t]));
      const uint16_t* row = table + t * stride;
      for (int r = 0; r < 2 * kRuns; ++r) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 16 * r));
        agreeing[r] = _mm256_sub_epi16(agreeing[r], _mm256_cmpeq_epi16(x, code));
      }
    }
    const __m256i one = _mm256_set1_epi16(1);
    for (int r = 0; r < kRuns; ++r) {
      // Packing works within 128-bit lanes; the permutation puts the four quarters in order.
      const __m256i packed = _mm256_packs_epi16(_mm256_cmpgt_epi16(agreeing[2 * r], one),
                                                _mm256_cmpgt_epi16(agreeing[2 * r + 1], one));
      masks[r] =
          static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(packed, 0xd8)));
    }
  }
};

}  // namespace
}  // namespace passel::host
