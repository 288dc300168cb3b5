// Batch normalisation with residual and activation, and its gradients.
//
// A tensor [outer, channels, inner] is taken in one of two ways. By planes, where an inner row fills vectors: sums run
// along planes. By rows, where inner is short (1 for 2-D and channels_last input): vectors lie across columns, each
// column being one of a channel's inner elements. Either way the partial sums depend on the shape alone, so results do
// not depend on the number of threads, and the second pass goes in the order of memory: by channel it would touch every
// page of a fresh output for each of them.
#include "kernels/batch_norm.h"

#include "activation.h"
#include "threads.h"

namespace fastdl::ISA {
FASTDL_CPU_BATCH_NORM(DECLARE)

// elements worth a thread of their own, and the most parts that work is cut into
constexpr int64_t thread_elements = 16384, most_parts = 64;
// Sums in the dtype of computation run over so many elements of a plane, of several small ones, or over so many rows;
// then they are added up in double.
constexpr int64_t group_elements = 4096, small_group_elements = 1024, block_rows = 64;
// columns whose sums fit in the first-level cache; columns of one round, which bounds the scratch memory
constexpr int64_t strip_columns = 512, round_columns = 8192;

// number of values, their mean and their squared differences from it
struct Moments {
  double count = 0, mean = 0, squares = 0;
  // Chan, Golub and LeVeque, 1983; an infinite mean stays one
  void add(double other_count, double other_mean, double other_squares) {
    double total = count + other_count, share = other_count / total, delta = other_mean - mean;
    squares += other_squares + (count > 0 ? delta * delta * count * share : 0);
    mean = count > 0 ? mean * (count / total) + other_mean * share : other_mean;
    count = total;
  }
};

// The forward's expression, and again the backward's where it needs the activation's argument: the same rounding.
template <class V>
struct Affine {
  V mean, scale, shift;
  template <class X>
  INLINE X operator()(X x) const {
    return (x - mean) * scale + shift;
  }
};

// the gradient of x is scale (dz - mean_gradient - (x - mean) mean_product), with z the activation's argument
template <class V>
struct Correction {
  V mean_gradient, mean_product;
};

// values by channel or by column
template <class S>
struct Columns {
  S *mean, *scale, *shift, *mean_gradient, *mean_product;
  static constexpr int count = 5;
  Columns(S* memory, int64_t size)
      : mean(memory),
        scale(memory + size),
        shift(memory + 2 * size),
        mean_gradient(memory + 3 * size),
        mean_product(memory + 4 * size) {}
  void set(int64_t column, Affine<S> affine, Correction<S> correction = {}) {
    mean[column] = affine.mean;
    scale[column] = affine.scale;
    shift[column] = affine.shift;
    mean_gradient[column] = correction.mean_gradient;
    mean_product[column] = correction.mean_product;
  }
  Affine<S> one(int64_t column) const { return {mean[column], scale[column], shift[column]}; }
  Correction<S> correction(int64_t column) const { return {mean_gradient[column], mean_product[column]}; }
  INLINE Affine<Vector<S>> several(int64_t column, int64_t n) const {
    return {load(mean + column, n), load(scale + column, n), load(shift + column, n)};
  }
  INLINE Correction<Vector<S>> corrections(int64_t column, int64_t n) const {
    return {load(mean_gradient + column, n), load(mean_product + column, n)};
  }
};

// zeros in all lanes but the first n
template <class V>
INLINE V keep_first(V v, int64_t n) {
  return iota<Scalar<V>>() < static_cast<Scalar<V>>(n) ? v : V{};
}
template <class V>
INLINE double sum(V v) {
  double total = 0;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(v[0])); i++) total += v[i];
  return total;
}

// ---- how a tensor is cut ----
template <class S>
static bool takes_planes(int64_t inner) {
  return inner >= 3 * lanes<S>;
}

// A channel's planes in groups of several planes, or of a part of one; groups in parts, the shares of threads.
struct Planes {
  int64_t outer, channels, inner;
  int64_t planes_in_group, elements_in_group, chunks, groups, parts;

  explicit Planes(const BatchNormShape& shape) : outer(shape.outer), channels(shape.channels), inner(shape.inner) {
    elements_in_group = min(inner, group_elements);
    planes_in_group = max(1, small_group_elements / inner);
    chunks = ceil_div(inner, elements_in_group);
    groups = ceil_div(outer, planes_in_group) * chunks;
    parts = min(groups, most_parts);
  }
  // f(channel, part) for this thread's share, nearly in the order of memory
  template <class F>
  void for_each_part(int thread, int team, F f) const {
    for_share(channels * parts, thread, team, [&](int64_t task) { f(task % channels, task / channels); });
  }
  // f(group's first element's offset, planes, elements of each) for the groups of a part of a channel
  template <class F>
  void for_each_group(int64_t channel, int64_t part, F f) const {
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; group++) {
      int64_t plane = group / chunks * planes_in_group, element = group % chunks * elements_in_group;
      f((plane * channels + channel) * inner + element, min(planes_in_group, outer - plane),
        min(elements_in_group, inner - element));
    }
  }
  // f(channel, offset, elements) for this thread's share of all planes, or parts of them, in the order of memory
  template <class F>
  void for_each_run(int thread, int team, F f) const {
    for_share(outer * channels * chunks, thread, team, [&](int64_t run) {
      int64_t plane = run / chunks, element = run % chunks * elements_in_group;
      f(plane % channels, plane * inner + element, min(elements_in_group, inner - element));
    });
  }
};

// Rows of columns, stride apart; rows in leaves.
struct Rows {
  int64_t rows, columns, stride, leaf_rows, leaves;

  Rows(int64_t rows, int64_t columns, int64_t stride) : rows(rows), columns(columns), stride(stride) {
    leaf_rows = round_up(ceil_div(rows, most_parts), block_rows);
    leaves = ceil_div(rows, leaf_rows);
  }
  int64_t rows_of(int64_t leaf) const { return min(leaf_rows, rows - leaf * leaf_rows); }

  // f(row begin, row end, column begin, column end) for pieces of row_step rows and column_step columns at most
  template <class F>
  static void for_each_piece(int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int thread, int team,
                             F f) {
    int64_t strips = ceil_div(columns, column_step);
    for_share(ceil_div(rows, row_step) * strips, thread, team, [&](int64_t task) {
      int64_t row = task / strips * row_step, column = task % strips * column_step;
      f(row, min(rows, row + row_step), column, min(columns, column + column_step));
    });
  }
  // f(leaf, column begin, column end)
  template <class F>
  void for_each_leaf(int thread, int team, F f) const {
    for_each_piece(leaves, columns, 1, strip_columns, thread, team,
                   [&](int64_t leaf, int64_t, int64_t begin, int64_t end) { f(leaf, begin, end); });
  }
  // f(rows Constant, first row, column, number) for tiles of rows and vectors that cover [row, end) x [begin, stop)
  template <class S, int step, class F>
  static INLINE void for_each_tile(int64_t row, int64_t end, int64_t begin, int64_t stop, F f) {
    auto line = [&](auto count, int64_t row) __attribute__((always_inline)) {
      int64_t column = begin;
      for (; column + lanes<S> <= stop; column += lanes<S>) f(count, row, column, lanes<S>);
      if (column < stop) f(count, row, column, stop - column);
    };
    for (; row + step <= end; row += step) line(Constant<step>(), row);
    for (; row < end; row++) line(Constant<1>(), row);
  }
  // f(row, column, number) for this thread's share of all vectors, in the order of memory
  template <class S, class F>
  void for_each_vector(int thread, int team, F f) const {
    int64_t row_step = ceil_div(group_elements, min(columns, group_elements));
    for_each_piece(rows, columns, row_step, group_elements, thread, team,
                   [&](int64_t row, int64_t end, int64_t begin, int64_t stop) {
                     for (; row < end; row++) {
                       int64_t column = begin;
                       for (; column + lanes<S> <= stop; column += lanes<S>) f(row, column, lanes<S>);
                       if (column < stop) f(row, column, stop - column);
                     }
                   });
  }
  // f(channel begin, end) for blocks of whole channels
  template <class F>
  static void for_each_channel_block(int64_t channels, int64_t inner, int thread, int team, F f) {
    int64_t block = max(1, strip_columns / inner);
    for_share(ceil_div(channels, block), thread, team,
              [&](int64_t i) { f(i * block, min(channels, (i + 1) * block)); });
  }
};

static int64_t useful_threads(const BatchNormShape& shape, int threads) {
  return max(1, min(threads, shape.outer * shape.channels * shape.inner / thread_elements));
}

// f(first channel, end) for rounds of channels by rows
template <class F>
static void for_each_round(const BatchNormShape& shape, F f) {
  int64_t step = max(1, round_columns / shape.inner);
  for (int64_t channel = 0; channel < shape.channels; channel += step) f(channel, min(shape.channels, channel + step));
}

// ---- statistics ----
// Sums of differences from a value of the group itself, here the mean of its first vector: however far the group's mean
// is from zero, and whatever else is in it, little is lost by cancellation.
template <class T>
static void add_group(const T* p, int64_t planes, int64_t elements, int64_t stride, Moments& moments) {
  using S = Compute<T>;
  using V = Vector<S>;
  constexpr int64_t width = lanes<S>;
  int64_t first = min(width, elements);
  S origin = static_cast<S>(sum(load(p, first)) / first);
  if (!(origin - origin == 0)) origin = 0;  // infinity: its differences would be NaN, and the mean with them
  V sums[4] = {}, squares[4] = {};
  for (int64_t plane = 0; plane < planes; plane++, p += stride) {
    int64_t i = 0;
    for (; i + 4 * width <= elements; i += 4 * width)
      for (int u = 0; u < 4; u++) {
        V d = load(p + i + u * width) - origin;
        sums[u] += d;
        squares[u] += d * d;
      }
    for (; i + width <= elements; i += width) {
      V d = load(p + i) - origin;
      sums[0] += d;
      squares[0] += d * d;
    }
    if (i < elements) {
      V d = keep_first(load(p + i, elements - i) - origin, elements - i);
      sums[1] += d;
      squares[1] += d * d;
    }
  }
  double count = static_cast<double>(planes * elements), total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  moments.add(count, origin + total / count,
              sum((squares[0] + squares[1]) + (squares[2] + squares[3])) - total * total / count);
}

// the same down the columns of a leaf, from its blocks' first rows
template <class T>
static void add_leaf(const T* input, const Rows& rows, int64_t leaf, int64_t begin, int64_t end, double* means,
                     double* squares) {
  using S = Compute<T>;
  using V = Vector<S>;
  S origin[strip_columns], sum[strip_columns], square[strip_columns];
  double* mean = means + leaf * rows.columns + begin;
  double* m2 = squares + leaf * rows.columns + begin;
  int64_t first_row = leaf * rows.leaf_rows, columns = end - begin, leaf_rows = rows.rows_of(leaf);
  for (int64_t row = 0; row < leaf_rows; row += block_rows) {
    const T* p = input + (first_row + row) * rows.stride + begin;
    int64_t count = min(block_rows, leaf_rows - row);
    auto add_block = [&] {
      for (int64_t i = 0; i < round_up(columns, lanes<S>); i++) sum[i] = square[i] = 0;
      Rows::for_each_tile<S, 8>(
          0, count, 0, columns, [&](auto step, int64_t r, int64_t column, int64_t n) __attribute__((always_inline)) {
            V from = load(origin + column), s0 = load(sum + column), q0 = load(square + column), s1 = {}, q1 = {};
            for (int i = 0; i < step; i++) {
              V d = load(p + (r + i) * rows.stride + column, n) - from;
              (i & 1 ? s1 : s0) += d;
              (i & 1 ? q1 : q0) += d * d;
            }
            store(sum + column, s0 + s1);
            store(square + column, q0 + q1);
          });
    };
    for (int64_t i = 0; i < columns; i += lanes<S>) {
      V x = load(p + i, columns - i);
      store(origin + i, x - x == 0 ? x : V{});
    }
    add_block();
    // A first row more than 5 deviations from the mean is no good origin; then the mean is one.
    S part = 1 / static_cast<S>(count);
    bool far = false;
    for (int64_t i = 0; i < columns; i++) far |= sum[i] * sum[i] * part * 33 > square[i] * 32;
    if (far) {
      for (int64_t i = 0; i < columns; i++) origin[i] += sum[i] - sum[i] == 0 ? sum[i] * part : 0;
      add_block();
    }
    double c = static_cast<double>(count), each = 1 / c, before = static_cast<double>(row), total = before + c;
    double old_share = before / total, share = c / total, product = before * share;
    if (row == 0)
      for (int64_t i = 0; i < columns; i++) {
        double s = sum[i];
        mean[i] = origin[i] + s * each;
        m2[i] = square[i] - s * s * each;
      }
    else
      for (int64_t i = 0; i < columns; i++) {
        double s = sum[i], block_mean = origin[i] + s * each, delta = block_mean - mean[i];
        mean[i] = mean[i] * old_share + block_mean * share;
        m2[i] += square[i] - s * s * each + delta * delta * product;
      }
  }
}

// f(channel, moments) for channels [begin, end) from the moments of their columns in each leaf
template <class F>
static void join_leaves(const Rows& rows, int64_t begin, int64_t end, int64_t inner, const double* means,
                        const double* squares, F f) {
  double mean[strip_columns], m2[strip_columns];
  int64_t columns = (end - begin) * inner;
  for (int64_t i = 0; i < columns; i++) mean[i] = m2[i] = 0;
  for (int64_t leaf = 0; leaf < rows.leaves; leaf++) {
    const double* p = means + leaf * rows.columns + begin * inner;
    double share = static_cast<double>(rows.rows_of(leaf)) / static_cast<double>(rows.rows);
    for (int64_t i = 0; i < columns; i++) mean[i] += p[i] * share;
  }
  for (int64_t leaf = 0; leaf < rows.leaves; leaf++) {
    const double *p = means + leaf * rows.columns + begin * inner, *q = squares + leaf * rows.columns + begin * inner;
    double count = static_cast<double>(rows.rows_of(leaf));
    for (int64_t i = 0; i < columns; i++) m2[i] += q[i] + (p[i] - mean[i]) * (p[i] - mean[i]) * count;
  }
  for (int64_t channel = begin; channel < end; channel++) {
    int64_t first = (channel - begin) * inner;
    double total = 0, joint = 0, n = static_cast<double>(rows.rows);
    for (int64_t i = first; i < first + inner; i++) total += mean[i];
    total /= static_cast<double>(inner);
    for (int64_t i = first; i < first + inner; i++) joint += m2[i] + (mean[i] - total) * (mean[i] - total) * n;
    f(channel, Moments{n * static_cast<double>(inner), total, joint});
  }
}

// ---- forward ----
// Runs element(offset, number, affine) over a tensor, with affine = finish(channel, moments, first), where `first`
// holds for one of the calls with a channel. Without `reduce` the moments are empty, without `apply` element does not
// run.
template <class T, class Finish, class Element>
static void forward_by_planes(const BatchNormShape& shape, int64_t threads, const T* input, bool reduce, bool apply,
                              Finish finish, Element element) {
  using S = Compute<T>;
  Planes planes(shape);
  Moments* partial = reduce ? scratch<Moments, column_sums>(planes.channels * planes.parts) : nullptr;
  Columns<S> columns(scratch<S, split_sums>(Columns<S>::count * planes.channels), planes.channels);
  parallel(threads, [&](int thread, int team) {
    if (reduce) {
      planes.for_each_part(thread, team, [&](int64_t channel, int64_t part) {
        Moments moments;
        planes.for_each_group(channel, part, [&](int64_t at, int64_t count, int64_t elements) {
          add_group(input + at, count, elements, planes.channels * planes.inner, moments);
        });
        partial[channel * planes.parts + part] = moments;
      });
      barrier(team);
    }
    for_share(planes.channels, thread, team, [&](int64_t channel) {
      Moments moments;
      for (int64_t i = 0; reduce && i < planes.parts; i++) {
        const Moments& other = partial[channel * planes.parts + i];
        moments.add(other.count, other.mean, other.squares);
      }
      columns.set(channel, finish(channel, moments));
    });
    if (!apply) return;
    barrier(team);
    planes.for_each_run(thread, team, [&](int64_t channel, int64_t at, int64_t elements) {
      Affine<S> affine = columns.one(channel);
      int64_t i = 0;
      for (; i + lanes<S> <= elements; i += lanes<S>) element(at + i, lanes<S>, affine);
      if (i < elements) element(at + i, elements - i, affine);
    });
  });
}

template <class T, class Finish, class Element>
static void forward_by_rows(const BatchNormShape& shape, int64_t threads, const T* input, bool reduce, bool apply,
                            Finish finish, Element element) {
  using S = Compute<T>;
  int64_t inner = shape.inner;
  for_each_round(shape, [&](int64_t first, int64_t end) {
    Rows rows(shape.outer, (end - first) * inner, shape.channels * inner);
    double* means = reduce ? scratch<double, column_sums>(2 * rows.leaves * rows.columns) : nullptr;
    double* squares = means + rows.leaves * rows.columns;
    Columns<S> columns(scratch<S, split_sums>(Columns<S>::count * rows.columns), rows.columns);
    int64_t offset = first * inner;
    parallel(threads, [&](int thread, int team) {
      if (reduce) {
        rows.for_each_leaf(thread, team, [&](int64_t leaf, int64_t begin, int64_t stop) {
          add_leaf(input + offset, rows, leaf, begin, stop, means, squares);
        });
        barrier(team);
      }
      Rows::for_each_channel_block(end - first, inner, thread, team, [&](int64_t begin, int64_t stop) {
        auto keep = [&](int64_t channel, const Moments& moments) {
          Affine<S> affine = finish(first + channel, moments);
          for (int64_t i = channel * inner; i < (channel + 1) * inner; i++) columns.set(i, affine);
        };
        if (reduce)
          join_leaves(rows, begin, stop, inner, means, squares, keep);
        else
          for (int64_t channel = begin; channel < stop; channel++) keep(channel, Moments());
      });
      if (!apply) return;
      barrier(team);
      rows.template for_each_vector<S>(thread, team,
                                       [&](int64_t row, int64_t column, int64_t n) __attribute__((always_inline)) {
                                         element(offset + row * rows.stride + column, n, columns.several(column, n));
                                       });
    });
  });
}

template <class T, class Finish, class Element>
static void forward_over(const BatchNormShape& shape, int threads, const T* input, bool reduce, bool apply,
                         Finish finish, Element element) {
  int64_t useful = useful_threads(shape, threads);
  if (takes_planes<Compute<T>>(shape.inner))
    forward_by_planes(shape, useful, input, reduce, apply, finish, element);
  else
    forward_by_rows(shape, useful, input, reduce, apply, finish, element);
}

template <class T>
static void statistics_of(const BatchNormStatisticsArguments& arguments) {
  using S = Compute<T>;
  S *mean = static_cast<S*>(arguments.mean), *squares = static_cast<S*>(arguments.squares);
  forward_over(
      arguments.shape, arguments.threads, static_cast<const T*>(arguments.input), true, false,
      [=](int64_t channel, const Moments& moments) {
        mean[channel] = static_cast<S>(moments.mean);
        squares[channel] = static_cast<S>(moments.squares);
        return Affine<S>();
      },
      [](int64_t, int64_t, auto) {});
}

template <class T, int kind>
static void forward_of(const BatchNormArguments& arguments) {
  using S = Compute<T>;
  const T *input = static_cast<const T*>(arguments.input), *residual = static_cast<const T*>(arguments.residual);
  const S *weight = static_cast<const S*>(arguments.weight), *bias = static_cast<const S*>(arguments.bias);
  const S* given_mean = static_cast<const S*>(arguments.given_mean);
  const S* given_variance = static_cast<const S*>(arguments.given_variance);
  S *mean = static_cast<S*>(arguments.mean), *rstd = static_cast<S*>(arguments.rstd);
  S* variance = static_cast<S*>(arguments.variance);
  T* output = static_cast<T*>(arguments.output);
  double eps = arguments.eps;
  S parameter = static_cast<S>(arguments.activation.parameter);
  forward_over(
      arguments.shape, arguments.threads, input, !given_mean, true,
      [=](int64_t channel, const Moments& moments) {
        S m, r;
        if (given_mean) {
          m = given_mean[channel];
          r = 1 / std::sqrt(given_variance[channel] + static_cast<S>(eps));
        } else {
          m = static_cast<S>(moments.mean);
          r = static_cast<S>(1 / std::sqrt(moments.squares / moments.count + eps));
          mean[channel] = m;
          rstd[channel] = r;
          variance[channel] = static_cast<S>(moments.squares / (moments.count - 1));
        }
        return Affine<S>{m, weight ? r * weight[channel] : r, bias ? bias[channel] : 0};
      },
      [=](int64_t at, int64_t n, auto affine) __attribute__((always_inline)) {
        Vector<S> z = affine(load(input + at, n));
        if (residual) z += load(residual + at, n);
        store(output + at, activate<kind>(z, parameter), n);
      });
}

// ---- backward ----
// the sums of dz and dz (x - mean), with z the activation's argument
struct GradientSums {
  double gradient = 0, product = 0;
};
template <class S, class Coefficients, class Gradient, class Finish, class Element>
static void backward_by_planes(const BatchNormShape& shape, int64_t threads, bool reduce, bool apply,
                               Coefficients coefficients, Gradient gradient, Finish finish, Element element) {
  using V = Vector<S>;
  Planes planes(shape);
  GradientSums* partial = reduce ? scratch<GradientSums, column_sums>(planes.channels * planes.parts) : nullptr;
  Columns<S> columns(scratch<S, split_sums>(Columns<S>::count * planes.channels), planes.channels);
  parallel(threads, [&](int thread, int team) {
    if (reduce) {
      planes.for_each_part(thread, team, [&](int64_t channel, int64_t part) {
        Affine<S> affine = coefficients(channel);
        GradientSums sums;
        planes.for_each_group(channel, part, [&](int64_t at, int64_t count, int64_t elements) {
          V gradients[4] = {}, products[4] = {};
          for (int64_t plane = 0; plane < count; plane++, at += planes.channels * planes.inner) {
            auto add = [&](int64_t i, int u, int64_t n) __attribute__((always_inline)) {
              V centred, dz = gradient(at + i, n, affine, centred);
              if (n < lanes<S>) {
                dz = keep_first(dz, n);
                centred = keep_first(centred, n);
              }
              gradients[u] += dz;
              products[u] += dz * centred;
            };
            int64_t i = 0;
            for (; i + 4 * lanes<S> <= elements; i += 4 * lanes<S>)
              for (int u = 0; u < 4; u++) add(i + u * lanes<S>, u, lanes<S>);
            for (; i + lanes<S> <= elements; i += lanes<S>) add(i, 0, lanes<S>);
            if (i < elements) add(i, 1, elements - i);
          }
          sums.gradient += sum((gradients[0] + gradients[1]) + (gradients[2] + gradients[3]));
          sums.product += sum((products[0] + products[1]) + (products[2] + products[3]));
        });
        partial[channel * planes.parts + part] = sums;
      });
      barrier(team);
    }
    for_share(planes.channels, thread, team, [&](int64_t channel) {
      GradientSums sums;
      for (int64_t i = 0; reduce && i < planes.parts; i++) {
        sums.gradient += partial[channel * planes.parts + i].gradient;
        sums.product += partial[channel * planes.parts + i].product;
      }
      columns.set(channel, coefficients(channel), finish(channel, sums));
    });
    if (!apply) return;
    barrier(team);
    planes.for_each_run(thread, team, [&](int64_t channel, int64_t at, int64_t elements) {
      Affine<S> affine = columns.one(channel);
      Correction<S> correction = columns.correction(channel);
      int64_t i = 0;
      for (; i + lanes<S> <= elements; i += lanes<S>) element(at + i, lanes<S>, affine, correction);
      if (i < elements) element(at + i, elements - i, affine, correction);
    });
  });
}

template <class S, class Coefficients, class Gradient, class Finish, class Element>
static void backward_by_rows(const BatchNormShape& shape, int64_t threads, bool reduce, bool apply,
                             Coefficients coefficients, Gradient gradient, Finish finish, Element element) {
  using V = Vector<S>;
  int64_t inner = shape.inner;
  for_each_round(shape, [&](int64_t first, int64_t end) {
    Rows rows(shape.outer, (end - first) * inner, shape.channels * inner);
    double* gradients = reduce ? scratch<double, column_sums>(2 * rows.leaves * rows.columns) : nullptr;
    double* products = gradients + rows.leaves * rows.columns;
    Columns<S> columns(scratch<S, split_sums>(Columns<S>::count * rows.columns), rows.columns);
    int64_t offset = first * inner;
    parallel(threads, [&](int thread, int team) {
      auto for_each_channel = [&](auto f) {
        Rows::for_each_channel_block(end - first, inner, thread, team, [&](int64_t begin, int64_t stop) {
          for (int64_t channel = begin; channel < stop; channel++) f(channel);
        });
      };
      for_each_channel([&](int64_t channel) {
        for (int64_t i = channel * inner; i < (channel + 1) * inner; i++) columns.set(i, coefficients(first + channel));
      });
      barrier(team);
      if (reduce) {
        rows.for_each_leaf(thread, team, [&](int64_t leaf, int64_t begin, int64_t stop) {
          S gradient_sum[strip_columns], product_sum[strip_columns];
          double* leaf_gradients = gradients + leaf * rows.columns + begin;
          double* leaf_products = products + leaf * rows.columns + begin;
          for (int64_t i = 0; i < stop - begin; i++) leaf_gradients[i] = leaf_products[i] = 0;
          int64_t leaf_end = leaf * rows.leaf_rows + rows.rows_of(leaf);
          for (int64_t row = leaf * rows.leaf_rows; row < leaf_end; row += block_rows) {
            for (int64_t i = 0; i < stop - begin; i += lanes<S>) {
              store(gradient_sum + i, V{});
              store(product_sum + i, V{});
            }
            Rows::for_each_tile<S, 4>(
                row, min(leaf_end, row + block_rows), begin, stop,
                [&](auto step, int64_t r, int64_t column, int64_t n) __attribute__((always_inline)) {
                  Affine<V> affine = columns.several(column, n);
                  V g = load(gradient_sum + (column - begin)), p = load(product_sum + (column - begin));
                  for (int i = 0; i < step; i++) {
                    V centred, dz = gradient(offset + (r + i) * rows.stride + column, n, affine, centred);
                    g += dz;
                    p += dz * centred;
                  }
                  store(gradient_sum + (column - begin), g);
                  store(product_sum + (column - begin), p);
                });
            for (int64_t i = 0; i < stop - begin; i++) {
              leaf_gradients[i] += gradient_sum[i];
              leaf_products[i] += product_sum[i];
            }
          }
        });
        barrier(team);
      }
      for_each_channel([&](int64_t channel) {
        GradientSums sums;
        for (int64_t leaf = 0; reduce && leaf < rows.leaves; leaf++)
          for (int64_t i = channel * inner; i < (channel + 1) * inner; i++) {
            sums.gradient += gradients[leaf * rows.columns + i];
            sums.product += products[leaf * rows.columns + i];
          }
        Correction<S> correction = finish(first + channel, sums);
        for (int64_t i = channel * inner; i < (channel + 1) * inner; i++) columns.set(i, columns.one(i), correction);
      });
      if (!apply) return;
      barrier(team);
      rows.template for_each_vector<S>(
          thread, team, [&](int64_t row, int64_t column, int64_t n) __attribute__((always_inline)) {
            element(offset + row * rows.stride + column, n, columns.several(column, n), columns.corrections(column, n));
          });
    });
  });
}

template <class T, int kind>
static void backward_of(const BatchNormBackwardArguments& arguments) {
  using S = Compute<T>;
  using V = Vector<S>;
  const T *input = static_cast<const T*>(arguments.input), *residual = static_cast<const T*>(arguments.residual);
  const T *grad_output = static_cast<const T*>(arguments.grad_output),
          *output = static_cast<const T*>(arguments.output);
  const S *weight = static_cast<const S*>(arguments.weight), *bias = static_cast<const S*>(arguments.bias);
  const S *mean = static_cast<const S*>(arguments.mean), *rstd = static_cast<const S*>(arguments.rstd);
  const S* mean_gradient = static_cast<const S*>(arguments.mean_gradient);
  const S* mean_product = static_cast<const S*>(arguments.mean_product);
  T *grad_input = static_cast<T*>(arguments.grad_input), *grad_residual = static_cast<T*>(arguments.grad_residual);
  S *grad_weight = static_cast<S*>(arguments.grad_weight), *grad_bias = static_cast<S*>(arguments.grad_bias);
  const BatchNormShape& shape = arguments.shape;
  double count = static_cast<double>(shape.outer * shape.inner);
  bool given = mean_gradient, corrected = given || (arguments.training && grad_input);
  bool reduce = (corrected && !given) || grad_weight || grad_bias, apply = grad_input || grad_residual;
  S parameter = static_cast<S>(arguments.activation.parameter);
  auto coefficients = [=](int64_t channel) {
    S scale = weight ? rstd[channel] * weight[channel] : rstd[channel];
    return Affine<S>{mean[channel], scale, bias ? bias[channel] : 0};
  };
  auto gradient = [=](int64_t at, int64_t n, auto affine, V& centred) __attribute__((always_inline)) {
    V x = load(input + at, n), g = load(grad_output + at, n);
    centred = x - affine.mean;
    if constexpr (kind == fastdl::none) return g;
    V made_of;
    if (output) {
      made_of = load(output + at, n);
    } else {
      made_of = affine(x);
      if (residual) made_of += load(residual + at, n);
      // of relu and leaky_relu only the sign matters, which the output shares
      if constexpr (kind == fastdl::elu || kind == fastdl::sigmoid || kind == fastdl::tanh)
        made_of = activate<kind>(made_of, parameter);
    }
    return fastdl::ISA::gradient<kind>(g, made_of, parameter);
  };
  auto finish = [=](int64_t channel, const GradientSums& sums) {
    if (grad_weight) grad_weight[channel] = static_cast<S>(sums.product * rstd[channel]);
    if (grad_bias) grad_bias[channel] = static_cast<S>(sums.gradient);
    if (given) return Correction<S>{mean_gradient[channel], mean_product[channel] * rstd[channel]};
    double squared = static_cast<double>(rstd[channel]) * rstd[channel];
    return Correction<S>{static_cast<S>(sums.gradient / count), static_cast<S>(sums.product * squared / count)};
  };
  auto element = [=](int64_t at, int64_t n, auto affine, auto correction) __attribute__((always_inline)) {
    V centred, dz = gradient(at, n, affine, centred);
    if (grad_residual) store(grad_residual + at, dz, n);
    if (!grad_input) return;
    V corrected_dz = corrected ? dz - correction.mean_gradient - centred * correction.mean_product : dz;
    store(grad_input + at, affine.scale * corrected_dz, n);
  };
  int64_t threads = useful_threads(shape, arguments.threads);
  if (takes_planes<S>(shape.inner))
    backward_by_planes<S>(shape, threads, reduce, apply, coefficients, gradient, finish, element);
  else
    backward_by_rows<S>(shape, threads, reduce, apply, coefficients, gradient, finish, element);
}

void batch_norm(const BatchNormArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) {
    with_kind(arguments.activation.kind,
              [&](auto kind) { forward_of<typename decltype(type)::type, decltype(kind)::value>(arguments); });
  });
}

void batch_norm_statistics(const BatchNormStatisticsArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) { statistics_of<typename decltype(type)::type>(arguments); });
}

void batch_norm_backward(const BatchNormBackwardArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) {
    with_kind(arguments.activation.kind,
              [&](auto kind) { backward_of<typename decltype(type)::type, decltype(kind)::value>(arguments); });
  });
}

}  // namespace fastdl::ISA
