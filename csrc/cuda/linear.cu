// The linear layer's epilogue and its gradient: bias, activation, and the column sums that are the bias's gradient.
#include <algorithm>

#include "activation.cuh"
#include "kernels.h"

namespace fastdl::cuda {
namespace {

constexpr int kThreads = 256;

// Rows that a thread loads before it computes.
template <int width>
constexpr int kUnroll = width > 1 ? 2 : 4;

// A block covers block.x vectors of columns and block.y rows at a time; block.x and block.y are powers of two.
template <int width>
dim3 block_of(int64_t columns) {
  unsigned x = 1;
  while (x < 32 && int64_t(x) * width < columns) x *= 2;
  return dim3(x, kThreads / x);
}

// Parts into which the rows are cut to be summed. It depends on nothing but the shape, so neither does the result.
int64_t row_parts(int64_t rows, int64_t columns) {
  constexpr int64_t blocks = std::min<int64_t>(kMaximumBlocks, 1024);
  constexpr int64_t columns_per_block = 256, rows_per_part = 64;
  return std::clamp<int64_t>(blocks / ceil_div(std::max<int64_t>(columns, 1), columns_per_block), 1,
                             std::max<int64_t>(ceil_div(rows, rows_per_part), 1));
}

// z = input + bias; output = activation(z). A thread keeps its columns' bias and strides over rows.
template <Activation kind, class T, int width>
__global__ void __launch_bounds__(kThreads)
    bias_activation_kernel(const T* input,    // [rows, columns]
                           const T* bias,     // [columns] or null
                           T* output,         // [rows, columns], may be input
                           T* preactivation,  // [rows, columns] or null, may be input
                           int64_t rows, int64_t columns, Compute<T> parameter) {
  constexpr int unroll = kUnroll<width>;
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * width;
  if (column >= columns) return;
  Compute<T> shift[width] = {};
  if (bias) {
    const Vector<T, width> values = load<width>(bias + column);
#pragma unroll
    for (int i = 0; i < width; ++i) shift[i] = widen(values.element[i]);
  }
  const int64_t stride = int64_t(gridDim.y) * blockDim.y * unroll;
  for (int64_t start = int64_t(blockIdx.y) * blockDim.y * unroll + threadIdx.y; start < rows; start += stride) {
    Vector<T, width> x[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t row = start + u * blockDim.y;
      if (row < rows) x[u] = load<width>(input + row * columns + column);
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t row = start + u * blockDim.y;
      if (row < rows) {
        Compute<T> z[width], y[width];
#pragma unroll
        for (int i = 0; i < width; ++i) {
          z[i] = widen(x[u].element[i]) + shift[i];
          y[i] = activate<kind, T>(z[i], parameter);
        }
        if (preactivation) store(preactivation + row * columns + column, z);
        store(output + row * columns + column, y);
      }
    }
  }
}

// dz = grad_output * activation'(saved), and its column sums over this block's part of the rows: to partial_sums or, if
// there is one part only, to grad_bias.
template <Activation kind, class T, int width>
__global__ void __launch_bounds__(kThreads)
    bias_activation_backward_kernel(const T* grad_output,      // [rows, columns]
                                    const T* saved,            // [rows, columns]
                                    T* grad_preactivation,     // [rows, columns] or null, may be grad_output
                                    T* grad_bias,              // [columns]
                                    Compute<T>* partial_sums,  // [gridDim.y, columns]
                                    int64_t rows, int64_t columns, Compute<T> parameter) {
  constexpr int unroll = kUnroll<width>;
  constexpr bool binary = kind != Activation::none;
  FDL_SHARED(Compute<T>, sums, [width][kThreads]);
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * width;
  const int64_t part = (rows + gridDim.y - 1) / gridDim.y;
  const int64_t end = column < columns ? min(rows, (int64_t(blockIdx.y) + 1) * part) : 0;
  Compute<T> sum[width] = {};
  for (int64_t start = blockIdx.y * part + threadIdx.y; start < end; start += int64_t(blockDim.y) * unroll) {
    Vector<T, width> g[unroll], s[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t row = start + u * blockDim.y;
      if (row < end) {
        g[u] = load<width>(grad_output + row * columns + column);
        if constexpr (binary) s[u] = load<width>(saved + row * columns + column);
      }
    }
    Compute<T> step[width] = {};  // the rows of one step are summed first: fewer roundings in the long sum
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t row = start + u * blockDim.y;
      if (row < end) {
        Compute<T> dz[width];
#pragma unroll
        for (int i = 0; i < width; ++i) {
          dz[i] = activate_backward<kind, T>(widen(g[u].element[i]), binary ? widen(s[u].element[i]) : Compute<T>(0),
                                             parameter);
          step[i] += dz[i];
        }
        if (grad_preactivation) store(grad_preactivation + row * columns + column, dz);
      }
    }
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += step[i];
  }

  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int i = 0; i < width; ++i) sums[i][thread] = sum[i];
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.y) < half) {
#pragma unroll
      for (int i = 0; i < width; ++i) sums[i][thread] += sums[i][thread + half * blockDim.x];
    }
  }
  if (threadIdx.y > 0 || column >= columns) return;
#pragma unroll
  for (int i = 0; i < width; ++i) sum[i] = sums[i][thread];  // this thread's own values: no barrier needed
  if (gridDim.y > 1) {
#pragma unroll
    for (int i = 0; i < width; ++i) partial_sums[blockIdx.y * columns + column + i] = sum[i];
  } else {
    store(grad_bias + column, sum);
  }
}

constexpr int kSumColumns = 32, kSumRows = 32;

// grad_bias = column sums of partial_sums. A block covers kSumColumns columns; its rows of threads share the parts.
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    column_sum_kernel(const Compute<T>* partial_sums,  // [parts, columns]
                      T* grad_bias,                    // [columns]
                      int64_t parts, int64_t columns) {
  FDL_SHARED(Compute<T>, sums, [kSumRows][kSumColumns]);
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  Compute<T> sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += kSumRows) sum += partial_sums[part * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  for (int half = kSumRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.y) < half) sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + half][threadIdx.x];
  }
  if (threadIdx.y == 0 && column < columns) {
    const Compute<T> result[1] = {sums[0][threadIdx.x]};
    store(grad_bias + column, result);
  }
}

// Calls function<width>() with the widest vectors that the columns and the addresses allow.
template <class T, class Function, class... Pointers>
void dispatch_width(int64_t columns, const Function& function, const Pointers*... pointers) {
  constexpr int full = kFullVector<T>;
  if (full > 1 && columns % full == 0 && aligned(16, pointers...)) {
    function.template operator()<full>();
  } else {
    function.template operator()<1>();
  }
}

void require_matrix(const char* name, int64_t rows, int64_t columns) {
  require(rows >= 0, name, "rows", rows, "at least 0");
  require(columns >= 0, name, "columns", columns, "at least 0");
}

}  // namespace

void bias_activation(int dtype, const void* input, const void* bias, void* output, void* preactivation, int64_t rows,
                     int64_t columns, int kind, double parameter, cudaStream_t stream) {
  constexpr const char* name = "bias_activation";
  require_matrix(name, rows, columns);
  const bool empty = rows == 0 || columns == 0;
  require(empty || input, name, "input", "0", "an address");
  require(empty || output, name, "output", "0", "an address");
  require(empty || preactivation != output, name, "preactivation", preactivation, "an array other than output");
  if (!bias && !preactivation) return activation(dtype, input, output, rows * columns, kind, parameter, stream);
  dispatch_dtype(name, dtype, [&]<class T>() {
    dispatch_activation(name, kind, [&]<Activation activation>() {
      if (empty) return;
      auto run = [&]<int width>() {
        const dim3 block = block_of<width>(columns);
        const int64_t column_blocks = ceil_div(columns, int64_t(block.x) * width);
        const int64_t row_blocks =
            std::clamp<int64_t>(kMaximumBlocks / column_blocks, 1, ceil_div(rows, int64_t(block.y) * kUnroll<width>));
        launch(bias_activation_kernel<activation, T, width>,
               Shape(dim3(unsigned(column_blocks), unsigned(row_blocks)), block, 0, stream),
               static_cast<const T*>(input), static_cast<const T*>(bias), static_cast<T*>(output),
               static_cast<T*>(preactivation), rows, columns, static_cast<Compute<T>>(parameter));
      };
      dispatch_width<T>(columns, run, input, bias, output, preactivation);
    });
  });
}

size_t bias_activation_backward_workspace(int64_t rows, int64_t columns) {
  require_matrix("bias_activation_backward_workspace", rows, columns);
  const int64_t parts = row_parts(rows, columns);
  return parts > 1 ? size_t(parts) * size_t(columns) * sizeof(double) : 0;
}

void bias_activation_backward(int dtype, const void* grad_output, const void* saved, void* grad_preactivation,
                              void* grad_bias, int64_t rows, int64_t columns, int kind, double parameter,
                              void* workspace, cudaStream_t stream) {
  constexpr const char* name = "bias_activation_backward";
  require_matrix(name, rows, columns);
  const bool empty = rows == 0 || columns == 0;
  require(empty || grad_output, name, "grad_output", "0", "an address");
  require(empty || kind == 0 || saved, name, "saved", "0", "an address");
  if (!grad_bias) {
    if (!grad_preactivation) return;
    return activation_backward(dtype, grad_output, saved, grad_preactivation, rows * columns, kind, parameter, stream);
  }
  const int64_t parts = row_parts(rows, columns);
  require(empty || parts == 1 || workspace, name, "workspace", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    dispatch_activation(name, kind, [&]<Activation activation>() {
      if (columns == 0) return;
      auto* partial_sums = static_cast<Compute<T>*>(workspace);
      auto run = [&]<int width>() {
        const dim3 block = block_of<width>(columns);
        const dim3 grid(unsigned(ceil_div(columns, int64_t(block.x) * width)), unsigned(parts));
        launch(bias_activation_backward_kernel<activation, T, width>, Shape(grid, block, 0, stream),
               static_cast<const T*>(grad_output), static_cast<const T*>(saved), static_cast<T*>(grad_preactivation),
               static_cast<T*>(grad_bias), partial_sums, rows, columns, static_cast<Compute<T>>(parameter));
      };
      dispatch_width<T>(columns, run, grad_output, kind == 0 ? nullptr : saved, grad_preactivation, grad_bias);
      if (parts == 1) return;
      const dim3 grid(unsigned(ceil_div(columns, int64_t(kSumColumns))));
      launch(column_sum_kernel<T>, Shape(grid, dim3(kSumColumns, kSumRows), 0, stream),
             static_cast<const Compute<T>*>(partial_sums), static_cast<T*>(grad_bias), parts, columns);
    });
  });
}

}  // namespace fastdl::cuda
