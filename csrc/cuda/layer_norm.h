// Host functions of the layer normalisation kernels, whose rules are those of kernels.h, and how they go over rows:
// pure functions of numbers, tested alone. They know nothing of the device, so the result is the same on all.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace fastdl::cuda {

// h = residual + dropout(input), rounded; output = (h - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps)
// by row; for RMS normalisation without mean, and rstd = 1 / sqrt(mean of h^2 + eps). Dropout is that of dropout.h.
void layer_norm(int dtype,
                bool wide,  // whether weight and bias are in the dtype of computation, which is that of statistics
                int64_t rows, int64_t columns,
                const void* input,     // [rows, columns]
                const void* residual,  // [rows, columns] or null
                const void* weight,    // [columns] or null
                const void* bias,      // [columns] or null
                void* output,          // [rows, columns]
                void* sum,             // [rows, columns], h, or null
                void* mean,            // [rows], null for RMS normalisation
                void* rstd,            // [rows]
                double eps, double dropout,
                const void* seed,  // [], 64 bits on the device; null without dropout
                cudaStream_t stream);

// The gradients that are not null; with n the normalised row, d = grad_output * weight: that of h is rstd (d - mean of
// d
// - n * mean of d n) + grad_sum, without the mean of d for RMS normalisation. The same in every run.
void layer_norm_backward(int dtype,
                         bool wide,  // whether weight is in the dtype of computation
                         int64_t rows, int64_t columns,
                         const void* grad_output,  // [rows, columns]
                         const void* grad_sum,     // [rows, columns] or null
                         const void* h,            // [rows, columns]
                         const void* weight,       // [columns] or null
                         const void* mean,         // [rows], null for RMS normalisation
                         const void* rstd,         // [rows]
                         void* grad_input,         // [rows, columns] or null: dropout(that of h)
                         void* grad_residual,      // [rows, columns] or null: that of h
                         void* grad_weight,        // [columns] or null, in the dtype of computation
                         void* grad_bias,          // [columns] or null, in the dtype of computation
                         double dropout, const void* seed,
                         void* workspace,  // as many bytes as the next function says, 16-byte aligned
                         cudaStream_t stream);
size_t layer_norm_backward_workspace(int dtype, int64_t rows, int64_t columns);

constexpr int kLayerNormThreads = 512;  // of a block, at most
// Vectors that a thread keeps, at most: in the forward of h; in the backward of two tensors and of two sums.
constexpr int kLayerNormForwardKept = 4, kLayerNormBackwardKept = 2;

// A row is a sequence of vectors, which the threads of a row (of a block) take in turn.
struct LayerNormPlan {
  int width;       // elements of a vector
  int kept;        // vectors that a thread keeps in registers, a power of two; 0: it reads them anew for each pass
  int threads;     // of a row, a power of two from 32
  int block_rows;  // rows of a block at once
};

// full: elements of 16 bytes, or 1 where an array is not aligned.
inline LayerNormPlan layer_norm_plan(int full, int64_t columns, int most_kept) {
  const int width = columns % full == 0 ? full : 1;
  const int64_t vectors = columns / width;
  int threads = 32, kept = 1;  // a warp needs no barrier, so it takes what it can keep
  while (threads < kLayerNormThreads && vectors > int64_t(threads) * most_kept) threads *= 2;
  while (kept < most_kept && vectors > int64_t(threads) * kept) kept *= 2;
  const bool keeps = width > 1 && vectors <= int64_t(threads) * kept;
  return {width, keeps ? kept : 0, threads, std::max(1, 128 / threads)};
}

}  // namespace fastdl::cuda
