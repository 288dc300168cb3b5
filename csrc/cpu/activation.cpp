// Activations on their own, with or without a bias, and their gradients with the bias's.
#include "activation.h"

#include "kernels/activation.h"
#include "threads.h"

namespace fastdl::ISA {
FASTDL_CPU_ACTIVATION(DECLARE)

// A task's share of a [rows, columns] tensor: strips keep a row's part in the first-level cache.
constexpr int64_t strip_columns = 2048, task_elements = 8192;

// elements worth a thread of their own: starting one takes some microseconds
static int64_t useful_threads(int64_t elements, int kind, int threads) {
  bool cheap = kind == fastdl::none || kind == fastdl::relu || kind == fastdl::leaky_relu;
  return max(1, min(threads, elements / (cheap ? 65536 : 8192)));
}

// f(row_begin, row_end, column_begin, column_end) for pieces that cover [rows, columns], row_step rows or fewer each
template <class F>
static void for_each_piece(int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t threads, F f) {
  int64_t strips = ceil_div(columns, column_step), groups = ceil_div(rows, row_step);
  parallel(threads, [&](int thread, int team) {
    for_share(groups * strips, thread, team, [&](int64_t task) {
      int64_t row = task / strips * row_step, column = task % strips * column_step;
      f(row, min(rows, row + row_step), column, min(columns, column + column_step));
    });
  });
}

template <class T, int kind>
static void forward_of(const ForwardArguments& arguments) {
  using S = Compute<T>;
  constexpr int width = lanes<S>;
  const T *input = static_cast<const T*>(arguments.input), *bias = static_cast<const T*>(arguments.bias);
  T *output = static_cast<T*>(arguments.output), *preactivation = static_cast<T*>(arguments.preactivation);
  int64_t rows = arguments.rows, columns = arguments.columns;
  S parameter = static_cast<S>(arguments.activation.parameter);
  if (!bias) {  // then the shape does not matter
    columns *= rows;
    rows = 1;
  }
  int64_t row_step = ceil_div(task_elements, min(columns, strip_columns));
  int64_t threads = useful_threads(rows * columns, kind, arguments.threads);
  for_each_piece(rows, columns, row_step, strip_columns, threads, [=](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    for (int64_t row = r0; row < r1; row++) {
      auto one = [=](int64_t column, int64_t n) __attribute__((always_inline)) {
        int64_t at = row * columns + column;
        Vector<S> z = load(input + at, n);
        if (bias) z += load(bias + column, n);
        if (preactivation) store(preactivation + at, z, n);
        store(output + at, activate<kind>(z, parameter), n);
      };
      int64_t column = c0;
      for (; column + width <= c1; column += width) one(column, width);
      if (column < c1) one(column, c1 - column);
    }
  });
}

template <class T, int kind>
static void backward_of(const BackwardArguments& arguments) {
  using S = Compute<T>;
  constexpr int width = lanes<S>;
  const T *grad_output = static_cast<const T*>(arguments.grad_output), *saved = static_cast<const T*>(arguments.saved);
  T *grad_input = static_cast<T*>(arguments.grad_input), *grad_bias = static_cast<T*>(arguments.grad_bias);
  int64_t rows = arguments.rows, columns = arguments.columns;
  S parameter = static_cast<S>(arguments.activation.parameter);
  auto grad = [=](int64_t at, int64_t n) __attribute__((always_inline)) {
    Vector<S> g = load(grad_output + at, n);
    if constexpr (kind != fastdl::none) g = gradient<kind>(g, load(saved + at, n), parameter);
    if (grad_input) store(grad_input + at, g, n);
    return g;
  };
  int64_t threads = useful_threads(rows * columns, kind, arguments.threads);
  if (!grad_bias) {
    for_each_piece(1, rows * columns, 1, task_elements, threads, [=](int64_t, int64_t, int64_t begin, int64_t end) {
      int64_t at = begin;
      for (; at + width <= end; at += width) grad(at, width);
      if (at < end) grad(at, end - at);
    });
    return;
  }
  // Sums of 4 rows in registers, of 64 in the first-level cache, then of a leaf; leaves are added as a tree. The same
  // additions whatever the number of threads, none of them a long running sum.
  constexpr int64_t run_rows = 64, strip = 1024;
  int64_t leaf_rows = round_up(max(1, ceil_div(rows, 128)), run_rows), leaves = max(1, ceil_div(rows, leaf_rows));
  S* leaf_sums = scratch<S, column_sums>(leaves * columns);
  if (rows == 0) __builtin_memset(leaf_sums, 0, columns * sizeof(S));
  for_each_piece(rows, columns, leaf_rows, strip, threads, [=](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    S* leaf = leaf_sums + r0 / leaf_rows * columns + c0;
    for (int64_t run = r0; run < r1; run += run_rows) {
      S sums[strip] = {};
      auto add_rows = [&](int64_t row, auto count) __attribute__((always_inline)) {
        auto one = [&](int64_t column, int64_t n) __attribute__((always_inline)) {
          int64_t at = row * columns + c0 + column;
          Vector<S> g = grad(at, n);
          if constexpr (count == 4) {
            g += grad(at + columns, n);
            g += grad(at + 2 * columns, n) + grad(at + 3 * columns, n);
          }
          store(sums + column, load(sums + column, n) + g, n);
        };
        int64_t column = 0;
        for (; column + width <= c1 - c0; column += width) one(column, width);
        if (column < c1 - c0) one(column, c1 - c0 - column);
      };
      int64_t row = run, end = min(r1, run + run_rows);
      for (; row + 4 <= end; row += 4) add_rows(row, Constant<4>());
      for (; row < end; row++) add_rows(row, Constant<1>());
      for (int64_t column = 0; column < c1 - c0; column++)
        leaf[column] = run == r0 ? sums[column] : leaf[column] + sums[column];
    }
  });
  for_each_piece(1, columns, 1, strip, threads, [=](int64_t, int64_t, int64_t c0, int64_t c1) {
    for (int64_t step = 1; step < leaves; step *= 2)
      for (int64_t leaf = 0; leaf + step < leaves; leaf += 2 * step)
        for (int64_t column = c0; column < c1; column++)
          leaf_sums[leaf * columns + column] += leaf_sums[(leaf + step) * columns + column];
    for (int64_t column = c0; column < c1; column += width)
      store(grad_bias + column, load(leaf_sums + column, c1 - column), c1 - column);
  });
}

void activation_forward(const ForwardArguments& arguments) {
  if (arguments.rows == 0 || arguments.columns == 0) return;
  with_dtype(arguments.dtype, [&](auto type) {
    with_kind(arguments.activation.kind,
              [&](auto kind) { forward_of<typename decltype(type)::type, decltype(kind)::value>(arguments); });
  });
}

void activation_backward(const BackwardArguments& arguments) {
  if (arguments.columns == 0 || (arguments.rows == 0 && !arguments.grad_bias)) return;
  with_dtype(arguments.dtype, [&](auto type) {
    with_kind(arguments.activation.kind,
              [&](auto kind) { backward_of<typename decltype(type)::type, decltype(kind)::value>(arguments); });
  });
}

}  // namespace fastdl::ISA
