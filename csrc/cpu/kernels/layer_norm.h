#pragma once
#include "common.h"

namespace fastdl {

// h = residual + dropout(input), rounded; output = (h - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps)
// by row; for rms without mean, and rstd = 1 / sqrt(mean of h^2 + eps). Dropout is that of dropout.h.
struct LayerNormArguments {
  int dtype;
  bool wide;  // whether weight and bias are in the dtype of computation, which is that of statistics
  int64_t rows, columns;
  const void *input, *residual;  // [rows, columns]; residual or null
  const void *weight, *bias;     // [columns] or null
  void *output, *sum;            // [rows, columns]; sum receives h, or null
  void *mean, *rstd;             // [rows]; mean null for rms
  double eps, dropout;
  uint64_t seed;
  int threads;
};

// With n the normalised row, g = grad_output and d = g * weight: grad_h = rstd (d - mean of d - n * mean of d n) +
// grad_sum, for rms without the mean of d; grad_input = dropout(grad_h), grad_residual = grad_h, grad_weight = the sum
// of g n over the rows, grad_bias that of g.
struct LayerNormBackwardArguments {
  int dtype;
  bool wide;  // whether weight is in the dtype of computation
  int64_t rows, columns;
  const void *grad_output, *grad_sum;  // [rows, columns]; grad_sum or null
  const void *h, *weight;              // [rows, columns], [columns] or null
  const void *mean, *rstd;             // [rows]; mean null for rms
  void *grad_input, *grad_residual;    // [rows, columns] or null
  void *grad_weight, *grad_bias;       // [columns] or null, in the dtype of computation
  double dropout;
  uint64_t seed;
  int threads;
};

#define FASTDL_CPU_LAYER_NORM(KERNEL)                   \
  KERNEL(void, layer_norm, (const LayerNormArguments&)) \
  KERNEL(void, layer_norm_backward, (const LayerNormBackwardArguments&))

}  // namespace fastdl
