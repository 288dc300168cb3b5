// Activations and their gradients on vectors, with the elementary functions they need. Errors are relative, in units of
// float32's last place (ulp).
#pragma once
#include <cmath>

#include "simd.h"

namespace fastdl::ISA {

// ---- exp and its relatives, float32 ----
// x = n log(2) + r with |r| <= log(2)/2; needs |x| < 2^21
struct Reduced {
  Floats n, r;
};
INLINE Reduced reduce(Floats x) {
  const float round = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  Floats n = (x * 1.44269504f + round) - round;
  Floats r = x - n * 0.693359375f;  // log(2) in two parts, the first with zeros at its end so that the product is exact
  return {n, r - n * -2.12194440e-4f};
}
// e^r - 1 for |r| <= log(2)/2, minimax, 3e-9 before rounding
INLINE Floats expm1_reduced(Floats r) {
  Floats q = 1.3950490e-3f * r + 8.3688898e-3f;
  q = q * r + 4.1666206e-2f;
  q = q * r + 0.16666518f;
  q = q * r + 0.5f;
  return q * (r * r) + r;
}
// 2^n for an integral n in [-126, 127]
INLINE Floats power_of_two(Ints n) { return (Floats)((n + 127) << 23); }
// e^x for x <= 89, 1 ulp
INLINE Floats exp_at_most_89(Floats x) {
  Reduced x_ = reduce(at_least(x, -104.f));  // beyond: 0
  Floats p = 1.f + expm1_reduced(x_.r);
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x_.n);
#else
  Ints n = __builtin_convertvector(x_.n, Ints), half = n >> 1;  // two factors: 2^n alone may leave float's range
  return p * power_of_two(half) * power_of_two(n - half);
#endif
}
INLINE Floats exp(Floats x) { return exp_at_most_89(at_most(x, 89.f)); }  // beyond: infinity
// e^x - 1 for x <= 0, 2 ulp
INLINE Floats expm1_negative(Floats x) {
  Reduced x_ = reduce(at_least(x, -30.f));  // beyond: -1
  Floats scale = power_of_two(__builtin_convertvector(x_.n, Ints));
  return expm1_reduced(x_.r) * scale + (scale - 1.f);
}
INLINE Floats sigmoid(Floats x) { return 1.f / (1.f + exp(-x)); }
INLINE Floats tanh(Floats x) {
  Ints sign = (Ints)x & INT32_MIN;
  Floats e = expm1_negative((Floats)((Ints)x | INT32_MIN) * 2.f);  // of -2|x|, so nothing overflows
  return (Floats)((Ints)(-e / (e + 2.f)) | sign);
}
// the normal distribution's cumulative function, also accurate where it is small, and its density
template <class V>
struct Normal {
  V cumulative, density;
};
INLINE Normal<Floats> normal(Floats x) {
  Floats bell = exp_at_most_89(x * x * -0.5f), t = (Floats)((Ints)x & INT32_MAX);
  Floats u = 1.f / (1.f + 0.3f * t);
  // upper tail = bell * u * p(u) for t up to 15, where it underflows; minimax, 3.5e-9 before rounding
  Floats p = -0.020628644f * u + 0.11246470f;
  p = p * u + -0.22828457f;
  p = p * u + 0.19188301f;
  p = p * u + -0.079508945f;
  p = p * u + 0.096204817f;
  p = p * u + 0.078372255f;
  p = p * u + 0.11023935f;
  p = p * u + 0.11957132f;
  p = p * u + 0.11968672f;
  Floats tail = bell * (u * p);
  return {x > 0.f ? 1.f - tail : tail, bell * 0.39894228f};
}

// ---- float64: the C library's, lane by lane ----
template <class F>
INLINE Doubles by_lane(Doubles x, F f) {
  for (int i = 0; i < lanes<double>; i++) x[i] = f(x[i]);
  return x;
}
INLINE Doubles exp_at_most_89(Doubles x) {
  return by_lane(x, [](double v) { return ::exp(v); });
}
INLINE Doubles expm1_negative(Doubles x) {
  return by_lane(x, [](double v) { return ::expm1(v > 0 ? 0 : v); });
}
INLINE Doubles sigmoid(Doubles x) {
  return by_lane(x, [](double v) { return 1 / (1 + ::exp(-v)); });
}
INLINE Doubles tanh(Doubles x) {
  return by_lane(x, [](double v) { return ::tanh(v); });
}
INLINE Normal<Doubles> normal(Doubles x) {
  return {by_lane(x, [](double v) { return 0.5 * ::erfc(-0.70710678118654752 * v); }),
          by_lane(x, [](double v) { return 0.39894228040143268 * ::exp(-0.5 * v * v); })};
}

// ---- activations ----
// gelu's tanh approximation: x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
template <class V>
INLINE V gelu_tanh_inner(V x) {
  using S = Scalar<V>;
  return x * (S(1.5957691216057308) + S(0.071354816272600247) * (x * x));
}

template <int kind, class V>
INLINE V activate(V x, Scalar<V> parameter) {
  if constexpr (kind == fastdl::relu) return x < 0 ? V{} : x;
  if constexpr (kind == fastdl::leaky_relu) return x > 0 ? x : parameter * x;
  if constexpr (kind == fastdl::elu) return x > 0 ? x : parameter * expm1_negative(x);
  if constexpr (kind == fastdl::sigmoid) return sigmoid(x);
  if constexpr (kind == fastdl::tanh) return tanh(x);
  if constexpr (kind == fastdl::gelu) return x * normal(x).cumulative;
  if constexpr (kind == fastdl::gelu_tanh) return x * sigmoid(gelu_tanh_inner(x));
  if constexpr (kind == fastdl::silu) return x * sigmoid(x);
  return x;
}

// g * activation'; s is the activation's output y, for gelu and silu its argument
template <int kind, class V>
INLINE V gradient(V g, V s, Scalar<V> parameter) {
  using S = Scalar<V>;
  if constexpr (kind == fastdl::relu) return s <= 0 ? V{} : g;
  if constexpr (kind == fastdl::leaky_relu) return s > 0 ? g : g * parameter;
  if constexpr (kind == fastdl::elu) return s <= 0 ? g * (s + parameter) : g;
  if constexpr (kind == fastdl::sigmoid) return g * (s * (1 - s));
  if constexpr (kind == fastdl::tanh) return g * (1 - s * s);
  if constexpr (kind == fastdl::gelu) {
    Normal<V> z = normal(s);
    return g * (z.cumulative + s * z.density);
  }
  if constexpr (kind == fastdl::gelu_tanh) {
    V x = at_least(at_most(s, S(1e3)), S(-1e3));  // saturated long before 1e3
    V inner = gelu_tanh_inner(x), tail = sigmoid(inner > 0 ? -inner : inner);
    V slope = x * (tail * (1 - tail)) * (S(1.5957691216057308) + S(0.21406444881780074) * (x * x));
    return g * ((inner > 0 ? 1 - tail : tail) + slope);
  }
  if constexpr (kind == fastdl::silu) {
    V y = sigmoid(s);
    return g * (y * (1 + s * (1 - y)));
  }
  return g;
}

// calls f with Constant<kind>, once checked by the caller
template <int kind = 0, class F>
INLINE void with_kind(int wanted, F f) {
  if constexpr (kind < kind_count) {
    if (wanted == kind) return f(Constant<kind>());
    with_kind<kind + 1>(wanted, f);
  }
}

}  // namespace fastdl::ISA
