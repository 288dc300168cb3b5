#pragma once
#include "common.h"

namespace fastdl {

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

#define FASTDL_CPU_ACTIVATION(KERNEL)                         \
  KERNEL(void, activation_forward, (const ForwardArguments&)) \
  KERNEL(void, activation_backward, (const BackwardArguments&))

}  // namespace fastdl
