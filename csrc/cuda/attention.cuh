// What attention's forward and backward share (Dao et al., 2022; Dao, 2023): products of a warp whose sums stay in
// registers, as operands of the next product; how scores are made of them; copies of heads' rows.
//
// Each warp owns some rows of the matrix of scores, queries in one kernel and keys in another, so what is summed over
// columns needs neither other warps nor atomics. Rows lie in shared memory, swizzled as matmul's.
#pragma once
#include <cstring>
#include <limits>

#include "attention.h"
#include "matmul.cuh"
#include "philox.cuh"

namespace fastdl::cuda::flash {

using Pass = AttentionPass;

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();
constexpr double kLog2E = 1.4426950408889634;

// Positions and sizes are below it: sums of three fit into 32 bits.
constexpr int64_t kMostRows = int64_t(1) << 28;
constexpr int kUnlimited = 1 << 29;

// ---- Arguments on the device ----------------------------------------------------------------------------------------

// As Heads; vectors: rows begin 16-byte aligned.
template <class T>
struct View {
  T* data;
  int64_t batch_stride, row_stride, head_stride;
  bool vectors;

  __device__ __forceinline__ T* at(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// What the kernels have in common; as AttentionShape and AttentionScores.
template <class T>
struct Task {
  using C = Compute<T>;
  View<const T> query, key, value;
  int heads, group, queries, keys, size, value_size;
  const int64_t *query_offsets, *key_offsets;
  int longest_queries, longest_keys;
  int left, right;
  bool bottom_right;
  C scale;
  bool scaled;  // scores are products times the scale, else products: that saves work where nothing is added to them
  C unit;       // powers of 2 in a score's unit
  int mask_kind;
  const void* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride;
  const C* slopes;
  int64_t slopes_batch_stride;
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;
  C kept;
};

// What a block works on: rows of one head of one sequence. It waits in shared memory, as few of a loop's passes need
// it.
struct Block {
  int batch, head;  // a head of queries or, in a kernel whose rows are keys, of keys
  int row;          // the first
  int queries, keys, shift;
  int64_t first_query, first_key;
};

template <class T>
__device__ __forceinline__ Block block_of(const Task<T>& task, int batch, int head, int row) {
  Block block{batch, head, row, task.queries, task.keys, 0, 0, 0};
  if (task.query_offsets) {
    block.first_query = task.query_offsets[batch];
    block.queries = int(task.query_offsets[batch + 1] - block.first_query);
    block.first_key = task.key_offsets[batch];
    block.keys = int(task.key_offsets[batch + 1] - block.first_key);
  }
  block.shift = task.bottom_right ? block.keys - block.queries : 0;
  return block;
}

// Of packed sequences all rows are in one entry of the batch.
template <class T>
__device__ __forceinline__ int entry_of(const Task<T>& task, const Block& block) {
  return task.query_offsets ? 0 : block.batch;
}

// ---- Mathematics ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float power_of_2(float x) { return ptx::exp2(x); }
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// A product that is rounded, not fused with a sum: a row's largest score minus itself has to be 0, however large.
#ifdef FDL_EMULATE
template <class C>
inline C rounded_product(C a, C b) {
  return a * b;
}
#else
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

// Over the four lanes that share a row.
template <class C>
__device__ __forceinline__ C quad_max(C value) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const C other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}
template <class C>
__device__ __forceinline__ C quad_sum(C value) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// ---- Products of a warp ---------------------------------------------------------------------------------------------

// Sums lie over a warp's lanes as mma leaves them: element e of tile (i, j) is in row i * 16 + e / 2 * 8 + lane / 4 and
// column j * 8 + lane % 4 * 2 + e % 2.
template <class C, int row_tiles, int column_tiles>
using Sums = C[row_tiles][column_tiles][4];

template <int row_tiles, int column_tiles, class Function>
__device__ __forceinline__ void for_each(const Function& function) {
#pragma unroll
  for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
    for (int j = 0; j < column_tiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) function(i, j, e);
    }
  }
}

__device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 2; }

// Of rows in shared memory, `bucket` elements each.
template <class T, Arithmetic arithmetic, int bucket>
struct Products {
  using C = Compute<T>;
  static constexpr bool kTensorCores = arithmetic == Arithmetic::half || arithmetic == Arithmetic::tf32;
  static constexpr bool kTf32 = arithmetic == Arithmetic::tf32;
  static constexpr int kLineBytes = bucket * int(sizeof(T));
  using Lines = StageTile<T, Layout::depth, 8, kLineBytes, kLineBytes / 2>;  // only its swizzle
  static constexpr int kWidth = Lines::kWidth;

  // On CUDA cores a warp's sums go through shared memory to be an operand.
  template <int columns>
  static constexpr int kStagingPitch = columns + 1;
  template <int columns>
  static constexpr int kStagingBytes = kTensorCores ? 0 : 16 * kStagingPitch<columns> * int(sizeof(C));

  static __device__ __forceinline__ void round(uint32_t (&fragment)[4]) {
    if constexpr (kTf32) {
#pragma unroll
      for (int r = 0; r < 4; ++r) fragment[r] = ptx::to_tf32(float_of(fragment[r]));
    }
  }

  static __device__ __forceinline__ Chunk<T> chunk_at(const char* lines, int line, int chunk) {
    return *reinterpret_cast<const Chunk<T>*>(lines + Lines::offset(line, chunk));
  }

  // sums += a b^T, over `size` elements of rows of a and b.
  template <int row_tiles, int column_tiles>
  static __device__ __forceinline__ void multiply(Sums<C, row_tiles, column_tiles>& sums, const char* a, const char* b,
                                                  int size) {
    if constexpr (kTensorCores) {
      const int lane = threadIdx.x % 32, quarter = lane / 8, within = lane % 8;
      const int first_a = ptx::anew(Lines::offset(lane % 16, lane / 16));
      const int first_b = ptx::anew(Lines::offset(quarter / 2 * 8 + within, quarter % 2));
#pragma unroll
      for (int step = 0; step < kLineBytes / 32; ++step) {
        uint32_t fragments[row_tiles][4];
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
          ptx::ldmatrix(fragments[i], a + Lines::further(first_a, i * 16, step * 2));
          round(fragments[i]);
        }
#pragma unroll
        for (int j = 0; j < column_tiles; j += 2) {
          uint32_t pair[4];
          ptx::ldmatrix(pair, b + Lines::further(first_b, j * 8, step * 2));
          round(pair);
          multiply_pair<row_tiles, column_tiles>(sums, fragments, pair, j);
        }
      }
    } else {
      const int row = lane_row(), column = lane_column();
#pragma unroll 1
      for (int chunk = 0; chunk * kWidth < size; ++chunk) {
        const Chunk<T> a0 = chunk_at(a, row, chunk), a1 = chunk_at(a, row + 8, chunk);
#pragma unroll
        for (int j = 0; j < column_tiles; ++j) {
          const Chunk<T> b0 = chunk_at(b, j * 8 + column, chunk), b1 = chunk_at(b, j * 8 + column + 1, chunk);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            sums[0][j][0] += a0.element[k] * b0.element[k];
            sums[0][j][1] += a0.element[k] * b1.element[k];
            sums[0][j][2] += a1.element[k] * b0.element[k];
            sums[0][j][3] += a1.element[k] * b1.element[k];
          }
        }
      }
    }
  }

  // sums += a b: a's columns are b's rows, of whose `size` elements from b's address on the sums have column_tiles * 8.
  // staging: of this warp.
  template <int row_tiles, int depth_tiles, int column_tiles>
  static __device__ __forceinline__ void multiply_rows(Sums<C, row_tiles, column_tiles>& sums,
                                                       const Sums<C, row_tiles, depth_tiles>& a, const char* b,
                                                       int size, C* staging) {
    const int lane = threadIdx.x % 32, row = lane_row(), column = lane_column();
    if constexpr (kTf32) {
      // A step's elements are taken in the order in which lanes have them: 2 t at depth t, 2 t + 1 at depth t + 4.
      const int first[2] = {Lines::offset(column, row / kWidth) + row % kWidth * 4,
                            Lines::offset(column + 1, row / kWidth) + row % kWidth * 4};
#pragma unroll
      for (int step = 0; step < depth_tiles; ++step) {
        uint32_t fragments[row_tiles][4];
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) fragments[i][r] = ptx::to_tf32(a[i][step][r % 2 * 2 + r / 2]);
        }
#pragma unroll
        for (int j = 0; j < column_tiles; j += 2) {
          uint32_t pair[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int at = Lines::further(first[r % 2], step * 8, (j + r / 2) * 2);
            pair[r] = *reinterpret_cast<const uint32_t*>(b + at);
          }
          round(pair);
          multiply_pair<row_tiles, column_tiles>(sums, fragments, pair, j);
        }
      }
    } else if constexpr (kTensorCores) {
      const int first = ptx::anew(Lines::offset(lane % 16, lane / 16));
#pragma unroll
      for (int step = 0; step < depth_tiles / 2; ++step) {
        uint32_t fragments[row_tiles][4];
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const C(&tile)[4] = a[i][step * 2 + r / 2];
            const C values[2] = {tile[r % 2 * 2], tile[r % 2 * 2 + 1]};
            const auto rounded = round_to<T>(values);
            memcpy(&fragments[i][r], &rounded, 4);
          }
        }
#pragma unroll
        for (int j = 0; j < column_tiles; j += 2) {
          uint32_t pair[4];
          ptx::ldmatrix<4, true>(pair, b + Lines::further(first, step * 16, j));
          multiply_pair<row_tiles, column_tiles>(sums, fragments, pair, j);
        }
      }
    } else {
      constexpr int pitch = kStagingPitch<depth_tiles * 8>;
      __syncwarp();  // the last values have been read
      for_each<1, depth_tiles>(
          [&](int, int j, int e) { staging[(row + e / 2 * 8) * pitch + j * 8 + column + e % 2] = a[0][j][e]; });
      __syncwarp();
#pragma unroll 1
      for (int k = 0; k < depth_tiles * 8; ++k) {
        const C a0 = staging[row * pitch + k], a1 = staging[(row + 8) * pitch + k];
        const int first = Lines::offset(k, column / kWidth) + column % kWidth * int(sizeof(T));
#pragma unroll
        for (int j = 0; j < column_tiles; ++j) {
          if (j * 8 < size) {
            const auto values = load<2>(reinterpret_cast<const T*>(b + Lines::further(first, 0, j * 8 / kWidth)));
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[0][j][e] += (e < 2 ? a0 : a1) * values.element[e % 2];
          }
        }
      }
    }
  }

 private:
  // pair: fragments of b for two tiles of columns.
  template <int row_tiles, int column_tiles>
  static __device__ __forceinline__ void multiply_pair(Sums<C, row_tiles, column_tiles>& sums,
                                                       const uint32_t (&a)[row_tiles][4], const uint32_t (&pair)[4],
                                                       int j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t b[2] = {pair[r * 2], pair[r * 2 + 1]};
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) ptx::mma<T>(sums[i][j + r], a[i], b);
    }
  }
};

// What is known about a kernel at compile time.
template <class T_, Arithmetic arithmetic, int bucket_, bool plain, Pass pass>
struct Traits {
  using T = T_;
  using C = Compute<T>;
  using Product = Products<T, arithmetic, bucket_>;
  using Lines = typename Product::Lines;
  static constexpr AttentionDivision kDivision = attention_division(pass, arithmetic, bucket_, plain);
  static constexpr bool kPlain = plain;
  static constexpr int kRows = kDivision.rows(), kColumns = kDivision.columns, kThreads = kDivision.threads();
  static constexpr int kBlocks = kDivision.blocks;
  static constexpr int kRowTiles = kDivision.row_tiles, kColumnTiles = kColumns / 8;
  static constexpr int kWarpRows = kRowTiles * 16;
  static constexpr int kAccumulated = kDivision.accumulated, kHalves = bucket_ / kAccumulated;
  static constexpr int kAccumulatedBytes = kAccumulated * int(sizeof(T));
  // A block of keys makes both gradients if their sums have 128 registers at most.
  static constexpr bool kBoth = kRowTiles * kAccumulated * int(sizeof(C)) <= 512;
  static constexpr int kParts = kBoth ? kHalves : kHalves * 2;
  static constexpr int kLineBytes = Product::kLineBytes;
  static constexpr int kRowBytes = kRows * kLineBytes, kColumnBytes = kColumns * kLineBytes;
  // The forward's two operands of columns have turns, a backward's are both there in each of two stages, with the
  // queries' statistics for gradients of keys.
  static constexpr bool kForward = pass == Pass::output;
  static constexpr int kStatisticBytes = pass == Pass::key_gradient ? kColumns * int(sizeof(C)) : 0;
  static constexpr int kStageBytes = (kColumnBytes + kStatisticBytes) * 2;
  static constexpr int kStaging = (kRowBytes + kStageBytes) * (kForward ? 1 : 2);
  static constexpr int kWarpStaging = Product::template kStagingBytes<kColumns>;
  static constexpr int kBytes = kStaging + kDivision.warps * kWarpStaging;

  static_assert(kBytes <= 162 * 1024, "what an A100 has, less the arrays of constant size");
  static_assert(kAccumulatedBytes % 128 == 0 || kHalves == 1, "halves of a line are swizzled alike");
  static_assert(Product::kTensorCores || kRowTiles == 1, "CUDA cores' rows of a warp");

  using ScoreSums = Sums<C, kRowTiles, kColumnTiles>;
  using OutputSums = Sums<C, kRowTiles, kAccumulated / 8>;

  static __device__ __forceinline__ C* staging(char* shared) {
    return reinterpret_cast<C*>(shared + kStaging + threadIdx.x / 32 * kWarpStaging);
  }
};

template <class T, Arithmetic arithmetic, int bucket, bool plain, Pass pass>
using TraitsOf = Traits<T, arithmetic, bucket, plain && attention_has_plain(pass, arithmetic, bucket), pass>;

// ---- Copies ---------------------------------------------------------------------------------------------------------

// How a block's threads share the chunks of lines in shared memory.
template <class Lines, int threads>
struct Share {
  static constexpr int kChunks = Lines::kLineChunks, kAcross = kChunks < threads ? kChunks : threads;
  static constexpr int kStep = threads / kAcross;  // lines that are copied at once

  // The thread's first element of rows.
  template <class T>
  static __device__ __forceinline__ const T* first(const T* rows, int64_t stride) {
    return rows + threadIdx.x / kAcross * stride + threadIdx.x % kAcross * Lines::kWidth;
  }
};

// Starts to copy rows of `size` elements to shared memory, with zeros after a row's end, and for rows from `count` on.
// source: the thread's first element.
template <class Lines, int lines, int threads, class T>
__device__ __forceinline__ void copy_rows(char* to, const T* source, const View<const T>& view, int count, int size) {
  using Mine = Share<Lines, threads>;
  constexpr int width = Lines::kWidth;
  const int first_line = threadIdx.x / Mine::kAcross, first_chunk = threadIdx.x % Mine::kAcross;
  static_assert(lines % Mine::kStep == 0 || Mine::kStep % lines == 0);
  if (view.vectors) {
    if (Mine::kStep > lines && first_line >= lines) return;  // more threads than chunks
#pragma unroll
    for (int more = 0; more < Mine::kChunks; more += Mine::kAcross) {
      const int chunk = first_chunk + more;
      const int bytes = max(0, min(width, size - chunk * width)) * int(sizeof(T));
      const T* from = source + more * width;
#pragma unroll 2  // addresses of all would take registers
      for (int line = 0; line < lines; line += Mine::kStep, from += Mine::kStep * view.row_stride) {
        ptx::cp_async16(to + Lines::offset(first_line + line, chunk), from, first_line + line < count ? bytes : 0);
      }
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < lines * Mine::kChunks; i += threads) {
      const int line = i / Mine::kChunks, chunk = i % Mine::kChunks;
      const T* from = source + (line - first_line) * view.row_stride + (chunk - first_chunk) * width;
      Chunk<T> values;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        values.element[k] = line < count && chunk * width + k < size ? from[k] : T(0.f);
      }
      *reinterpret_cast<Chunk<T>*>(to + Lines::offset(line, chunk)) = values;
    }
  }
}

// Stores a warp's sums, times a factor for each of its rows' halves of tiles, as `count` rows of `size` elements from
// first_column on. By way of the warp's lines in shared memory, which no other warp reads any more.
template <class Traits, class Factor>
__device__ __forceinline__ void store_rows(typename Traits::T* to, const View<typename Traits::T>& view, char* lines,
                                           int count, int size, int first_column,
                                           const typename Traits::OutputSums& sums, const Factor& factor) {
  using T = typename Traits::T;
  using C = Compute<T>;
  using Lines = typename Traits::Lines;
  constexpr int width = Lines::kWidth, chunks = Traits::kAccumulated / width;
  const int first_chunk = first_column / width;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kAccumulated / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const C times = factor(i, half);
        const C pair[2] = {sums[i][j][half * 2] * times, sums[i][j][half * 2 + 1] * times};
        const int column = j * 8 + lane_column();
        char* at = lines + Lines::offset(i * 16 + half * 8 + lane_row(), first_chunk + column / width);
        store(reinterpret_cast<T*>(at) + column % width, pair);
      }
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < Traits::kWarpRows * chunks; i += 32) {
    const int line = i / chunks, chunk = first_chunk + i % chunks;
    if (line >= count || chunk * width >= size) continue;
    const auto values = *reinterpret_cast<const Chunk<T>*>(lines + Lines::offset(line, chunk));
    T* target = to + line * view.row_stride + chunk * width;
    if (view.vectors && (chunk + 1) * width <= size) {
      *reinterpret_cast<Chunk<T>*>(target) = values;
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (chunk * width + k < size) target[k] = values.element[k];
      }
    }
  }
}

// ---- Scores ---------------------------------------------------------------------------------------------------------

// The query and the key of a lane's first element of sums, and those of others; transposed: rows are keys.
template <bool transposed>
struct Place {
  int query, key;

  __device__ __forceinline__ Place(int query0, int key0) {
    const int lane = ptx::anew(threadIdx.x % 32), row = lane / 4, column = lane % 4 * 2;
    query = ptx::anew(query0) + (transposed ? column : row);
    key = key0 + (transposed ? row : column);
  }
  static __device__ __forceinline__ constexpr int queries(int i, int j, int e) {
    return transposed ? j * 8 + e % 2 : i * 16 + e / 2 * 8;
  }
  static __device__ __forceinline__ constexpr int keys(int i, int j, int e) {
    return transposed ? i * 16 + e / 2 * 8 : j * 8 + e % 2;
  }
};

// Makes scores of products. scaled: multiply by the scale, all: each query sees each key.
template <bool transposed, bool plain, class T, int row_tiles, int column_tiles>
__device__ __forceinline__ void change_scores(Sums<Compute<T>, row_tiles, column_tiles>& s, const Task<T>& task,
                                              const Block& block, int head, int query0, int key0, bool scaled,
                                              bool all) {
  using C = Compute<T>;
  using At = Place<transposed>;
  auto each = [&](const auto& function) {
    for_each<row_tiles, column_tiles>(
        [&](int i, int j, int e) { s[i][j][e] = function(s[i][j][e], At::queries(i, j, e), At::keys(i, j, e)); });
  };
  if (scaled) each([&](C z, int, int) { return rounded_product(z, task.scale); });
  if (!plain && task.mask_kind != kNoMask) {
    const At at(query0, key0);
    const int queries_left = block.queries - at.query, keys_left = block.keys - at.key;
    const int64_t first = block.batch * task.mask_batch_stride + head * task.mask_head_stride +
                          at.query * task.mask_row_stride + at.key * task.mask_column_stride;
    auto masked = [&](const auto* mask, const auto& function) {
      each([&](C z, int query, int key) {
        if (query >= queries_left || key >= keys_left) return z;
        return function(z, mask[first + query * task.mask_row_stride + key * task.mask_column_stride]);
      });
    };
    auto add = [](C z, auto value) { return z + widen(value); };
    if (task.mask_kind == kBooleanMask) {
      masked(static_cast<const uint8_t*>(task.mask), [](C z, uint8_t seen) { return seen ? z : -kInfinity<C>; });
    } else if (std::is_same_v<T, C> || task.mask_kind == kWideAdditiveMask) {
      masked(static_cast<const C*>(task.mask), add);
    } else {
      masked(static_cast<const T*>(task.mask), add);
    }
  }
  if (!plain && task.slopes) {
    const At at(query0, key0);
    const C slope = task.slopes[block.batch * task.slopes_batch_stride + head];
    const C distance = C(at.query + block.shift - at.key);
    each([&](C z, int query, int key) {
      const C further = distance + C(query - key);
      return z - slope * (further < 0 ? -further : further);
    });
  }
  if (!all) {
    const At at(query0, key0);
    const int keys_left = block.keys - at.key, before = at.query + block.shift - at.key + task.right;
    const unsigned window = unsigned(task.left + task.right);
    each([&](C z, int query, int key) {
      return key < keys_left && unsigned(before + query - key) <= window ? z : -kInfinity<C>;
    });
  }
}

// The columns that any row of a warp's sees, and those that all do: ends not included. transposed: rows are keys.
struct Seen {
  int begin, end, all_begin, all_end;

  template <bool transposed, class T>
  static __device__ __forceinline__ Seen of(const Task<T>& task, const Block& block, int first, int last) {
    if (first > last) return {0, 0, 0, 0};
    if (transposed) {
      const int before = task.right + block.shift, after = task.left - block.shift;
      return {max(0, first - before), min(block.queries, last + after + 1), last - before, first + after + 1};
    }
    const int before = task.left - block.shift, after = task.right + block.shift;
    return {max(0, first - before), min(block.keys, last + after + 1), last - before,
            min(block.keys, first + after + 1)};
  }
};

// Multiplies by dropout's factors what `multiply(i, j, e, factor)` is told. The four words of a counter belong to four
// queries, which neighbouring lanes have: each lane makes one counter's words and hands on what others need.
template <bool transposed, int row_tiles, int column_tiles, class T, class Multiply>
__device__ __forceinline__ void drop(const Task<T>& task, const Block& block, int head, int query0, int key0,
                                     const Multiply& multiply) {
  const uint64_t seed = uint64_t(*task.seed);
  const uint32_t line = uint32_t(block.batch * task.heads + head);
  const Place<transposed> at(query0, key0);
#pragma unroll
  for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
    for (int j = 0; j < column_tiles; ++j) {
      uint32_t kept = 0;  // a bit for each element
      if constexpr (transposed) {
        // Two lanes have a counter's queries, for two keys: each makes the words of one.
        const int own = threadIdx.x % 2;
        uint32_t words[4] = {uint32_t(at.key + i * 16 + own * 8), uint32_t(at.query + j * 8) / 4, line, 0};
        philox(words, seed);
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const uint32_t mine = own ? words[2 + column] : words[column];
          const uint32_t others = __shfl_xor_sync(0xffffffffu, own ? words[column] : words[2 + column], 1);
          kept |= uint32_t(mine >= task.threshold) << (own * 2 + column);
          kept |= uint32_t(others >= task.threshold) << ((1 - own) * 2 + column);
        }
      } else {
        // Four lanes have a counter's queries, for four elements: each makes the words of one.
        const int own = lane_row() % 4, query = at.query + i * 16 + own / 2 * 8;
        uint32_t words[4] = {uint32_t(at.key + j * 8 + own % 2), uint32_t(query) / 4, line, 0};
        philox(words, seed);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int other = own ^ k;
          const uint32_t low = other % 2 ? words[1] : words[0], high = other % 2 ? words[3] : words[2];
          const uint32_t word = __shfl_xor_sync(0xffffffffu, other / 2 ? high : low, k * 4);
          kept |= uint32_t(word >= task.threshold) << other;
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) multiply(i, j, e, kept >> e & 1 ? task.kept : Compute<T>(0));
    }
  }
}

// ---- Host -----------------------------------------------------------------------------------------------------------

// Calls function<T, arithmetic, bucket, plain>().
template <class Function>
void dispatch_attention(const char* name, int dtype, bool allow_tf32, const AttentionShape& shape,
                        const AttentionScores& scores, const Function& function) {
  const int64_t size = std::max(shape.size, shape.value_size);
  const bool plain = scores.mask_kind == kNoMask && !scores.slopes && scores.dropout == 0 && scores.scale > 0;
  dispatch_dtype(name, dtype, [&]<class T>() {
    auto call = [&]<Arithmetic arithmetic, int... buckets>() {
      const int bucket = attention_bucket(arithmetic, size);
      auto call_bucket = [&]<int one>() {
        plain ? function.template operator()<T, arithmetic, one, true>()
              : function.template operator()<T, arithmetic, one, false>();
      };
      ((bucket == buckets ? call_bucket.template operator()<buckets>() : void()), ...);
    };
    if constexpr (sizeof(T) == 2) {
      call.template operator()<Arithmetic::half, 32, 64, 128, 256>();
    } else if constexpr (std::is_same_v<T, double>) {
      call.template operator()<Arithmetic::float64, 64, 256>();
    } else if (allow_tf32 && size <= 128) {
      call.template operator()<Arithmetic::tf32, 64, 128>();
    } else {
      call.template operator()<Arithmetic::float32, 64, 256>();
    }
  });
}

template <class T, class Pointer>
View<T> view_of(const Heads<Pointer>& heads) {
  const auto strides = heads.batch_stride | heads.row_stride | heads.head_stride;
  return {static_cast<T*>(heads.data), heads.batch_stride, heads.row_stride, heads.head_stride,
          aligned(16, heads.data) && strides * int64_t(sizeof(T)) % 16 == 0};
}

inline void check_attention(const char* name, const AttentionShape& shape, const AttentionScores& scores) {
  require(shape.group >= 1 && shape.heads % shape.group == 0, name, "group", shape.group, "a divisor of heads");
  for (const auto& [argument, size] :
       {std::pair("queries", shape.queries), std::pair("keys", shape.keys),
        std::pair("longest_queries", shape.longest_queries), std::pair("longest_keys", shape.longest_keys),
        std::pair("batch", shape.batch), std::pair("heads", shape.heads)}) {
    require(size >= 1 && size < kMostRows, name, argument, size, "1 to 2^28 - 1");
  }
  require(shape.batch * shape.heads < kMostRows, name, "batch * heads", shape.batch * shape.heads, "less than 2^28");
  for (const auto& [argument, size] : {std::pair("size", shape.size), std::pair("value_size", shape.value_size)}) {
    require(size >= 1 && size <= 256, name, argument, size, "1 to 256");
  }
  require(bool(shape.query_offsets) == bool(shape.key_offsets), name, "key_offsets", shape.key_offsets,
          "given with query_offsets, or null");
  require(scores.mask_kind >= kNoMask && scores.mask_kind < kMaskKinds, name, "mask_kind", scores.mask_kind,
          "0 (none), 1 (boolean), 2 (additive) or 3 (additive, as computed in)");
  require(scores.mask_kind == kNoMask || scores.mask, name, "mask", scores.mask, "an address");
  require(scores.dropout >= 0 && scores.dropout <= 1, name, "dropout", scores.dropout, "0 to 1");
  require(scores.dropout == 0 || scores.seed, name, "seed", scores.seed, "an address, with dropout");
}

template <class T, class Arguments>
Task<T> task_of(const Arguments& arguments) {
  const AttentionShape& shape = arguments.shape;
  const AttentionScores& scores = arguments.scores;
  auto limit = [](int64_t keys) { return int(keys < 0 ? kUnlimited : std::min<int64_t>(keys, kUnlimited)); };
  Task<T> task{};
  task.query = view_of<const T>(arguments.query);
  task.key = view_of<const T>(arguments.key);
  task.value = view_of<const T>(arguments.value);
  task.heads = int(shape.heads);
  task.group = int(shape.group);
  task.queries = int(shape.queries);
  task.keys = int(shape.keys);
  task.size = int(shape.size);
  task.value_size = int(shape.value_size);
  task.query_offsets = shape.query_offsets;
  task.key_offsets = shape.key_offsets;
  task.longest_queries = int(shape.longest_queries);
  task.longest_keys = int(shape.longest_keys);
  task.left = limit(scores.left);
  task.right = limit(scores.right);
  task.bottom_right = scores.bottom_right;
  task.scale = Compute<T>(scores.scale);
  task.scaled = scores.mask_kind != kNoMask || scores.slopes || !(scores.scale > 0);
  task.unit = Compute<T>(task.scaled ? kLog2E : kLog2E * scores.scale);
  task.mask_kind = scores.mask_kind;
  task.mask = scores.mask;
  task.mask_batch_stride = scores.mask_batch_stride;
  task.mask_head_stride = scores.mask_head_stride;
  task.mask_row_stride = scores.mask_row_stride;
  task.mask_column_stride = scores.mask_column_stride;
  task.slopes = static_cast<const Compute<T>*>(scores.slopes);
  task.slopes_batch_stride = scores.slopes_batch_stride;
  task.seed = scores.dropout > 0 ? scores.seed : nullptr;
  task.threshold = dropout_threshold(scores.dropout);
  task.kept = Compute<T>(dropout_kept(scores.dropout));
  return task;
}

// A launch of `blocks` blocks for each sequence and head.
inline Shape grid_of(const char* name, int64_t sequences_heads, int64_t blocks, int threads, size_t bytes,
                     cudaStream_t stream) {
  const int64_t total = sequences_heads * blocks;
  require(total <= INT32_MAX, name, "blocks", total, "less than 2^31");
  return Shape(dim3(unsigned(total)), dim3(unsigned(threads)), bytes, stream);
}

}  // namespace fastdl::cuda::flash
