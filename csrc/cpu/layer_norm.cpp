// Layer and RMS normalisation of rows, with dropout and a residual before it, and the gradients.
//
// A row stays in the first-level cache between the passes over it: its mean, the squares of differences from that, the
// output. Longer ones go chunk by chunk, whose moments are joined. The sums over rows are made of leaves that depend on
// the shape alone, so that results do not depend on the number of threads.
#include "kernels/layer_norm.h"

#include "dropout.h"
#include "threads.h"

namespace fastdl::ISA {
FASTDL_CPU_LAYER_NORM(DECLARE)
namespace {

struct row_sum;
struct wide_weight;
struct wide_bias;

constexpr int64_t thread_elements = 16384;  // worth a thread of their own
constexpr int64_t chunk_columns = 4096;     // of a row, which stay in the first-level cache
// Leaves of the sums over rows: of rows enough that adding them up costs little, and of bounded memory.
constexpr int64_t leaf_rows = 16, most_leaves = 64, least_leaves = 2, leaf_elements = 1 << 19;

int64_t useful_threads(int64_t rows, int64_t columns, int threads) {
  return max(1, min(threads, rows * columns / thread_elements));
}

// f(place, column, number) for the vectors of [begin, end): place, 0 to 3, tells sums apart that do not wait for each
// other
template <class S, class F>
INLINE void for_each_vector(int64_t begin, int64_t end, F f) {
  constexpr int64_t width = lanes<S>;
  int64_t i = begin;
  for (; i + 4 * width <= end; i += 4 * width) {
#pragma GCC unroll 4
    for (int place = 0; place < 4; place++) f(place, i + place * width, width);
  }
  for (; i + width <= end; i += width) f(0, i, width);
  if (i < end) f(1, i, end - i);
}
// zeros in all lanes but the first n
template <class V>
INLINE V keep_first(V v, int64_t n) {
  return n < lanes<Scalar<V>> ? (iota<Scalar<V>>() < static_cast<Scalar<V>>(n) ? v : V{}) : v;
}
template <class V>
INLINE Scalar<V> sum(const V (&v)[4]) {
  return sum_of_lanes((v[0] + v[1]) + (v[2] + v[3]));
}

// weight or bias in the dtype of computation: as given, or widened once for all rows of this thread
template <class T, class Slot>
const Compute<T>* widened(const void* parameter, bool wide, int64_t columns) {
  using S = Compute<T>;
  if (!parameter || wide) return static_cast<const S*>(parameter);
  S* copy = scratch<S, Slot>(columns);
  for_each_vector<S>(0, columns, [&](int, int64_t column, int64_t n) __attribute__((always_inline)) {
    store(copy + column, load(static_cast<const T*>(parameter) + column, n), n);
  });
  return copy;
}

// number of values, their mean and their squared differences from it
struct Moments {
  double count = 0, mean = 0, squares = 0;
  // Chan, Golub and LeVeque, 1983
  void add(double other_count, double other_mean, double other_squares) {
    if (count == 0) {
      count = other_count, mean = other_mean, squares = other_squares;
      return;
    }
    double total = count + other_count, share = other_count / total, delta = other_mean - mean;
    squares += other_squares + delta * delta * count * share;
    mean += delta * share;
    count = total;
  }
};

template <class T>
void forward_of(const LayerNormArguments& arguments) {
  using S = Compute<T>;
  using V = Vector<S>;
  int64_t rows = arguments.rows, columns = arguments.columns;
  S *mean = static_cast<S*>(arguments.mean), *rstd = static_cast<S*>(arguments.rstd);
  const bool rms = !mean, drops = arguments.dropout > 0, adds = drops || arguments.residual;
  const DropoutFactors<S> dropout(arguments.dropout, arguments.seed);

  // h of a chunk of a row
  auto add = [&](T* h, int64_t row, int64_t begin, int64_t end) __attribute__((always_inline)) {
    alignas(64) S factors[chunk_columns + 2 * DropoutFactors<S>::block];
    const T* input = static_cast<const T*>(arguments.input) + row * columns;
    const T* residual = arguments.residual ? static_cast<const T*>(arguments.residual) + row * columns : nullptr;
    const S* left = drops ? dropout.make(row * columns + begin, end - begin, factors) - begin : nullptr;
    for_each_vector<S>(begin, end, [&](int, int64_t column, int64_t n) __attribute__((always_inline)) {
      V x = load(input + column, n);
      if (drops) x *= load(left + column);
      if (residual) x += load(residual + column, n);
      store(h + column, x, n);
    });
  };

  parallel(useful_threads(rows, columns, arguments.threads), [&](int thread, int team) {
    const S* weight = widened<T, wide_weight>(arguments.weight, arguments.wide, columns);
    const S* bias = widened<T, wide_bias>(arguments.bias, arguments.wide, columns);
    T* own = adds && !arguments.sum ? scratch<T, row_sum>(columns) : nullptr;
    for_share(rows, thread, team, [&](int64_t row) {
      T* h = own ? own : static_cast<T*>(arguments.sum) + row * columns;
      const T* x = adds ? h : static_cast<const T*>(arguments.input) + row * columns;
      Moments moments;
      double squares = 0;
      for (int64_t begin = 0; begin < columns; begin += chunk_columns) {
        int64_t end = min(columns, begin + chunk_columns);
        if (adds) add(h, row, begin, end);
        V sums[4] = {}, chunk_squares[4] = {};
        if (rms) {
          for_each_vector<S>(begin, end, [&](int place, int64_t column, int64_t n) __attribute__((always_inline)) {
            V v = load(x + column, n);
            chunk_squares[place] += v * v;
          });
          squares += sum(chunk_squares);
          continue;
        }
        for_each_vector<S>(begin, end, [&](int place, int64_t column, int64_t n) __attribute__((always_inline)) {
          sums[place] += load(x + column, n);
        });
        double count = static_cast<double>(end - begin);
        S origin = static_cast<S>(sum(sums) / count);
        V rests[4] = {};  // what rounding has left of the mean
        for_each_vector<S>(begin, end, [&](int place, int64_t column, int64_t n) __attribute__((always_inline)) {
          V d = keep_first(load(x + column, n) - origin, n);
          rests[place] += d;
          chunk_squares[place] += d * d;
        });
        double rest = sum(rests);
        moments.add(count, origin + rest / count, sum(chunk_squares) - rest * rest / count);
      }
      double total = static_cast<double>(columns), variance = (rms ? squares : moments.squares) / total;
      S centre = static_cast<S>(moments.mean);
      S scale = static_cast<S>(1 / __builtin_sqrt(variance + arguments.eps));
      if (!rms) mean[row] = centre;
      rstd[row] = scale;
      T* output = static_cast<T*>(arguments.output) + row * columns;
      for_each_vector<S>(0, columns, [&](int, int64_t column, int64_t n) __attribute__((always_inline)) {
        V y = (load(x + column, n) - centre) * scale;
        if (weight) y *= load(weight + column, n);
        if (bias) y += load(bias + column, n);
        store(output + column, y, n);
      });
    });
  });
}

// The gradients of `count` rows, whose sums are made together: a column of the sums over rows is read and written once
// for all of them.
template <class T, int count, bool sums>
INLINE void backward_rows(const LayerNormBackwardArguments& arguments, const DropoutFactors<Compute<T>>& dropout,
                          const Compute<T>* weight, int64_t row, Compute<T>* weight_sums, Compute<T>* bias_sums) {
  using S = Compute<T>;
  using V = Vector<S>;
  int64_t columns = arguments.columns;
  const T* grad_output = static_cast<const T*>(arguments.grad_output) + row * columns;
  const T* h = static_cast<const T*>(arguments.h) + row * columns;
  S centre[count], scale[count];
  double means[count] = {}, products[count] = {};
  for (int i = 0; i < count; i++) {
    centre[i] = arguments.mean ? static_cast<const S*>(arguments.mean)[row + i] : 0;
    scale[i] = static_cast<const S*>(arguments.rstd)[row + i];
  }
  for (int64_t begin = 0; begin < columns; begin += chunk_columns) {
    V mean[count] = {}, product[count] = {};
    auto one = [&](int64_t column, int64_t n) __attribute__((always_inline)) {
      V w = weight ? load(weight + column, n) : broadcast<V>(1), dw = {}, db = {};
      if (sums) dw = load(weight_sums + column), db = load(bias_sums + column);
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) {
        V g = load(grad_output + i * columns + column, n);
        V normal = (load(h + i * columns + column, n) - centre[i]) * scale[i], d = g * w;
        V gn = g * normal;
        mean[i] += d;
        product[i] += d * normal;
        if (sums) dw += gn, db += g;
      }
      if (sums) store(weight_sums + column, dw), store(bias_sums + column, db);
    };
    int64_t end = min(columns, begin + chunk_columns), column = begin;
    for (; column + lanes<S> <= end; column += lanes<S>) one(column, lanes<S>);
    if (column < end) one(column, end - column);
    for (int i = 0; i < count; i++) means[i] += sum_of_lanes(mean[i]), products[i] += sum_of_lanes(product[i]);
  }
  if (!arguments.grad_input && !arguments.grad_residual) return;
  const bool drops = arguments.dropout > 0 && arguments.grad_input;
  for (int i = 0; i < count; i++) {
    int64_t at = (row + i) * columns;
    S mean = arguments.mean ? static_cast<S>(means[i] / static_cast<double>(columns)) : 0;
    S product = static_cast<S>(products[i] / static_cast<double>(columns));
    for (int64_t begin = 0; begin < columns; begin += chunk_columns) {
      alignas(64) S factors[chunk_columns + 2 * DropoutFactors<S>::block];
      int64_t end = min(columns, begin + chunk_columns);
      const S* left = drops ? dropout.make(at + begin, end - begin, factors) - begin : nullptr;
      for_each_vector<S>(begin, end, [&](int, int64_t column, int64_t n) __attribute__((always_inline)) {
        V d = load(grad_output + i * columns + column, n);
        if (weight) d *= load(weight + column, n);
        V normal = (load(h + i * columns + column, n) - centre[i]) * scale[i];
        V grad = scale[i] * (d - mean - normal * product);
        if (arguments.grad_sum) grad += load(static_cast<const T*>(arguments.grad_sum) + at + column, n);
        if (arguments.grad_residual) store(static_cast<T*>(arguments.grad_residual) + at + column, grad, n);
        if (drops) grad *= load(left + column);
        if (arguments.grad_input) store(static_cast<T*>(arguments.grad_input) + at + column, grad, n);
      });
    }
  }
}

template <class T, bool sums>
void backward_of(const LayerNormBackwardArguments& arguments) {
  using S = Compute<T>;
  int64_t rows = arguments.rows, columns = arguments.columns, stride = round_up(columns, lanes<S>);
  int64_t most = max(least_leaves, min(most_leaves, leaf_elements / stride));
  int64_t rows_of_leaf = max(leaf_rows, ceil_div(rows, most)), leaves = ceil_div(rows, rows_of_leaf);
  S* leaf_sums = sums ? scratch<S, column_sums>(2 * leaves * stride) : nullptr;
  const DropoutFactors<S> dropout(arguments.dropout, arguments.seed);
  parallel(useful_threads(rows, columns, arguments.threads), [&](int thread, int team) {
    const S* weight = widened<T, wide_weight>(arguments.weight, arguments.wide, columns);
    for_share(leaves, thread, team, [&](int64_t leaf) {
      S *weight_sums = leaf_sums + 2 * leaf * stride, *bias_sums = weight_sums + stride;
      for (int64_t i = 0; sums && i < 2 * stride; i += lanes<S>) store(weight_sums + i, Vector<S>{});
      int64_t row = leaf * rows_of_leaf, end = min(rows, row + rows_of_leaf);
      for (; row + 4 <= end; row += 4)
        backward_rows<T, 4, sums>(arguments, dropout, weight, row, weight_sums, bias_sums);
      for (; row < end; row++) backward_rows<T, 1, sums>(arguments, dropout, weight, row, weight_sums, bias_sums);
    });
    if (!sums) return;
    barrier(team);
    for_share(ceil_div(columns, lanes<S>), thread, team, [&](int64_t i) {
      Vector<S> weight_sum = {}, bias_sum = {};
      for (const S* from = leaf_sums + i * lanes<S>; from < leaf_sums + 2 * leaves * stride; from += 2 * stride)
        weight_sum += load(from), bias_sum += load(from + stride);
      int64_t column = i * lanes<S>;
      if (arguments.grad_weight) store(static_cast<S*>(arguments.grad_weight) + column, weight_sum, columns - column);
      if (arguments.grad_bias) store(static_cast<S*>(arguments.grad_bias) + column, bias_sum, columns - column);
    });
  });
}

}  // namespace

void layer_norm(const LayerNormArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) { forward_of<typename decltype(type)::type>(arguments); });
}

void layer_norm_backward(const LayerNormBackwardArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    arguments.grad_weight || arguments.grad_bias ? backward_of<T, true>(arguments) : backward_of<T, false>(arguments);
  });
}

}  // namespace fastdl::ISA
