#pragma once
#include "common.h"

namespace fastdl {

enum PoolingMode { max_forward, max_backward, average_forward, average_backward };

// One axis of pooling: window o has input positions o * stride - padding + k * dilation, k < kernel. Kernel 0:
// adaptive, the positions from o * input / output, rounded down, to (o + 1) * input / output, rounded up.
struct PoolingAxis {
  int64_t input, output, kernel, stride, padding, dilation;
};

// Images of [batch, channels, rows, columns], or with the channels last. A forward's source has the axes' input sizes,
// a backward's target.
struct PoolingArguments {
  PoolingMode mode;
  int dtype;
  const void* source;        // input, or the output's gradient
  const void* source_codes;  // of max_backward
  void* target;              // output, or the input's gradient
  void* target_codes;        // of max_forward, or null
  int64_t code_bytes;        // 1: the maximum's place in its window, row by row; 8: in its plane; 0: no codes
  int64_t batch, channels;
  PoolingAxis rows, columns;
  bool channels_last;
  bool count_include_pad;
  double divisor;  // of every window's sum, or 0: its size
  int threads;
};

// Maxima of windows that start where the caller says, and the gradient; contiguous.
struct FractionalArguments {
  int dtype;
  const void* input;             // [planes, height, width]; backward: the output's gradient
  const int32_t* row_starts;     // [planes, output_height]
  const int32_t* column_starts;  // [planes, output_width]
  void* output;                  // [planes, output_height, output_width]; backward: the input's gradient
  int64_t* indices;              // of the output's shape: the maximum's place in its plane
  int64_t planes, height, width, output_height, output_width, kernel_height, kernel_width;
  int threads;
};

#define FASTDL_CPU_POOLING(KERNEL)                               \
  KERNEL(void, pooling, (const PoolingArguments&))               \
  KERNEL(void, fractional_pooling, (const FractionalArguments&)) \
  KERNEL(void, fractional_pooling_backward, (const FractionalArguments&))

}  // namespace fastdl
