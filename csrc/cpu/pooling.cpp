// Pooling over windows of an image. One kernel for both memory formats, with a vector across channels: channels_last
// lies in memory so; of NCHW, tiles of as many planes as a vector has lanes are transposed in cache, which makes every
// stride, dilation and window as fast as the simple ones. Each target element gathers what it is made of, so threads
// share nothing, and a gradient is summed in one order.
#include "kernels/pooling.h"

#include "threads.h"

namespace fastdl::ISA {
FASTDL_CPU_POOLING(DECLARE)
namespace {

struct pooling_values;
struct pooling_results;
struct pooling_codes;
struct pooling_runs;
struct pooling_windows;
struct pooling_divisors;

template <class T, int n>
struct VectorOfCount {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
// Codes in registers and in transposed tiles: integers as wide as the values they belong to.
template <class S>
using CodeVector = decltype(Vector<S>{} > Vector<S>{});
template <class S>
using TileCode = Scalar<CodeVector<S>>;

template <class S, class C>
INLINE CodeVector<S> load_codes(const C* p, int64_t n) {
  typename VectorOfCount<C, lanes<S>>::type codes = {};
  if (n >= lanes<S>)
    __builtin_memcpy(&codes, p, sizeof codes);
  else
    for (int64_t i = 0; i < n; i++) codes[i] = p[i];
#if defined(__AVX2__)  // GCC would go step by step
  if constexpr (sizeof(C) == 1 && sizeof(S) == 4) {
#if defined(__AVX512F__)
    return (CodeVector<S>)_mm512_cvtepu8_epi32((__m128i)codes);
#else
    return (CodeVector<S>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)codes));
#endif
  }
#endif
  return __builtin_convertvector(codes, CodeVector<S>);
}
template <class S, class C>
INLINE void store_codes(C* p, CodeVector<S> wide, int64_t n) {
  using Narrow = typename VectorOfCount<C, lanes<S>>::type;
  Narrow codes = __builtin_convertvector(wide, Narrow);
  if (n >= lanes<S>)
    __builtin_memcpy(p, &codes, sizeof codes);
  else
    for (int64_t i = 0; i < n; i++) p[i] = codes[i];
}

// What one target row or column is made of: source positions first, first + step, ... The window's element that each
// is, as a code: code, code + code_step, ... (see PoolingArguments::code_bytes). divisor and scale: of averages, the
// axis' factor of a window's size and its reciprocal, by the forward's target.
struct Run {
  int64_t first, count, code;
};
struct Axis {
  Run* runs;
  double* divisors;
  int64_t targets, sources, step, code_step;
};

// windows as targets; code_unit: what a step of one position, else of one element of the window, adds to the code
void fill_windows(Axis& axis, const PoolingAxis& a, bool adaptive, bool positions, int64_t code_unit,
                  bool include_pad) {
  axis.step = adaptive ? 1 : a.dilation;
  axis.code_step = positions ? axis.step * code_unit : code_unit;
  for (int64_t o = 0; o < a.output; o++) {
    int64_t origin = o * a.stride - a.padding, k = 0, end = a.kernel, size = 0;
    if (adaptive) {
      origin = o * a.input / a.output;
      end = size = ceil_div((o + 1) * a.input, a.output) - origin;
    } else {
      k = origin < 0 ? ceil_div(-origin, a.dilation) : 0;
      end = max(k, min(a.kernel, a.input > origin ? ceil_div(a.input - origin, a.dilation) : 0));
      size = include_pad ? min(origin + a.kernel, a.input + a.padding) - origin : end - k;
    }
    int64_t first = origin + k * axis.step;
    axis.runs[o] = {first, end - k, (positions ? first : k) * code_unit};
    axis.divisors[o] = static_cast<double>(max(size, 1));
  }
}

// input positions as targets: the windows that hold them, by rising position; code: of the target in the first of them
void fill_inputs(Axis& axis, const PoolingAxis& a, bool adaptive, bool positions, int64_t code_unit) {
  // every `step`th window has the position among its dilated elements: step * stride is a multiple of the dilation
  axis.step = 1;
  if (!adaptive)
    while (axis.step * a.stride % a.dilation) axis.step++;
  axis.code_step = positions || adaptive ? 0 : -axis.step * a.stride / a.dilation * code_unit;
  for (int64_t i = 0; i < a.input; i++) {
    int64_t first = 0, last = -1, code = 0;
    if (adaptive) {
      first = i * a.output / a.input;
      last = ceil_div((i + 1) * a.output, a.input) - 1;
    } else {
      int64_t reach = (a.kernel - 1) * a.dilation, at = i + a.padding;
      first = at > reach ? ceil_div(at - reach, a.stride) : 0;
      last = min(a.output - 1, at / a.stride);
      while (first <= last && (at - first * a.stride) % a.dilation) first++;
      code = (positions ? i : (at - first * a.stride) / a.dilation) * code_unit;
    }
    axis.runs[i] = {first, last < first ? 0 : (last - first) / axis.step + 1, code};
  }
}

// An image's rows and columns: element (i, j) of channel c at i * row + j * column + c.
template <class T, class C>
struct Image {
  T* values;
  C* codes;
  int64_t row, column;
};

struct Geometry {
  Axis rows, columns;
  double divisor;  // of every window, or 0
};

// One target of `vectors` vectors of channels from c on, n channels where that is less than a vector. All by value: as
// stores may alias what is reached through a pointer, it would be loaded anew for every target.
template <int mode, bool with_codes, int vectors, class T, class C, class U, class D>
INLINE void point(const Image<T, C> source, const Image<U, D> target, const Geometry g, const Run row, const Run column,
                  int64_t to, double divisor, int64_t c, int64_t n) {
  using S = Compute<std::remove_const_t<T>>;
  constexpr int width = lanes<S>;
  const int64_t row_step = g.rows.step * source.row, column_step = g.columns.step * source.column;
  Vector<S> result[vectors] = {};
  CodeVector<S> codes[vectors] = {};
  if constexpr (mode == max_forward)
    for (int v = 0; v < vectors; v++) {
      result[v] -= static_cast<S>(__builtin_inf());
      codes[v] += static_cast<TileCode<S>>(row.code + column.code);
    }
  int64_t row_from = row.first * source.row + column.first * source.column + c, row_code = row.code + column.code;
  for (int64_t i = 0; i < row.count; i++, row_from += row_step, row_code += g.rows.code_step) {
    int64_t from = row_from, code = row_code;
    Vector<S> sum[vectors] = {};  // a row at a time: shorter sums round less
    for (int64_t j = 0; j < column.count; j++, from += column_step, code += g.columns.code_step) {
      const auto code_ = CodeVector<S>{} + static_cast<TileCode<S>>(code);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        Vector<S> x = load(source.values + from + v * width, n);
        if constexpr (mode == max_forward) {
          auto better = (x > result[v]) | (x != x);
          result[v] = better ? x : result[v];
          if constexpr (with_codes) codes[v] = better ? code_ : codes[v];
        } else if constexpr (mode == max_backward) {
          sum[v] += load_codes<S>(source.codes + from + v * width, n) == code_ ? x : Vector<S>{};
        } else if constexpr (mode == average_backward) {
          sum[v] += x * static_cast<S>(g.columns.divisors[column.first + j * g.columns.step]);
        } else {
          sum[v] += x;
        }
      }
    }
    for (int v = 0; v < vectors; v++) {
      if constexpr (mode == average_backward) sum[v] *= static_cast<S>(g.rows.divisors[row.first + i * g.rows.step]);
      if constexpr (mode != max_forward) result[v] += sum[v];
    }
  }
  for (int v = 0; v < vectors; v++) {
    if constexpr (mode == average_forward) result[v] /= static_cast<S>(divisor);
    store(target.values + to + c + v * width, result[v], n);
    if constexpr (mode == max_forward && with_codes) store_codes<S>(target.codes + to + c + v * width, codes[v], n);
  }
}

// The targets [h0, h1) x [w0, w1).
template <int mode, bool with_codes, class T, class C, class U, class D>
__attribute__((noinline)) void area(const Image<T, C> source, const Image<U, D> target, const Geometry g, int64_t h0,
                                    int64_t h1, int64_t w0, int64_t w1, int64_t channels) {
  constexpr int width = lanes<Compute<std::remove_const_t<T>>>;
  for (int64_t h = h0; h < h1; h++) {
    const Run row = g.rows.runs[h];
    for (int64_t w = w0; w < w1; w++) {
      const Run column = g.columns.runs[w];
      const int64_t to = h * target.row + w * target.column;
      double divisor = g.divisor;
      if (mode == average_forward && divisor == 0) divisor = g.rows.divisors[h] * g.columns.divisors[w];
      auto some = [=](auto vectors, int64_t c, int64_t n) __attribute__((always_inline)) {
        point<mode, with_codes, decltype(vectors)::value>(source, target, g, row, column, to, divisor, c, n);
      };
      if (channels < width) {
        some(Constant<1>(), 0, channels);
        continue;
      }
      int64_t c = 0;
      for (; c + 4 * width <= channels; c += 4 * width) some(Constant<4>(), c, width);
      for (; c + 2 * width <= channels; c += 2 * width) some(Constant<2>(), c, width);
      for (; c + width <= channels; c += width) some(Constant<1>(), c, width);
      // the last vector overlaps the one before: the same values once more
      if (c < channels) some(Constant<1>(), channels - width, width);
    }
  }
}

constexpr int64_t elements_per_thread = 32768;  // starting a thread takes some microseconds

template <int mode, bool with_codes, class T, class C>
void channels_last(const PoolingArguments& a, const Geometry& g) {
  const Axis &rows = g.rows, &columns = g.columns;
  const int64_t channels = a.channels;
  const int64_t source_size = rows.sources * columns.sources * channels;
  const int64_t target_size = rows.targets * columns.targets * channels;
  int64_t threads = min(a.threads, a.batch * max(source_size, target_size) / elements_per_thread);
  parallel(threads, [&](int thread, int team) {
    for_share(a.batch * rows.targets, thread, team, [&](int64_t task) {
      const int64_t image = task / rows.targets, h = task % rows.targets;
      Image<const T, const C> source{static_cast<const T*>(a.source) + image * source_size,
                                     static_cast<const C*>(a.source_codes) + image * source_size,
                                     columns.sources * channels, channels};
      Image<T, C> target{static_cast<T*>(a.target) + image * target_size,
                         static_cast<C*>(a.target_codes) + image * target_size, columns.targets * channels, channels};
      area<mode, with_codes>(source, target, g, h, h + 1, 0, columns.targets, channels);
    });
  });
}

// ---- NCHW, by tiles of `lanes` planes ----

// A rectangle of each plane into a tile [rows * columns][lanes], or back.
struct Rectangle {
  int64_t row, rows, column, columns;
};
INLINE Rectangle merged(Rectangle r, int64_t width) {  // whole rows lie one after the other
  return r.columns == width ? Rectangle{0, 1, r.row * width, r.rows * width} : r;
}
template <class S, class V, class Load, class Keep>
INLINE void transpose_rectangle(Rectangle r, int64_t width, Load take, Keep keep) {
  constexpr int n = lanes<S>;
  r = merged(r, width);
  for (int64_t i = 0; i < r.rows; i++)
    for (int64_t j = 0; j < r.columns; j += n) {
      V square[n];
      int64_t at = (r.row + i) * width + r.column + j, count = min(n, r.columns - j);
      take(square, at, i * r.columns + j, count);
      transpose(square);
      keep(square, at, i * r.columns + j, count);
    }
}
// planes at from, plane_size apart; `planes` of them
template <class S, class V, class T, class Load>
INLINE void to_tile(const T* from, int64_t plane_size, int64_t planes, Rectangle r, int64_t width, Scalar<V>* tile,
                    Load load_vector) {
  constexpr int n = lanes<S>;
  transpose_rectangle<S, V>(
      r, width,
      [&](V(&square)[n], int64_t at, int64_t, int64_t count) __attribute__((always_inline)) {
        for (int p = 0; p < n; p++) square[p] = p < planes ? load_vector(from + p * plane_size + at, count) : V{};
      },
      [&](V(&square)[n], int64_t, int64_t index, int64_t count) __attribute__((always_inline)) {
        for (int64_t i = 0; i < count; i++) __builtin_memcpy(tile + (index + i) * n, &square[i], sizeof(V));
      });
}
template <class S, class V, class T, class Store>
INLINE void from_tile(T* to, int64_t plane_size, int64_t planes, Rectangle r, int64_t width, const Scalar<V>* tile,
                      Store store_vector) {
  constexpr int n = lanes<S>;
  transpose_rectangle<S, V>(
      r, width,
      [&](V(&square)[n], int64_t, int64_t index, int64_t count) __attribute__((always_inline)) {
        for (int64_t i = 0; i < n; i++)
          if (i < count)
            __builtin_memcpy(&square[i], tile + (index + i) * n, sizeof(V));
          else
            square[i] = V{};
      },
      [&](V(&square)[n], int64_t at, int64_t, int64_t count) __attribute__((always_inline)) {
        for (int p = 0; p < planes; p++) store_vector(to + p * plane_size + at, square[p], count);
      });
}

// the source positions [begin, end) of targets [first, last)
struct Span {
  int64_t begin, end;
};
Span sources_of(const Axis& axis, int64_t first, int64_t last) {
  Span span{axis.sources, 0};
  for (int64_t t = first; t < last; t++) {
    const Run& run = axis.runs[t];
    if (run.count == 0) continue;
    span.begin = min(span.begin, run.first);
    span.end = max(span.end, run.first + (run.count - 1) * axis.step + 1);
  }
  return span.begin < span.end ? span : Span{0, 0};
}
// how many targets a tile takes along an axis, so that their sources are about so many
int64_t tile_targets(const Axis& axis, int64_t positions) {
  int64_t parts = max(1, ceil_div(max(axis.sources, axis.targets), positions));
  return ceil_div(axis.targets, parts);
}

constexpr int64_t tile_columns = 256, tile_positions = 1024;

template <int mode, bool with_codes, class T, class C>
void planar(const PoolingArguments& a, const Geometry& g) {
  using S = Compute<T>;
  using K = TileCode<S>;
  constexpr int n = lanes<S>;
  const Axis &rows = g.rows, &columns = g.columns;
  const int64_t planes = a.batch * a.channels, groups = ceil_div(planes, n);
  const int64_t source_size = rows.sources * columns.sources, target_size = rows.targets * columns.targets;
  const int64_t width = tile_targets(columns, tile_columns);
  const int64_t height =
      tile_targets(rows, max(1, tile_positions / min(tile_columns, max(columns.sources, columns.targets))));
  const int64_t across = ceil_div(columns.targets, width), tiles = ceil_div(rows.targets, height) * across;
  int64_t threads = min(a.threads, planes * max(source_size, target_size) / elements_per_thread);
  auto load_values = [](const T* p, int64_t count) __attribute__((always_inline)) { return load(p, count); };
  auto load_code = [](const C* p, int64_t count) __attribute__((always_inline)) { return load_codes<S>(p, count); };
  auto store_values = [](T* p, Vector<S> v, int64_t count) __attribute__((always_inline)) { store(p, v, count); };
  auto store_code = [](C* p, CodeVector<S> v, int64_t count)
                        __attribute__((always_inline)) { store_codes<S>(p, v, count); };
  parallel(threads, [&](int thread, int team) {
    for_share(groups * tiles, thread, team, [&](int64_t task) {
      const int64_t plane = task / tiles * n, count = min(n, planes - plane);
      const int64_t h0 = task % tiles / across * height, w0 = task % across * width;
      const int64_t h1 = min(rows.targets, h0 + height), w1 = min(columns.targets, w0 + width);
      if (h0 >= h1 || w0 >= w1) return;
      const Span down = sources_of(rows, h0, h1), right = sources_of(columns, w0, w1);
      const Rectangle from{down.begin, down.end - down.begin, right.begin, right.end - right.begin};
      const Rectangle to{h0, h1 - h0, w0, w1 - w0};
      const int64_t from_size = from.rows * from.columns * n, to_size = to.rows * to.columns * n;
      S* values = scratch<S, pooling_values>(from_size + to_size);
      K* codes = with_codes ? scratch<K, pooling_codes>(mode == max_forward ? to_size : from_size) : nullptr;
      to_tile<S, Vector<S>>(static_cast<const T*>(a.source) + plane * source_size, source_size, count, from,
                            columns.sources, values, load_values);
      if constexpr (with_codes && mode == max_backward)
        to_tile<S, CodeVector<S>>(static_cast<const C*>(a.source_codes) + plane * source_size, source_size, count, from,
                                  columns.sources, codes, load_code);
      const int64_t source_origin = (from.row * from.columns + from.column) * n;
      const int64_t target_origin = (to.row * to.columns + to.column) * n;
      S* results = values + from_size;
      Image<const S, const K> source{values - source_origin, codes - source_origin, from.columns * n, n};
      Image<S, K> target{results - target_origin, codes - target_origin, to.columns * n, n};
      area<mode, with_codes>(source, target, g, h0, h1, w0, w1, n);
      from_tile<S, Vector<S>>(static_cast<T*>(a.target) + plane * target_size, target_size, count, to, columns.targets,
                              results, store_values);
      if constexpr (with_codes && mode == max_forward)
        from_tile<S, CodeVector<S>>(static_cast<C*>(a.target_codes) + plane * target_size, target_size, count, to,
                                    columns.targets, codes, store_code);
    });
  });
}

// the mean of whole planes, whose elements lie one after the other
template <class T>
void plane_means(const PoolingArguments& a, double divisor) {
  using S = Compute<T>;
  constexpr int n = lanes<S>;
  constexpr int64_t strip = 64 * n;  // summed apart, so that sums stay short
  const int64_t planes = a.batch * a.channels, size = a.rows.input * a.columns.input;
  int64_t threads = min(a.threads, planes * size / elements_per_thread);
  parallel(threads, [&](int thread, int team) {
    for_share(planes, thread, team, [&](int64_t plane) {
      const T* from = static_cast<const T*>(a.source) + plane * size;
      Vector<S> total = {};
      for (int64_t begin = 0; begin < size; begin += strip) {
        int64_t i = begin, end = min(size, begin + strip);
        Vector<S> sums[4] = {};
        for (; i + 4 * n <= end; i += 4 * n)
          for (int k = 0; k < 4; k++) sums[k] += load(from + i + k * n);
        for (; i < end; i += n) sums[0] += load(from + i, end - i);
        total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
      }
      S sum = 0;
      for (int i = 0; i < n; i++) sum += total[i];
      store(static_cast<T*>(a.target) + plane, Vector<S>{} + sum / static_cast<S>(divisor), 1);
    });
  });
}

// the gradient of a plane's mean: one value for all of it
template <class T>
void plane_means_backward(const PoolingArguments& a, double scale) {
  using S = Compute<T>;
  constexpr int n = lanes<S>;
  const int64_t planes = a.batch * a.channels, size = a.rows.input * a.columns.input;
  int64_t threads = min(a.threads, planes * size / elements_per_thread);
  parallel(threads, [&](int thread, int team) {
    for_share(planes, thread, team, [&](int64_t plane) {
      Vector<S> value = Vector<S>{} + load(static_cast<const T*>(a.source) + plane, 1)[0] * static_cast<S>(scale);
      T* to = static_cast<T*>(a.target) + plane * size;
      for (int64_t i = 0; i < size; i += n) store(to + i, value, size - i);
    });
  });
}

template <int mode, bool with_codes, class T, class C>
void run(const PoolingArguments& a, const Geometry& g) {
  if (a.channels_last)
    channels_last<mode, with_codes, T, C>(a, g);
  else
    planar<mode, with_codes, T, C>(a, g);
}

template <int mode, class T>
void with_code_type(const PoolingArguments& a, const Geometry& g) {
  if (a.code_bytes == 8) return run<mode, true, T, int64_t>(a, g);
  if (a.code_bytes == 1) return run<mode, true, T, uint8_t>(a, g);
  if constexpr (mode == max_forward) run<mode, false, T, uint8_t>(a, g);
}

}  // namespace

void pooling(const PoolingArguments& a) {
  const bool adaptive = a.rows.kernel == 0, positions = a.code_bytes == 8;
  const bool backward = a.mode == max_backward || a.mode == average_backward;
  const int64_t row_targets = backward ? a.rows.input : a.rows.output;
  const int64_t column_targets = backward ? a.columns.input : a.columns.output;
  Run* runs = scratch<Run, pooling_runs>(row_targets + column_targets);
  double* divisors = scratch<double, pooling_divisors>(a.rows.output + a.columns.output);
  Geometry g{{runs, divisors, row_targets, backward ? a.rows.output : a.rows.input, 0, 0},
             {runs + row_targets, divisors + a.rows.output, column_targets,
              backward ? a.columns.output : a.columns.input, 0, 0},
             a.divisor};
  const int64_t row_unit = positions ? a.columns.input : a.columns.kernel;
  // the windows' sizes are needed either way; a backward then replaces the runs, in the same place if that is larger
  if (!backward) {
    fill_windows(g.rows, a.rows, adaptive, positions, row_unit, a.count_include_pad);
    fill_windows(g.columns, a.columns, adaptive, positions, 1, a.count_include_pad);
  } else {
    if (a.mode == average_backward) {
      Run* windows = scratch<Run, pooling_windows>(a.rows.output + a.columns.output);
      Axis rows = g.rows, columns = g.columns;
      rows.runs = windows;
      columns.runs = windows + a.rows.output;
      fill_windows(rows, a.rows, adaptive, false, 0, a.count_include_pad);
      fill_windows(columns, a.columns, adaptive, false, 0, a.count_include_pad);
      for (int64_t o = 0; o < a.rows.output; o++) divisors[o] = a.divisor != 0 ? 1 / a.divisor : 1 / divisors[o];
      for (int64_t o = 0; o < a.columns.output; o++) columns.divisors[o] = a.divisor != 0 ? 1 : 1 / columns.divisors[o];
    }
    fill_inputs(g.rows, a.rows, adaptive, positions, row_unit);
    fill_inputs(g.columns, a.columns, adaptive, positions, 1);
  }
  // one window over all of a plane, whose elements lie one after the other
  auto whole_axis = [&](const PoolingAxis& axis) {
    return axis.output == 1 && (adaptive || (axis.padding == 0 && axis.kernel == axis.input));
  };
  const bool whole = !a.channels_last && whole_axis(a.rows) && whole_axis(a.columns);
  with_dtype(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (a.mode == max_forward) with_code_type<max_forward, T>(a, g);
    if (a.mode == max_backward) with_code_type<max_backward, T>(a, g);
    if (a.mode == average_forward && whole)
      plane_means<T>(a, a.divisor != 0 ? a.divisor : g.rows.divisors[0] * g.columns.divisors[0]);
    else if (a.mode == average_forward)
      run<average_forward, false, T, uint8_t>(a, g);
    else if (a.mode == average_backward && whole)
      plane_means_backward<T>(a, g.rows.divisors[0] * g.columns.divisors[0]);
    else if (a.mode == average_backward)
      run<average_backward, false, T, uint8_t>(a, g);
  });
}

// ---- fractional ----

// a plane's values in the type that they are computed in: themselves, or a widened copy
template <class T>
static const Compute<T>* widened(const T* from, int64_t count) {
  using S = Compute<T>;
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
    S* copy = scratch<S, pooling_values>(count);
    for (int64_t i = 0; i < count; i += lanes<S>) store(copy + i, load(from + i, count - i), count - i);
    return copy;
  }
}
template <class T>
static void fractional_of(const FractionalArguments& a) {
  using S = Compute<T>;
  constexpr int n = lanes<S>;
  const int64_t input_size = a.height * a.width, output_size = a.output_height * a.output_width;
  int64_t threads = min(a.threads, a.planes * output_size * a.kernel_height * a.kernel_width / elements_per_thread);
  parallel(threads, [&](int thread, int team) {
    for_share(a.planes, thread, team, [&](int64_t plane) {
      const S* values = widened(static_cast<const T*>(a.input) + plane * input_size, input_size);
      T* output = static_cast<T*>(a.output) + plane * output_size;
      int64_t* indices = a.indices + plane * output_size;
      const int32_t *row_starts = a.row_starts + plane * a.output_height,
                    *column_starts = a.column_starts + plane * a.output_width;
      for (int64_t h = 0; h < a.output_height; h++)
        for (int64_t w = 0; w < a.output_width; w += n) {
          const int64_t count = min(n, a.output_width - w);
          int32_t starts[n] = {};
          for (int64_t l = 0; l < count; l++) starts[l] = column_starts[w + l];
          CodeVector<S> first = {}, index;
          for (int l = 0; l < n; l++) first[l] = starts[l];
          first += static_cast<TileCode<S>>(row_starts[h] * a.width);
          index = first;
          Vector<S> best = Vector<S>{} - static_cast<S>(__builtin_inf());
          for (int64_t i = 0; i < a.kernel_height; i++)
            for (int64_t j = 0; j < a.kernel_width; j++) {
              const int64_t offset = i * a.width + j;
              const S* at = values + row_starts[h] * a.width + offset;
              Vector<S> x;
#pragma GCC unroll 16
              for (int l = 0; l < n; l++) x[l] = at[starts[l]];
              auto better = (x > best) | (x != x);
              best = better ? x : best;
              index = better ? first + static_cast<TileCode<S>>(offset) : index;
            }
          store(output + h * a.output_width + w, best, count);
          store_codes<S>(indices + h * a.output_width + w, index, count);
        }
    });
  });
}

template <class T>
static void fractional_backward_of(const FractionalArguments& a) {
  using S = Compute<T>;
  const int64_t input_size = a.height * a.width, output_size = a.output_height * a.output_width;
  int64_t threads = min(a.threads, a.planes * input_size / elements_per_thread);
  parallel(threads, [&](int thread, int team) {
    for_share(a.planes, thread, team, [&](int64_t plane) {
      const S* values = widened(static_cast<const T*>(a.input) + plane * output_size, output_size);
      T* grad_input = static_cast<T*>(a.output) + plane * input_size;
      S* results;
      if constexpr (std::is_same_v<S, T>)
        results = grad_input;
      else
        results = scratch<S, pooling_results>(input_size);
      __builtin_memset(results, 0, input_size * sizeof(S));
      const int64_t* indices = a.indices + plane * output_size;
      for (int64_t i = 0; i < output_size; i++) results[indices[i]] += values[i];
      if constexpr (!std::is_same_v<S, T>)
        for (int64_t i = 0; i < input_size; i += lanes<S>)
          store(grad_input + i, load(results + i, input_size - i), input_size - i);
    });
  });
}

void fractional_pooling(const FractionalArguments& a) {
  with_dtype(a.dtype, [&](auto type) { fractional_of<typename decltype(type)::type>(a); });
}
void fractional_pooling_backward(const FractionalArguments& a) {
  with_dtype(a.dtype, [&](auto type) { fractional_backward_of<typename decltype(type)::type>(a); });
}

}  // namespace fastdl::ISA
