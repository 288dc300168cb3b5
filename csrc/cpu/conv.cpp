// Convolutions that the library has no good kernel for, in NCHW: 1x1 as a matrix product for each image, depthwise, and
// the gradient of activation and bias. A plane is one channel of one image.
#include "kernels/conv.h"

#include "activation.h"
#include "gemm.h"

namespace fastdl::ISA {
FASTDL_CPU_CONV(DECLARE)

// f(plane) for this thread's planes; fewer threads where the work of one would not pay its start
template <class F>
static void for_each_plane(int64_t planes, int64_t work, int threads, F f) {
  constexpr int64_t work_per_thread = 1 << 16;
  parallel(max(1, min(threads, min(planes, work / work_per_thread))), [&](int thread, int team) {
    for_share(planes, thread, team, [&](int64_t plane) { f(plane, thread, team); });
  });
}

// ---- 1x1 ----

template <class T, int kind>
static void conv_1x1_of(const Conv1x1Arguments& arguments) {
  using S = Compute<T>;
  const T *input = static_cast<const T*>(arguments.input), *bias = static_cast<const T*>(arguments.bias);
  T *output = static_cast<T*>(arguments.output), *preactivation = static_cast<T*>(arguments.preactivation);
  int64_t channels = arguments.channels, out_channels = arguments.out_channels, pixels = arguments.pixels;
  S parameter = static_cast<S>(arguments.activation.parameter);
  Operand<T> weight{static_cast<const T*>(arguments.weight), arguments.weight_row_stride,
                    arguments.weight_column_stride, out_channels};
  // A thread takes whole images if all threads get their share of them.
  bool by_image = arguments.images >= 2 * arguments.threads || arguments.threads == 1;
  auto one = [=](int64_t image, int threads) {
    int64_t base = image * out_channels * pixels;
    auto finish = [=](const Tile<S>& tile) {
      tile.for_each_vector([=](int64_t row, int64_t column, int64_t n, Vector<S> z) __attribute__((always_inline)) {
        int64_t at = base + row * pixels + column;
        if (bias) z += broadcast<Vector<S>>(load(bias + row, 1)[0]);
        if (preactivation) store(preactivation + at, z, n);
        store(output + at, activate<kind>(z, parameter), n);
      });
    };
    gemm<T>(weight, Operand<T>{input + image * channels * pixels, 1, pixels, pixels}, channels, threads, finish);
  };
  if (!by_image) {
    for (int64_t image = 0; image < arguments.images; image++) one(image, arguments.threads);
    return;
  }
  int64_t work = arguments.images * out_channels * pixels * channels / 8;
  for_each_plane(arguments.images, work, arguments.threads, [=](int64_t image, int, int) { one(image, 1); });
}

template <class T>
static void conv_1x1_weight_gradient_of(const Conv1x1GradientArguments& arguments) {
  using S = Compute<T>;
  const T *grad_output = static_cast<const T*>(arguments.grad_output), *input = static_cast<const T*>(arguments.input);
  T* grad_weight = static_cast<T*>(arguments.grad_weight);
  int64_t channels = arguments.channels, out_channels = arguments.out_channels, pixels = arguments.pixels;
  int64_t size = out_channels * channels;
  // Each part of the images is summed on its own; the parts are added in order.
  int64_t parts = max(1, min(arguments.images, arguments.threads));
  S* sums = scratch<S, column_sums>(parts * size);
  parallel(parts, [&](int thread, int team) {
    for (int64_t part = thread; part < parts; part += team) {
      S* sum = sums + part * size;
      int64_t first = arguments.images * part / parts, last = arguments.images * (part + 1) / parts;
      for (int64_t image = first; image < last; image++) {
        auto add = [=](const Tile<S>& tile) {
          tile.for_each_vector([=](int64_t row, int64_t column, int64_t n, Vector<S> z) __attribute__((always_inline)) {
            S* to = sum + row * channels + column;
            store(to, image == first ? z : z + load(to, n), n);
          });
        };
        gemm<T>(Operand<T>{grad_output + image * out_channels * pixels, pixels, 1, out_channels},
                Operand<T>{input + image * channels * pixels, pixels, 1, channels}, pixels, 1, add);
      }
    }
    barrier(team);
    constexpr int width = lanes<S>;
    for_share(ceil_div(size, width), thread, team, [&](int64_t i) {
      int64_t at = i * width, n = size - at;
      Vector<S> sum = load(sums + at, n);
      for (int64_t part = 1; part < parts; part++) sum += load(sums + part * size + at, n);
      store(grad_weight + at, sum, n);
    });
  });
}

// ---- depthwise ----

// Rows of a plane, widened, between zeros, so that the taps of every output row are plain loads. A row's columns are
// stored in as many runs as the stride, one of every stride-th column: a vector of outputs loads neighbours.
template <class T>
struct PaddedRows {
  using S = Compute<T>;
  const DepthwiseArguments& a;
  int64_t run, row_size, rows;  // elements of a run and a row; rows that `band` outputs need
  int64_t band;                 // output rows at a time, so that their rows fit the first-level cache
  int64_t first, last;          // columns of the plane that lie within a padded row
  S *row_data, *widened;

  explicit PaddedRows(const DepthwiseArguments& arguments) : a(arguments) {
    constexpr int64_t band_bytes = 32 << 10;
    run = round_up(a.out_width, lanes<S>) + (a.kernel_width - 1) * a.dilation_w / a.stride_w;
    row_size = a.stride_w * run;
    int64_t reach = (a.kernel_height - 1) * a.dilation_h + 1;
    int64_t fitting = band_bytes / (row_size * static_cast<int64_t>(sizeof(S)));
    band = max(1, min(a.out_height, (fitting - reach) / a.stride_h + 1));
    rows = (band - 1) * a.stride_h + reach;
    first = a.padding_w < 0 ? ceil_div(-a.padding_w, a.upsample_w) : 0;
    last = min(a.width, ceil_div(row_size - a.padding_w, a.upsample_w));
    row_data = scratch<S, private_panels>(rows * row_size + a.width + 3 * lanes<S>);
    widened = row_data + rows * row_size;
  }

  // where tap (r, s) of the first output of a row lies, from that row's first
  int64_t tap(int64_t r, int64_t s) const {
    int64_t column = s * a.dilation_w;
    return r * a.dilation_h * row_size + column % a.stride_w * run + column / a.stride_w;
  }
  const S* at(int64_t output_row) const { return row_data + output_row * a.stride_h * row_size; }

  // the rows that outputs first_output .. need
  void fill(const T* plane, int64_t first_output) {
    __builtin_memset(row_data, 0, rows * row_size * sizeof(S));
    for (int64_t i = 0; i < rows; i++) {
      int64_t row = first_output * a.stride_h + i - a.padding_h;
      if (row < 0) continue;
      if (a.upsample_h > 1) {
        if (row % a.upsample_h) continue;
        row /= a.upsample_h;
      }
      if (row >= a.height) break;
      fill_row(row_data + i * row_size, plane + row * a.width);
    }
  }

 private:
  void fill_row(S* to, const T* from) {
    bool in_order = a.stride_w == 1 && a.upsample_w == 1;
    S* straight = in_order ? to + a.padding_w : widened;
    for (int64_t j = first; j < last; j += lanes<S>) store(straight + j, load(from + j, last - j), last - j);
    if (in_order) return;
    if (a.stride_w == 1) {
      for (int64_t j = first; j < last; j++) to[j * a.upsample_w + a.padding_w] = widened[j];
      return;
    }
    for (int64_t phase = 0; phase < a.stride_w; phase++) {
      int64_t j = first + (phase + a.stride_w - (first + a.padding_w) % a.stride_w) % a.stride_w;
      S* run_at = to + phase * run + (j + a.padding_w) / a.stride_w;
      int64_t count = min(to + (phase + 1) * run - run_at, ceil_div(last - j, a.stride_w));
      if (a.stride_w == 2)
        every_second(run_at, widened + j, count, std::make_integer_sequence<int, lanes<S>>());
      else
        for (int64_t i = 0; i < count; i++) run_at[i] = widened[j + i * a.stride_w];
    }
  }

  template <int... i>
  static void every_second(S* to, const S* from, int64_t count, std::integer_sequence<int, i...>) {
    for (int64_t at = 0; at < count; at += lanes<S>) {
      Vector<S> low = load(from + 2 * at), high = load(from + 2 * at + lanes<S>);
      store(to + at, __builtin_shufflevector(low, high, 2 * i...), count - at);
    }
  }
};

// where each tap of a row's first output lies in PaddedRows, for all threads
template <class T>
static int64_t* tap_offsets(const DepthwiseArguments& a) {
  PaddedRows<T> rows(a);
  int64_t taps = a.kernel_height * a.kernel_width;
  int64_t* offsets = scratch<int64_t, split_sums>(taps);
  for (int64_t t = 0; t < taps; t++) offsets[t] = rows.tap(t / a.kernel_width, t % a.kernel_width);
  return offsets;
}

template <class T, int kind>
static void depthwise_of(const DepthwiseArguments& arguments) {
  using S = Compute<T>;
  constexpr int width = lanes<S>;
  const DepthwiseArguments& a = arguments;
  const T *input = static_cast<const T*>(a.input), *weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  T *output = static_cast<T*>(a.output), *preactivation = static_cast<T*>(a.preactivation);
  S parameter = static_cast<S>(a.activation.parameter);
  int64_t taps = a.kernel_height * a.kernel_width, pixels = a.out_height * a.out_width;
  int64_t planes = a.images * a.channels;
  const int64_t* offsets = tap_offsets<T>(a);
  for_each_plane(planes, planes * pixels * taps / 8, a.threads, [=](int64_t plane, int, int) {
    PaddedRows<T> rows(arguments);
    int64_t channel = plane % a.channels;
    S* weights = scratch<S, chunk_sums>(taps);
    for (int64_t t = 0; t < taps; t++) weights[t] = load(weight + channel * taps + (a.flip ? taps - 1 - t : t), 1)[0];
    Vector<S> first = broadcast<Vector<S>>(bias ? load(bias + channel, 1)[0] : 0);
    int64_t row_step = a.stride_h * rows.row_size;
    // `count` rows at a time share the reads of weights; fixed_taps of them are known to the compiler
    auto some = [=](const S* from, int64_t at, auto count, auto fixed_taps) __attribute__((always_inline)) {
      for (int64_t column = 0; column < a.out_width; column += width) {
        Vector<S> sums[count];
        for (int i = 0; i < count; i++) sums[i] = first;
        auto add = [&](int64_t t) __attribute__((always_inline)) {
          Vector<S> w = broadcast<Vector<S>>(weights[t]);
          const S* values = from + offsets[t] + column;
          for (int i = 0; i < count; i++) sums[i] += w * load(values + i * row_step);
        };
        if constexpr (fixed_taps > 0)
          for (int t = 0; t < fixed_taps; t++) add(t);
        else
          for (int64_t t = 0; t < taps; t++) add(t);
        int64_t n = a.out_width - column;
        for (int i = 0; i < count; i++) {
          int64_t to = at + i * a.out_width + column;
          if (preactivation) store(preactivation + to, sums[i], n);
          store(output + to, activate<kind>(sums[i], parameter), n);
        }
      }
    };
    for (int64_t band = 0; band < a.out_height; band += rows.band) {
      rows.fill(input + plane * a.height * a.width, band);
      int64_t row = 0, end = min(rows.band, a.out_height - band), base = plane * pixels + band * a.out_width;
      for (; row + 4 <= end; row += 4)
        taps == 9 ? some(rows.at(row), base + row * a.out_width, Constant<4>(), Constant<9>())
                  : some(rows.at(row), base + row * a.out_width, Constant<4>(), Constant<0>());
      for (; row < end; row++) some(rows.at(row), base + row * a.out_width, Constant<1>(), Constant<0>());
    }
  });
}

template <class T>
static void depthwise_weight_gradient_of(const DepthwiseArguments& arguments) {
  using S = Compute<T>;
  constexpr int width = lanes<S>, together = 9;
  const DepthwiseArguments& a = arguments;
  const T *input = static_cast<const T*>(a.input), *grad_output = static_cast<const T*>(a.weight);
  T* grad_weight = static_cast<T*>(a.output);
  int64_t taps = a.kernel_height * a.kernel_width, pixels = a.out_height * a.out_width;
  int64_t planes = a.images * a.channels, work = planes * pixels * taps / 8;
  const int64_t* offsets = tap_offsets<T>(a);
  double* sums = scratch<double, column_sums>(planes * taps);  // of each plane
  for_each_plane(planes, work, a.threads, [=](int64_t plane, int, int) {
    PaddedRows<T> rows(arguments);
    double* sum = sums + plane * taps;
    for (int64_t t = 0; t < taps; t++) sum[t] = 0;
    for (int64_t band = 0; band < a.out_height; band += rows.band) {
      rows.fill(input + plane * a.height * a.width, band);
      int64_t band_rows = min(rows.band, a.out_height - band);
      const T* grad = grad_output + plane * pixels + band * a.out_width;
      auto some = [&](int64_t tap, auto count) __attribute__((always_inline)) {
        Vector<S> parts[count] = {};
        for (int64_t row = 0; row < band_rows; row++) {
          const S* from = rows.at(row);
          for (int64_t column = 0; column < a.out_width; column += width) {
            Vector<S> g = load(grad + row * a.out_width + column, a.out_width - column);
            for (int i = 0; i < count; i++) parts[i] += g * load(from + offsets[tap + i] + column);
          }
        }
        for (int i = 0; i < count; i++) sum[tap + i] += sum_of_lanes(parts[i]);
      };
      int64_t tap = 0;
      for (; tap + together <= taps; tap += together) some(tap, Constant<together>());
      for (; tap < taps; tap++) some(tap, Constant<1>());
    }
  });
  for_each_plane(a.channels, planes * taps, a.threads, [=](int64_t channel, int, int) {
    for (int64_t t = 0; t < taps; t++) {
      double sum = 0;
      for (int64_t image = 0; image < a.images; image++) sum += sums[(image * a.channels + channel) * taps + t];
      store(grad_weight + channel * taps + t, broadcast<Vector<S>>(static_cast<S>(sum)), 1);
    }
  });
}

// ---- the gradient of activation and bias ----

template <class T, int kind>
static void channel_gradient_of(const ChannelGradientArguments& arguments) {
  using S = Compute<T>;
  constexpr int width = lanes<S>;
  const T *grad_output = static_cast<const T*>(arguments.grad_output), *saved = static_cast<const T*>(arguments.saved);
  T *grad_input = static_cast<T*>(arguments.grad_input), *grad_bias = static_cast<T*>(arguments.grad_bias);
  int64_t channels = arguments.channels, images = arguments.images, pixels = arguments.pixels;
  int64_t planes = images * channels;
  S parameter = static_cast<S>(arguments.activation.parameter);
  double* sums = grad_bias ? scratch<double, column_sums>(planes) : nullptr;  // of each plane
  for_each_plane(planes, planes * pixels, arguments.threads, [=](int64_t plane, int, int) {
    constexpr int64_t run = 64 * width;  // elements summed before they join the total
    double total = 0;
    for (int64_t begin = 0; begin < pixels; begin += run) {
      Vector<S> sum = {};
      int64_t end = min(pixels, begin + run);
      for (int64_t i = begin; i < end; i += width) {
        int64_t at = plane * pixels + i, n = end - i;
        Vector<S> g = load(grad_output + at, n);
        if constexpr (kind != fastdl::none) g = gradient<kind>(g, load(saved + at, n), parameter);
        if (grad_input) store(grad_input + at, g, n);
        sum += g;
      }
      total += sum_of_lanes(sum);
    }
    if (sums) sums[plane] = total;
  });
  if (!sums) return;
  for (int64_t channel = 0; channel < channels; channel++) {
    double sum = 0;
    for (int64_t image = 0; image < images; image++) sum += sums[image * channels + channel];
    store(grad_bias + channel, broadcast<Vector<S>>(static_cast<S>(sum)), 1);
  }
}

void conv_1x1(const Conv1x1Arguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) {
    with_kind(arguments.activation.kind,
              [&](auto kind) { conv_1x1_of<typename decltype(type)::type, decltype(kind)::value>(arguments); });
  });
}

void conv_1x1_weight_gradient(const Conv1x1GradientArguments& arguments) {
  with_dtype(arguments.dtype,
             [&](auto type) { conv_1x1_weight_gradient_of<typename decltype(type)::type>(arguments); });
}

void depthwise(const DepthwiseArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) {
    with_kind(arguments.activation.kind,
              [&](auto kind) { depthwise_of<typename decltype(type)::type, decltype(kind)::value>(arguments); });
  });
}

void depthwise_weight_gradient(const DepthwiseArguments& arguments) {
  with_dtype(arguments.dtype,
             [&](auto type) { depthwise_weight_gradient_of<typename decltype(type)::type>(arguments); });
}

void channel_gradient(const ChannelGradientArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) {
    with_kind(arguments.activation.kind,
              [&](auto kind) { channel_gradient_of<typename decltype(type)::type, decltype(kind)::value>(arguments); });
  });
}

}  // namespace fastdl::ISA
