// Softmax and its logarithm over the middle of [outer, size, inner], and their gradients. Where inner is 1 vectors lie
// along a row, else across rows, strip by strip.
#include "softmax.h"

#include "kernels/softmax.h"

namespace fastdl::ISA {
FASTDL_CPU_SOFTMAX(DECLARE)

struct softmax_row;

template <class T, bool log>
static void forward_of(const SoftmaxArguments& arguments) {
  using S = Compute<T>;
  using V = Vector<S>;
  const int64_t outer = arguments.shape.outer, size = arguments.shape.size, inner = arguments.shape.inner;
  const T* input = static_cast<const T*>(arguments.input);
  T* output = static_cast<T*>(arguments.output);
  if (inner == 1) {
    for_each_rows(outer, size, arguments.threads, [=](int64_t first, int64_t end) {
      // exponentials of a 16-bit row, which its output would round
      S* kept = !log && sizeof(T) == 2 ? scratch<S, softmax_row>(round_up(size, lanes<S>)) : nullptr;
      for (int64_t row = first; row < end; row++) {
        const T* x = input + row * size;
        T* y = output + row * size;
        S top = largest_of_row(x, size);
        if constexpr (log) {
          S shift = logarithm_of(sum_of_exponentials(x, size, top, [](auto...) {}));
          for_each_vector<S>(size, [&](int64_t i, auto n) __attribute__((always_inline)) {
            store(y + i, load(x + i, n) - top - shift, n);
          });
        } else {
          S sum = sum_of_exponentials(x, size, top, [&](int64_t i, V e, auto n) __attribute__((always_inline)) {
            if constexpr (sizeof(T) == 2)
              store(kept + i, e);
            else
              store(y + i, e, n);
          });
          S scale = 1 / sum;
          for_each_vector<S>(size, [&](int64_t i, auto n) __attribute__((always_inline)) {
            if constexpr (sizeof(T) == 2)
              store(y + i, load(kept + i) * scale, n);
            else
              store(y + i, load(y + i, n) * scale, n);
          });
        }
      }
    });
    return;
  }
  for_each_strip(outer, size, inner, arguments.threads, [=](int64_t o, int64_t first, int64_t count) {
    S largest[strip_rows], factor[strip_rows];
    const T* x = input + o * size * inner + first;
    T* y = output + o * size * inner + first;
    strip_sums(x, size, inner, count, largest, factor,
               [&](int64_t k, int64_t i, V e, auto n) __attribute__((always_inline)) {
                 if constexpr (!log && sizeof(T) > 2) store(y + k * inner + i, e, n);
               });
    for (int64_t i = 0; i < count; i += lanes<S>) {
      V sums = load(factor + i);
      store(factor + i, log ? logarithm(sums) : 1 / sums);
    }
    for (int64_t k = 0; k < size; k++)
      for_each_vector<S>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
        int64_t at = k * inner + i;
        V f = load(factor + i);
        if constexpr (log)
          store(y + at, load(x + at, n) - load(largest + i) - f, n);
        else if constexpr (sizeof(T) == 2)
          store(y + at, exp_at_most_89(load(x + at, n) - load(largest + i)) * f, n);
        else
          store(y + at, load(y + at, n) * f, n);
      });
  });
}

template <class T, bool log>
static void backward_of(const SoftmaxBackwardArguments& arguments) {
  using S = Compute<T>;
  using V = Vector<S>;
  const int64_t outer = arguments.shape.outer, size = arguments.shape.size, inner = arguments.shape.inner;
  const T *grad = static_cast<const T*>(arguments.grad_output), *output = static_cast<const T*>(arguments.output);
  T* grad_input = static_cast<T*>(arguments.grad_input);
  // a term of the sum, 0 in lanes that do not count; and the gradient
  auto term = [](V g, V y) __attribute__((always_inline)) { return log ? g : g * y; };
  auto result = [](V g, V y, V sum) __attribute__((always_inline)) {
    if constexpr (log)
      return g - exp_at_most_89(y) * sum;
    else
      return y * (g - sum);
  };
  if (inner == 1) {
    for_each_rows(outer, size, arguments.threads, [=](int64_t first, int64_t end) {
      for (int64_t row = first; row < end; row++) {
        const T *g = grad + row * size, *y = output + row * size;
        T* dx = grad_input + row * size;
        V sums[4] = {};
        for_each_four<S>(size, [&](int64_t i, auto u, auto n)
                                   __attribute__((always_inline)) { sums[u] += term(load(g + i, n), load(y + i, n)); });
        V sum = broadcast<V>(sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])));
        for_each_vector<S>(size, [&](int64_t i, auto n) __attribute__((always_inline)) {
          store(dx + i, result(load(g + i, n), load(y + i, n), sum), n);
        });
      }
    });
    return;
  }
  for_each_strip(outer, size, inner, arguments.threads, [=](int64_t o, int64_t first, int64_t count) {
    S sums[strip_rows] = {};
    int64_t start = o * size * inner + first;
    for (int64_t k = 0; k < size; k++)
      for_each_vector<S>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
        int64_t at = start + k * inner + i;
        store(sums + i, load(sums + i) + term(load(grad + at, n), load(output + at, n)));
      });
    for (int64_t k = 0; k < size; k++)
      for_each_vector<S>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
        int64_t at = start + k * inner + i;
        store(grad_input + at, result(load(grad + at, n), load(output + at, n), load(sums + i)), n);
      });
  });
}

void softmax(const SoftmaxArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    arguments.log ? forward_of<T, true>(arguments) : forward_of<T, false>(arguments);
  });
}

void softmax_backward(const SoftmaxBackwardArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    arguments.log ? backward_of<T, true>(arguments) : backward_of<T, false>(arguments);
  });
}

}  // namespace fastdl::ISA
