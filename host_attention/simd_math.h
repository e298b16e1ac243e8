#pragma once
// Vector exp, log, acos and the inclusion probability, over the Simd of the including file.
// Error bounds (measured by tests/host_attention against float64): exp 3e-7 relative on
// [−87, 0]; u 2e-5 relative wherever u > 1e-12, given the float32 cosine.

namespace passel::host {
namespace {

using F = Simd::F;

// Two vectors as one: chains of operations that wait for each other run side by side.
struct Pair {
  struct F {
    Simd::F a, b;
  };
  static constexpr int kLanes = 2 * Simd::kLanes;

  static F Zero() { return {Simd::Zero(), Simd::Zero()}; }
  static F Set1(float x) { return {Simd::Set1(x), Simd::Set1(x)}; }
  static F Load(const float* p) { return {Simd::Load(p), Simd::Load(p + Simd::kLanes)}; }
  static void Store(float* p, F x) {
    Simd::Store(p, x.a);
    Simd::Store(p + Simd::kLanes, x.b);
  }
  static F Add(F x, F y) { return {Simd::Add(x.a, y.a), Simd::Add(x.b, y.b)}; }
  static F Sub(F x, F y) { return {Simd::Sub(x.a, y.a), Simd::Sub(x.b, y.b)}; }
  static F Mul(F x, F y) { return {Simd::Mul(x.a, y.a), Simd::Mul(x.b, y.b)}; }
  static F Fma(F x, F y, F z) { return {Simd::Fma(x.a, y.a, z.a), Simd::Fma(x.b, y.b, z.b)}; }
  static F Max(F x, F y) { return {Simd::Max(x.a, y.a), Simd::Max(x.b, y.b)}; }
  static F Min(F x, F y) { return {Simd::Min(x.a, y.a), Simd::Min(x.b, y.b)}; }
  static F Sqrt(F x) { return {Simd::Sqrt(x.a), Simd::Sqrt(x.b)}; }
  static F Abs(F x) { return {Simd::Abs(x.a), Simd::Abs(x.b)}; }
  static F Round(F x) { return {Simd::Round(x.a), Simd::Round(x.b)}; }
  static F Pow2(F x) { return {Simd::Pow2(x.a), Simd::Pow2(x.b)}; }
  static F RoughReciprocal(F x) { return {Simd::RoughReciprocal(x.a), Simd::RoughReciprocal(x.b)}; }
  static F RoughInverseSqrt(F x) {
    return {Simd::RoughInverseSqrt(x.a), Simd::RoughInverseSqrt(x.b)};
  }
  static F IfLess(F x, F y, F then, F otherwise) {
    return {Simd::IfLess(x.a, y.a, then.a, otherwise.a),
            Simd::IfLess(x.b, y.b, then.b, otherwise.b)};
  }
  static F Mantissa(F x, F* e) { return {Simd::Mantissa(x.a, &e->a), Simd::Mantissa(x.b, &e->b)}; }
};

template <class V, class F = V::F>
inline F Polynomial(F x, const float* coefficients, int count) {
  F y = V::Set1(coefficients[0]);
  for (int i = 1; i < count; ++i) y = V::Fma(y, x, V::Set1(coefficients[i]));
  return y;
}

// 1/x and 1/√x within 2⁻²¹ for normal x > 0, by one step of Newton's: divisions and roots of
// vectors take as long as ten products.
template <class V, class F = V::F>
inline F Reciprocal(F x) {
  const F y = V::RoughReciprocal(x);
  return V::Fma(y, V::Sub(V::Set1(1.0f), V::Mul(x, y)), y);
}
template <class V, class F = V::F>
inline F InverseSqrt(F x) {
  const F y = V::RoughInverseSqrt(x);
  const F error = V::Sub(V::Set1(1.0f), V::Mul(V::Mul(x, y), y));
  return V::Fma(V::Mul(y, V::Set1(0.5f)), error, y);
}

// e^x; arguments below −87 give e^−87, which no float32 sum with a term of 1 notices.
template <class V, class F = V::F>
inline F Exp(F x) {
  x = V::Min(V::Max(x, V::Set1(-87.0f)), V::Set1(88.0f));
  const F n = V::Round(V::Mul(x, V::Set1(1.44269504f)));
  F r = V::Fma(n, V::Set1(-0.693359375f), x);
  r = V::Fma(n, V::Set1(2.12194440e-4f), r);
  static constexpr float kTaylor[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                      4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const F y = V::Fma(Polynomial<V>(r, kTaylor, 6), V::Mul(r, r), r);
  return V::Mul(V::Add(y, V::Set1(1.0f)), V::Pow2(n));
}

// ln x for normal x > 0 (the Cephes polynomial).
template <class V, class F = V::F>
inline F Log(F x) {
  F e;
  F m = V::Mantissa(x, &e);
  const F low = V::Set1(0.707106781f);
  e = V::IfLess(m, low, V::Sub(e, V::Set1(1.0f)), e);
  m = V::Sub(V::IfLess(m, low, V::Add(m, m), m), V::Set1(1.0f));
  static constexpr float kLog[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                   -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                   2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  const F z = V::Mul(m, m);
  F y = V::Mul(V::Mul(Polynomial<V>(m, kLog, 9), m), z);
  y = V::Fma(e, V::Set1(-2.12194440e-4f), y);
  y = V::Fma(z, V::Set1(-0.5f), y);
  return V::Fma(e, V::Set1(0.693359375f), V::Add(m, y));
}

// u at this cosine (DESIGN 2), as InclusionProbability.
template <class V, class F = V::F>
inline F Inclusion(F cosine, uint32_t k, uint32_t l) {
  const F one = V::Set1(1.0f);
  const float tables = static_cast<float>(l);
  const F c = V::Max(V::Min(cosine, one), V::Set1(-1.0f));
  const F a = V::Abs(c);
  // acos |c| (Abramowitz and Stegun 4.4.46), relative accuracy kept as |c| → 1 by the root.
  static constexpr float kAcos[] = {-0.0012624911f, 0.0066700901f, -0.0170881256f, 0.0308918810f,
                                    -0.0501743046f, 0.0889789874f, -0.2145988016f, 1.5707963050f};
  const F angle =
      V::Mul(V::Mul(V::Sqrt(V::Sub(one, a)), Polynomial<V>(a, kAcos, 8)), V::Set1(0.318309886f));
  const F p = V::IfLess(c, V::Zero(), angle, V::Sub(one, angle));
  F agree = one;
  F square = p;
  for (uint32_t bits = k; bits != 0; bits >>= 1) {
    if (bits & 1) agree = V::Mul(agree, square);
    square = V::Mul(square, square);
  }
  agree = V::Min(agree, V::Set1(0x1.fffffep-1f));
  const F y = V::Sub(one, agree);
  // ln(1 − P), corrected for the rounding of 1 − P.
  const F inverse = Reciprocal<V>(y);
  const F log = V::Fma(V::Sub(V::Sub(one, y), agree), inverse, Log<V>(y));
  const F none = Exp<V>(V::Mul(V::Set1(tables - 2.0f), log));  // (1 − P)^(L − 2)
  const F expected = V::Mul(V::Set1(tables - 1.0f), agree);
  const F direct = V::Sub(one, V::Mul(V::Mul(none, y), V::Add(one, expected)));
  // Where few agreements are expected, `direct` cancels: sum the binomial tail instead.
  const F ratio = V::Mul(agree, inverse);
  F series = one;
  for (int j = 6; j >= 1; --j) {
    const float factor = tables - 1.0f - static_cast<float>(j);
    const float scaled = factor > 0 ? factor / static_cast<float>(j + 2) : 0.0f;
    series = V::Fma(V::Mul(ratio, V::Set1(scaled)), series, one);
  }
  const F pairs = V::Mul(V::Mul(V::Set1(0.5f * tables * (tables - 1.0f)), agree), agree);
  const F tail = V::Mul(V::Mul(pairs, none), series);
  const F u = V::IfLess(expected, V::Set1(0.5f), tail, direct);
  return V::Min(V::Max(u, V::Set1(1e-30f)), one);
}

}  // namespace
}  // namespace passel::host
