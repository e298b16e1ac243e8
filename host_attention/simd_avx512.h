#pragma once
// 16-lane float32 operations for kernels_simd.h. Only kernels_avx512.cpp may include this, under
// its target pragma: everything here has internal linkage, so no AVX-512 copy can reach other
// files.

#include <immintrin.h>

namespace passel::host {
namespace {

struct Simd {
  using F = __m512;
  static constexpr int kLanes = 16;

  static F Zero() { return _mm512_setzero_ps(); }
  static F Set1(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F Fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  // Within 14 bits.
  static F RoughReciprocal(F a) { return _mm512_rcp14_ps(a); }
  static F RoughInverseSqrt(F a) { return _mm512_rsqrt14_ps(a); }
  static F Sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F Abs(F a) { return _mm512_abs_ps(a); }
  // a < b ? x : y, lane by lane.
  static F IfLess(F a, F b, F x, F y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static F Round(F a) { return _mm512_roundscale_ps(a, 0); }
  // 2^n for integral n in [−126, 127].
  static F Pow2(F n) {
    const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
  }
  // x = m · 2^e with m in [0.5, 1), for normal x > 0.
  static F Mantissa(F x, F* e) {
    const __m512i bits = _mm512_castps_si512(x);
    *e = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(bits, 23), _mm512_set1_epi32(126)));
    return _mm512_castsi512_ps(_mm512_or_epi32(
        _mm512_and_epi32(bits, _mm512_set1_epi32(0x007fffff)), _mm512_set1_epi32(0x3f000000)));
  }
  static float ReduceMax(F a) { return _mm512_reduce_max_ps(a); }
  static float ReduceAdd(F a) { return _mm512_reduce_add_ps(a); }
  // Lane i of the result is the sum of the lanes of v[i].
  static F ReduceLanes(const F* v) {
    F a[8], b[4];
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
      a[i] = Add(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44),
                 _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      b[i] = Add(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                 _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    }
    const F c = Add(_mm512_unpacklo_ps(b[0], b[2]), _mm512_unpackhi_ps(b[0], b[2]));
    const F e = Add(_mm512_unpacklo_ps(b[1], b[3]), _mm512_unpackhi_ps(b[1], b[3]));
    const F r = Add(_mm512_unpacklo_ps(c, e), _mm512_unpackhi_ps(c, e));
    return _mm512_shuffle_f32x4(r, r, 0xd8);
  }
  // 32 bf16 as even and odd elements: the upper halves of 32-bit words are float32 already.
  static void LoadBf16(const void* p, F* even, F* odd) {
    const __m512i x = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_epi32(x, _mm512_set1_epi32(-65536)));
  }
  // The same for the last 16 of a row; upper lanes are zero.
  static void LoadBf16Half(const void* p, F* even, F* odd) {
    const __m512i x = _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_epi32(x, _mm512_set1_epi32(-65536)));
  }
  static F LoadInt8(const void* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  // Adds 0.5 to each lane whose bit, of 16 at `bits`, is set.
  static F AddHalves(F a, const void* bits) {
    __mmask16 mask;
    __builtin_memcpy(&mask, bits, sizeof(mask));
    return _mm512_mask_add_ps(a, mask, a, Set1(0.5f));
  }
  // Bit i: lane i > 0.
  static uint32_t PositiveBits(F a) {
    return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ);
  }

  // The bytes of a 64-byte line of counters above 1, as bits; the line is cleared.
  static uint64_t TakeAboveOne(uint8_t* line) {
    const __m512i x = _mm512_loadu_si512(line);
    _mm512_storeu_si512(line, _mm512_setzero_si512());
    return _mm512_cmpgt_epu8_mask(x, _mm512_set1_epi8(1));
  }
  static void SaturateAtTwo(uint8_t* line) {
    _mm512_storeu_si512(line, _mm512_min_epu8(_mm512_loadu_si512(line), _mm512_set1_epi8(2)));
  }
  static void Copy64(uint16_t* to, const uint16_t* from) {
    _mm512_storeu_si512(to, _mm512_loadu_si512(from));
  }
  // For 32·kRuns tokens: which share ≥ 2 codes. codes: [l] broadcast; table[t·stride + i].
  template <int kRuns>
  static void CompareCodes(const uint16_t* table, size_t stride, const uint16_t* codes, uint32_t l,
                           uint32_t* masks) {
    __m512i agreeing[kRuns];
    for (int r = 0; r < kRuns; ++r) agreeing[r] = _mm512_setzero_si512();
    const __m512i one = _mm512_set1_epi16(1);
    for (size_t t = 0; t < l; ++t) {
      const __m512i code = _mm512_set1_epi16(static_cast<int16_t>(codes[t]));
      const uint16_t* row = table + t * stride;
      for (int r = 0; r < kRuns; ++r) {
        const __mmask32 equal = _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(row + 32 * r), code);
        agreeing[r] = _mm512_mask_add_epi16(agreeing[r], equal, agreeing[r], one);
      }
    }
    for (int r = 0; r < kRuns; ++r) masks[r] = _mm512_cmpgt_epu16_mask(agreeing[r], one);
  }
};

}  // namespace
}  // namespace passel::host
