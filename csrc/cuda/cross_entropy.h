// Cross entropy: what the kernels are given. Plain C++.
#pragma once
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace fastdl::cuda {

// Logits [outer, classes, inner]: row (o, i), number o * inner + i, has its logit c at (o * classes + c) * inner + i;
// none is empty. All but logits and probabilities is in the dtype of computation.
struct CrossEntropyRows {
  int dtype;
  int64_t outer, classes, inner;
  const void* logits;
  const void* target;  // [rows] int64, or probabilities like the logits
  bool index;          // which of them
  const void* weight;  // [classes] or null
  int64_t ignore_index;
  double label_smoothing;
};

// loss: [rows] or, with sums ([2, rows] workspace), [1] and denominator [1]. statistics: [3, rows], the largest logit,
// logsumexp less this, the mass.
void cross_entropy(const CrossEntropyRows& rows, void* loss, void* denominator, void* statistics, void* sums,
                   cudaStream_t stream);
// grad_loss: [rows] if by_row, else [1]; denominator: [1] or null; the gradients: like the logits, or null
void cross_entropy_backward(const CrossEntropyRows& rows, const void* grad_loss, bool by_row, const void* denominator,
                            const void* statistics, void* grad_logits, void* grad_target, cudaStream_t stream);

}  // namespace fastdl::cuda
