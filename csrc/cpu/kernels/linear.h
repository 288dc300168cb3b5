#pragma once
#include "common.h"

namespace fastdl {

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

#define FASTDL_CPU_LINEAR(KERNEL) KERNEL(void, linear, (const LinearArguments&))

}  // namespace fastdl
