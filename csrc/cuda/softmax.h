// Softmax: what the kernels are given. Plain C++.
#pragma once
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace fastdl::cuda {

// output = softmax(input) over the middle of [outer, size, inner], or its logarithm; none is empty.
void softmax(int dtype, int64_t outer, int64_t size, int64_t inner, const void* input, void* output, bool log,
             cudaStream_t stream);
void softmax_backward(int dtype, int64_t outer, int64_t size, int64_t inner, const void* grad_output,
                      const void* output, void* grad_input, bool log, cudaStream_t stream);

}  // namespace fastdl::cuda
