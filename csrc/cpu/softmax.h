// Pieces of softmax that the cross entropy shares: a row's largest value and its sum of exponentials, and strips of
// neighbouring rows where the elements of one are `inner` apart.
#pragma once
#include "activation.h"
#include "threads.h"

namespace fastdl::ISA {

// elements worth a thread of their own; of a task
constexpr int64_t softmax_thread_elements = 8192, softmax_task_elements = 4096;
// The most rows side by side that a strip holds, whose maxima and sums stay in the first-level cache; fewer where rows
// are long, so that what is read again is in the second-level cache.
constexpr int64_t strip_rows = 512, least_strip_rows = 64, strip_elements = 65536;

INLINE int64_t softmax_threads(int64_t elements, int threads) {
  return max(1, min(threads, elements / softmax_thread_elements));
}

// f(first row, end) for tasks of rows of `size` contiguous elements
template <class F>
INLINE void for_each_rows(int64_t rows, int64_t size, int threads, F f) {
  int64_t step = max(1, softmax_task_elements / size), tasks = ceil_div(rows, step);
  parallel(softmax_threads(rows * size, threads), [&](int thread, int team) {
    for_share(tasks, thread, team, [&](int64_t task) { f(task * step, min(rows, (task + 1) * step)); });
  });
}
// f(outer, first inner, rows of the strip) for strips of rows
template <class F>
INLINE void for_each_strip(int64_t outer, int64_t size, int64_t inner, int threads, F f) {
  int64_t step = max(least_strip_rows, min(strip_rows, strip_elements / size / least_strip_rows * least_strip_rows));
  int64_t strips = ceil_div(inner, step);
  parallel(softmax_threads(outer * size * inner, threads), [&](int thread, int team) {
    for_share(outer * strips, thread, team, [&](int64_t task) {
      int64_t first = task % strips * step;
      f(task / strips, first, min(step, inner - first));
    });
  });
}

// f(offset, lanes that count) for a row's vectors; the last may be a part of one
template <class S, class F>
INLINE void for_each_vector(int64_t size, F f) {
  int64_t i = 0;
  for (; i + lanes<S> <= size; i += lanes<S>) f(i, Constant<lanes<S>>());
  if (i < size) f(i, size - i);
}
// four of them at a time: f(offset, Constant number of the four, lanes that count)
template <class S, class F>
INLINE void for_each_four(int64_t size, F f) {
  int64_t i = 0;
  for (; i + 4 * lanes<S> <= size; i += 4 * lanes<S>) {
    f(i, Constant<0>(), Constant<lanes<S>>());
    f(i + lanes<S>, Constant<1>(), Constant<lanes<S>>());
    f(i + 2 * lanes<S>, Constant<2>(), Constant<lanes<S>>());
    f(i + 3 * lanes<S>, Constant<3>(), Constant<lanes<S>>());
  }
  for (; i + lanes<S> <= size; i += lanes<S>) f(i, Constant<0>(), Constant<lanes<S>>());
  if (i < size) f(i, Constant<1>(), size - i);
}
template <class V>
INLINE V first_lanes(V v, int64_t n, Scalar<V> otherwise) {
  if (n >= lanes<Scalar<V>>) return v;
  return iota<Scalar<V>>() < static_cast<Scalar<V>>(n) ? v : broadcast<V>(otherwise);
}

// The largest of a row, -infinity if all are; NaN may or may not show: the sum of exponentials has it.
template <class T>
INLINE Compute<T> largest_of_row(const T* row, int64_t size) {
  using S = Compute<T>;
  using V = Vector<S>;
  const S lowest = -static_cast<S>(INFINITY);
  V top[4] = {broadcast<V>(lowest), broadcast<V>(lowest), broadcast<V>(lowest), broadcast<V>(lowest)};
  for_each_four<S>(size, [&](int64_t i, auto u, auto n) __attribute__((always_inline)) {
    top[u] = larger(top[u], first_lanes(load(row + i, n), n, lowest));
  });
  return largest_of_lanes(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}
// The sum of exp(x - top); f(offset, exponential, n) sees each vector.
template <class T, class F>
INLINE Compute<T> sum_of_exponentials(const T* row, int64_t size, Compute<T> top, F f) {
  using S = Compute<T>;
  using V = Vector<S>;
  V sums[4] = {};
  for_each_four<S>(size, [&](int64_t i, auto u, auto n) __attribute__((always_inline)) {
    V e = exp_at_most_89(load(row + i, n) - top);
    f(i, e, n);
    sums[u] += first_lanes(e, n, S(0));
  });
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
// The same for a strip of `count` rows whose element k is at rows + k * inner: into largest and sums.
template <class T, class F>
INLINE void strip_sums(const T* rows, int64_t size, int64_t inner, int64_t count, Compute<T>* largest, Compute<T>* sums,
                       F f) {
  using S = Compute<T>;
  for (int64_t i = 0; i < strip_rows; i++) {
    largest[i] = -static_cast<S>(INFINITY);
    sums[i] = 0;
  }
  for (int64_t k = 0; k < size; k++)
    for_each_vector<S>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
      store(largest + i, larger(load(largest + i), load(rows + k * inner + i, n)));
    });
  for (int64_t k = 0; k < size; k++)
    for_each_vector<S>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
      Vector<S> e = exp_at_most_89(load(rows + k * inner + i, n) - load(largest + i));
      f(k, i, e, n);
      store(sums + i, load(sums + i) + e);
    });
}
// The logarithm of a sum of exponentials, of which one is 1: x >= 1 or NaN. For float 1 ulp: the polynomial of Cephes.
INLINE Floats logarithm(Floats x) {
  Ints bits = (Ints)x, exponent = (bits >> 23) - 127;
  Floats m = (Floats)((bits & 0x7fffff) | 0x3f800000);  // x = m 2^exponent, m in [1, 2)
  auto large = m > 1.41421356f;
  Floats f = (large ? m * 0.5f : m) - 1.f, e = __builtin_convertvector(large ? exponent + 1 : exponent, Floats);
  Floats p = f * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  Floats square = f * f, y = p * f * square + e * -2.12194440e-4f - square * 0.5f;
  return x == x ? f + y + e * 0.693359375f : x;
}
INLINE Doubles logarithm(Doubles x) {
  return by_lane(x, [](double v) { return ::log(v); });
}
template <class S>
INLINE S logarithm_of(S sum) {
  return logarithm(broadcast<Vector<S>>(sum))[0];
}

}  // namespace fastdl::ISA
