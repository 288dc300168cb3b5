// Batch normalisation of arrays [outer, channels, inner]: NCHW, and channels_last with inner 1.
//
// Training is three passes over memory forward (the input for its statistics, and again; the output) and five backward;
// two and three where a block can keep its channels in registers. Statistics are of x - shift, shift being the
// channel's first element, by chunks that are merged (Chan, Golub and LeVeque, 1979): the mean is rounded only once.
#include "batch_norm.h"
#include "epilogue.cuh"
#include "kernels.h"

namespace fastdl::cuda {
namespace {

constexpr int kThreads = kBatchNormThreads, kWholeThreads = kBatchNormWholeThreads;

// Vectors that a thread loads before it computes, for so many operands: 64 bytes are in flight, of elements 16.
// One where a function is called, as few registers outlive calls.
template <int width, int operands, bool smooth = false>
constexpr int kUnroll = smooth ? 1 : (width > 1 ? 4 : 8) / operands;

template <int width>
constexpr int kKept = batch_norm_kept(width);

// Blocks of kThreads that a multiprocessor holds at once. Lanes and float64 take registers.
template <class T, int lanes, bool smooth = false>
constexpr int kBlocks = lanes == 1 && !smooth && sizeof(T) < 8 ? 4 : 2;

// ---- Going over the array -------------------------------------------------------------------------------------------

// Quotients by a constant, for dividends below 2^31 (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t divisor, multiplier, shift;

  explicit Divider(uint32_t divisor) : divisor(divisor), multiplier(0), shift(0) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    multiplier = uint32_t((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t dividend) const {
    return (uint32_t((uint64_t(dividend) * multiplier) >> 32) + dividend) >> shift;
  }
};

// What kernels know of the plan.
struct View {
  int64_t columns, column_stride, row_stride, spread, items;
  int64_t channel_stride, middle, last;  // elements from a channel's first one to the next channel's, and to two others
  Divider row_items;

  // The offset of a column's item.
  template <int width>
  __device__ __forceinline__ int64_t offset(int64_t column, int64_t item) const {
    const uint32_t row = row_items.quotient(uint32_t(item));
    const uint32_t within = uint32_t(item) - row * row_items.divisor;
    return column * column_stride + row * row_stride + int64_t(within) * width;
  }
  template <int lanes>
  __device__ __forceinline__ int64_t channel(int64_t column, int lane) const {
    const int64_t position = column * lanes + lane;
    return spread == 1 ? position : position / spread;
  }
};

// Where a thread is: its column, and its items: `first`, first + rows, ... below `end`.
struct Place {
  int64_t column, first, end;
  int rows;
  bool inside;  // whether there is such a column

  // reversed: the last blocks first, for what was read last is in the cache still.
  __device__ __forceinline__ Place(const View& view, int64_t part, bool reversed) : rows(blockDim.y) {
    const int64_t block = reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int64_t start = (reversed ? gridDim.y - 1 - blockIdx.y : blockIdx.y) * part;
    column = block * blockDim.x + threadIdx.x;
    inside = column < view.columns;
    first = start + threadIdx.y;
    end = inside ? min(view.items, start + part) : 0;
  }
};

// A vector in the registers that it fills: bfloat16 would come apart into one for each element.
template <class T, int width>
struct Packed {
  struct Words {
    uint32_t word[4];
  };
  static constexpr bool is_packed = std::is_same_v<T, bfloat16> && width == 8;
  std::conditional_t<is_packed, Words, Vector<T, width>> data;

  __device__ __forceinline__ void load(const T* address) {
    if constexpr (is_packed) {
      data = __builtin_bit_cast(Words, *reinterpret_cast<const uint4*>(address));
    } else {
      data = cuda::load<width>(address);
    }
  }
  __device__ __forceinline__ Compute<T> operator[](int i) const {
    if constexpr (is_packed) {
      const uint32_t word = data.word[i / 2];
      return __builtin_bit_cast(float, i % 2 ? word & 0xffff0000u : word << 16);
    } else {
      return widen(data.element[i]);
    }
  }
};

// Loads items `from`, from + rows, ... and says how many there are.
template <class T, int width, int unroll>
__device__ __forceinline__ int load_items(Packed<T, width> (&x)[unroll], const T* array, const View& view,
                                          const Place& place, int64_t from) {
  int count = 0;
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int64_t item = from + u * place.rows;
    if (item < place.end) {
      x[u].load(array + view.offset<width>(place.column, item));
      count = u + 1;
    }
  }
  return count;
}

// ---- Reductions -----------------------------------------------------------------------------------------------------

// Mean and sum of squared differences from it, of so many values.
template <class C>
struct Moments {
  C mean, squares, count;

  __device__ __forceinline__ void merge(const Moments& other) {
    const C total = count + other.count;
    if (total == 0) return;
    const C share = other.count / total, delta = other.mean - mean;
    mean = mean * (count / total) + other.mean * share;  // not by delta: infinity stays what it is
    squares += other.squares + delta * delta * (count * share);
    count = total;
  }
  __device__ __forceinline__ Moments shuffled(int offset) const {
    return {__shfl_xor_sync(0xffffffffu, mean, offset), __shfl_xor_sync(0xffffffffu, squares, offset),
            __shfl_xor_sync(0xffffffffu, count, offset)};
  }
};

// Sums of dz and of dz * (x - mean).
template <class C>
struct Sums {
  C gradient, product;

  __device__ __forceinline__ void merge(const Sums& other) {
    gradient += other.gradient;
    product += other.product;
  }
  __device__ __forceinline__ Sums shuffled(int offset) const {
    return {__shfl_xor_sync(0xffffffffu, gradient, offset), __shfl_xor_sync(0xffffffffu, product, offset)};
  }
};

// Merges what the block's threads of one column have; each gets the result. Called by all of `threads`.
template <int threads, class Value, int lanes>
__device__ __forceinline__ void merge_block(Value (&value)[lanes]) {
  FDL_SHARED(Value, shared, [lanes][threads]);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    for (int offset = 16; offset >= int(blockDim.x); offset /= 2) value[i].merge(value[i].shuffled(offset));
    shared[i][thread] = value[i];
  }
  for (int half = threads / 2; half >= 32; half /= 2) {
    __syncthreads();
    if (thread < half) {
#pragma unroll
      for (int i = 0; i < lanes; ++i) {
        value[i].merge(shared[i][thread + half]);
        shared[i][thread] = value[i];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < lanes; ++i) value[i] = shared[i][threadIdx.x];
}

// A block's results: [parts, 2, columns * lanes].
template <class C, int lanes>
__device__ __forceinline__ C* partial_of(C* partial, const View& view, int64_t part, int64_t column) {
  return partial + part * 2 * view.columns * lanes + column * lanes;
}

// Merges a channel's partial results by one block of columns 1 wide; each thread gets the result. make(first, second,
// part) gives the value of a partial result.
template <class Value, class C, class Make>
__device__ __forceinline__ Value merge_partial(const C* partial, int64_t parts, int64_t width, int64_t spread,
                                               int64_t channel, const Make& make) {
  Value value[1] = {};
#pragma unroll 1  // it is mostly one step, and the kernels around it have no registers for more
  for (int64_t i = threadIdx.y; i < parts * spread; i += kThreads) {
    const int64_t part = spread == 1 ? i : i / spread;
    const C* from = partial + part * 2 * width + channel * spread + (i - part * spread);
    value[0].merge(make(from[0], from[width], part));
  }
  merge_block<kThreads>(value);
  return value[0];
}

// ---- Activations ----------------------------------------------------------------------------------------------------

constexpr bool is_smooth(int kind) { return kind > int(Activation::leaky_relu); }

// As with_activation, for the others.
template <class Function>
__device__ __forceinline__ void with_line(Activation kind, const Function& function) {
  if (kind == Activation::none) {
    function.template operator()<Activation::none>();
  } else if (kind == Activation::relu) {
    function.template operator()<Activation::relu>();
  } else {
    function.template operator()<Activation::leaky_relu>();
  }
}

// Whether the gradient is made of the output; where the sign of the argument serves as well, of the argument.
template <Activation kind>
constexpr bool kFromOutput = kind == Activation::elu || kind == Activation::sigmoid || kind == Activation::tanh;

// gradient * activation'(z), from the output if saved is that, else from z. Not inlined, see activate_values.
template <class T, int count>
[[gnu::noinline]] __device__ Values<Compute<T>, count> smooth_gradient(Values<Compute<T>, count> gradient,
                                                                       Values<Compute<T>, count> saved, bool is_output,
                                                                       Activation kind, Compute<T> parameter) {
  with_activation(kind, [&]<Activation activation>() {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      Compute<T>& value = saved.element[i];
      if (kFromOutput<activation> && !is_output) value = activate<activation, T>(value, parameter);
      gradient.element[i] = activate_backward<activation, T>(gradient.element[i], value, parameter);
    }
  });
  return gradient;
}

// Rounds and stores by one instruction; a plain store would go into the branches before it, and come apart there.
template <class T, int width>
__device__ __forceinline__ void put(T* address, const Compute<T> (&values)[width]) {
  if constexpr (width * sizeof(T) == 16) {
    __stcg(reinterpret_cast<uint4*>(address), __builtin_bit_cast(uint4, round_to<T>(values)));
  } else {
    store(address, values);
  }
}

// ---- Normalising ----------------------------------------------------------------------------------------------------

// What forward and backward have in common; a kernel's argument.
template <class T>
struct Layer {
  using C = Compute<T>;
  View view;
  const T* input;
  const C* weight;  // [channels] or null: 1
  const C* bias;    // [channels] or null: 0
  C parameter;
  Activation kind;
};

// Of one channel: z = (x - mean) * scale + shift, the same to the last bit in forward and backward.
template <class C>
struct Affine {
  C mean, scale, shift;

  template <class T>
  __device__ __forceinline__ Affine(const Layer<T>& layer, int64_t channel, C mean, C rstd)
      : mean(mean),
        scale(layer.weight ? rstd * layer.weight[channel] : rstd),
        shift(layer.bias ? layer.bias[channel] : C(0)) {}
  Affine() = default;
  __device__ __forceinline__ C operator()(C x) const { return std::fma(x - mean, scale, shift); }
};

// The statistics of the channels: results of training, given for inference.
template <class C>
struct Statistics {
  C* mean;      // [channels]
  C* rstd;      // [channels], 1 / sqrt(variance + eps); null: it is made of the variance
  C* variance;  // [channels], in training the unbiased one, or null
  C eps;
};

template <class C>
__device__ __forceinline__ C inverse_deviation(C variance, C eps) {
  return 1 / std::sqrt(variance + eps);
}

// Stores what a channel's moments, of values without their shift, give; and adds the shift to the mean.
template <class C>
__device__ __forceinline__ C finish(Moments<C>& moments, C shift, const Statistics<C>& statistics, int64_t channel,
                                    bool stores) {
  moments.mean += shift;
  const C rstd = inverse_deviation(moments.squares / moments.count, statistics.eps);
  if (stores) {
    statistics.mean[channel] = moments.mean;
    statistics.rstd[channel] = rstd;
    statistics.variance[channel] = moments.squares / (moments.count - 1);
  }
  return rstd;
}

// What is subtracted from a channel's values: the middle of three of them, which no outlier is.
template <class T>
__device__ __forceinline__ Compute<T> shift_of(const T* input, int64_t channel, const View& view) {
  const T* values = input + channel * view.channel_stride;
  const Compute<T> a = widen(values[0]), b = widen(values[view.middle]), c = widen(values[view.last]);
  const Compute<T> median = std::fmax(std::fmin(a, b), std::fmin(std::fmax(a, b), c));
  return median - median == 0 ? median : Compute<T>(0);  // infinity would hide where it is
}

// Adds a chunk of vectors: exact differences from its own mean, in registers.
template <class T, int width, int lanes, int unroll>
__device__ __forceinline__ void add_chunk(Moments<Compute<T>> (&moments)[lanes], const Packed<T, width> (&x)[unroll],
                                          int count, const Compute<T> (&shift)[lanes]) {
  using C = Compute<T>;
  const C number = C(count * (width / lanes)), reciprocal = count ? 1 / number : C(0);
  C mean[lanes] = {}, squares[lanes] = {};
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    if (u < count) {
#pragma unroll
      for (int i = 0; i < width; ++i) mean[i % lanes] += x[u][i] - shift[i % lanes];
    }
  }
#pragma unroll
  for (int i = 0; i < lanes; ++i) mean[i] *= reciprocal;
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    if (u < count) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const C difference = (x[u][i] - shift[i % lanes]) - mean[i % lanes];
        squares[i % lanes] += difference * difference;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < lanes; ++i) moments[i].merge({mean[i], squares[i], number});
}

template <class T, int width, int lanes>
__device__ __forceinline__ void load_shifts(Compute<T> (&shift)[lanes], const T* input, const View& view,
                                            const Place& place) {
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    const int64_t channel = place.inside ? view.channel<lanes>(place.column, i) : 0;
    shift[i] = shift_of(input, channel, view);
  }
}

// z = affine(x) + residual, rounded to y = activation(z) in the output.
template <bool smooth, class T, int width, int lanes>
__device__ __forceinline__ void normalise(const Layer<T>& layer, const Affine<Compute<T>> (&affine)[lanes],
                                          const Packed<T, width>& x, const Packed<T, width>& residual,
                                          bool has_residual, T* output) {
  Values<Compute<T>, width> z;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    z.element[i] = affine[i % lanes](x[i]);
    if (has_residual) z.element[i] += residual[i];
  }
  if constexpr (smooth) {
    z = activate_values<T, width>(z, layer.kind, layer.parameter);
  } else {
    with_line(layer.kind, [&]<Activation kind>() {
#pragma unroll
      for (int i = 0; i < width; ++i) z.element[i] = activate<kind, T>(z.element[i], layer.parameter);
    });
  }
  put(output, z.element);
}

// ---- Forward kernels ------------------------------------------------------------------------------------------------

// The moments of a part of each column.
template <class T, int width, int lanes>
__global__ void __launch_bounds__(kThreads, kBlocks<T, lanes>)
    statistics_kernel(View view, const T* input,
                      Compute<T>* partial,  // [parts, 2, columns * lanes]: means without shift, sums of squares
                      int64_t part) {
  using C = Compute<T>;
  const Place place(view, part, false);
  Moments<C> moments[lanes] = {};
  C shift[lanes];
  load_shifts<T, width>(shift, input, view, place);
  Packed<T, width> x[kUnroll<width, 1>];
  for (int64_t from = place.first; from < place.end; from += place.rows * kUnroll<width, 1>) {
    const int count = load_items(x, input, view, place, from);
    add_chunk(moments, x, count, shift);
  }
  merge_block<kThreads>(moments);
  if (threadIdx.y > 0 || !place.inside) return;
  C* target = partial_of<C, lanes>(partial, view, blockIdx.y, place.column);
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    target[i] = moments[i].mean;
    target[view.columns * lanes + i] = moments[i].squares;
  }
}

// A channel's moments from their parts, by one block of columns 1 wide.
template <class C>
__device__ __forceinline__ Moments<C> merge_moments(const C* partial, const View& view, int lanes, int64_t parts,
                                                    int64_t part, int elements, int64_t channel) {
  return merge_partial<Moments<C>>(
      partial, parts, view.columns * lanes, view.spread, channel, [&](C mean, C squares, int64_t index) {
        return Moments<C>{mean, squares, C(min(part, view.items - index * part) * elements)};
      });
}

// The statistics of channel blockIdx.x; for the synchronised layer (rstd null) mean and sum of squares.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_statistics_kernel(View view, int lanes, const T* input, const Compute<T>* partial, int64_t parts,
                             int64_t part, int elements, Statistics<Compute<T>> statistics, Compute<T>* squares) {
  const int64_t channel = blockIdx.x;
  auto moments = merge_moments(partial, view, lanes, parts, part, elements, channel);
  const bool stores = threadIdx.y == 0;
  const Compute<T> shift = shift_of(input, channel, view);
  if (!squares) {
    finish(moments, shift, statistics, channel, stores);
  } else if (stores) {
    statistics.mean[channel] = moments.mean + shift;
    squares[channel] = moments.squares;
  }
}

// The output, from the statistics or, in planes, from the parts of each channel's moments.
template <class T, int width, int lanes, bool smooth>
__global__ void __launch_bounds__(kThreads, kBlocks<T, lanes, smooth>)
    normalise_kernel(Layer<T> layer, const T* residual, T* output, Statistics<Compute<T>> statistics,
                     const Compute<T>* partial, int64_t partial_parts, int64_t partial_part, int64_t part) {
  using C = Compute<T>;
  constexpr int unroll = kUnroll<width, 2, smooth>;
  const View& view = layer.view;
  const Place place(view, part, true);
  Affine<C> affine[lanes];
  if (lanes == 1 && partial) {
    auto moments = merge_moments(partial, view, 1, partial_parts, partial_part, width, place.column);
    const C shift = shift_of(layer.input, place.column, view);
    const C rstd = finish(moments, shift, statistics, place.column, place.first == 0);
    affine[0] = Affine<C>(layer, place.column, moments.mean, rstd);
  } else {
    if (!place.inside) return;
#pragma unroll
    for (int i = 0; i < lanes; ++i) {
      const int64_t channel = view.channel<lanes>(place.column, i);
      const C rstd =
          statistics.rstd ? statistics.rstd[channel] : inverse_deviation(statistics.variance[channel], statistics.eps);
      affine[i] = Affine<C>(layer, channel, statistics.mean[channel], rstd);
    }
  }
  for (int64_t from = place.first; from < place.end; from += place.rows * unroll) {
    Packed<T, width> x[unroll], r[unroll];
    const int count = load_items(x, layer.input, view, place, from);
    if (residual) load_items(r, residual, view, place, from);
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (u < count) {
        T* target = output + view.offset<width>(place.column, from + u * place.rows);
        normalise<smooth>(layer, affine, x[u], r[u], residual, target);
      }
    }
  }
}

// All of the forward, by blocks that keep their columns.
template <class T, int width, int lanes>
__global__ void __launch_bounds__(kWholeThreads, 1)
    whole_kernel(Layer<T> layer, const T* residual, T* output, Statistics<Compute<T>> statistics) {
  using C = Compute<T>;
  constexpr int kept = kKept<width>;
  const View& view = layer.view;
  const Place place(view, view.items, false);
  Moments<C> moments[lanes] = {};
  C shift[lanes];
  load_shifts<T, width>(shift, layer.input, view, place);
  Packed<T, width> x[kept];
  const int count = load_items(x, layer.input, view, place, place.first);
  add_chunk(moments, x, count, shift);
  merge_block<kWholeThreads>(moments);
  if (!place.inside) return;
  Affine<C> affine[lanes];
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    const int64_t channel = view.channel<lanes>(place.column, i);
    const C rstd = finish(moments[i], shift[i], statistics, channel, threadIdx.y == 0);
    affine[i] = Affine<C>(layer, channel, moments[i].mean, rstd);
  }
#pragma unroll
  for (int u = 0; u < kept; ++u) {
    if (u < count) {
      const int64_t offset = view.offset<width>(place.column, place.first + u * place.rows);
      Packed<T, width> r;
      if (residual) r.load(residual + offset);
      normalise<false>(layer, affine, x[u], r, residual, output + offset);
    }
  }
}

// ---- Backward kernels -----------------------------------------------------------------------------------------------

// What the backward reads besides.
template <class T>
struct Gradient {
  const T* grad_output;
  const T* saved;  // the residual or the output, or null
  bool is_output;
  const Compute<T>* mean;  // [channels]
  const Compute<T>* rstd;  // [channels]
};

// dz = grad_output * activation'(z), z made again of input and residual if it is not told by the output.
template <bool smooth, class T, int width, int lanes>
__device__ __forceinline__ void preactivation_gradient(Compute<T> (&dz)[width], const Layer<T>& layer,
                                                       const Affine<Compute<T>> (&affine)[lanes],
                                                       const Packed<T, width>& grad_output, const Packed<T, width>& x,
                                                       const Packed<T, width>& saved, bool has_saved, bool is_output) {
  using C = Compute<T>;
#pragma unroll
  for (int i = 0; i < width; ++i) dz[i] = grad_output[i];
  if (layer.kind == Activation::none) return;
  Values<C, width> z;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const C own = affine[i % lanes](x[i]);
    z.element[i] = has_saved ? saved[i] + (is_output ? C(0) : own) : own;
  }
  if constexpr (smooth) {
    Values<C, width> gradient;
#pragma unroll
    for (int i = 0; i < width; ++i) gradient.element[i] = dz[i];
    gradient = smooth_gradient<T, width>(gradient, z, is_output, layer.kind, layer.parameter);
#pragma unroll
    for (int i = 0; i < width; ++i) dz[i] = gradient.element[i];
  } else {
    with_line(layer.kind, [&]<Activation kind>() {
#pragma unroll
      for (int i = 0; i < width; ++i) dz[i] = activate_backward<kind, T>(dz[i], z.element[i], layer.parameter);
    });
  }
}

template <class T, int lanes>
__device__ __forceinline__ void load_affine(Affine<Compute<T>> (&affine)[lanes], const Layer<T>& layer,
                                            const Gradient<T>& gradient, const Place& place) {
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    const int64_t channel = place.inside ? layer.view.template channel<lanes>(place.column, i) : 0;
    affine[i] = Affine<Compute<T>>(layer, channel, gradient.mean[channel], gradient.rstd[channel]);
  }
}

// The sums of a part of each column, and what needs no sums.
template <class T, int width, int lanes, bool smooth>
__global__ void __launch_bounds__(kThreads, kBlocks<T, lanes, smooth>)
    sums_kernel(Layer<T> layer, Gradient<T> gradient,
                T* grad_residual,     // dz, or null
                T* grad_input,        // of constant statistics, or null
                Compute<T>* partial,  // [parts, 2, columns * lanes], or null
                int64_t part) {
  using C = Compute<T>;
  constexpr int unroll = kUnroll<width, 2, smooth>;
  const View& view = layer.view;
  const Place place(view, part, false);
  Affine<C> affine[lanes];
  load_affine(affine, layer, gradient, place);
  Sums<C> sums[lanes] = {};
  for (int64_t from = place.first; from < place.end; from += place.rows * unroll) {
    Packed<T, width> g[unroll], x[unroll], s[unroll];
    const int count = load_items(g, gradient.grad_output, view, place, from);
    load_items(x, layer.input, view, place, from);
    if (gradient.saved) load_items(s, gradient.saved, view, place, from);
    Sums<C> step[lanes] = {};  // the vectors of one step are summed first: fewer roundings in the long sum
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (u < count) {
        C dz[width];
        preactivation_gradient<smooth>(dz, layer, affine, g[u], x[u], s[u], gradient.saved, gradient.is_output);
#pragma unroll
        for (int i = 0; i < width; ++i) {
          step[i % lanes].merge({dz[i], dz[i] * (x[u][i] - affine[i % lanes].mean)});
        }
        const int64_t offset = view.offset<width>(place.column, from + u * place.rows);
        if (grad_residual) put(grad_residual + offset, dz);
        if (grad_input) {
#pragma unroll
          for (int i = 0; i < width; ++i) dz[i] *= affine[i % lanes].scale;
          put(grad_input + offset, dz);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < lanes; ++i) sums[i].merge(step[i]);
  }
  if (!partial) return;
  merge_block<kThreads>(sums);
  if (threadIdx.y > 0 || !place.inside) return;
  C* target = partial_of<C, lanes>(partial, view, blockIdx.y, place.column);
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    target[i] = sums[i].gradient;
    target[view.columns * lanes + i] = sums[i].product;
  }
}

// The results for each channel; each null or [channels].
template <class C>
struct Totals {
  C* grad_weight;
  C* grad_bias;
  C* mean_gradient;  // the means over the channel of dz, and of dz times the normalised input
  C* mean_product;
  C count;  // elements of a channel

  __device__ __forceinline__ void put(C gradient, C product, int64_t channel) const {
    if (grad_weight) grad_weight[channel] = product;
    if (grad_bias) grad_bias[channel] = gradient;
    if (mean_gradient) mean_gradient[channel] = gradient / count;
    if (mean_product) mean_product[channel] = product / count;
  }
};

template <class C>
__device__ __forceinline__ Sums<C> merge_sums(const C* partial, int64_t width, int64_t spread, int64_t parts,
                                              int64_t channel) {
  return merge_partial<Sums<C>>(partial, parts, width, spread, channel,
                                [](C gradient, C product, int64_t) { return Sums<C>{gradient, product}; });
}

// The totals of channel blockIdx.x.
template <class C>
__global__ void __launch_bounds__(kThreads) finish_sums_kernel(int64_t width, int64_t spread, const C* partial,
                                                               int64_t parts, const C* rstd, Totals<C> totals) {
  const int64_t channel = blockIdx.x;
  const Sums<C> sums = merge_sums(partial, width, spread, parts, channel);
  if (threadIdx.y == 0) totals.put(sums.gradient, sums.product * rstd[channel], channel);
}

// grad_input = scale * (dz - mean gradient - normalised input * mean product), as dz * scale + (x - mean) * slope +
// constant.
template <class C>
struct Slope {
  C slope, constant;

  Slope() = default;
  __device__ __forceinline__ Slope(C scale, C rstd, C mean_gradient, C mean_product)
      : slope(-scale * rstd * mean_product), constant(-scale * mean_gradient) {}
};

template <class T, int width, int lanes>
__device__ __forceinline__ void input_gradient(T* target, Compute<T> (&dz)[width], const Packed<T, width>& x,
                                               const Affine<Compute<T>> (&affine)[lanes],
                                               const Slope<Compute<T>> (&slope)[lanes]) {
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int lane = i % lanes;
    const Compute<T> centred = x[i] - affine[lane].mean;
    dz[i] = std::fma(dz[i], affine[lane].scale, std::fma(centred, slope[lane].slope, slope[lane].constant));
  }
  put(target, dz);
}

// The gradient of the input from the totals or, in planes, from the parts of each channel's sums.
template <class T, int width, int lanes, bool smooth>
__global__ void __launch_bounds__(kThreads, kBlocks<T, lanes, smooth>)
    input_gradient_kernel(Layer<T> layer, Gradient<T> gradient, Totals<Compute<T>> totals, T* grad_input,
                          const Compute<T>* partial, int64_t partial_parts, int64_t part) {
  using C = Compute<T>;
  constexpr int unroll = kUnroll<width, 2, smooth>;
  const View& view = layer.view;
  const Place place(view, part, true);
  Affine<C> affine[lanes];
  load_affine(affine, layer, gradient, place);
  Slope<C> slope[lanes];
  if (lanes == 1 && partial) {
    const C rstd = gradient.rstd[place.column];
    const Sums<C> sums = merge_sums(partial, view.columns, 1, partial_parts, place.column);
    const C product = sums.product * rstd;
    if (place.first == 0) totals.put(sums.gradient, product, place.column);
    slope[0] = Slope<C>(affine[0].scale, rstd, sums.gradient / totals.count, product / totals.count);
  } else {
    if (!place.inside) return;
#pragma unroll
    for (int i = 0; i < lanes; ++i) {
      const int64_t channel = view.channel<lanes>(place.column, i);
      slope[i] = Slope<C>(affine[i].scale, gradient.rstd[channel], totals.mean_gradient[channel],
                          totals.mean_product[channel]);
    }
  }
  for (int64_t from = place.first; from < place.end; from += place.rows * unroll) {
    Packed<T, width> g[unroll], x[unroll], s[unroll];
    const int count = load_items(g, gradient.grad_output, view, place, from);
    load_items(x, layer.input, view, place, from);
    if (gradient.saved) load_items(s, gradient.saved, view, place, from);
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (u < count) {
        C dz[width];
        preactivation_gradient<smooth>(dz, layer, affine, g[u], x[u], s[u], gradient.saved, gradient.is_output);
        T* target = grad_input + view.offset<width>(place.column, from + u * place.rows);
        input_gradient(target, dz, x[u], affine, slope);
      }
    }
  }
}

// All of the backward, by blocks that keep their columns: of the gradient, dz rounded to T.
template <class T, int width, int lanes>
__global__ void __launch_bounds__(kWholeThreads, 1)
    whole_backward_kernel(Layer<T> layer, Gradient<T> gradient, Totals<Compute<T>> totals, T* grad_residual,
                          T* grad_input) {
  using C = Compute<T>;
  constexpr int kept = kKept<width> / 2;
  const View& view = layer.view;
  const Place place(view, view.items, false);
  Affine<C> affine[lanes];
  load_affine(affine, layer, gradient, place);
  Sums<C> sums[lanes] = {};
  Packed<T, width> g[kept], x[kept];
  const int count = load_items(g, gradient.grad_output, view, place, place.first);
  load_items(x, layer.input, view, place, place.first);
  auto dz_of = [&](int u, int64_t offset, C(&dz)[width]) {
    Packed<T, width> s;
    if (gradient.saved) s.load(gradient.saved + offset);
    preactivation_gradient<false>(dz, layer, affine, g[u], x[u], s, gradient.saved, gradient.is_output);
  };
#pragma unroll
  for (int u = 0; u < kept; ++u) {
    if (u < count) {
      const int64_t offset = view.offset<width>(place.column, place.first + u * place.rows);
      C dz[width];
      dz_of(u, offset, dz);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sums[i % lanes].merge({dz[i], dz[i] * (x[u][i] - affine[i % lanes].mean)});
      }
      if (grad_residual) put(grad_residual + offset, dz);
    }
  }
  merge_block<kWholeThreads>(sums);
  if (!place.inside) return;
  Slope<C> slope[lanes];
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    const int64_t channel = view.channel<lanes>(place.column, i);
    const C rstd = gradient.rstd[channel], product = sums[i].product * rstd;
    if (threadIdx.y == 0) totals.put(sums[i].gradient, product, channel);
    slope[i] = Slope<C>(affine[i].scale, rstd, sums[i].gradient / totals.count, product / totals.count);
  }
#pragma unroll
  for (int u = 0; u < kept; ++u) {
    if (u < count) {
      const int64_t offset = view.offset<width>(place.column, place.first + u * place.rows);
      C dz[width];
      dz_of(u, offset, dz);
      input_gradient(grad_input + offset, dz, x[u], affine, slope);
    }
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

// Enough blocks that the last wave does not count, on any GPU.
constexpr int64_t kReductionBlocks = std::min<int64_t>(kMaximumBlocks, 4096);

int full_width(size_t element_bytes, bool is_aligned) {
  return is_aligned && element_bytes < 8 ? int(16 / element_bytes) : 1;
}

View view_of(const char* name, const BatchNormPlan& plan, int64_t outer, int64_t channels, int64_t inner) {
  require(plan.items < (int64_t(1) << 31), name, "vectors of a channel", plan.items, "less than 2^31");
  const int64_t row_stride = channels * inner;
  return {plan.columns,
          plan.column_stride,
          row_stride,
          plan.spread,
          plan.items,
          inner,
          outer / 2 * row_stride + inner / 2,
          (outer - 1) * row_stride + inner - 1,
          Divider(uint32_t(plan.row_items))};
}

dim3 block_of(const BatchNormPlan& plan, int threads) {
  return dim3(unsigned(plan.block_columns), unsigned(threads / plan.block_columns));
}

// Each thread of a reduction takes at least 128 bytes, and of the passes after it 64: these have less to end with.
Partition reduction_of(const BatchNormPlan& plan) {
  const int64_t rows = kThreads / plan.block_columns;
  return partition(plan.column_blocks(), plan.items, rows * batch_norm_kept(plan.width), kReductionBlocks);
}
Partition pass_of(const BatchNormPlan& plan) {
  const int64_t rows = kThreads / plan.block_columns;
  return partition(plan.column_blocks(), plan.items, rows * batch_norm_kept(plan.width) / 2, kMaximumBlocks);
}

Shape shape_of(const BatchNormPlan& plan, const Partition& partition, cudaStream_t stream) {
  return Shape(dim3(unsigned(plan.column_blocks()), unsigned(partition.parts)), block_of(plan, kThreads), 0, stream);
}
Shape whole_shape_of(const BatchNormPlan& plan, cudaStream_t stream) {
  return Shape(dim3(unsigned(plan.column_blocks())), block_of(plan, kWholeThreads), 0, stream);
}
Shape channel_shape_of(int64_t channels, cudaStream_t stream) {
  return Shape(dim3(unsigned(channels)), dim3(1, kThreads), 0, stream);
}

// Whether a block of the pass after a reduction may merge the partial results itself: it has one channel.
bool merges_itself(const BatchNormPlan& plan) { return plan.block_columns == 1 && plan.lanes == 1; }

// Calls function<width, lanes>() as planned.
template <class T, class Function>
void dispatch_vectors(const BatchNormPlan& plan, const Function& function) {
  constexpr int full = kFullVector<T>;
  if (plan.width == 1) return function.template operator()<1, 1>();
  if (plan.lanes == 1) return function.template operator()<full, 1>();
  function.template operator()<full, full>();
}

template <class Function>
void dispatch_smooth(int kind, const Function& function) {
  is_smooth(kind) ? function.template operator()<true>() : function.template operator()<false>();
}

void require_array(const char* name, int64_t outer, int64_t channels, int64_t inner, int kind) {
  require(outer > 0, name, "outer", outer, "at least 1");
  require(channels > 0, name, "channels", channels, "at least 1");
  require(inner > 0, name, "inner", inner, "at least 1");
  require(kind >= 0 && kind <= int(Activation::silu), name, "kind", kind, "0 to 8");
}

template <class T>
Layer<T> layer_of(const View& view, const void* input, const void* weight, const void* bias, int kind,
                  double parameter) {
  using C = Compute<T>;
  return {view,
          static_cast<const T*>(input),
          static_cast<const C*>(weight),
          static_cast<const C*>(bias),
          C(parameter),
          Activation(kind)};
}

// The moments of all parts into the workspace.
template <class T>
void reduce_moments(const BatchNormPlan& plan, const View& view, const void* input, void* workspace,
                    cudaStream_t stream) {
  const Partition parts = reduction_of(plan);
  dispatch_vectors<T>(plan, [&]<int width, int lanes>() {
    launch(statistics_kernel<T, width, lanes>, shape_of(plan, parts, stream), view, static_cast<const T*>(input),
           static_cast<Compute<T>*>(workspace), parts.part);
  });
}

template <class T>
void finish_moments(const BatchNormPlan& plan, const View& view, const void* input, const void* workspace,
                    const Statistics<Compute<T>>& statistics, Compute<T>* squares, int64_t channels,
                    cudaStream_t stream) {
  const Partition parts = reduction_of(plan);
  launch(finish_statistics_kernel<T>, channel_shape_of(channels, stream), view, plan.lanes,
         static_cast<const T*>(input), static_cast<const Compute<T>*>(workspace), parts.parts, parts.part,
         plan.width / plan.lanes, statistics, squares);
}

template <class T>
void normalise_all(const BatchNormPlan& plan, const Layer<T>& layer, const void* residual, void* output,
                   const Statistics<Compute<T>>& statistics, const Compute<T>* partial, cudaStream_t stream) {
  const Partition parts = pass_of(plan), partial_parts = reduction_of(plan);
  dispatch_vectors<T>(plan, [&]<int width, int lanes>() {
    dispatch_smooth(int(layer.kind), [&]<bool smooth>() {
      launch(normalise_kernel<T, width, lanes, smooth>, shape_of(plan, parts, stream), layer,
             static_cast<const T*>(residual), static_cast<T*>(output), statistics, partial, partial_parts.parts,
             partial_parts.part, parts.part);
    });
  });
}

}  // namespace

void batch_norm(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* input, const void* weight,
                const void* bias, const void* residual, void* output, void* mean, void* rstd, void* variance,
                double eps, int kind, double parameter, void* workspace, cudaStream_t stream) {
  constexpr const char* name = "batch_norm";
  require_array(name, outer, channels, inner, kind);
  require(input && output && mean && rstd && variance && workspace, name, "arrays", "0", "addresses");
  dispatch_dtype(name, dtype, [&]<class T>() {
    using C = Compute<T>;
    const int full = full_width(sizeof(T), aligned(16, input, residual, output));
    BatchNormPlan plan = batch_norm_plan(full, outer, channels, inner, 1);
    const View view = view_of(name, plan, outer, channels, inner);
    const Layer<T> layer = layer_of<T>(view, input, weight, bias, kind, parameter);
    const Statistics<C> statistics{static_cast<C*>(mean), static_cast<C*>(rstd), static_cast<C*>(variance), C(eps)};
    if (plan.whole && !is_smooth(kind)) {
      return dispatch_vectors<T>(plan, [&]<int width, int lanes>() {
        launch(whole_kernel<T, width, lanes>, whole_shape_of(plan, stream), layer, static_cast<const T*>(residual),
               static_cast<T*>(output), statistics);
      });
    }
    reduce_moments<T>(plan, view, input, workspace, stream);
    const bool merges = merges_itself(plan);
    if (!merges) finish_moments<T>(plan, view, input, workspace, statistics, nullptr, channels, stream);
    normalise_all(plan, layer, residual, output, statistics, merges ? static_cast<const C*>(workspace) : nullptr,
                  stream);
  });
}

void batch_norm_statistics(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* input, void* mean,
                           void* squares, void* workspace, cudaStream_t stream) {
  constexpr const char* name = "batch_norm_statistics";
  require_array(name, outer, channels, inner, 0);
  require(input && mean && squares && workspace, name, "arrays", "0", "addresses");
  dispatch_dtype(name, dtype, [&]<class T>() {
    using C = Compute<T>;
    const BatchNormPlan plan = batch_norm_plan(full_width(sizeof(T), aligned(16, input)), outer, channels, inner, 1);
    const View view = view_of(name, plan, outer, channels, inner);
    reduce_moments<T>(plan, view, input, workspace, stream);
    const Statistics<C> statistics{static_cast<C*>(mean), nullptr, nullptr, 0};
    finish_moments<T>(plan, view, input, workspace, statistics, static_cast<C*>(squares), channels, stream);
  });
}

void batch_norm_inference(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* input,
                          const void* weight, const void* bias, const void* residual, const void* mean,
                          const void* variance, void* output, double eps, int kind, double parameter,
                          cudaStream_t stream) {
  constexpr const char* name = "batch_norm_inference";
  require_array(name, outer, channels, inner, kind);
  require(input && output && mean && variance, name, "arrays", "0", "addresses");
  dispatch_dtype(name, dtype, [&]<class T>() {
    using C = Compute<T>;
    const int full = full_width(sizeof(T), aligned(16, input, residual, output));
    const BatchNormPlan plan = batch_norm_plan(full, outer, channels, inner, 1);
    const View view = view_of(name, plan, outer, channels, inner);
    const Statistics<C> statistics{static_cast<C*>(const_cast<void*>(mean)), nullptr,
                                   static_cast<C*>(const_cast<void*>(variance)), C(eps)};
    normalise_all<T>(plan, layer_of<T>(view, input, weight, bias, kind, parameter), residual, output, statistics,
                     nullptr, stream);
  });
}

void batch_norm_backward(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* grad_output,
                         const void* input, const void* weight, const void* bias, const void* residual,
                         const void* output, const void* mean, const void* rstd, void* grad_input, void* grad_weight,
                         void* grad_bias, void* grad_residual, bool training, int kind, double parameter,
                         void* workspace, cudaStream_t stream) {
  constexpr const char* name = "batch_norm_backward";
  require_array(name, outer, channels, inner, kind);
  require(grad_output && input && mean && rstd && workspace, name, "arrays", "0", "addresses");
  dispatch_dtype(name, dtype, [&]<class T>() {
    using C = Compute<T>;
    const void* saved = kind == 0 ? nullptr : output ? output : residual;
    const int full = full_width(sizeof(T), aligned(16, grad_output, input, saved, grad_input, grad_residual));
    const BatchNormPlan plan = batch_norm_plan(full, outer, channels, inner, 2);
    const View view = view_of(name, plan, outer, channels, inner);
    Layer<T> layer = layer_of<T>(view, input, weight, bias, kind, parameter);
    Gradient<T> gradient{static_cast<const T*>(grad_output), static_cast<const T*>(saved), output != nullptr,
                         static_cast<const C*>(mean), static_cast<const C*>(rstd)};
    const C count = C(double(outer) * double(inner));
    Totals<C> totals{static_cast<C*>(grad_weight), static_cast<C*>(grad_bias), nullptr, nullptr, count};
    T* const dz = static_cast<T*>(grad_residual);
    T* const dx = static_cast<T*>(grad_input);
    if (training && dx && plan.whole && !is_smooth(kind)) {
      return dispatch_vectors<T>(plan, [&]<int width, int lanes>() {
        launch(whole_backward_kernel<T, width, lanes>, whole_shape_of(plan, stream), layer, gradient, totals, dz, dx);
      });
    }
    const Partition parts = reduction_of(plan), pass = pass_of(plan);
    C* const partial = static_cast<C*>(workspace);
    const bool sums = (training && dx) || grad_weight || grad_bias;
    dispatch_vectors<T>(plan, [&]<int width, int lanes>() {
      dispatch_smooth(kind, [&]<bool smooth>() {
        launch(sums_kernel<T, width, lanes, smooth>, shape_of(plan, parts, stream), layer, gradient, dz,
               training ? nullptr : dx, sums ? partial : nullptr, parts.part);
      });
    });
    if (!sums) return;
    const bool continues = training && dx, merges = continues && merges_itself(plan);
    const int64_t width = plan.columns * plan.lanes;
    if (continues && !merges) {
      totals.mean_gradient = partial + parts.parts * 2 * width;
      totals.mean_product = totals.mean_gradient + channels;
    }
    if (!merges) {
      launch(finish_sums_kernel<C>, channel_shape_of(channels, stream), width, plan.spread,
             static_cast<const C*>(partial), parts.parts, gradient.rstd, totals);
    }
    if (!continues) return;
    if (dz) {  // what has been written need not be made again
      layer.kind = Activation::none;
      gradient.grad_output = dz;
      gradient.saved = nullptr;
    }
    dispatch_vectors<T>(plan, [&]<int width, int lanes>() {
      dispatch_smooth(int(layer.kind), [&]<bool smooth>() {
        launch(input_gradient_kernel<T, width, lanes, smooth>, shape_of(plan, pass, stream), layer, gradient, totals,
               dx, static_cast<const C*>(merges ? partial : nullptr), parts.parts, pass.part);
      });
    });
  });
}

void batch_norm_apply(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* grad_output,
                      const void* input, const void* weight, const void* mean, const void* rstd,
                      const void* mean_gradient, const void* mean_product, void* grad_input, cudaStream_t stream) {
  constexpr const char* name = "batch_norm_apply";
  require_array(name, outer, channels, inner, 0);
  require(grad_output && input && mean && rstd && mean_gradient && mean_product && grad_input, name, "arrays", "0",
          "addresses");
  dispatch_dtype(name, dtype, [&]<class T>() {
    using C = Compute<T>;
    const int full = full_width(sizeof(T), aligned(16, grad_output, input, grad_input));
    const BatchNormPlan plan = batch_norm_plan(full, outer, channels, inner, 2);
    const View view = view_of(name, plan, outer, channels, inner);
    const Gradient<T> gradient{static_cast<const T*>(grad_output), nullptr, false, static_cast<const C*>(mean),
                               static_cast<const C*>(rstd)};
    const Totals<C> totals{nullptr, nullptr, static_cast<C*>(const_cast<void*>(mean_gradient)),
                           static_cast<C*>(const_cast<void*>(mean_product)), 1};
    const Partition pass = pass_of(plan);
    dispatch_vectors<T>(plan, [&]<int width, int lanes>() {
      launch(input_gradient_kernel<T, width, lanes, false>, shape_of(plan, pass, stream),
             layer_of<T>(view, input, weight, nullptr, 0, 0.0), gradient, totals, static_cast<T*>(grad_input),
             static_cast<const C*>(nullptr), int64_t(0), pass.part);
    });
  });
}

size_t batch_norm_workspace(int dtype, int64_t outer, int64_t channels, int64_t inner) {
  constexpr const char* name = "batch_norm_workspace";
  require_array(name, outer, channels, inner, 0);
  size_t bytes = 0;
  dispatch_dtype(name, dtype, [&]<class T>() {
    for (const bool is_aligned : {false, true}) {  // whatever the arrays will be like
      for (const int operands : {1, 2}) {
        const BatchNormPlan plan = batch_norm_plan(full_width(sizeof(T), is_aligned), outer, channels, inner, operands);
        const size_t numbers = 2 * size_t(reduction_of(plan).parts * plan.columns * plan.lanes + channels);
        bytes = std::max(bytes, numbers * sizeof(Compute<T>));
      }
    }
  });
  return bytes;
}

}  // namespace fastdl::cuda
