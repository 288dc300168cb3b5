// The matmul of compute capability 8.0 and up: C[rows, columns] = A[rows, depth] * B[columns, depth]^T, on tensor cores
// for 16-bit types and tf32, else on CUDA cores. The main loop is here; what becomes of the sums is in epilogue.cuh.
//
// A block computes one tile. Its operands go through a ring of stages in shared memory, filled by cp.async well ahead;
// each warp reads its fragments one step ahead of the products. Shared memory is swizzled, 16 bytes (a chunk) at a
// time, so that neither copies nor fragments meet bank conflicts.
#pragma once
#include "epilogue.cuh"
#include "ptx.cuh"
#include "tiles.h"

namespace fastdl::cuda {

// Which of an operand's dimensions is contiguous in shared memory, and in global memory if that is copied by chunks.
enum class Layout { depth, rows };

// A matrix [rows, depth]; rows are the product's rows or columns.
template <class T>
struct Operand {
  const T* data;
  int64_t rows, row_stride, depth_stride;
  bool vectors;  // of 16 bytes along the layout's dimension; else any strides, with Layout::depth and a flexible tile
};

// A product; a kernel's argument.
template <class T>
struct Product {
  Operand<T> a, b;
  Operand<T> saved;     // like a
  Activation gradient;  // A = a * gradient'(saved); none: A = a, and saved is not read
  Compute<T> parameter;
  int64_t depth, split_depth;    // split i begins at i * split_depth
  T* row_sums;                   // [a.rows] of A, or null
  Compute<T>* partial_row_sums;  // [splits, a.rows] if split, else null
  Epilogue<T> epilogue;
};

template <class T>
using Chunk = Vector<T, 16 / sizeof(T)>;

__device__ __forceinline__ float float_of(uint32_t bits) { return __int_as_float(int(bits)); }

// Not inlined, as activate_values.
template <class T>
[[gnu::noinline]] __device__ Chunk<T> gradient_chunk(Chunk<T> gradient, Chunk<T> saved, Activation kind,
                                                     Compute<T> parameter) {
  constexpr int width = 16 / sizeof(T);
  Compute<T> values[width];
  with_activation(kind, [&]<Activation activation>() {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      values[i] = activate_backward<activation, T>(widen(gradient.element[i]), widen(saved.element[i]), parameter);
    }
  });
  Chunk<T> result;
  store(result.element, values);
  return result;
}

// One operand's part of a stage: `size` rows of the product. Lines of chunks: a line is a row, or with Layout::rows one
// step of depth.
template <class T, Layout layout, int size, int depth_bytes, int threads>
struct StageTile {
  static constexpr int kWidth = 16 / sizeof(T);                // elements in a chunk
  static constexpr int kDepth = depth_bytes / int(sizeof(T));  // elements
  static constexpr int kLines = layout == Layout::depth ? size : kDepth;
  static constexpr int kLineChunks = size * kDepth / kLines / kWidth;
  static constexpr int kBytes = size * depth_bytes;
  static constexpr int kStep = threads / kLineChunks;  // lines that all threads copy at once
  static constexpr int kCopies = kLines / kStep;       // chunks that a thread copies
  static_assert(threads % kLineChunks == 0 && kLines % kStep == 0, "all threads copy equally");

  // Where a chunk lies, in bytes. ldmatrix reads the same chunk of 8 lines, the CUDA cores that of 4 or 8: these must
  // lie in different groups of banks, of which 128 bytes have 8. Larger elements by rows are read in other ways: tf32
  // by 4 bytes, 2 chunks of 4 lines together, and a line's neighbouring chunks by the CUDA cores.
  static constexpr bool kPairs = layout == Layout::rows && sizeof(T) >= 4;
  static constexpr int kPeriod = kPairs ? 4 : 8;  // lines after which the pattern repeats
  static __device__ __forceinline__ int offset(int line, int chunk) {
    chunk ^= kLineChunks == 4 ? line / 2 % 4 : kPairs ? line % 4 * 2 : line % 8;
    return (line * kLineChunks + chunk) * 16;
  }
  static_assert(kStep % kPeriod == 0, "a thread's chunks lie at equal distances");

  // The offset of a chunk that is `lines` (a multiple of kPeriod) and `chunks` (whose bits are 0 in the first's chunk)
  // further on. With constants that is an exclusive or of few values, and an address's constant part.
  static __device__ __forceinline__ int further(int first, int lines, int chunks) {
    constexpr int swizzled = kLineChunks < 8 ? kLineChunks : 8;
    return (first ^ chunks % swizzled * 16) + (lines * kLineChunks + chunks / swizzled * swizzled) * 16;
  }

  // The sum over the depth of one row.
  static __device__ __forceinline__ Compute<T> sum_row(const char* stage, int row) {
    Compute<T> sum = 0;
    if constexpr (layout == Layout::depth) {
#pragma unroll 1
      for (int chunk = 0; chunk < kLineChunks; ++chunk) {
        const auto values = *reinterpret_cast<const Vector<T, kWidth>*>(stage + offset(row, chunk));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum += widen(values.element[i]);
      }
    } else {
#pragma unroll 4
      for (int depth = 0; depth < kDepth; ++depth) {
        sum += widen(reinterpret_cast<const T*>(stage + offset(depth, row / kWidth))[row % kWidth]);
      }
    }
    return sum;
  }
};

__device__ __forceinline__ int clamp(int64_t value, int most) {
  return value < 0 ? 0 : value < most ? int(value) : most;
}

// A thread's place in an operand's copies from global memory.
template <class Stage, class T, Layout layout>
struct Copier {
  const Operand<T>& operand;
  const T* source;  // the thread's first chunk of the next stage
  int limit;        // Layout::depth: lines from the thread's first that are inside; else bytes of its chunks that are

  __device__ __forceinline__ Copier(const Operand<T>& operand, int64_t first_row, int64_t first_depth)
      : operand(operand) {
    const int line = threadIdx.x / Stage::kLineChunks, chunk = threadIdx.x % Stage::kLineChunks;
    if constexpr (layout == Layout::depth) {
      source = operand.data + (first_row + line) * operand.row_stride + first_depth + chunk * Stage::kWidth;
      limit = clamp(operand.rows - first_row - line, Stage::kLines);
    } else {
      const int64_t row = first_row + chunk * Stage::kWidth;
      source = operand.data + row + (first_depth + line) * operand.depth_stride;
      limit = clamp((operand.rows - row) * int64_t(sizeof(T)), 16);
    }
  }

  // Starts to copy the next stage, of which depth_left are inside.
  __device__ __forceinline__ void operator()(char* stage, int depth_left) {
    const int line = threadIdx.x / Stage::kLineChunks, chunk = threadIdx.x % Stage::kLineChunks;
    char* destination = stage + Stage::offset(line, chunk);
    int lines = limit, bytes = limit;
    if constexpr (layout == Layout::depth) {
      bytes = max(0, min(Stage::kWidth, depth_left - chunk * Stage::kWidth)) * int(sizeof(T));
    } else {
      lines = depth_left - line;
    }
    const int64_t line_stride = layout == Layout::depth ? operand.row_stride : operand.depth_stride;
    const T* from = source;  // moved along: offsets of all lines would take registers
#pragma unroll
    for (int i = 0; i < Stage::kCopies; ++i, from += Stage::kStep * line_stride) {
      ptx::cp_async16(destination + i * Stage::kStep * Stage::kLineChunks * 16, from,
                      i * Stage::kStep < lines ? bytes : 0);
    }
    source += Stage::kDepth * (layout == Layout::depth ? 1 : operand.depth_stride);
  }
};

// Loads a stage of A or B, with Layout::depth, element by element; A = operand * activation'(saved) if that is there.
template <class Stage, class T, int threads>
__device__ __forceinline__ void load_elements(char* stage, const Operand<T>& operand, const Operand<T>* saved,
                                              const Product<T>& product, int64_t first_row, int64_t first_depth,
                                              int depth_left) {
  constexpr int width = Stage::kWidth;
  const bool along_rows = operand.row_stride == 1;  // then neighbouring threads take neighbouring rows
#pragma unroll 1
  for (int i = threadIdx.x; i < Stage::kLines * Stage::kLineChunks; i += threads) {
    const int line = along_rows ? i % Stage::kLines : i / Stage::kLineChunks;
    const int chunk = along_rows ? i / Stage::kLines : i % Stage::kLineChunks;
    const int64_t row = first_row + line;
    auto gather = [&](const Operand<T>& matrix) {
      const T* source = matrix.data + row * matrix.row_stride + (first_depth + chunk * width) * matrix.depth_stride;
      Chunk<T> values;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const bool inside = row < matrix.rows && chunk * width + j < depth_left;
        values.element[j] = inside ? source[j * matrix.depth_stride] : T(0.f);
      }
      return values;
    };
    Chunk<T> values = gather(operand);
    if (saved) values = gradient_chunk<T>(values, gather(*saved), product.gradient, product.parameter);
    *reinterpret_cast<Chunk<T>*>(stage + Stage::offset(line, chunk)) = values;
  }
}

// ---- Products of a warp ---------------------------------------------------------------------------------------------

// The sums of one warp, [tile.warp_rows, tile.warp_columns], and its fragments of both operands for one step of depth.
// first_row, first_column: of the warp in the block's tile.

// On tensor cores; a step is 32 bytes deep: 16 elements, or 8 of tf32.
template <class T, TileName name, class StageA, class StageB, Layout layout_a, Layout layout_b>
struct TensorCores {
  static constexpr Tile tile = kTiles[int(name)];
  static constexpr int kSteps = tile.depth_bytes / 32, kUnroll = kSteps;
  static constexpr bool kTf32 = std::is_same_v<T, float>;
  // Fragments are loaded one step ahead; but tf32 by rows is loaded by words, whose addresses take the registers.
  static constexpr bool kAhead = !kTf32 || (layout_a == Layout::depth && layout_b == Layout::depth);
  static constexpr int kRowTiles = tile.warp_rows / 16, kColumnTiles = tile.warp_columns / 8;

  struct Fragments {
    uint32_t a[kRowTiles][4], b[kColumnTiles][2];
  };
  float sum[kRowTiles][kColumnTiles][4] = {};
  int lane = threadIdx.x % 32;
  int first_a, first_b;  // offsets in a stage of what this lane reads first

  __device__ __forceinline__ TensorCores(int first_row, int first_column) {
    constexpr int width = StageA::kWidth;
    const int quarter = lane / 8, within = lane % 8;
    if constexpr (layout_a == Layout::depth) {
      first_a = StageA::offset(first_row + lane % 16, lane / 16);
    } else if constexpr (kTf32) {
      first_a = StageA::offset(lane % 4, first_row / width + lane / 16) + lane / 4 % 4 * 4;
    } else {
      first_a = StageA::offset(quarter / 2 * 8 + within, first_row / width + quarter % 2);
    }
    if constexpr (layout_b == Layout::depth) {
      first_b = StageB::offset(first_column + quarter / 2 * 8 + within, quarter % 2);
    } else if constexpr (kTf32) {
      first_b = StageB::offset(lane % 4, first_column / width + lane / 16) + lane / 4 % 4 * 4;
    } else {
      first_b = StageB::offset(quarter % 2 * 8 + within, first_column / width + quarter / 2);
    }
  }

  __device__ __forceinline__ void load(Fragments& fragments, const char* a, const char* b, int step) const {
    constexpr int width = StageA::kWidth, depth = 2 * width;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if constexpr (layout_a == Layout::depth) {
        ptx::ldmatrix(fragments.a[i], a + StageA::further(first_a, i * 16, step * 2));
      } else if constexpr (!kTf32) {
        ptx::ldmatrix<4, true>(fragments.a[i], a + StageA::further(first_a, step * depth, i * 2));
      } else {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int at = StageA::further(first_a, step * depth + r / 2 * 4, i * 4 + r % 2 * 2);
          fragments.a[i][r] = *reinterpret_cast<const uint32_t*>(a + at);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t pair[4];  // of tiles
      if constexpr (layout_b == Layout::depth) {
        ptx::ldmatrix(pair, b + StageB::further(first_b, j * 8, step * 2));
      } else if constexpr (!kTf32) {
        ptx::ldmatrix<4, true>(pair, b + StageB::further(first_b, step * depth, j));
      } else {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int at = StageB::further(first_b, step * depth + r % 2 * 4, j * 2 + r / 2 * 2);
          pair[r] = *reinterpret_cast<const uint32_t*>(b + at);
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) fragments.b[j + r / 2][r % 2] = pair[r];
    }
  }

  __device__ __forceinline__ void multiply(Fragments& fragments) {
    if constexpr (kTf32) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) fragments.a[i][r] = ptx::to_tf32(float_of(fragments.a[i][r]));
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) fragments.b[j][r] = ptx::to_tf32(float_of(fragments.b[j][r]));
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        // Back and forth, so that neighbouring products share a fragment.
        const int column_tile = i % 2 ? kColumnTiles - 1 - j : j;
        ptx::mma<T>(sum[i][column_tile], fragments.a[i], fragments.b[column_tile]);
      }
    }
  }

  __device__ __forceinline__ void stage_sums(float* staging) const {
    constexpr int pitch = tile.warp_columns + kStagingPadding;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float pair[2] = {sum[i][j][half * 2], sum[i][j][half * 2 + 1]};
          store(staging + (i * 16 + half * 8 + lane / 4) * pitch + j * 8 + lane % 4 * 2, pair);
        }
      }
    }
  }
};

// On CUDA cores, for float and double; a step is a chunk deep. A warp is 4 x 8 lanes.
template <class T, TileName name, class StageA, class StageB, Layout layout_a, Layout layout_b>
struct CudaCores {
  static constexpr Tile tile = kTiles[int(name)];
  static constexpr int kSteps = tile.depth_bytes / 16;
  static constexpr int kUnroll = sizeof(T) == 8 ? 1 : kSteps;  // registers for one step of float64
  static constexpr bool kAhead = false;  // the products of one step hide the loads of the next as it is
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kRows = tile.warp_rows / 4, kColumns = tile.warp_columns / 8;

  struct Fragments {
    T a[kRows][kWidth], b[kColumns][kWidth];
  };
  T sum[kRows][kColumns] = {};
  int lane_row = threadIdx.x % 32 / 8, lane_column = threadIdx.x % 8, first_row, first_column;

  __device__ __forceinline__ CudaCores(int first_row, int first_column)
      : first_row(first_row), first_column(first_column) {}

  // The row (or column) of the warp that a lane's i-th is: lanes take neighbouring chunks of what is contiguous.
  template <Layout layout, int lanes>
  static __device__ __forceinline__ int index(int i, int lane) {
    return layout == Layout::depth ? i * lanes + lane : i / kWidth * kWidth * lanes + lane * kWidth + i % kWidth;
  }

  template <class Stage, Layout layout, int lanes, int count>
  static __device__ __forceinline__ void load_operand(T (&values)[count][kWidth], const char* stage, int first,
                                                      int lane, int step) {
    if constexpr (layout == Layout::depth) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const auto chunk =
            *reinterpret_cast<const Chunk<T>*>(stage + Stage::offset(first + index<layout, lanes>(i, lane), step));
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[i][k] = chunk.element[k];
      }
    } else {
#pragma unroll
      for (int i = 0; i < count; i += kWidth) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const auto chunk = *reinterpret_cast<const Chunk<T>*>(
              stage + Stage::offset(step * kWidth + k, (first + index<layout, lanes>(i, lane)) / kWidth));
#pragma unroll
          for (int j = 0; j < kWidth; ++j) values[i + j][k] = chunk.element[j];
        }
      }
    }
  }

  __device__ __forceinline__ void load(Fragments& fragments, const char* a, const char* b, int step) const {
    load_operand<StageA, layout_a, 4>(fragments.a, a, first_row, lane_row, step);
    load_operand<StageB, layout_b, 8>(fragments.b, b, first_column, lane_column, step);
  }

  __device__ __forceinline__ void multiply(Fragments& fragments) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] += fragments.a[i][k] * fragments.b[j][k];
      }
    }
  }

  __device__ __forceinline__ void stage_sums(T* staging) const {
    constexpr int pitch = tile.warp_columns + kStagingPadding;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        staging[index<layout_a, 4>(i, lane_row) * pitch + index<layout_b, 8>(j, lane_column)] = sum[i][j];
      }
    }
  }
};

// ---- The kernel -----------------------------------------------------------------------------------------------------

// How many rows of tiles go down before the next column: those that run at the same time make a square, which shares
// most operands in L2.
constexpr int64_t kTileGroup = 16;

template <TileName name>
constexpr int kTileThreads = kTiles[int(name)].threads();

// Neighbouring columns that a thread ends at once.
template <class T>
constexpr int kEndWidth = 32 / sizeof(Compute<T>);

// What a kernel computes with: its parts of a stage and its warps' products.
template <class T, bool tensor_cores, TileName name, Layout layout_a, Layout layout_b>
struct Parts {
  static constexpr Tile tile = kTiles[int(name)];
  using StageA = StageTile<T, layout_a, tile.rows, tile.depth_bytes, kTileThreads<name>>;
  using StageB = StageTile<T, layout_b, tile.columns, tile.depth_bytes, kTileThreads<name>>;
  using Warp = std::conditional_t<tensor_cores, TensorCores<T, name, StageA, StageB, layout_a, layout_b>,
                                  CudaCores<T, name, StageA, StageB, layout_a, layout_b>>;
};

// The first row and column of this block's tile of a product.
template <TileName name>
struct TilePlace {
  int64_t row, column;

  __device__ __forceinline__ explicit TilePlace(int64_t rows) {
    constexpr Tile tile = kTiles[int(name)];
    const int64_t row_tiles = (rows + tile.rows - 1) / tile.rows;
    const int64_t group_tiles = kTileGroup * (gridDim.x / row_tiles);
    const int64_t group = blockIdx.x / group_tiles * kTileGroup, in_group = blockIdx.x % group_tiles;
    const int64_t group_rows = min(row_tiles - group, kTileGroup);
    row = (group + in_group % group_rows) * tile.rows;
    column = in_group / group_rows * tile.columns;
  }
};

// The same of a warp in its block's tile.
template <TileName name>
struct WarpPlace {
  static constexpr Tile tile = kTiles[int(name)];
  int warp = threadIdx.x / 32, row = warp % (tile.rows / tile.warp_rows) * tile.warp_rows;
  int column = warp / (tile.rows / tile.warp_rows) * tile.warp_columns;
};

// The main loop: sums of all steps. load_stage(step) starts to fill a step's stage, of which the first StageA::kBytes
// are A's and B's follow. wait_for(step) waits until it is there for all threads, and all have read the stage before
// it. read_stage(step) is called while it is there.
template <class Parts, class Load, class Wait, class Read>
__device__ __forceinline__ void run_pipeline(typename Parts::Warp& sums, const char* shared, int stage_bytes, int steps,
                                             const Load& load_stage, const Wait& wait_for, const Read& read_stage) {
  using Warp = typename Parts::Warp;
  constexpr int stages = Parts::tile.stages;
  typename Warp::Fragments fragments[2];
  auto load_fragments = [&](int step, int part) {
    const char* stage = shared + step % stages * stage_bytes;
    sums.load(fragments[Warp::kAhead ? part % 2 : 0], stage, stage + Parts::StageA::kBytes, part);
  };
#pragma unroll 1
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) load_stage(step);
    ptx::cp_async_commit();
  }
  wait_for(0);
  if (Warp::kAhead) load_fragments(0, 0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll(Warp::kUnroll)
    for (int part = 0; part < Warp::kSteps; ++part) {
      const bool last = part == Warp::kSteps - 1;
      if (Warp::kAhead) {
        if (last) wait_for(step + 1);
        load_fragments(step + last, last ? 0 : part + 1);
      } else {
        load_fragments(step, part);
      }
      if (part == 0) {
        read_stage(step);
        if (step + stages - 1 < steps) load_stage(step + stages - 1);
        ptx::cp_async_commit();
      }
      sums.multiply(fragments[Warp::kAhead ? part % 2 : 0]);
    }
    if (!Warp::kAhead) wait_for(step + 1);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the sums take the stages' place
}

// Calls end(row, column, values) for the tile's sums, kEndWidth neighbouring columns at a time; the row and column are
// the tile's. by_rows: neighbouring threads take neighbouring rows, for outputs that are contiguous along them.
template <class T, TileName name, class Warp, class End>
__device__ __forceinline__ void end_sums(const Warp& sums, char* shared, const WarpPlace<name>& place, bool by_rows,
                                         const End& end) {
  constexpr Tile tile = kTiles[int(name)];
  constexpr int pitch = tile.warp_columns + kStagingPadding, width = kEndWidth<T>;
  auto* staging = reinterpret_cast<Compute<T>*>(shared) + place.warp * tile.warp_rows * pitch;
  sums.stage_sums(staging);
  __syncwarp();
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < tile.warp_rows * tile.warp_columns / width; i += 32) {
    const int row = by_rows ? i % tile.warp_rows : i / (tile.warp_columns / width);
    const int column = (by_rows ? i / tile.warp_rows : i % (tile.warp_columns / width)) * width;
    constexpr int at_once = 16 / sizeof(Compute<T>);
    Compute<T> values[width];
#pragma unroll
    for (int j = 0; j < width; j += at_once) {
      const auto part = load<at_once>(staging + row * pitch + column + j);
#pragma unroll
      for (int k = 0; k < at_once; ++k) values[j + k] = part.element[k];
    }
    end(place.row + row, place.column + column, values);
  }
}

// Stores a thread's sum of a row: finished, or of this block's split of the depth.
template <class T>
__device__ __forceinline__ void store_row_sum(Compute<T> sum, int64_t row, int64_t rows, T* row_sums,
                                              Compute<T>* partial_row_sums) {
  if (row >= rows) return;
  const Compute<T> values[1] = {sum};
  if (partial_row_sums) {
    store(partial_row_sums + (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * rows + row, values);
  } else {
    store(row_sums + blockIdx.z * rows + row, values);
  }
}

// Shared memory of a block without a third operand.
template <class T, TileName name>
constexpr int kPipelineBytes = shared_bytes(kTiles[int(name)], false, sizeof(Compute<T>));

// Launches (tiles, splits) blocks.
template <class T, bool tensor_cores, TileName name, Layout layout_a, Layout layout_b>
__global__ void __launch_bounds__(kTileThreads<name>, kResidentBlocks[int(name)])
    matmul_kernel(const __grid_constant__ Product<T> product) {
  using P = Parts<T, tensor_cores, name, layout_a, layout_b>;
  using StageA = typename P::StageA;
  using StageB = typename P::StageB;
  constexpr Tile tile = kTiles[int(name)];
  constexpr int threads = kTileThreads<name>, stages = tile.stages;
  constexpr bool by_elements = tile.flexible && layout_a == Layout::depth && layout_b == Layout::depth;
  constexpr bool can_sum_rows = tile.flexible || layout_a == Layout::rows;
  FDL_DYN_SHARED(char, shared, (kPipelineBytes<T, name>));
  const auto& epilogue = product.epilogue;

  const TilePlace<name> first(epilogue.rows);
  const int64_t first_depth = blockIdx.y * product.split_depth;
  const int depth = int(min(product.depth - first_depth, product.split_depth));
  const int steps = (depth + StageA::kDepth - 1) / StageA::kDepth;
  const WarpPlace<name> warp;
  // Those of A's rows are the first warps' extra work in the first column of tiles.
  const bool sums_rows = can_sum_rows && product.row_sums && first.column == 0 && int(threadIdx.x) < tile.rows;
  const bool gradient = tile.flexible && product.gradient != Activation::none;
  const int stage_bytes = StageA::kBytes * (gradient ? 2 : 1) + StageB::kBytes;

  Copier<StageA, T, layout_a> copy_a(product.a, first.row, first_depth),
      copy_saved(product.saved, first.row, first_depth);
  Copier<StageB, T, layout_b> copy_b(product.b, first.column, first_depth);
  auto load_stage = [&](int step) {
    char* stage = shared + step % stages * stage_bytes;
    const int done = step * StageA::kDepth;
    if (by_elements && !product.a.vectors) {
      load_elements<StageA, T, threads>(stage, product.a, gradient ? &product.saved : nullptr, product, first.row,
                                        first_depth + done, depth - done);
    } else {
      copy_a(stage, depth - done);
      if (gradient) copy_saved(stage + StageA::kBytes + StageB::kBytes, depth - done);
    }
    if (by_elements && !product.b.vectors) {
      load_elements<StageB, T, threads>(stage + StageA::kBytes, product.b, nullptr, product, first.column,
                                        first_depth + done, depth - done);
    } else {
      copy_b(stage + StageA::kBytes, depth - done);
    }
  };
  auto wait_for = [&](int step) {
    ptx::cp_async_wait<stages - 2>();
    if (gradient && step < steps && !(by_elements && !product.a.vectors)) {  // each thread takes its own copies
      char* a = shared + step % stages * stage_bytes;
#pragma unroll 1
      for (int i = threadIdx.x; i < StageA::kLines * StageA::kLineChunks; i += threads) {
        const int at = StageA::offset(i / StageA::kLineChunks, i % StageA::kLineChunks);
        auto& values = *reinterpret_cast<Chunk<T>*>(a + at);
        const auto& saved = *reinterpret_cast<const Chunk<T>*>(a + StageA::kBytes + StageB::kBytes + at);
        values = gradient_chunk<T>(values, saved, product.gradient, product.parameter);
      }
    }
    __syncthreads();
  };

  typename P::Warp sums(warp.row, warp.column);
  Compute<T> row_sum = 0;
  run_pipeline<P>(sums, shared, stage_bytes, steps, load_stage, wait_for, [&](int step) {
    if (sums_rows) row_sum += StageA::sum_row(shared + step % stages * stage_bytes, threadIdx.x);
  });
  if (sums_rows) {
    store_row_sum(row_sum, first.row + threadIdx.x, epilogue.rows, product.row_sums, product.partial_row_sums);
  }
  end_sums<T, name>(sums, shared, warp, false, [&](int row, int column, Compute<T>(&values)[kEndWidth<T>]) {
    epilogue(first.row + row, first.column + column, values, int(blockIdx.y));
  });
}

// ---- The end of a split product -------------------------------------------------------------------------------------

constexpr int kFinishThreads = 256;

// Adds the splits' partial sums in order, and ends them as the product would have. Blocks stride over vectors of
// columns, then over the row sums; the grid's z counts the products of a batch.
template <class T, class End>
__global__ void __launch_bounds__(kFinishThreads, 3)
    finish_kernel(const __grid_constant__ End epilogue,  // partial: null
                  const Compute<T>* partial,             // [splits, rows, columns]
                  const Compute<T>* partial_row_sums,    // [splits, rows]
                  T* row_sums,                           // [rows] or null
                  int splits) {
  constexpr int width = kEndWidth<T>;
  const int64_t row_vectors = (epilogue.columns + width - 1) / width, vectors = epilogue.rows * row_vectors;
  const int64_t work = vectors + (row_sums ? epilogue.rows : 0);
  const int64_t size = epilogue.rows * epilogue.columns;
  for (int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x; i < work;
       i += int64_t(gridDim.x) * kFinishThreads) {
    if (i >= vectors) {
      const int64_t row = i - vectors;
      const Compute<T>* source = partial_row_sums + blockIdx.z * splits * epilogue.rows + row;
      Compute<T> total[1] = {};
      for (int split = 0; split < splits; ++split) total[0] += source[split * epilogue.rows];
      store(row_sums + blockIdx.z * epilogue.rows + row, total);
      continue;
    }
    const int64_t row = i / row_vectors, column = i % row_vectors * width;
    const Compute<T>* source = partial + (blockIdx.z * splits * epilogue.rows + row) * epilogue.columns + column;
    Compute<T> values[width] = {};
    for (int split = 0; split < splits; ++split, source += size) {
      if (epilogue.vectors) {
        constexpr int at_once = 16 / sizeof(Compute<T>);
#pragma unroll
        for (int j = 0; j < width; j += at_once) {
          if (column + j >= epilogue.columns) break;
          const auto part = load<at_once>(source + j);
#pragma unroll
          for (int k = 0; k < at_once; ++k) values[j + k] += part.element[k];
        }
      } else {
#pragma unroll
        for (int j = 0; j < width; ++j) {
          if (column + j < epilogue.columns) values[j] += source[j];
        }
      }
    }
    epilogue(row, column, values);
  }
}

// ---- Host -----------------------------------------------------------------------------------------------------------

inline DeviceLimits device_limits() {
#ifdef FDL_EMULATE
  return {4, 163 * 1024};  // few multiprocessors, so that small tests meet large tiles
#else
  DeviceLimits limits{};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return limits;
#endif
}

template <class T>
Arithmetic arithmetic_of(bool allow_tf32) {
  if (sizeof(T) == 2) return Arithmetic::half;
  if (sizeof(T) == 8) return Arithmetic::float64;
  return allow_tf32 ? Arithmetic::tf32 : Arithmetic::float32;
}

// Calls function<tensor_cores, tile>() for the tile that a plan has chosen.
template <class T, class Function>
void dispatch_tile(Arithmetic arithmetic, TileName tile, const Function& function) {
  if (arithmetic == Arithmetic::half || arithmetic == Arithmetic::tf32) {
    if constexpr (sizeof(T) < 8) {
      if (tile == TileName::large) function.template operator()<true, TileName::large>();
      if (tile == TileName::medium) function.template operator()<true, TileName::medium>();
      if (tile == TileName::small) function.template operator()<true, TileName::small>();
    }
  } else if constexpr (sizeof(T) == 4) {
    if (tile == TileName::plain) function.template operator()<false, TileName::plain>();
    if (tile == TileName::small) function.template operator()<false, TileName::small>();
  } else if constexpr (sizeof(T) == 8) {
    function.template operator()<false, TileName::float64>();
  }
}

// Launches (blocks, 1, batch) blocks of finish_kernel.
template <class T, class End>
void launch_finish(const End& epilogue, const Compute<T>* partial, const Compute<T>* partial_row_sums, T* row_sums,
                   int splits, unsigned batch, cudaStream_t stream) {
  const int64_t work =
      epilogue.rows * ceil_div(epilogue.columns, int64_t(kEndWidth<T>)) + (row_sums ? epilogue.rows : 0);
  const int64_t blocks = std::min(ceil_div(work, int64_t(kFinishThreads)), kMaximumBlocks);
  End finished = epilogue;
  finished.partial = nullptr;
  launch(finish_kernel<T, End>, Shape(dim3(unsigned(blocks), 1, batch), dim3(kFinishThreads), 0, stream), finished,
         partial, partial_row_sums, row_sums, splits);
}

}  // namespace fastdl::cuda
