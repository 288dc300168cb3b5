// Layer and RMS normalisation of rows, with dropout and a residual before it, and the gradients.
//
// The threads of a row keep it in registers: one pass over memory. Rows too long for that, and single elements where
// nothing is aligned, are read again for each sum, with dropout made again. The backward's blocks take so many rows
// each and keep their threads' part of the sums over rows, which a second kernel adds up.
#include "dropout.cuh"
#include "layer_norm.h"

namespace fastdl::cuda {
namespace {

// Parts of the sums over rows, at most: enough to fill any GPU, few enough that adding them up costs little.
constexpr int64_t kParts = std::min<int64_t>(kMaximumBlocks, 512);
constexpr int kFinishColumns = 32, kFinishThreads = 8;

// f(u, vector) for the vectors of this thread; u is its place among those kept.
template <int kept, class Function>
__device__ __forceinline__ void for_each_vector(bool inside, int64_t vectors, const Function& f) {
  if constexpr (kept > 0) {
#pragma unroll
    for (int u = 0; u < kept; ++u) {
      const int64_t vector = threadIdx.x + u * int64_t(blockDim.x);
      if (inside && vector < vectors) f(u, vector);
    }
  } else {
    for (int64_t vector = threadIdx.x; inside && vector < vectors; vector += blockDim.x) f(0, vector);
  }
}

// Adds each value up over the threads of a row; all get the result. Called by all of the block.
template <int count, class C>
__device__ __forceinline__ void sum_row(C (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
  }
  if (blockDim.x == 32) return;
  FDL_SHARED(C, parts, [count][kLayerNormThreads / 32]);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x / 32;
  if (thread % 32 == 0) {
#pragma unroll
    for (int i = 0; i < count; ++i) parts[i][thread / 32] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = 0;
    for (int warp = 0; warp < warps; ++warp) values[i] += parts[i][threadIdx.y * warps + warp];
  }
  __syncthreads();  // the next sum writes there
}

// weight or bias of one vector
template <class T, int width>
__device__ __forceinline__ void load_parameter(Compute<T> (&values)[width], const void* parameter, bool wide,
                                               int64_t vector) {
  using C = Compute<T>;
  if (wide) {
    constexpr int step = width > 1 ? 16 / sizeof(C) : 1;
#pragma unroll
    for (int i = 0; i < width; i += step) {
      const Vector<C, step> part = load<step>(static_cast<const C*>(parameter) + vector * width + i);
#pragma unroll
      for (int j = 0; j < step; ++j) values[i + j] = part.element[j];
    }
  } else {
    const Vector<T, width> part = load<width>(static_cast<const T*>(parameter) + vector * width);
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = widen(part.element[i]);
  }
}

// ---- Forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  using C = Compute<T>;
  int64_t rows, columns;
  const T* input;      // [rows, columns]
  const T* residual;   // [rows, columns] or null
  const void* weight;  // [columns] or null
  const void* bias;    // [columns] or null
  bool wide;
  T* output;  // [rows, columns]
  T* sum;     // [rows, columns] or null
  C* mean;    // [rows] or null
  C* rstd;    // [rows]
  C eps;
  Dropout<C> dropout;

  // h of the elements from `first`
  template <int width>
  __device__ __forceinline__ Vector<T, width> h(int64_t first, uint64_t seed) const {
    const Vector<T, width> x = load<width>(input + first);
    if (!residual && !dropout.seed) return x;
    C values[width];
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = widen(x.element[i]);
    if (dropout.seed) dropout.apply(values, seed, first);
    if (residual) {
      const Vector<T, width> r = load<width>(residual + first);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] += widen(r.element[i]);
    }
    return round_to<T>(values);
  }
};

// A row of a block's threads goes to one row of the arrays at a time; blocks stride over them.
template <class T, int width, int kept>
__global__ void __launch_bounds__(kLayerNormThreads, kept < 4 ? 2 : 1) forward_kernel(Forward<T> layer) {
  using C = Compute<T>;
  const int64_t vectors = layer.columns / width;
  const C count = C(layer.columns);
  const uint64_t seed = layer.dropout.seed ? *layer.dropout.seed : 0;
  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < layer.rows; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y, start = row * layer.columns;
    const bool inside = row < layer.rows;
    Vector<T, width> x[kept > 0 ? kept : 1];
    auto read = [&](int u, int64_t vector) { x[u] = layer.template h<width>(start + vector * width, seed); };
    auto again = [&](int u, int64_t vector) {
      if constexpr (kept == 0) read(u, vector);
    };
    C first[1] = {};
    for_each_vector<kept>(inside, vectors, [&](int u, int64_t vector) {
      read(u, vector);
      if (layer.sum) *reinterpret_cast<Vector<T, width>*>(layer.sum + start + vector * width) = x[u];
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const C value = widen(x[u].element[i]);
        first[0] += layer.mean ? value : value * value;
      }
    });
    sum_row(first);
    C mean = 0, variance = first[0] / count;
    if (layer.mean) {
      const C origin = first[0] / count;
      C sums[2] = {};  // of differences from the rounded mean, and of their squares
      for_each_vector<kept>(inside, vectors, [&](int u, int64_t vector) {
        again(u, vector);
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const C difference = widen(x[u].element[i]) - origin;
          sums[0] += difference;
          sums[1] += difference * difference;
        }
      });
      sum_row(sums);
      const C rest = sums[0] / count;
      mean = origin + rest;
      variance = sums[1] / count - rest * rest;
    }
    const C rstd = 1 / std::sqrt(variance + layer.eps);
    if (inside && threadIdx.x == 0) {
      if (layer.mean) layer.mean[row] = mean;
      layer.rstd[row] = rstd;
    }
    for_each_vector<kept>(inside, vectors, [&](int u, int64_t vector) {
      again(u, vector);
      C values[width], parameter[width];
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] = (widen(x[u].element[i]) - mean) * rstd;
      if (layer.weight) {
        load_parameter<T>(parameter, layer.weight, layer.wide, vector);
#pragma unroll
        for (int i = 0; i < width; ++i) values[i] *= parameter[i];
      }
      if (layer.bias) {
        load_parameter<T>(parameter, layer.bias, layer.wide, vector);
#pragma unroll
        for (int i = 0; i < width; ++i) values[i] += parameter[i];
      }
      store(layer.output + start + vector * width, values);
    });
  }
}

// ---- Backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  using C = Compute<T>;
  int64_t rows, columns;
  const T* grad_output;  // [rows, columns]
  const T* grad_sum;     // [rows, columns] or null
  const T* h;            // [rows, columns]
  const void* weight;    // [columns] or null
  bool wide;
  const C* mean;     // [rows] or null
  const C* rstd;     // [rows]
  T* grad_input;     // [rows, columns] or null
  T* grad_residual;  // [rows, columns] or null
  C* partial;        // [parts, 2, columns] or null: sums of grad_output * normal and of grad_output
  Dropout<C> dropout;
};

// Part p, a row of a block's threads, takes `steps` rows: p, p + parts, ...
template <class T, int width, int kept>
__global__ void __launch_bounds__(kLayerNormThreads, 1) backward_kernel(Backward<T> layer, int64_t steps) {
  using C = Compute<T>;
  constexpr int places = kept > 0 ? kept : 1;
  const int64_t vectors = layer.columns / width, parts = int64_t(gridDim.x) * blockDim.y;
  const int64_t part = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const C count = C(layer.columns);
  const uint64_t seed = layer.dropout.seed ? *layer.dropout.seed : 0;
  C* const weight_target = layer.partial + part * 2 * layer.columns;
  C* const bias_target = weight_target + layer.columns;
  C weight_sums[places][width] = {}, bias_sums[places][width] = {};
  if (kept == 0 && layer.partial) {  // too many columns for registers: this thread's sums stay in the cache
    for_each_vector<kept>(true, vectors, [&](int, int64_t vector) {
#pragma unroll
      for (int i = 0; i < width; ++i) weight_target[vector * width + i] = bias_target[vector * width + i] = 0;
    });
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t row = part + step * parts, start = row * layer.columns;
    const bool inside = row < layer.rows;
    const C mean = inside && layer.mean ? layer.mean[row] : C(0), rstd = inside ? layer.rstd[row] : C(0);
    Vector<T, width> grad[places], x[places];
    auto read = [&](int u, int64_t vector) {
      grad[u] = load<width>(layer.grad_output + start + vector * width);
      x[u] = load<width>(layer.h + start + vector * width);
    };
    // d = grad_output * weight and the normalised row
    auto values = [&](int u, int64_t vector, C(&d)[width], C(&normal)[width]) {
      C weight[width];
      if (layer.weight) load_parameter<T>(weight, layer.weight, layer.wide, vector);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        d[i] = widen(grad[u].element[i]);
        if (layer.weight) d[i] *= weight[i];
        normal[i] = (widen(x[u].element[i]) - mean) * rstd;
      }
    };
    C sums[2] = {};  // of d, and of d * normal
    for_each_vector<kept>(inside, vectors, [&](int u, int64_t vector) {
      read(u, vector);
      C d[width], normal[width];
      values(u, vector, d, normal);
      if (kept == 0 && layer.partial) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          weight_sums[0][i] = weight_target[vector * width + i];
          bias_sums[0][i] = bias_target[vector * width + i];
        }
      }
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const C g = widen(grad[u].element[i]);
        weight_sums[u][i] += g * normal[i];
        bias_sums[u][i] += g;
        sums[0] += d[i];
        sums[1] += d[i] * normal[i];
      }
      if (kept == 0 && layer.partial) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          weight_target[vector * width + i] = weight_sums[0][i];
          bias_target[vector * width + i] = bias_sums[0][i];
        }
      }
    });
    if (!layer.grad_input && !layer.grad_residual) continue;
    sum_row(sums);
    const C mean_gradient = layer.mean ? sums[0] / count : C(0), mean_product = sums[1] / count;
    for_each_vector<kept>(inside, vectors, [&](int u, int64_t vector) {
      if constexpr (kept == 0) read(u, vector);
      const int64_t first = start + vector * width;
      C d[width], normal[width];
      values(u, vector, d, normal);
#pragma unroll
      for (int i = 0; i < width; ++i) d[i] = rstd * (d[i] - mean_gradient - normal[i] * mean_product);
      if (layer.grad_sum) {
        const Vector<T, width> given = load<width>(layer.grad_sum + first);
#pragma unroll
        for (int i = 0; i < width; ++i) d[i] += widen(given.element[i]);
      }
      if (layer.grad_residual) store(layer.grad_residual + first, d);
      if (layer.grad_input) {
        if (layer.dropout.seed) layer.dropout.apply(d, seed, first);
        store(layer.grad_input + first, d);
      }
    });
  }
  if (kept == 0 || !layer.partial) return;
  for_each_vector<kept>(true, vectors, [&](int u, int64_t vector) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      weight_target[vector * width + i] = weight_sums[u][i];
      bias_target[vector * width + i] = bias_sums[u][i];
    }
  });
}

// Adds the parts up, a column by the threads of one threadIdx.x.
template <class C>
__global__ void __launch_bounds__(kFinishColumns* kFinishThreads)
    finish_kernel(const C* partial,  // [parts, 2, columns]
                  int64_t parts, int64_t columns,
                  C* grad_weight,  // [columns] or null
                  C* grad_bias) {  // [columns] or null
  FDL_SHARED(C, shared, [2][kFinishThreads][kFinishColumns]);
  const int64_t column = int64_t(blockIdx.x) * kFinishColumns + threadIdx.x;
  C weight_sum = 0, bias_sum = 0;
  for (int64_t part = threadIdx.y; part < parts && column < columns; part += kFinishThreads) {
    weight_sum += partial[part * 2 * columns + column];
    bias_sum += partial[(part * 2 + 1) * columns + column];
  }
  shared[0][threadIdx.y][threadIdx.x] = weight_sum;
  shared[1][threadIdx.y][threadIdx.x] = bias_sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  for (int i = 1; i < kFinishThreads; ++i) {
    weight_sum += shared[0][i][threadIdx.x];
    bias_sum += shared[1][i][threadIdx.x];
  }
  if (grad_weight) grad_weight[column] = weight_sum;
  if (grad_bias) grad_bias[column] = bias_sum;
}

// ---- Host -----------------------------------------------------------------------------------------------------------

void require_rows(const char* name, int64_t rows, int64_t columns, double dropout, const void* seed) {
  require(rows > 0, name, "rows", rows, "at least 1");
  require(columns > 0, name, "columns", columns, "at least 1");
  require(dropout >= 0 && dropout <= 1, name, "dropout", dropout, "0 to 1");
  require(dropout == 0 || seed, name, "seed", "0", "an address");
}

// Calls function<width, kept>() as planned.
template <class T, int most_kept, class Function>
void dispatch_plan(const LayerNormPlan& plan, const Function& function) {
  constexpr int full = kFullVector<T>;
  if constexpr (full > 1) {
    if (plan.width == full) {
      if (plan.kept == 1) return function.template operator()<full, 1>();
      if (plan.kept == 2) return function.template operator()<full, 2>();
      if constexpr (most_kept == 4) {
        if (plan.kept == 4) return function.template operator()<full, 4>();
      }
      return function.template operator()<full, 0>();
    }
  }
  function.template operator()<1, 0>();
}

dim3 block_of(const LayerNormPlan& plan) { return dim3(unsigned(plan.threads), unsigned(plan.block_rows)); }

// The blocks of the backward: each of their rows of threads is a part.
int64_t backward_blocks(const LayerNormPlan& plan, int64_t rows) {
  return std::min(ceil_div<int64_t>(rows, plan.block_rows), std::max<int64_t>(1, kParts / plan.block_rows));
}

}  // namespace

void layer_norm(int dtype, bool wide, int64_t rows, int64_t columns, const void* input, const void* residual,
                const void* weight, const void* bias, void* output, void* sum, void* mean, void* rstd, double eps,
                double dropout, const void* seed, cudaStream_t stream) {
  constexpr const char* name = "layer_norm";
  require_rows(name, rows, columns, dropout, seed);
  require(input && output && rstd, name, "arrays", "0", "addresses");
  dispatch_dtype(name, dtype, [&]<class T>() {
    using C = Compute<T>;
    const int full = aligned(16, input, residual, weight, bias, output, sum) ? kFullVector<T> : 1;
    const LayerNormPlan plan = layer_norm_plan(full, columns, kLayerNormForwardKept);
    const Forward<T> layer{rows,
                           columns,
                           static_cast<const T*>(input),
                           static_cast<const T*>(residual),
                           weight,
                           bias,
                           wide,
                           static_cast<T*>(output),
                           static_cast<T*>(sum),
                           static_cast<C*>(mean),
                           static_cast<C*>(rstd),
                           C(eps),
                           Dropout<C>(seed, dropout)};
    const int64_t blocks = std::min(ceil_div<int64_t>(rows, plan.block_rows), kMaximumBlocks);
    dispatch_plan<T, kLayerNormForwardKept>(plan, [&]<int width, int kept>() {
      launch(forward_kernel<T, width, kept>, Shape(dim3(unsigned(blocks)), block_of(plan), 0, stream), layer);
    });
  });
}

void layer_norm_backward(int dtype, bool wide, int64_t rows, int64_t columns, const void* grad_output,
                         const void* grad_sum, const void* h, const void* weight, const void* mean, const void* rstd,
                         void* grad_input, void* grad_residual, void* grad_weight, void* grad_bias, double dropout,
                         const void* seed, void* workspace, cudaStream_t stream) {
  constexpr const char* name = "layer_norm_backward";
  require_rows(name, rows, columns, dropout, seed);
  require(grad_output && h && rstd, name, "arrays", "0", "addresses");
  const bool sums = grad_weight || grad_bias;
  require(!sums || workspace, name, "workspace", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    using C = Compute<T>;
    const bool is_aligned = aligned(16, grad_output, grad_sum, h, weight, grad_input, grad_residual);
    const LayerNormPlan plan = layer_norm_plan(is_aligned ? kFullVector<T> : 1, columns, kLayerNormBackwardKept);
    const int64_t blocks = backward_blocks(plan, rows), parts = blocks * plan.block_rows;
    const Backward<T> layer{rows,
                            columns,
                            static_cast<const T*>(grad_output),
                            static_cast<const T*>(grad_sum),
                            static_cast<const T*>(h),
                            weight,
                            wide,
                            static_cast<const C*>(mean),
                            static_cast<const C*>(rstd),
                            static_cast<T*>(grad_input),
                            static_cast<T*>(grad_residual),
                            sums ? static_cast<C*>(workspace) : nullptr,
                            Dropout<C>(seed, dropout)};
    dispatch_plan<T, kLayerNormBackwardKept>(plan, [&]<int width, int kept>() {
      launch(backward_kernel<T, width, kept>, Shape(dim3(unsigned(blocks)), block_of(plan), 0, stream), layer,
             ceil_div(rows, parts));
    });
    if (!sums) return;
    const int64_t finish_blocks = ceil_div<int64_t>(columns, kFinishColumns);
    launch(finish_kernel<C>, Shape(dim3(unsigned(finish_blocks)), dim3(kFinishColumns, kFinishThreads), 0, stream),
           static_cast<const C*>(workspace), parts, columns, static_cast<C*>(grad_weight), static_cast<C*>(grad_bias));
  });
}

size_t layer_norm_backward_workspace(int dtype, int64_t rows, int64_t columns) {
  constexpr const char* name = "layer_norm_backward_workspace";
  require_rows(name, rows, columns, 0, nullptr);
  size_t bytes = 0;
  dispatch_dtype(name, dtype, [&]<class T>() {
    for (const int full : {1, kFullVector<T>}) {  // whatever the arrays will be like
      const LayerNormPlan plan = layer_norm_plan(full, columns, kLayerNormBackwardKept);
      const int64_t parts = backward_blocks(plan, rows) * plan.block_rows;
      bytes = std::max(bytes, size_t(parts * 2 * columns) * sizeof(Compute<T>));
    }
  });
  return bytes;
}

}  // namespace fastdl::cuda
