// Embedding: rows of a table by their indices, and the table's gradient.
//
// The gradient takes the indices sorted, so that the terms of a row of the table, its run, lie side by side. A block
// sums kChunk of them. Runs inside a chunk are finished there; the parts of those that go on are kept, and summed by
// the block of the chunk where a run begins. So long runs are spread over many blocks, and the order is fixed.
#include <algorithm>
#include <cmath>

#include "common.cuh"
#include "embedding.h"

namespace fastdl::cuda {
namespace {

constexpr int kThreads = 128, kWarps = 8;
constexpr int64_t kChunk = 32;

// A warp takes a row of the output.
template <int width, class T>
__global__ void __launch_bounds__(32 * kWarps)
    gather_kernel(const T* table, const int64_t* indices, T* output, int64_t count, int64_t rows, int64_t columns) {
  const int64_t stride = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.y; i < count; i += stride) {
    const int64_t row = indices[i];
    const bool known = row >= 0 && row < rows;
    for (int64_t c = threadIdx.x * width; c < columns; c += 32 * width) {
      Vector<T, width> value;
      if (known) {
        value = load<width>(table + row * columns + c);
      } else {
#pragma unroll
        for (int k = 0; k < width; ++k) value.element[k] = T(NAN);
      }
      *reinterpret_cast<Vector<T, width>*>(output + i * columns + c) = value;
    }
  }
}

// The gradient's sums, as the kernels below share them.
template <class T>
struct Runs {
  using C = Compute<T>;
  const int64_t* index;  // [count], sorted
  const C* scale;        // [count] or null
  T* grad_table;         // [rows, columns]
  C* partial;            // [chunks, 2, columns]: of the run that comes from the chunk before, of the one that goes on
  int64_t count, rows, columns, padding, chunks;

  // Stores a finished run's sums, unless it is of the padding row or of none.
  template <int width>
  __device__ __forceinline__ void finish(C (&sums)[width], int64_t position, int64_t column) const {
    const int64_t row = index[position];
    if (row < 0 || row >= rows || row == padding) return;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (scale) sums[k] *= scale[position];
    }
    store(grad_table + row * columns + column, sums);
  }
};

// Blocks (c, b) take chunk c of the b-th kThreads vectors of columns.
template <int width, class T>
__global__ void __launch_bounds__(kThreads) runs_kernel(Runs<T> runs, const T* grad_output,  // [count, columns]
                                                        const int64_t* order) {              // [count]
  using C = Compute<T>;
  const int64_t column = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * width;
  if (column >= runs.columns) return;
  const int64_t chunk = blockIdx.x, first = chunk * kChunk, end = min(first + kChunk, runs.count);
  C* partial = runs.partial + chunk * 2 * runs.columns + column;
  bool from_before = first > 0 && runs.index[first - 1] == runs.index[first];
  C sums[width] = {};
  for (int64_t position = first; position < end; ++position) {
    const Vector<T, width> term = load<width>(grad_output + order[position] * runs.columns + column);
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k] += widen(term.element[k]);
    const bool goes_on = position + 1 < runs.count && runs.index[position + 1] == runs.index[position];
    if (goes_on && position + 1 < end) continue;
    if (from_before || goes_on) {
      C* to = from_before ? partial : partial + runs.columns;
#pragma unroll
      for (int k = 0; k < width; ++k) to[k] = sums[k];
    } else {
      runs.finish(sums, position, column);
    }
    from_before = false;
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k] = 0;
  }
}

// Sums the parts of the run that begins in a chunk and goes on; the grid of runs_kernel.
template <int width, class T>
__global__ void __launch_bounds__(kThreads) join_kernel(Runs<T> runs) {
  using C = Compute<T>;
  const int64_t column = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * width;
  if (column >= runs.columns) return;
  const int64_t chunk = blockIdx.x, first = chunk * kChunk, end = min(first + kChunk, runs.count);
  const int64_t row = runs.index[end - 1];
  if (end == runs.count || runs.index[end] != row) return;
  if (first > 0 && runs.index[first] == row && runs.index[first - 1] == row) return;  // it began before
  C sums[width] = {};
  const C* from = runs.partial + (chunk * 2 + 1) * runs.columns + column;
  for (int64_t other = chunk + 1;; ++other) {
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k] += from[k];
    if (other == runs.chunks || runs.index[other * kChunk] != row) break;
    from = runs.partial + other * 2 * runs.columns + column;
  }
  runs.finish(sums, end - 1, column);
}

int64_t chunks_of(int64_t count) { return ceil_div(count, kChunk); }

// Calls function<width>() for rows of so many columns.
template <class T, class Function>
void with_width(int64_t columns, bool is_aligned, const Function& function) {
  constexpr int full = kFullVector<T>;
  if (full > 1 && is_aligned && columns % full == 0) return function.template operator()<full>();
  function.template operator()<1>();
}

}  // namespace

void embedding(int dtype, const void* table, const int64_t* indices, void* output, int64_t count, int64_t rows,
               int64_t columns, cudaStream_t stream) {
  constexpr const char* name = "embedding";
  require(count > 0, name, "count", count, "at least 1");
  require(rows >= 0, name, "rows", rows, "at least 0");
  require(columns > 0, name, "columns", columns, "at least 1");
  require(rows == 0 || table, name, "weight", "0", "an address");
  require(indices, name, "indices", "0", "an address");
  require(output, name, "output", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    with_width<T>(columns, aligned(16, table, output), [&]<int width>() {
      const int64_t blocks = std::min(ceil_div(count, int64_t(kWarps)), kMaximumBlocks);
      launch(gather_kernel<width, T>, Shape(dim3(unsigned(blocks)), dim3(32, kWarps), 0, stream),
             static_cast<const T*>(table), indices, static_cast<T*>(output), count, rows, columns);
    });
  });
}

int64_t embedding_workspace(int dtype, int64_t count, int64_t columns) {
  return chunks_of(count) * 2 * columns * (dtype == 3 ? 8 : 4);
}

void embedding_backward(int dtype, const void* grad_output, const int64_t* index, const int64_t* order,
                        const void* scale, void* grad_table, int64_t count, int64_t rows, int64_t columns,
                        int64_t padding, void* workspace, cudaStream_t stream) {
  constexpr const char* name = "embedding_backward";
  require(count > 0, name, "count", count, "at least 1");
  require(rows > 0, name, "rows", rows, "at least 1");
  require(columns > 0, name, "columns", columns, "at least 1");
  require(grad_output, name, "grad_output", "0", "an address");
  require(index, name, "index", "0", "an address");
  require(order, name, "order", "0", "an address");
  require(grad_table, name, "grad_weight", "0", "an address");
  require(workspace, name, "workspace", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    using C = Compute<T>;
    const Runs<T> runs{index,
                       static_cast<const C*>(scale),
                       static_cast<T*>(grad_table),
                       static_cast<C*>(workspace),
                       count,
                       rows,
                       columns,
                       padding,
                       chunks_of(count)};
    with_width<T>(columns, aligned(16, grad_output, grad_table), [&]<int width>() {
      const dim3 grid(unsigned(runs.chunks), unsigned(ceil_div(columns, int64_t(kThreads) * width)));
      const Shape shape(grid, dim3(kThreads), 0, stream);
      launch(runs_kernel<width, T>, shape, runs, static_cast<const T*>(grad_output), order);
      launch(join_kernel<width, T>, shape, runs);
    });
  });
}

}  // namespace fastdl::cuda
