// Activations and their gradients over contiguous arrays of any length.
#include <algorithm>

#include "activation.cuh"
#include "kernels.h"

namespace fastdl::cuda {
namespace {

constexpr int kThreads = 256;

template <Activation kind, class T>
struct Forward {
  static constexpr int kOperands = 1;
  Compute<T> parameter;
  __device__ __forceinline__ Compute<T> operator()(Compute<T> x, Compute<T>) const {
    return activate<kind, T>(x, parameter);
  }
};

template <Activation kind, class T>
struct Backward {
  static constexpr int kOperands = kind == Activation::none ? 1 : 2;
  Compute<T> parameter;
  __device__ __forceinline__ Compute<T> operator()(Compute<T> gradient, Compute<T> saved) const {
    return activate_backward<kind, T>(gradient, saved, parameter);
  }
};

// output = function(first, second), where a thread loads `unroll` vectors of each operand before it computes. Blocks
// stride over tiles of kThreads * unroll vectors; the first block takes the elements that fill no vector.
template <class Function, class T, int width>
__global__ void __launch_bounds__(kThreads) elementwise_kernel(const T* first,   // [count]
                                                               const T* second,  // [count], read if kOperands is 2
                                                               T* output,        // [count], may be an operand
                                                               int64_t count, Function function) {
  constexpr int unroll = width > 1 ? 2 : 4;
  constexpr bool binary = Function::kOperands == 2;
  const int64_t vectors = count / width;
  const int64_t stride = int64_t(gridDim.x) * (kThreads * unroll);
  for (int64_t start = int64_t(blockIdx.x) * (kThreads * unroll) + threadIdx.x; start < vectors; start += stride) {
    Vector<T, width> a[unroll], b[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t vector = start + u * kThreads;
      if (vector < vectors) {
        a[u] = load<width>(first + vector * width);
        if constexpr (binary) b[u] = load<width>(second + vector * width);
      }
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t vector = start + u * kThreads;
      if (vector < vectors) {
        Compute<T> result[width];
#pragma unroll
        for (int i = 0; i < width; ++i) {
          result[i] = function(widen(a[u].element[i]), binary ? widen(b[u].element[i]) : Compute<T>(0));
        }
        store(output + vector * width, result);
      }
    }
  }
  const int64_t last = vectors * width + threadIdx.x;
  if (width > 1 && blockIdx.x == 0 && last < count) {
    const Compute<T> result[1] = {function(widen(first[last]), binary ? widen(second[last]) : Compute<T>(0))};
    store(output + last, result);
  }
}

template <class Function, class T>
void elementwise(const void* first, const void* second, void* output, int64_t count, Function function,
                 cudaStream_t stream) {
  auto run = [&]<int width>() {
    const int64_t tile = kThreads * width * (width > 1 ? 2 : 4);
    const int64_t blocks = std::min(ceil_div(count, tile), kMaximumBlocks);
    launch(elementwise_kernel<Function, T, width>, Shape(dim3(unsigned(blocks)), dim3(kThreads), 0, stream),
           static_cast<const T*>(first), static_cast<const T*>(second), static_cast<T*>(output), count, function);
  };
  constexpr int full = kFullVector<T>;
  if (full > 1 && aligned(16, first, second, output)) {
    run.template operator()<full>();
  } else {
    run.template operator()<1>();
  }
}

}  // namespace

void activation(int dtype, const void* input, void* output, int64_t count, int kind, double parameter,
                cudaStream_t stream) {
  constexpr const char* name = "activation";
  require(count >= 0, name, "count", count, "at least 0");
  require(count == 0 || input, name, "input", "0", "an address");
  require(count == 0 || output, name, "output", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    dispatch_activation(name, kind, [&]<Activation activation>() {
      if (count == 0) return;
      const Forward<activation, T> function{static_cast<Compute<T>>(parameter)};
      elementwise<Forward<activation, T>, T>(input, nullptr, output, count, function, stream);
    });
  });
}

void activation_backward(int dtype, const void* grad_output, const void* saved, void* grad_input, int64_t count,
                         int kind, double parameter, cudaStream_t stream) {
  constexpr const char* name = "activation_backward";
  require(count >= 0, name, "count", count, "at least 0");
  require(count == 0 || grad_output, name, "grad_output", "0", "an address");
  require(count == 0 || kind == 0 || saved, name, "saved", "0", "an address");
  require(count == 0 || grad_input, name, "grad_input", "0", "an address");
  dispatch_dtype(name, dtype, [&]<class T>() {
    dispatch_activation(name, kind, [&]<Activation activation>() {
      if (count == 0) return;
      const Backward<activation, T> function{static_cast<Compute<T>>(parameter)};
      elementwise<Backward<activation, T>, T>(grad_output, kind == 0 ? nullptr : saved, grad_input, count, function,
                                              stream);
    });
  });
}

}  // namespace fastdl::cuda
