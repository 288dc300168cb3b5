#pragma once
#include "common.h"

namespace fastdl {

// element (o, c, i) of a tensor [outer, channels, inner] lies at (o * channels + c) * inner + i; none is empty
struct BatchNormShape {
  int64_t outer, channels, inner;
};

// output = activation((input - mean) * rstd * weight + bias + residual), rstd = 1 / sqrt(variance + eps). What is
// [channels] is in the dtype of computation: float32 for 16-bit types.
struct BatchNormArguments {
  int dtype;
  const void* input;
  const void *weight, *bias;                // [channels] or null
  const void* residual;                     // of input's shape, or null
  const void *given_mean, *given_variance;  // [channels], or null: then they are taken from input
  void* output;
  void *mean, *rstd, *variance;  // [channels]: receive the statistics taken, variance the unbiased one
  BatchNormShape shape;
  double eps;
  Activation activation;
  int threads;
};

// mean and sum of squared differences from it, by channel
struct BatchNormStatisticsArguments {
  int dtype;
  const void* input;
  void *mean, *squares;  // [channels]
  BatchNormShape shape;
  int threads;
};

// With dz the gradient of the activation's argument: grad_residual = dz, grad_bias = its sum, grad_weight = the sum of
// dz (input - mean) rstd, grad_input = rstd weight (dz - mean_gradient - (input - mean) rstd mean_product).
struct BatchNormBackwardArguments {
  int dtype;
  const void *grad_output, *input;
  const void *weight, *bias;                 // [channels] or null
  const void *residual, *output;             // what the activation's gradient is made of besides input, or null
  const void *mean, *rstd;                   // [channels]
  const void *mean_gradient, *mean_product;  // [channels], or null: then of these sums in training, else 0
  void *grad_input, *grad_weight, *grad_bias, *grad_residual;  // or null
  BatchNormShape shape;
  bool training;  // whether mean and rstd are those of input
  Activation activation;
  int threads;
};

#define FASTDL_CPU_BATCH_NORM(KERNEL)                                        \
  KERNEL(void, batch_norm, (const BatchNormArguments&))                      \
  KERNEL(void, batch_norm_statistics, (const BatchNormStatisticsArguments&)) \
  KERNEL(void, batch_norm_backward, (const BatchNormBackwardArguments&))

}  // namespace fastdl
