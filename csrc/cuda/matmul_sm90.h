// The linear layer's forward for Hopper (compute capability 9.0 only), as the host sees it. csrc/cuda/linear.cu calls
// it.
#pragma once
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace fastdl::cuda::hopper {

// Whether forward() takes these operands, whatever the GPU: bfloat16 (1) or float16 (2), no extent zero, unit column
// strides, and all that TMA asks for: 16-byte aligned addresses and rows that are multiples of 16 bytes apart.
bool supports(int dtype, const void* input, int64_t input_row_stride, int64_t input_column_stride, const void* weight,
              int64_t weight_row_stride, int64_t weight_column_stride, const void* output,
              const void* preactivation,  // or null
              int64_t M, int64_t N, int64_t K);

// output = activation(input @ weight^T + bias) where supports() says so. Throws std::runtime_error on a GPU of another
// compute capability.
void forward(int dtype,
             const void* input,  // [M, K], rows input_row_stride elements apart
             int64_t input_row_stride,
             const void* weight,  // [N, K], rows weight_row_stride elements apart
             int64_t weight_row_stride,
             const void* bias,     // [N] or null: 0
             void* output,         // [M, N]
             void* preactivation,  // [M, N] or null
             int64_t M, int64_t N, int64_t K, int kind, double parameter, cudaStream_t stream);

// Whether forward() takes 128 x 256 tiles, by pairs of blocks, and not 128 x 128 tiles by consumers in turns. An
// estimate of the busiest multiprocessor's time, in narrow steps (128 x 128 x 64): a wide step counts two, and the end
// of a wide tile, which nothing overlaps, four. Narrow tiles ask twice as much of L2; an eighth more time is assumed
// for that.
constexpr bool prefers_wide(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t steps = parts(K, 64), pairs = multiprocessors > 1 ? multiprocessors / 2 : 1;
  const int64_t wide = parts(parts(M, 256) * parts(N, 256), pairs) * (2 * steps + 4);
  const int64_t narrow = parts(parts(M, 128) * parts(N, 128), multiprocessors) * steps;
  return wide * 8 < narrow * 9 + 4 * 8;
}
static_assert(prefers_wide(8192, 8192, 8192, 132) && !prefers_wide(512, 1024, 1024, 132));

}  // namespace fastdl::cuda::hopper
