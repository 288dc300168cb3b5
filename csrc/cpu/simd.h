// Vectors of float, double and int32 on GCC's vector extensions. Kernel files are compiled once per instruction set;
// all their symbols live in the namespace fastdl::ISA: an inline function shared between two builds would be kept once
// by the linker, and might run AVX-512 code on a machine without it.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#include "kernels/common.h"

#if !defined(ISA)
#error "define ISA as the name of the instruction set that the compiler's flags choose: see isas.json"
#endif
#define INLINE inline __attribute__((always_inline))
#define DECLARE(result, name, arguments) result name arguments;  // for FASTDL_CPU_<FAMILY> of kernels/

namespace fastdl::ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// The element types of tensors; float and double are themselves.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int lanes = vector_bytes / sizeof(T);
using Floats = Vector<float>;
using Doubles = Vector<double>;
using Ints = Vector<int32_t>;
typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));  // as many lanes as Floats

template <class V>
using Scalar = std::remove_reference_t<decltype(V{}[0])>;
// what T is computed in: float for the 16-bit types, else itself
template <class T>
using Compute = std::conditional_t<sizeof(T) == 2, float, T>;

template <int n>
using Constant = std::integral_constant<int, n>;
template <class T>
struct Type {
  using type = T;
};

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class V>
INLINE V broadcast(Scalar<V> x) {
  return x - V{};
}
// these keep a NaN in x, as x86's minimum and maximum do in this order of operands
template <class V>
INLINE V at_most(V x, Scalar<V> limit) {
  V limits = broadcast<V>(limit);
#if defined(__AVX512F__)  // GCC would compare and blend
  if constexpr (std::is_same_v<V, Floats>) return (Floats)_mm512_min_ps((__m512)limits, (__m512)x);
#endif
  return limits < x ? limits : x;
}
template <class V>
INLINE V larger(V limits, V x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Floats>) return (Floats)_mm512_max_ps((__m512)limits, (__m512)x);
#endif
  return limits > x ? limits : x;
}
template <class V>
INLINE V at_least(V x, Scalar<V> limit) {
  return larger(broadcast<V>(limit), x);
}

// ---- conversions, rounding to nearest even; NaN, infinities and denormals are kept ----
INLINE Floats widen(bf16, Halves h) { return (Floats)(__builtin_convertvector(h, Ints) << 16); }
INLINE Halves narrow(bf16, Floats x) {
#if defined(__AVX512BF16__)  // its conversion flushes denormals, which are rare
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, 0x20) == 0, 1)) return (Halves)_mm512_cvtneps_pbh((__m512)x);
#endif
  Ints bits = (Ints)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : ((bits >> 16) | 0x40), Halves);
}

#if defined(__AVX512F__)
INLINE Floats widen(fp16, Halves h) { return (Floats)_mm512_cvtph_ps((__m256i)h); }
INLINE Halves narrow(fp16, Floats x) { return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
INLINE Floats widen(fp16, Halves h) { return (Floats)_mm256_cvtph_ps((__m128i)h); }
INLINE Halves narrow(fp16, Floats x) { return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE Floats widen(fp16, Halves h) {
  Ints bits = __builtin_convertvector(h, Ints), magnitude = (bits & 0x7fff) << 13;
  Floats finite = (Floats)magnitude * 0x1p112f;  // moves the exponent's bias from 15 to 127, denormals included
  Ints special = magnitude | 0x7f800000;         // infinity and NaN
  return (Floats)(((bits & 0x7c00) == 0x7c00 ? special : (Ints)finite) | ((bits & 0x8000) << 16));
}
INLINE Halves narrow(fp16, Floats x) {
  Ints bits = (Ints)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  Ints normal = (magnitude + (0xfff + ((magnitude >> 13) & 1)) - (112 << 23)) >> 13;
  Ints denormal = (Ints)((Floats)magnitude + 0.5f) - 0x3f000000;  // the sum's last place is float16's least denormal
  Ints result = magnitude < 0x38800000 ? denormal : normal;
  result = magnitude > 0x477fefff ? Ints{} + 0x7c00 : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000 ? Ints{} + 0x7e00 : result;
  return __builtin_convertvector(result | sign, Halves);
}
#endif

// ---- loads and stores of any alignment; the forms with a count touch only the first lanes ----
template <class T>
INLINE Vector<Compute<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(T{}, h);
  } else {
    Vector<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}
template <class T>
INLINE void store(T* p, Vector<Compute<T>> v) {
  if constexpr (sizeof(T) == 2) {
    Halves h = narrow(T{}, v);
    __builtin_memcpy(p, &h, sizeof h);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

#if defined(__AVX512F__)
INLINE uint32_t lane_mask(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }
#endif
template <class T>
INLINE Vector<Compute<T>> load(const T* p, int64_t n) {
  if (n >= lanes<Compute<T>>) return load(p);
#if defined(__AVX512F__)
  uint32_t mask = lane_mask(n);
  if constexpr (sizeof(T) == 2)
    return widen(T{}, (Halves)_mm256_maskz_loadu_epi16((__mmask16)mask, p));
  else if constexpr (sizeof(T) == 4)
    return (Floats)_mm512_maskz_loadu_ps((__mmask16)mask, p);
  else
    return (Doubles)_mm512_maskz_loadu_pd((__mmask8)mask, p);
#else
  T copy[lanes<Compute<T>>] = {};
  for (int64_t i = 0; i < n; i++) copy[i] = p[i];
  return load(copy);
#endif
}
template <class T>
INLINE void store(T* p, Vector<Compute<T>> v, int64_t n) {
  if (n >= lanes<Compute<T>>) return store(p, v);
#if defined(__AVX512F__)
  uint32_t mask = lane_mask(n);
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, (__mmask16)mask, (__m256i)narrow(T{}, v));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, (__mmask16)mask, (__m512)v);
  else
    _mm512_mask_storeu_pd(p, (__mmask8)mask, (__m512d)v);
#else
  T copy[lanes<Compute<T>>];
  store(copy, v);
  for (int64_t i = 0; i < n; i++) p[i] = copy[i];
#endif
}

// ---- transpose of a square of lanes in registers ----
template <int distance, class V, int... i>
INLINE void exchange(V& x, V& y, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  V low = __builtin_shufflevector(x, y, (i & distance ? n + i - distance : i)...);
  y = __builtin_shufflevector(x, y, (i & distance ? n + i : i + distance)...);
  x = low;
}
template <int distance = 1, class V, int n>
INLINE void transpose(V (&rows)[n]) {
#pragma GCC unroll 16
  for (int i = 0; i < n; i++)
    if (!(i & distance)) exchange<distance>(rows[i], rows[i + distance], std::make_integer_sequence<int, n>());
  if constexpr (2 * distance < n) transpose<2 * distance>(rows);
}

// ---- over the lanes of one vector ----
template <int distance, class V, int... i>
INLINE V swapped(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ distance)...);
}
// f over all lanes, in pairs
template <int distance, class V, class F>
INLINE Scalar<V> fold(V v, F f) {
  if constexpr (distance == 0) {
    return v[0];
  } else {
    constexpr int n = sizeof(V) / sizeof(v[0]);
    return fold<distance / 2>(f(v, swapped<distance>(v, std::make_integer_sequence<int, n>())), f);
  }
}
template <class V>
INLINE Scalar<V> sum_of_lanes(V v) {
  return fold<lanes<Scalar<V>> / 2>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
template <class V>
INLINE Scalar<V> largest_of_lanes(V v) {
  return fold<lanes<Scalar<V>> / 2>(v, [](auto a, auto b) __attribute__((always_inline)) { return larger(a, b); });
}
template <class S>
INLINE Vector<S> iota() {
  Vector<S> lane;
  for (int i = 0; i < lanes<S>; i++) lane[i] = static_cast<S>(i);
  return lane;
}

// Calls f with Type<T> of a dtype's code, once checked by the caller.
template <class F>
INLINE void with_dtype(int dtype, F f) {
  if (dtype == float32) f(Type<float>());
  if (dtype == bfloat16) f(Type<bf16>());
  if (dtype == float16) f(Type<fp16>());
  if (dtype == float64) f(Type<double>());
}

}  // namespace fastdl::ISA
