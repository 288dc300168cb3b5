#pragma once
#include "common.h"

namespace fastdl {

// Logits [outer, classes, inner]: row (o, i), number o * inner + i, has its logit c at (o * classes + c) * inner + i;
// none is empty. A row's loss is the sum over c of q[c] (logsumexp(x) - x[c]); its mass the sum of q.
struct CrossEntropyRows {
  int dtype;
  int64_t outer, classes, inner;
  const void* logits;
  const void* target;  // [rows] int64, or probabilities like the logits
  bool index;          // which of them
  const void* weight;  // [classes] in the dtype of computation, or null
  int64_t ignore_index;
  double label_smoothing;
};

// All but the logits and probabilities is in the dtype of computation.
struct CrossEntropyArguments {
  CrossEntropyRows rows;
  void* loss;         // [rows], or [1]: their sum, if `sums` is given
  void* denominator;  // [1] with `sums`: of the mean
  void* statistics;   // [3, rows]: the largest logit, logsumexp less this, the mass
  void* sums;         // [2, rows] workspace, or null
  int threads;
};

struct CrossEntropyBackwardArguments {
  CrossEntropyRows rows;
  const void* grad_loss;            // [rows], or [1] for all of them
  bool grad_by_row;                 // which of them
  const void* denominator;          // [1] that divides grad_loss, or null
  const void* statistics;           // as the forward's
  void *grad_logits, *grad_target;  // like the logits, or null
  int threads;
};

// Both give the number of the first row whose target is no class, and then do nothing; else -1.
#define FASTDL_CPU_CROSS_ENTROPY(KERNEL)                         \
  KERNEL(int64_t, cross_entropy, (const CrossEntropyArguments&)) \
  KERNEL(int64_t, cross_entropy_backward, (const CrossEntropyBackwardArguments&))

}  // namespace fastdl
