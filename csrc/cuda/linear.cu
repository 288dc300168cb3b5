// The linear layer: its products with bias and activation, their gradients, and the same without the product.
#include <algorithm>
#include <array>
#include <utility>

#include "activation.cuh"
#include "kernels.h"
#include "matmul.cuh"
#include "matmul_sm90.h"

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

// ---- Products -------------------------------------------------------------------------------------------------------

namespace {

// Whether an operand can be copied by chunks along a dimension.
template <class T>
bool has_vectors(const Operand<T>& operand, Layout layout) {
  const auto [along, across] = layout == Layout::depth ? std::pair(operand.depth_stride, operand.row_stride)
                                                       : std::pair(operand.row_stride, operand.depth_stride);
  return along == 1 && across % int64_t(16 / sizeof(T)) == 0 && aligned(16, operand.data);
}

// An operand of a product; the stride of a dimension of one element does not matter, whatever it is.
template <class T>
Operand<T> operand_of(const void* data, int64_t rows, int64_t depth, int64_t row_stride, int64_t depth_stride) {
  Operand<T> operand{static_cast<const T*>(data), rows, rows == 1 ? 0 : row_stride, depth == 1 ? 0 : depth_stride,
                     true};
  return operand;
}

template <class T, bool tensor_cores, TileName name>
void launch_matmul(const Product<T>& product, Layout layout_a, Layout layout_b, int splits, cudaStream_t stream) {
  constexpr Tile tile = kTiles[int(name)];
  const auto& epilogue = product.epilogue;
  const int64_t tiles = ceil_div(epilogue.rows, int64_t(tile.rows)) *
                        std::max<int64_t>(1, ceil_div(epilogue.columns, int64_t(tile.columns)));
  require(tiles < (int64_t(1) << 31), "linear", "the number of tiles", tiles, "less than 2^31");
  const bool gradient = product.gradient != Activation::none;
  const Shape shape(dim3(unsigned(tiles), unsigned(splits)), dim3(tile.threads()),
                    size_t(shared_bytes(tile, gradient, sizeof(Compute<T>))), stream);
  constexpr Layout depth = Layout::depth, rows = Layout::rows;
  if (layout_a == depth && layout_b == depth) {
    launch(matmul_kernel<T, tensor_cores, name, depth, depth>, shape, product);
  } else if (layout_a == depth) {
    launch(matmul_kernel<T, tensor_cores, name, depth, rows>, shape, product);
  } else if (layout_b == depth) {
    launch(matmul_kernel<T, tensor_cores, name, rows, depth>, shape, product);
  } else {
    launch(matmul_kernel<T, tensor_cores, name, rows, rows>, shape, product);
  }
}

// Runs a product of which all is set but its split. workspace: null, or as large as linear_workspace says.
template <class T>
void multiply(Product<T> product, bool allow_tf32, void* workspace, cudaStream_t stream) {
  auto& [a, b, saved, gradient, parameter, depth, split_depth, row_sums, partial_row_sums, epilogue] = product;
  auto layout_of = [](const Operand<T>& operand) {
    return has_vectors(operand, Layout::depth) ? Layout::depth : Layout::rows;
  };
  Layout layout_a = layout_of(a), layout_b = layout_of(b);
  a.vectors = has_vectors(a, layout_a) && (gradient == Activation::none || has_vectors(saved, layout_a));
  b.vectors = has_vectors(b, layout_b);
  if (!a.vectors || !b.vectors) {
    a.vectors &= layout_a == Layout::depth;
    b.vectors &= layout_b == Layout::depth;
    layout_a = layout_b = Layout::depth;
  }
  const bool flexible =
      !a.vectors || !b.vectors || gradient != Activation::none || (row_sums && layout_a == Layout::depth);
  const Arithmetic arithmetic = arithmetic_of<T>(allow_tf32);
  const Plan plan = choose_plan(arithmetic, epilogue.rows, epilogue.columns, depth, flexible,
                                gradient != Activation::none, workspace, device_limits());
  require(depth < (int64_t(1) << 31) - 1024, "linear", "the depth", depth, "less than 2^31 - 1024");
  split_depth = plan.split_depth;
  if (plan.splits > 1) {
    epilogue.partial = static_cast<Compute<T>*>(workspace);
    if (row_sums) partial_row_sums = epilogue.partial + plan.splits * epilogue.rows * epilogue.columns;
  }
  epilogue.use_vectors();
  auto run = [&]<bool tensor_cores, TileName tile>() {
    launch_matmul<T, tensor_cores, tile>(product, layout_a, layout_b, plan.splits, stream);
  };
  dispatch_tile<T>(arithmetic, plan.tile, run);
  if (plan.splits == 1) return;
  launch_finish(epilogue, static_cast<const Compute<T>*>(epilogue.partial),
                static_cast<const Compute<T>*>(partial_row_sums), row_sums, plan.splits, 1, stream);
}

void require_product(const char* name, int64_t M, int64_t N, int64_t K, int kind) {
  require(M >= 0, name, "M", M, "at least 0");
  require(N >= 0, name, "N", N, "at least 0");
  require(K >= 0, name, "K", K, "at least 0");
  require(kind >= 0 && kind <= int(Activation::silu), name, "kind", kind, "0 to 8");
}

}  // namespace

void linear(int dtype, const void* input, int64_t input_row_stride, int64_t input_column_stride, const void* weight,
            int64_t weight_row_stride, int64_t weight_column_stride, const void* bias, void* output,
            void* preactivation, int64_t M, int64_t N, int64_t K, int kind, double parameter, bool allow_tf32, int path,
            cudaStream_t stream) {
  constexpr const char* name = "linear";
  require_product(name, M, N, K, kind);
  require(path == 0 || path == 1, name, "path", path, "0 (portable) or 1 (Hopper)");
  const bool empty = M == 0 || N == 0;
  require(empty || K == 0 || input, name, "input", "0", "an address");
  require(empty || K == 0 || weight, name, "weight", "0", "an address");
  require(empty || output, name, "output", "0", "an address");
  require(empty || preactivation != output, name, "preactivation", preactivation, "an array other than output");
  if (path == 1) {
    const bool supported = hopper::supports(dtype, input, input_row_stride, input_column_stride, weight,
                                            weight_row_stride, weight_column_stride, output, preactivation, M, N, K);
    require(supported, name, "path", path, "0 for operands that hopper_supports() refuses");
    return hopper::forward(dtype, input, input_row_stride, weight, weight_row_stride, bias, output, preactivation, M, N,
                           K, kind, parameter, stream);
  }
  dispatch_dtype(name, dtype, [&]<class T>() {
    if (empty) return;
    Product<T> product{};
    product.a = operand_of<T>(K ? input : output, M, K, input_row_stride, input_column_stride);
    product.b = operand_of<T>(K ? weight : output, N, K, weight_row_stride, weight_column_stride);
    product.saved = product.a;
    product.depth = K;
    product.epilogue = {static_cast<const T*>(bias),
                        static_cast<T*>(output),
                        static_cast<T*>(preactivation),
                        nullptr,
                        M,
                        N,
                        static_cast<Compute<T>>(parameter),
                        Activation(kind),
                        false};
    multiply(product, allow_tf32, nullptr, stream);
  });
}

void linear_input_gradient(int dtype, const void* grad_output, int64_t grad_row_stride, int64_t grad_column_stride,
                           const void* saved, const void* weight, int64_t weight_row_stride,
                           int64_t weight_column_stride, void* grad_input, int64_t M, int64_t N, int64_t K, int kind,
                           double parameter, bool allow_tf32, void* workspace, cudaStream_t stream) {
  constexpr const char* name = "linear_input_gradient";
  require_product(name, M, N, K, kind);
  const bool empty = M == 0 || K == 0;
  require(empty || N == 0 || grad_output, name, "grad_output", "0", "an address");
  require(empty || N == 0 || kind == 0 || saved, name, "saved", "0", "an address");
  require(empty || N == 0 || weight, name, "weight", "0", "an address");
  require(empty || grad_input, name, "grad_input", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    if (empty) return;
    Product<T> product{};
    product.a = operand_of<T>(N ? grad_output : grad_input, M, N, grad_row_stride, grad_column_stride);
    product.b = operand_of<T>(N ? weight : grad_input, K, N, weight_column_stride, weight_row_stride);
    product.gradient = N ? Activation(kind) : Activation::none;
    product.saved = kind && N ? operand_of<T>(saved, M, N, N, 1) : product.a;
    product.parameter = static_cast<Compute<T>>(parameter);
    product.depth = N;
    product.epilogue.output = static_cast<T*>(grad_input);
    product.epilogue.rows = M;
    product.epilogue.columns = K;
    multiply(product, allow_tf32, workspace, stream);
  });
}

void linear_weight_gradient(int dtype, const void* grad_output, int64_t grad_row_stride, int64_t grad_column_stride,
                            const void* saved, const void* input, int64_t input_row_stride, int64_t input_column_stride,
                            void* grad_weight, void* grad_bias, int64_t M, int64_t N, int64_t K, int kind,
                            double parameter, bool allow_tf32, bool /*deterministic*/, void* workspace,
                            cudaStream_t stream) {
  constexpr const char* name = "linear_weight_gradient";
  require_product(name, M, N, K, kind);
  const int64_t columns = grad_weight ? K : 0;
  const bool empty = N == 0 || (columns == 0 && !grad_bias);
  require(empty || M == 0 || grad_output, name, "grad_output", "0", "an address");
  require(empty || M == 0 || kind == 0 || saved, name, "saved", "0", "an address");
  require(empty || M == 0 || columns == 0 || input, name, "input", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    if (empty) return;
    void* const somewhere = grad_weight ? grad_weight : grad_bias;  // for operands that are not read
    Product<T> product{};
    product.a = operand_of<T>(M ? grad_output : somewhere, N, M, grad_column_stride, grad_row_stride);
    product.b = operand_of<T>(M && columns ? input : somewhere, columns, M, input_column_stride, input_row_stride);
    if (columns == 0) product.b = operand_of<T>(product.a.data, 0, M, product.a.row_stride, product.a.depth_stride);
    product.gradient = M ? Activation(kind) : Activation::none;
    product.saved = kind && M ? operand_of<T>(saved, N, M, 1, N) : product.a;
    product.parameter = static_cast<Compute<T>>(parameter);
    product.depth = M;
    product.row_sums = static_cast<T*>(grad_bias);
    product.epilogue.output = static_cast<T*>(grad_weight);
    product.epilogue.rows = N;
    product.epilogue.columns = columns;
    multiply(product, allow_tf32, workspace, stream);
  });
}

size_t linear_workspace(int product, int dtype, int64_t M, int64_t N, int64_t K, int multiprocessors,
                        bool /*deterministic*/) {
  constexpr const char* name = "linear_workspace";
  require_product(name, M, N, K, 0);
  require(product >= 0 && product <= 2, name, "product", product,
          "0 (linear), 1 (input gradient) or 2 (weight gradient)");
  size_t bytes = 0;
  dispatch_dtype(name, dtype, [&]<class T>() {
    if (product == 0) return;  // not split: its epilogue would need another launch
    const auto [rows, columns, depth] = product == 1 ? std::array{M, K, N} : std::array{N, K, M};
    DeviceLimits device = device_limits();
    if (multiprocessors > 0) device.multiprocessors = multiprocessors;
    for (const bool allow_tf32 : {false, true}) {  // whatever the operands will be like
      for (const bool flexible : {false, true}) {
        for (const bool gradient : {false, true}) {
          const Plan plan = choose_plan(arithmetic_of<T>(allow_tf32), rows, columns, depth, flexible || gradient,
                                        gradient, true, device);
          if (plan.splits == 1) continue;
          bytes = std::max(bytes, plan.splits * size_t(rows) * size_t(columns + 1) * sizeof(Compute<T>));
        }
      }
    }
  });
  return bytes;
}

}  // namespace fastdl::cuda
