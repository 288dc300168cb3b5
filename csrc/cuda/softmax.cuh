// What softmax and cross entropy share: how threads are laid over the rows of [outer, size, inner], reductions along a
// row, and a row's sum of exponentials by an online maximum (Milakov and Gimelshein, 2018).
#pragma once
#include <algorithm>
#include <cmath>

#include "common.cuh"

namespace fastdl::cuda {

// A block is 8 warps. By warps, each has a row; by blocks, they share one; by columns, a lane of all 8 has one, and
// neighbouring lanes have neighbouring rows, whose elements lie side by side.
enum class Layout { warps, block, columns };
constexpr int kRowWarps = 8, kRowThreads = 32 * kRowWarps;
constexpr int64_t kWarpRow = 1024;  // longer rows are worth a block
// Blocks that a multiprocessor holds at once: told so, the compiler takes the registers that they leave.
template <class T>
constexpr int kRowBlocks = sizeof(T) == 8 ? 2 : 4;

struct RowsView {
  int64_t outer, size, inner;
};

// The work of a block, one item after the other: so many rows each.
template <Layout layout>
__host__ __device__ inline int64_t row_items(const RowsView& view) {
  if (layout == Layout::warps) return (view.outer + kRowWarps - 1) / kRowWarps;
  return layout == Layout::block ? view.outer : view.outer * ((view.inner + 31) / 32);
}

// A thread's part of a row: the vectors `first`, first + stride, ... below `end`.
template <Layout layout, int width>
struct RowPart {
  int64_t base, number, step, first, end, stride;
  bool inside;    // whether there is such a row
  bool is_first;  // whether this thread stores what the row has one of

  __device__ __forceinline__ RowPart(const RowsView& view, int64_t item) {
    const int x = threadIdx.x, y = threadIdx.y;
    if constexpr (layout == Layout::columns) {
      const int64_t strips = (view.inner + 31) / 32, plane = item / strips, lane = item % strips * 32 + x;
      inside = lane < view.inner;
      base = plane * view.size * view.inner + lane;
      number = plane * view.inner + lane;
      step = view.inner;
      first = y;
      stride = kRowWarps;
      is_first = inside && y == 0;
    } else {
      number = layout == Layout::warps ? item * kRowWarps + y : item;
      inside = number < view.outer;
      base = number * view.size;
      step = 1;
      first = layout == Layout::warps ? x : y * 32 + x;
      stride = layout == Layout::warps ? 32 : kRowThreads;
      is_first = inside && first == 0;
    }
    end = inside ? view.size / width : 0;
  }
  __device__ __forceinline__ int64_t offset(int64_t vector) const { return base + vector * width * step; }
};

// operation over what a row's threads have; each gets the result. Called by all threads of the row.
template <Layout layout, class C, class Operation>
__device__ __forceinline__ C reduce_row(C value, const Operation& operation) {
  if constexpr (layout != Layout::columns) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      value = operation(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
  }
  if constexpr (layout != Layout::warps) {
    FDL_SHARED(C, shared, [kRowWarps][32]);
    const int lane = layout == Layout::block ? 0 : threadIdx.x;
    __syncthreads();  // the reduction before has been read
    if (layout == Layout::columns || threadIdx.x == 0) shared[threadIdx.y][lane] = value;
    __syncthreads();
    value = shared[0][lane];
#pragma unroll
    for (int warp = 1; warp < kRowWarps; ++warp) value = operation(value, shared[warp][lane]);
  }
  return value;
}
template <Layout layout, class C>
__device__ __forceinline__ C sum_of_row(C value) {
  return reduce_row<layout>(value, [](C a, C b) { return a + b; });
}

// function(offset, class or position, vector) for a thread's vectors
template <int width, Layout layout, class T, class Function>
__device__ __forceinline__ void for_each_vector(const RowPart<layout, width>& part, const T* values,
                                                const Function& function) {
#pragma unroll 2  // two vectors in flight a thread; more would take registers from the blocks beside it
  for (int64_t i = part.first; i < part.end; i += part.stride) {
    const int64_t at = part.offset(i);
    function(at, i * width, load<width>(values + at));
  }
}

// A row's largest value, and its sum of exp(x - largest). NaN is in the sum.
template <class C>
struct Exponentials {
  C largest, sum;
};
template <int width, Layout layout, class T>
__device__ __forceinline__ Exponentials<Compute<T>> exponentials_of(const RowPart<layout, width>& part,
                                                                    const T* values) {
  using C = Compute<T>;
  constexpr C lowest = -C(INFINITY);
  C largest = lowest, sum = 0;
  auto origin = [](C value) { return value == lowest ? C(0) : value; };
  for_each_vector<width>(part, values, [&](int64_t, int64_t, const Vector<T, width>& x) {
    C top = largest;
#pragma unroll
    for (int i = 0; i < width; ++i) top = std::fmax(top, widen(x.element[i]));
    sum *= std::exp(largest - origin(top));
#pragma unroll
    for (int i = 0; i < width; ++i) sum += std::exp(widen(x.element[i]) - origin(top));
    largest = top;
  });
  const C top = reduce_row<layout>(largest, [](C a, C b) { return std::fmax(a, b); });
  return {top, sum_of_row<layout>(sum * std::exp(largest - origin(top)))};
}

// Calls function<layout, width>() as the view and the alignment of all arrays allow.
template <class T, class Function>
void with_layout(const RowsView& view, bool is_aligned, const Function& function) {
  constexpr int full = kFullVector<T>;
  if (view.inner > 1) return function.template operator()<Layout::columns, 1>();
  const bool wide = full > 1 && is_aligned && view.size % full == 0;
  if (view.size <= kWarpRow) {
    if (wide) return function.template operator()<Layout::warps, full>();
    return function.template operator()<Layout::warps, 1>();
  }
  if (wide) return function.template operator()<Layout::block, full>();
  function.template operator()<Layout::block, 1>();
}

inline Shape row_shape(int64_t items, cudaStream_t stream,
                       std::source_location site = std::source_location::current()) {
  return Shape(dim3(unsigned(std::min(items, kMaximumBlocks))), dim3(32, kRowWarps), 0, stream, site);
}

inline void require_view(const char* name, const RowsView& view, const char* size_name) {
  require(view.outer > 0, name, "outer", view.outer, "at least 1");
  require(view.size > 0, name, size_name, view.size, "at least 1");
  require(view.inner > 0, name, "inner", view.inner, "at least 1");
}

}  // namespace fastdl::cuda
