#pragma once
#include "common.h"

namespace fastdl {

// element (o, k, i) of a tensor [outer, size, inner] lies at (o * size + k) * inner + i; none is empty
struct SoftmaxShape {
  int64_t outer, size, inner;
};

// output = softmax(input) over k, or its logarithm
struct SoftmaxArguments {
  int dtype;
  SoftmaxShape shape;
  const void* input;
  void* output;
  bool log;
  int threads;
};

struct SoftmaxBackwardArguments {
  int dtype;
  SoftmaxShape shape;
  const void *grad_output, *output;
  void* grad_input;
  bool log;
  int threads;
};

#define FASTDL_CPU_SOFTMAX(KERNEL)                 \
  KERNEL(void, softmax, (const SoftmaxArguments&)) \
  KERNEL(void, softmax_backward, (const SoftmaxBackwardArguments&))

}  // namespace fastdl
