// What the kernels of every family take.
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

}  // namespace fastdl
