// Softmax and its logarithm over the middle of [outer, size, inner], and their gradients: two passes over a row, of
// which the second finds it in a cache.
#include "softmax.cuh"
#include "softmax.h"

namespace fastdl::cuda {
namespace {

template <Layout layout, int width, bool log, class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T>) softmax_kernel(RowsView view, const T* input, T* output) {
  using C = Compute<T>;
  for (int64_t item = blockIdx.x; item < row_items<layout>(view); item += gridDim.x) {
    const RowPart<layout, width> part(view, item);
    const auto [largest, sum] = exponentials_of<width>(part, input);
    const C factor = log ? std::log(sum) : 1 / sum, top = largest;
    for_each_vector<width>(part, input, [&](int64_t at, int64_t, const Vector<T, width>& x) {
      C result[width];
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const C difference = widen(x.element[i]) - top;
        result[i] = log ? difference - factor : std::exp(difference) * factor;
      }
      store(output + at, result);
    });
  }
}

template <Layout layout, int width, bool log, class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T>)
    softmax_backward_kernel(RowsView view, const T* grad_output, const T* output, T* grad_input) {
  using C = Compute<T>;
  for (int64_t item = blockIdx.x; item < row_items<layout>(view); item += gridDim.x) {
    const RowPart<layout, width> part(view, item);
    C sum = 0;
    for_each_vector<width>(part, grad_output, [&](int64_t at, int64_t, const Vector<T, width>& gradient) {
      Vector<T, width> y;
      if constexpr (!log) y = load<width>(output + at);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const C g = widen(gradient.element[i]);
        if constexpr (log) {
          sum += g;
        } else {
          sum += g * widen(y.element[i]);
        }
      }
    });
    sum = sum_of_row<layout>(sum);
    for_each_vector<width>(part, grad_output, [&](int64_t at, int64_t, const Vector<T, width>& gradient) {
      const Vector<T, width> y = load<width>(output + at);
      C result[width];
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const C g = widen(gradient.element[i]), value = widen(y.element[i]);
        result[i] = log ? g - std::exp(value) * sum : value * (g - sum);
      }
      store(grad_input + at, result);
    });
  }
}

}  // namespace

void softmax(int dtype, int64_t outer, int64_t size, int64_t inner, const void* input, void* output, bool log,
             cudaStream_t stream) {
  constexpr const char* name = "softmax";
  const RowsView view{outer, size, inner};
  require_view(name, view, "size");
  require(input, name, "input", "0", "an address");
  require(output, name, "output", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    with_layout<T>(view, aligned(16, input, output), [&]<Layout layout, int width>() {
      launch(log ? softmax_kernel<layout, width, true, T> : softmax_kernel<layout, width, false, T>,
             row_shape(row_items<layout>(view), stream), view, static_cast<const T*>(input), static_cast<T*>(output));
    });
  });
}

void softmax_backward(int dtype, int64_t outer, int64_t size, int64_t inner, const void* grad_output,
                      const void* output, void* grad_input, bool log, cudaStream_t stream) {
  constexpr const char* name = "softmax_backward";
  const RowsView view{outer, size, inner};
  require_view(name, view, "size");
  require(grad_output, name, "grad_output", "0", "an address");
  require(output, name, "output", "0", "an address");
  require(grad_input, name, "grad_input", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    with_layout<T>(view, aligned(16, grad_output, output, grad_input), [&]<Layout layout, int width>() {
      launch(log ? softmax_backward_kernel<layout, width, true, T> : softmax_backward_kernel<layout, width, false, T>,
             row_shape(row_items<layout>(view), stream), view, static_cast<const T*>(grad_output),
             static_cast<const T*>(output), static_cast<T*>(grad_input));
    });
  });
}

}  // namespace fastdl::cuda
