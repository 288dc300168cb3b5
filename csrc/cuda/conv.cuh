// Convolution as an implicit matmul: rows of the product are pixels, its depth is taps and channels, and an operand's
// chunks are gathered from the image where the main loop of matmul.cuh wants them. No matrix of them is ever in memory.
//
// Images lie with their channels innermost, in whole chunks of 16 bytes; what comes otherwise is packed first.
#pragma once
#include "matmul.cuh"

namespace fastdl::cuda {

// Divides numbers below 2^31 by one that the host knows (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t divisor = 1, factor = 0, shift = 0;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(uint32_t(by)) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    factor = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor) / divisor + 1);
  }
  __device__ __forceinline__ int operator()(int dividend) const {
    const uint32_t value = uint32_t(dividend);
    return int((uint32_t((uint64_t(value) * factor) >> 32) + value) >> shift);
  }
};

// A pixel's number as (n, i, j) of [.., height, width].
struct Pixels {
  Divider height, width;

  __device__ __forceinline__ void operator()(int pixel, int& n, int& i, int& j) const {
    const int line = width(pixel);
    j = pixel - line * int(width.divisor);
    n = height(line);
    i = line - n * int(height.divisor);
  }
};

// One dimension of a window that moves over an image: row i of the product and tap t meet at i * stride + offset +
// t * dilation, where there are zeros outside of the image.
struct Axis {
  int image;                     // its extent
  int stride, offset, dilation;  // dilation < 0 in the input's gradient
  int taps;
  int first_tap, tap_step;  // of the weight's: first_tap + t * tap_step
};

// An image whose chunks are gathered; distances are in chunks.
template <class T>
struct Gather {
  const T* data;  // [n, image, image, groups, channels]
  int batch, height, width, group;
  int channels;
  int pixels;  // rows of the product, each (n, i, j)
  Pixels split;
  Axis h, w;
};

// Where a row's window begins: its chunk, and its place in the image.
struct alignas(16) Position {
  int chunk, h, w, unused;
};

// A window and a channel, which is a step of the product's depth: in order of (h, w, channel).
struct Tap {
  int h, w, channel;

  template <class T>
  __device__ __forceinline__ Tap(const Gather<T>& gather, int chunk) {
    const int tap = chunk / max(gather.channels, 1), taps = max(gather.w.taps, 1);
    channel = chunk - tap * gather.channels;
    h = tap / taps;
    w = tap - h * taps;
  }

  // Goes on by so many chunks. They are a stage's, so few steps.
  template <class T>
  __device__ __forceinline__ void advance(const Gather<T>& gather, int chunks) {
    channel += chunks;
    while (channel >= gather.channels) {
      channel -= gather.channels;
      if (++w == gather.w.taps) w = 0, ++h;
    }
  }
};

constexpr int kOutside = -(1 << 30);  // a place that no tap brings back into an image

template <class T>
__device__ __forceinline__ Position position_of(const Gather<T>& gather, int pixel) {
  if (pixel >= gather.pixels) return {0, kOutside, kOutside, 0};
  int n, i, j;
  gather.split(pixel, n, i, j);
  const int h = i * gather.h.stride + gather.h.offset, w = j * gather.w.stride + gather.w.offset;
  return {n * gather.batch + h * gather.height + w * gather.width, h, w, 0};
}

// Starts to copy a chunk of the window at a position; zeros where it is outside of the image.
template <class T>
__device__ __forceinline__ void gather_chunk(char* destination, const T* data, const Gather<T>& gather,
                                             const Position& position, int chunk, int h, int w, bool inside) {
  inside = inside && unsigned(position.h + h) < unsigned(gather.h.image) &&
           unsigned(position.w + w) < unsigned(gather.w.image);
  ptx::cp_async16(destination, data + int64_t(position.chunk + chunk) * int(16 / sizeof(T)), inside ? 16 : 0);
}

template <class... Strides>
bool are_multiples(int64_t of, Strides... strides) {
  return ((strides % of == 0) && ...);
}

// ---- The end --------------------------------------------------------------------------------------------------------

// As Epilogue, to an output of any strides, by rows (n, i, j) and columns (tap, channel); channels that are padding are
// left out.
template <class T>
struct ImageEpilogue : Epilogue<T> {
  Pixels split;
  int64_t batch_stride, height_stride, width_stride, tap_stride, channel_stride, group_stride;  // in elements
  Divider tap_columns;
  int channels;         // of tap_columns
  bool output_vectors;  // whether chunks of columns can be stored

  // Host: to be called when all else is set.
  void use_vectors() {
    constexpr int64_t chunk = 16 / sizeof(T);
    this->vectors = this->columns % chunk == 0 && aligned(16, this->bias, this->partial);
    output_vectors = this->vectors && channel_stride == 1 && channels == int(tap_columns.divisor) &&
                     aligned(16, this->output, this->preactivation);
    output_vectors &= are_multiples(chunk, batch_stride, height_stride, width_stride, tap_stride, group_stride);
    output_vectors &= channels % chunk == 0;
  }

  template <int count>
  __device__ __forceinline__ void put_image(T* image, int column, const Compute<T> (&values)[count]) const {
    constexpr int chunk = count * sizeof(T) < 16 ? count : int(16 / sizeof(T));
#pragma unroll
    for (int i = 0; i < count; i += chunk) {
      Compute<T> part[chunk];
#pragma unroll
      for (int j = 0; j < chunk; ++j) part[j] = values[i + j];
      if (output_vectors) {
        const int tap = tap_columns(column + i), channel = column + i - tap * int(tap_columns.divisor);
        if (column + i < this->columns) store(image + tap * tap_stride + channel, part);
      } else {
#pragma unroll
        for (int j = 0; j < chunk; ++j) {
          const int tap = tap_columns(column + i + j), channel = column + i + j - tap * int(tap_columns.divisor);
          const Compute<T> one[1] = {part[j]};
          if (column + i + j < this->columns && channel < channels) {
            store(image + tap * tap_stride + channel * channel_stride, one);
          }
        }
      }
    }
  }

  // The group is the block's z.
  template <int count>
  __device__ __forceinline__ void operator()(int64_t row, int64_t column, Compute<T> (&values)[count],
                                             int split_index = 0) const {
    if (row >= this->rows || column >= this->columns) return;
    if (this->partial) {
      const int64_t matrix = int64_t(blockIdx.z) * gridDim.y + split_index;
      this->put(this->partial + matrix * this->rows * this->columns, row, column, values);
      return;
    }
    int n, i, j;
    split(int(row), n, i, j);
    const int64_t place = blockIdx.z * group_stride + n * batch_stride + i * height_stride + j * width_stride;
    if (this->bias) {
      Epilogue<T> of_group = *this;
      of_group.bias += blockIdx.z * this->columns;
      of_group.add_bias(column, values);
    }
    if (this->preactivation) put_image(this->preactivation + place, int(column), values);
    this->activate_in_place(values);
    put_image(this->output + place, int(column), values);
  }
};

// ---- The kernel -----------------------------------------------------------------------------------------------------

enum class Convolution {
  image,
  weight
};  // what the product makes: pixels (output, input's gradient), or a weight's gradient

// A product; a kernel's argument.
template <class T>
struct ConvProduct {
  Gather<T> gather;
  // image: the weight, rows [columns of the product, ..]; weight: the output's gradient, [pixels, channels], its rows
  // the product's.
  Operand<T> operand;
  int64_t operand_group;                                 // its distance between groups
  int64_t operand_height, operand_width, operand_first;  // image: of the weight's taps, in elements
  int64_t depth, split_depth;                            // split i begins at i * split_depth
  T* row_sums;                                           // weight: [groups, rows], the bias's gradient, or null
  Compute<T>* partial_row_sums;                          // [groups, splits, rows] if split, else null
  ImageEpilogue<T> epilogue;
};

// Positions lie behind all else in a block's shared memory: those of its rows; or of a stage's pixels and the next
// one's.
template <class T, TileName name>
constexpr int kPositions = std::max(kTiles[int(name)].rows, 2 * kTiles[int(name)].depth_bytes / int(sizeof(T)));

template <class T, TileName name>
constexpr int kSharedBytes = kPipelineBytes<T, name> + kPositions<T, name> * int(sizeof(Position));

// Launches (tiles, splits, groups) blocks.
template <class T, bool tensor_cores, TileName name, Convolution result>
__global__ void __launch_bounds__(kTileThreads<name>, kResidentBlocks[int(name)])
    conv_kernel(const __grid_constant__ ConvProduct<T> product) {
  constexpr Layout layout = result == Convolution::image ? Layout::depth : Layout::rows;
  using P = Parts<T, tensor_cores, name, layout, layout>;
  using StageA = typename P::StageA;
  using StageB = typename P::StageB;
  constexpr Tile tile = kTiles[int(name)];
  constexpr int threads = kTileThreads<name>, stages = tile.stages, stage_bytes = StageA::kBytes + StageB::kBytes;
  constexpr int chunk_width = StageA::kWidth, depth_of_stage = StageA::kDepth;
  FDL_DYN_SHARED(char, shared, (kSharedBytes<T, name>));
  auto* positions = reinterpret_cast<Position*>(shared + kPipelineBytes<T, name>);
  const auto& gather = product.gather;
  const auto& epilogue = product.epilogue;

  const TilePlace<name> first(epilogue.rows);
  const int first_row = int(first.row), first_column = int(first.column);
  const int first_depth = int(blockIdx.y * product.split_depth);
  const int depth = int(max(min(product.depth - first_depth, product.split_depth), int64_t(0)));
  const int steps = (depth + depth_of_stage - 1) / depth_of_stage;
  const WarpPlace<name> warp;
  const T* image = gather.data + int64_t(blockIdx.z) * gather.group * chunk_width;
  Operand<T> operand = product.operand;
  operand.data += blockIdx.z * product.operand_group;
  auto wait_for = [&](int) {
    ptx::cp_async_wait<stages - 2>();
    __syncthreads();
  };
  typename P::Warp sums(warp.row, warp.column);

  if constexpr (result == Convolution::image) {
    for (int i = threadIdx.x; i < tile.rows; i += threads) positions[i] = position_of(gather, first_row + i);
    __syncthreads();
    const int line = threadIdx.x / StageA::kLineChunks, chunk = threadIdx.x % StageA::kLineChunks;
    Tap tap(gather, first_depth / chunk_width + chunk);
    Copier<StageB, T, layout> copy_b(operand, first_column, 0);
    const T* weight = copy_b.source - chunk * chunk_width + product.operand_first;
    auto load_stage = [&](int step) {
      char* stage = shared + step % stages * stage_bytes;
      char* destination = stage + StageA::offset(line, chunk);
      const int left = depth - step * depth_of_stage;
      const int h = tap.h * gather.h.dilation, w = tap.w * gather.w.dilation;
      const int distance = h * gather.height + w * gather.width + tap.channel;
#pragma unroll
      for (int i = 0; i < StageA::kCopies; ++i) {
        gather_chunk(destination + i * StageA::kStep * StageA::kLineChunks * 16, image, gather,
                     positions[line + i * StageA::kStep], distance, h, w, chunk * chunk_width < left);
      }
      copy_b.source =
          weight + tap.h * product.operand_height + tap.w * product.operand_width + int64_t(tap.channel) * chunk_width;
      copy_b(stage + StageA::kBytes, left);
      tap.advance(gather, StageA::kLineChunks);
    };
    run_pipeline<P>(sums, shared, stage_bytes, steps, load_stage, wait_for, [](int) {});
  } else {
    const bool sums_rows = product.row_sums && first_column == 0 && int(threadIdx.x) < tile.rows;
    Copier<StageA, T, layout> copy_a(operand, first_row, first_depth);
    const int line = threadIdx.x / StageB::kLineChunks, chunk = threadIdx.x % StageB::kLineChunks;
    const int column = first_column + chunk * chunk_width;
    const Tap tap(gather, column / chunk_width);
    const int h = tap.h * gather.h.dilation, w = tap.w * gather.w.dilation;
    const int distance = h * gather.height + w * gather.width + tap.channel;
    // The pixels of a stage are found one stage ahead, into one half of the table while the other is read.
    auto find_pixels = [&](int step) {
      if (int(threadIdx.x) < depth_of_stage) {
        positions[step % 2 * depth_of_stage + threadIdx.x] =
            position_of(gather, first_depth + step * depth_of_stage + int(threadIdx.x));
      }
    };
    find_pixels(0);
    auto load_stage = [&](int step) {
      if (step < stages - 1) __syncthreads();  // in the main loop there is one between any two loads
      char* stage = shared + step % stages * stage_bytes;
      copy_a(stage, depth - step * depth_of_stage);
      char* destination = stage + StageA::kBytes + StageB::offset(line, chunk);
      const Position* pixels = positions + step % 2 * depth_of_stage + line;
#pragma unroll
      for (int i = 0; i < StageB::kCopies; ++i) {
        gather_chunk(destination + i * StageB::kStep * StageB::kLineChunks * 16, image, gather,
                     pixels[i * StageB::kStep], distance, h, w, column < epilogue.columns);
      }
      find_pixels(step + 1);
    };
    Compute<T> row_sum = 0;
    run_pipeline<P>(sums, shared, stage_bytes, steps, load_stage, wait_for, [&](int step) {
      if (sums_rows) row_sum += StageA::sum_row(shared + step % stages * stage_bytes, threadIdx.x);
    });
    if (sums_rows) {
      store_row_sum(row_sum, first_row + int(threadIdx.x), epilogue.rows, product.row_sums, product.partial_row_sums);
    }
  }
  const bool by_rows = !epilogue.partial && epilogue.channel_stride != 1;
  end_sums<T, name>(sums, shared, warp, by_rows, [&](int row, int column, Compute<T>(&values)[kEndWidth<T>]) {
    epilogue(first_row + row, first_column + column, values, int(blockIdx.y));
  });
}

// ---- Packing --------------------------------------------------------------------------------------------------------

// [n, groups, channels, height, width] of any strides.
template <class T>
struct Unpacked {
  const T* data;
  int64_t batch_stride, group_stride, channel_stride, height_stride, width_stride;
  int64_t pixels;  // n * height * width
  Pixels split;
  int channels, padded;  // a group's; padded: to whole chunks
  Divider padded_channels;
  int columns;  // groups * padded
};

constexpr int kPackThreads = 256, kPackPixels = 32, kPackChannels = 64;

// Makes [n, height, width, groups, padded] of it, zeros as padding. A block copies tiles of kPackPixels and
// kPackChannels, by way of shared memory, so that both sides are read and written along what is contiguous.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const __grid_constant__ Unpacked<T> input, T* output, int64_t pixel_tiles) {
  constexpr int width = 16 / sizeof(T), chunks = kPackChannels / width;
  FDL_SHARED(T, tile, [kPackChannels][kPackPixels + 1]);
  const bool along_channels = input.channel_stride == 1;
  const int64_t first_pixel = blockIdx.x % pixel_tiles * kPackPixels;
  const int first_column = int(blockIdx.x / pixel_tiles) * kPackChannels;
  const int per_line = along_channels ? kPackChannels : kPackPixels;
#pragma unroll 2
  for (int i = threadIdx.x; i < kPackChannels * kPackPixels; i += kPackThreads) {
    const int pixel = along_channels ? i / per_line : i % per_line;
    const int column = first_column + (along_channels ? i % per_line : i / per_line);
    T value = T(0.f);
    if (first_pixel + pixel < input.pixels && column < input.columns) {
      int n, h, w;
      input.split(int(first_pixel) + pixel, n, h, w);
      const int group = input.padded_channels(column), channel = column - group * input.padded;
      if (channel < input.channels) {
        value = input.data[n * input.batch_stride + group * input.group_stride + channel * input.channel_stride +
                           h * input.height_stride + w * input.width_stride];
      }
    }
    tile[column - first_column][pixel] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPackPixels * chunks; i += kPackThreads) {
    const int pixel = i / chunks, column = i % chunks * width;
    if (first_pixel + pixel >= input.pixels || first_column + column >= input.columns) continue;
    Chunk<T> values;
#pragma unroll
    for (int j = 0; j < width; ++j) values.element[j] = tile[column + j][pixel];
    *reinterpret_cast<Chunk<T>*>(output + (first_pixel + pixel) * input.columns + first_column + column) = values;
  }
}

// ---- Depthwise ------------------------------------------------------------------------------------------------------

// A window over one channel for each of the output's; a kernel's argument. Strides are in elements.
template <class T>
struct Depthwise {
  const T* input;  // [n, channels / multiple * reads, image, image]
  int64_t input_batch, input_channel, input_height, input_width;
  const T* weight;  // [channels of the layer's output, taps, taps]
  int64_t weight_channel, weight_height, weight_width;
  int64_t output_batch, output_channel, output_height, output_width;  // and preactivation's
  int channels, height, width;                                        // of the output
  Axis h, w;
  int divide_h, divide_w;  // input's gradient: a place counts if they divide it, and is the quotient; else 1
  // Channel k of the output meets the input's k / multiple * reads + i for all i < reads: one of both is 1.
  int multiple, reads;
  bool along_lines;      // neighbouring threads take neighbouring pixels of a line, not channels
  bool line_vectors;     // whether the pixels of a thread can be stored at once
  Epilogue<T> epilogue;  // columns: channels
};

constexpr int kDepthwiseThreads = 256;

template <int width, class T>
__device__ __forceinline__ void load_values(Compute<T> (&values)[width], const T* address) {
  const Vector<T, width> vector = load<width>(address);
#pragma unroll
  for (int i = 0; i < width; ++i) values[i] = widen(vector.element[i]);
}

// The place in the image of a row and a tap; false if it is outside.
__device__ __forceinline__ bool find_place(const Axis& axis, int divide, int row, int tap, int& place) {
  place = row * axis.stride + axis.offset + tap * axis.dilation;
  if (divide > 1) {
    if (place % divide) return false;
    place /= divide;
  }
  return unsigned(place) < unsigned(axis.image);
}

// Pixels of a line that a thread computes: they share the weight, and are 16 bytes or less.
template <class T>
constexpr int kDepthwisePixels = sizeof(T) == 8 ? 2 : 4;

// The output, or the input's gradient. A thread makes `width` channels of kDepthwisePixels pixels.
template <class T, int width>
__global__ void __launch_bounds__(kDepthwiseThreads, 3)
    depthwise_kernel(const __grid_constant__ Depthwise<T> args, Divider fast, Divider middle,
                     Divider slow,  // along_lines: spans of pixels, lines, channels; else
                                    // vectors of channels, spans, lines
                     int64_t work) {
  constexpr int pixels = kDepthwisePixels<T>;
  for (int64_t index = int64_t(blockIdx.x) * kDepthwiseThreads + threadIdx.x; index < work;
       index += int64_t(gridDim.x) * kDepthwiseThreads) {
    const int a = fast(int(index)), b = middle(a), n = slow(b);
    const int in_fast = int(index) - a * int(fast.divisor), in_middle = a - b * int(middle.divisor);
    const int in_slow = b - n * int(slow.divisor);
    const int channel = (args.along_lines ? in_slow : in_fast) * width, i = args.along_lines ? in_middle : in_slow;
    const int j = (args.along_lines ? in_fast : in_middle) * pixels;
    Compute<T> sum[width == 1 ? 1 : pixels][width == 1 ? pixels : width] = {};  // values that end together
#pragma unroll 1
    for (int read = 0; read < args.reads; ++read) {
      const int input_channel = channel / args.multiple * args.reads + read;
      const T* plane = args.input + n * args.input_batch + input_channel * args.input_channel;
      const T* weight = args.weight + (args.reads > 1 ? input_channel : channel) * args.weight_channel;
#pragma unroll 1
      for (int r = 0; r < args.h.taps; ++r) {
        int h, w;
        if (!find_place(args.h, args.divide_h, i, r, h)) continue;
#pragma unroll 1
        for (int s = 0; s < args.w.taps; ++s) {
          Compute<T> factor[width];
          load_values(factor, weight + r * args.weight_height + s * args.weight_width);
#pragma unroll
          for (int p = 0; p < pixels; ++p) {
            if (!find_place(args.w, args.divide_w, j + p, s, w)) continue;
            Compute<T> values[width];
            load_values(values, plane + h * args.input_height + w * args.input_width);
#pragma unroll
            for (int k = 0; k < width; ++k) (width == 1 ? sum[0][p] : sum[p][k]) += values[k] * factor[k];
          }
        }
      }
    }
    const int64_t place =
        n * args.output_batch + channel * args.output_channel + i * args.output_height + j * args.output_width;
    auto put = [&](T* output) {
      if constexpr (width == 1) {
        if (args.line_vectors) return store(output + place, sum[0]);
      }
#pragma unroll
      for (int p = 0; p < pixels; ++p) {
        if (j + p >= args.width) break;
        Compute<T> values[width];
#pragma unroll
        for (int k = 0; k < width; ++k) values[k] = width == 1 ? sum[0][p] : sum[p][k];
        store(output + place + p * args.output_width, values);
      }
    };
    const auto& epilogue = args.epilogue;
    if constexpr (width == 1) {
      const Compute<T> shift = epilogue.bias ? widen(epilogue.bias[channel]) : Compute<T>(0);
#pragma unroll
      for (int p = 0; p < pixels; ++p) sum[0][p] += shift;
    } else {
#pragma unroll
      for (int p = 0; p < pixels; ++p) epilogue.add_bias(channel, sum[p]);
    }
    if (epilogue.preactivation) put(epilogue.preactivation);
#pragma unroll
    for (auto& values : sum) epilogue.activate_in_place(values);
    put(epilogue.output);
  }
}

constexpr int kDepthwiseTaps = 9;  // of the weight whose gradients a thread sums while it reads the output's once

// Partial sums of the weight's gradient, and of the bias's as one tap more. Launches (channels, parts of the pixels,
// taps) blocks; threads are (vectors of channels, pixels), both powers of two.
template <class T, int width>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_weight_kernel(const __grid_constant__ Depthwise<T> args,  // weight: none; output: its gradient, is read
                            Pixels split, int64_t pixels,
                            Compute<T>* partial) {  // [parts, taps + 1, channels]
  FDL_SHARED(Compute<T>, sums, [width][kDepthwiseThreads]);
  const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * width;
  const int64_t part = (pixels + gridDim.y - 1) / gridDim.y;
  const int64_t end = channel < args.channels ? min(pixels, (int64_t(blockIdx.y) + 1) * part) : 0;
  const int taps = args.h.taps * args.w.taps, first = blockIdx.z * kDepthwiseTaps;
  const int first_r = first / max(args.w.taps, 1), first_s = first - first_r * args.w.taps;
  const T* plane = args.input + channel / args.multiple * args.input_channel;
  const T* gradient = args.epilogue.output + channel * args.output_channel;
  Compute<T> sum[kDepthwiseTaps + 1][width] = {};  // the bias's first
  for (int64_t pixel = blockIdx.y * part + threadIdx.y; pixel < end; pixel += blockDim.y) {
    int n, i, j;
    split(int(pixel), n, i, j);
    Compute<T> dy[width];
    load_values(dy, gradient + n * args.output_batch + i * args.output_height + j * args.output_width);
#pragma unroll
    for (int k = 0; k < width; ++k) sum[0][k] += dy[k];
    int r = first_r, s = first_s;
#pragma unroll
    for (int t = 0; t < kDepthwiseTaps; ++t) {
      int h, w;
      if (r < args.h.taps && find_place(args.h, 1, i, r, h) && find_place(args.w, 1, j, s, w)) {
        Compute<T> values[width];
        load_values(values, plane + n * args.input_batch + h * args.input_height + w * args.input_width);
#pragma unroll
        for (int k = 0; k < width; ++k) sum[t + 1][k] += dy[k] * values[k];
      }
      if (++s == args.w.taps) s = 0, ++r;
    }
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int t = 0; t <= kDepthwiseTaps; ++t) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k][thread] = sum[t][k];
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
      __syncthreads();
      if (int(threadIdx.y) < half) {
#pragma unroll
        for (int k = 0; k < width; ++k) sums[k][thread] += sums[k][thread + half * blockDim.x];
      }
    }
    const int tap = t ? first + t - 1 : taps;  // the bias's is the last
    if (threadIdx.y > 0 || channel >= args.channels || (t ? tap >= taps : blockIdx.z > 0)) continue;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      partial[(blockIdx.y * int64_t(taps + 1) + tap) * args.channels + channel + k] = sums[k][thread];
    }
  }
}

// Adds the parts in order.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_finish_kernel(const __grid_constant__ Depthwise<T> args,
                            const Compute<T>* partial,  // [parts, taps + 1, channels]
                            int parts, T* grad_weight,  // with the weight's strides, or null
                            T* grad_bias) {             // [channels] or null
  const int taps = args.h.taps * args.w.taps;
  const int64_t size = int64_t(taps + 1) * args.channels;
  for (int64_t i = int64_t(blockIdx.x) * kDepthwiseThreads + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * kDepthwiseThreads) {
    const int tap = int(i / args.channels);
    const int64_t channel = i % args.channels;
    Compute<T> total[1] = {};
#pragma unroll 4
    for (int part = 0; part < parts; ++part) total[0] += partial[part * size + i];
    if (tap < taps) {
      const int r = tap / args.w.taps, s = tap % args.w.taps;
      const int64_t place = channel * args.weight_channel + r * args.weight_height + s * args.weight_width;
      if (grad_weight) store(grad_weight + place, total);
    } else if (grad_bias) {
      store(grad_bias + channel, total);
    }
  }
}

}  // namespace fastdl::cuda
