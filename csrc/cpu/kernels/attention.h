#pragma once
#include "common.h"

namespace fastdl {

// Rows of one size for each batch, position and head: element (b, i, h, d) at data[b * batch_stride + i * row_stride +
// h * head_stride + d]
template <class Pointer>
struct Heads {
  Pointer data;
  int64_t batch_stride, row_stride, head_stride;
};

// Sequence b has queries [query_offsets[b], query_offsets[b + 1]) of `queries` rows, and keys likewise; without offsets
// all of them. `group` heads of queries, one after the other, share one of keys and values.
struct AttentionShape {
  int64_t batch, heads, group, queries, keys, size, value_size;
  const int64_t *query_offsets, *key_offsets;  // [batch + 1] or null
};

enum MaskKind { no_mask, boolean_mask, additive_mask, wide_additive_mask, mask_kind_count };  // wide: as computed in

// The score of query i for key j: scale * q . k + mask[i, j] - slope * |p - j|, where p - left <= j <= p + right and
// the boolean mask is not 0, else -infinity. p = i, or with bottom_right i + keys - queries. An additive mask is in the
// dtype of query, a wide one and the slopes in that of computation.
struct AttentionScores {
  double scale;
  int64_t left, right;  // less than 0: no limit
  bool bottom_right;
  int mask_kind;
  const void* mask;  // element (b, h, i, j) at the strides' sum and j
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride;
  const void* slopes;  // [batch, heads] or null
  int64_t slopes_batch_stride;
  double dropout;
  uint64_t seed;
};

// output = dropout(softmax(scores)) value; logsumexp that of the scores, -infinity where all are
struct AttentionArguments {
  int dtype;
  AttentionShape shape;
  AttentionScores scores;
  Heads<const void*> query, key, value;
  Heads<void*> output;
  void* logsumexp;  // [batch, or 1 with offsets, heads, queries] in the dtype of computation
  int threads;
};

struct AttentionBackwardArguments {
  int dtype;
  AttentionShape shape;
  AttentionScores scores;
  Heads<const void*> grad_output, query, key, value, output;
  const void *logsumexp, *grad_logsumexp;         // as above; grad_logsumexp may be null
  Heads<void*> grad_query, grad_key, grad_value;  // data may be null
  void* grad_mask;                                // [batch, heads, queries, keys] or null, in the dtype of computation
  void* workspace;                                // as attention_backward_workspace asks
  int threads;
};

#define FASTDL_CPU_ATTENTION(KERNEL)                                    \
  KERNEL(void, attention, (const AttentionArguments&))                  \
  KERNEL(void, attention_backward, (const AttentionBackwardArguments&)) \
  KERNEL(int64_t, attention_backward_workspace, (int dtype, const AttentionShape&, int threads))

}  // namespace fastdl
