#pragma once
// Vector exp, log, acos and the inclusion probability, over the Simd of the including file.
// Error bounds (measured by tests/host_attention against float64): exp 3e-7 relative on
// [−87, 0]; u 2e-5 relative wherever u > 1e-12, given the float32 cosine.

namespace passel::host {
namespace {

using F = Simd::F;

inline F Polynomial(F x, const float* coefficients, int count) {
  F y = Simd::Set1(coefficients[0]);
  for (int i = 1; i < count; ++i) y = Simd::Fma(y, x, Simd::Set1(coefficients[i]));
  return y;
}

// e^x; arguments below −87 give e^−87, which no float32 sum with a term of 1 notices.
inline F Exp(F x) {
  x = Simd::Min(Simd::Max(x, Simd::Set1(-87.0f)), Simd::Set1(88.0f));
  const F n = Simd::Round(Simd::Mul(x, Simd::Set1(1.44269504f)));
  F r = Simd::Fma(n, Simd::Set1(-0.693359375f), x);
  r = Simd::Fma(n, Simd::Set1(2.12194440e-4f), r);
  static constexpr float kTaylor[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                      4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const F y = Simd::Fma(Polynomial(r, kTaylor, 6), Simd::Mul(r, r), r);
  return Simd::Mul(Simd::Add(y, Simd::Set1(1.0f)), Simd::Pow2(n));
}

// ln x for normal x > 0 (the Cephes polynomial).
inline F Log(F x) {
  F e;
  F m = Simd::Mantissa(x, &e);
  const F low = Simd::Set1(0.707106781f);
  e = Simd::IfLess(m, low, Simd::Sub(e, Simd::Set1(1.0f)), e);
  m = Simd::Sub(Simd::IfLess(m, low, Simd::Add(m, m), m), Simd::Set1(1.0f));
  static constexpr float kLog[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                   -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                   2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  const F z = Simd::Mul(m, m);
  F y = Simd::Mul(Simd::Mul(Polynomial(m, kLog, 9), m), z);
  y = Simd::Fma(e, Simd::Set1(-2.12194440e-4f), y);
  y = Simd::Fma(z, Simd::Set1(-0.5f), y);
  return Simd::Fma(e, Simd::Set1(0.693359375f), Simd::Add(m, y));
}

// u at this cosine (DESIGN 2), as InclusionProbability.
inline F Inclusion(F cosine, uint32_t k, uint32_t l) {
  const F one = Simd::Set1(1.0f);
  const float tables = static_cast<float>(l);
  const F c = Simd::Max(Simd::Min(cosine, one), Simd::Set1(-1.0f));
  const F a = Simd::Abs(c);
  // acos |c| (Abramowitz and Stegun 4.4.46), relative accuracy kept as |c| → 1 by the root.
  static constexpr float kAcos[] = {-0.0012624911f, 0.0066700901f, -0.0170881256f, 0.0308918810f,
                                    -0.0501743046f, 0.0889789874f, -0.2145988016f, 1.5707963050f};
  const F angle = Simd::Mul(Simd::Mul(Simd::Sqrt(Simd::Sub(one, a)), Polynomial(a, kAcos, 8)),
                            Simd::Set1(0.318309886f));
  const F p = Simd::IfLess(c, Simd::Zero(), angle, Simd::Sub(one, angle));
  F agree = one;
  F square = p;
  for (uint32_t bits = k; bits != 0; bits >>= 1) {
    if (bits & 1) agree = Simd::Mul(agree, square);
    square = Simd::Mul(square, square);
  }
  agree = Simd::Min(agree, Simd::Set1(0x1.fffffep-1f));
  const F y = Simd::Sub(one, agree);
  // ln(1 − P), corrected for the rounding of 1 − P.
  const F log = Simd::Add(Log(y), Simd::Div(Simd::Sub(Simd::Sub(one, y), agree), y));
  const F none = Exp(Simd::Mul(Simd::Set1(tables - 2.0f), log));  // (1 − P)^(L − 2)
  const F expected = Simd::Mul(Simd::Set1(tables - 1.0f), agree);
  const F direct = Simd::Sub(one, Simd::Mul(Simd::Mul(none, y), Simd::Add(one, expected)));
  // Where few agreements are expected, `direct` cancels: sum the binomial tail instead.
  const F ratio = Simd::Div(agree, y);
  F series = one;
  for (int j = 6; j >= 1; --j) {
    const float factor = tables - 1.0f - static_cast<float>(j);
    const float scaled = factor > 0 ? factor / static_cast<float>(j + 2) : 0.0f;
    series = Simd::Fma(Simd::Mul(ratio, Simd::Set1(scaled)), series, one);
  }
  const F pairs = Simd::Mul(Simd::Mul(Simd::Set1(0.5f * tables * (tables - 1.0f)), agree), agree);
  const F tail = Simd::Mul(Simd::Mul(pairs, none), series);
  const F u = Simd::IfLess(expected, Simd::Set1(0.5f), tail, direct);
  return Simd::Min(Simd::Max(u, Simd::Set1(1e-30f)), one);
}

}  // namespace
}  // namespace passel::host
