// The table of functions that every instruction set's build fills; bindings.cpp chooses one table at import.
#pragma once
#include <cstdint>

namespace fastdl {

enum Dtype { float32, bfloat16, float16, float64, dtype_count };
enum Kind { none, relu, leaky_relu, elu, sigmoid, tanh, gelu, gelu_tanh, silu, kind_count };

// parameter: negative_slope of leaky_relu, alpha of elu, else ignored
struct Activation {
  int kind;
  double parameter;
};

// output[m, n] = activation(input[m, k] @ weight[n, k]^T + bias[n]), output and preactivation contiguous
struct LinearArguments {
  int dtype;
  const void* input;
  int64_t input_row_stride, input_column_stride;  // one of them is 1
  const void* weight;
  int64_t weight_row_stride, weight_column_stride;  // one of them is 1
  const void* bias;                                 // [n] or null
  void* output;                                     // [m, n]
  void* preactivation;                              // [m, n] or null
  int64_t m, n, k;
  Activation activation;
  int threads;
};

// output = activation(input + bias), element by element
struct ForwardArguments {
  int dtype;
  const void* input;    // [rows, columns]
  const void* bias;     // [columns] or null
  void* output;         // [rows, columns]
  void* preactivation;  // [rows, columns] or null
  int64_t rows, columns;
  Activation activation;
  int threads;
};

// grad_input = grad_output * activation'(saved); grad_bias = its column sums before rounding
struct BackwardArguments {
  int dtype;
  const void* grad_output;  // [rows, columns]
  const void* saved;        // [rows, columns]: the output, or for gelu and silu the preactivation; null for none
  void* grad_input;         // [rows, columns] or null
  void* grad_bias;          // [columns] or null
  int64_t rows, columns;
  Activation activation;
  int threads;
};

struct Kernels {
  const char* name;
  void (*linear)(const LinearArguments&);
  void (*activation_forward)(const ForwardArguments&);
  void (*activation_backward)(const BackwardArguments&);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

}  // namespace fastdl
