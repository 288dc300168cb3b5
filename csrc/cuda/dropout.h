// Host function of the dropout kernel; the rules are those of kernels.h.
#pragma once
#include "kernels.h"

namespace fastdl::cuda {

// output = input * factor: 0 where dropped, which element e is if word e % 4 of the random words of the counter (e / 4,
// its high 32 bits, 0, 1) is below p * 2^32; else 1 / (1 - p). output may be input.
void dropout(int dtype,
             const void* input,  // [count]
             void* output,       // [count]
             int64_t count, double p,
             const void* seed,  // [], 64 bits on the device
             cudaStream_t stream);

}  // namespace fastdl::cuda
