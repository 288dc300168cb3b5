// Attention: what the kernels are given, and how they divide their work. Plain C++.
#pragma once
#include <cstddef>
#include <cstdint>

#include "tiles.h"

typedef struct CUstream_st* cudaStream_t;

namespace fastdl::cuda {

// Rows of one size for each batch entry, position and head: element (b, i, h, d) at
// data[b * batch_stride + i * row_stride + h * head_stride + d].
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
  int64_t longest_queries, longest_keys;       // no sequence is longer
};

enum MaskKind { kNoMask, kBooleanMask, kAdditiveMask, kWideAdditiveMask, kMaskKinds };  // wide: as computed in

// The score of query i for key j: scale * q . k + mask[i, j] - slope * |p - j|, where p - left <= j <= p + right and
// the boolean mask is not 0, else -infinity. p = i, or with bottom_right i + keys - queries. An additive mask is in the
// dtype of query, a wide one and the slopes in that of computation.
struct AttentionScores {
  double scale;
  int64_t left, right;  // less than 0: no limit
  bool bottom_right;
  int mask_kind;
  const void* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride;
  const void* slopes;  // [batch, heads] or null
  int64_t slopes_batch_stride;
  double dropout;
  const int64_t* seed;  // [] on the device, with dropout
};

// output = dropout(softmax(scores)) value; logsumexp that of the scores, -infinity where all are.
struct AttentionArguments {
  int dtype;
  AttentionShape shape;
  AttentionScores scores;
  Heads<const void*> query, key, value;
  Heads<void*> output;
  void* logsumexp;  // [batch, or 1 with offsets, heads, queries] in the dtype of computation
  bool allow_tf32;
  cudaStream_t stream;
};

// The same in every run: each sum has one place and one order.
struct AttentionBackwardArguments {
  int dtype;
  AttentionShape shape;
  AttentionScores scores;
  Heads<const void*> grad_output, query, key, value, output;
  const void *logsumexp, *grad_logsumexp;         // as above; grad_logsumexp may be null
  Heads<void*> grad_query, grad_key, grad_value;  // data may be null
  void* grad_mask;                                // [batch, heads, queries, keys] or null, in the dtype of computation
  bool allow_tf32;
  void* workspace;  // as attention_backward_workspace says, 16-byte aligned
  cudaStream_t stream;
};

void attention(const AttentionArguments& arguments);
void attention_backward(const AttentionBackwardArguments& arguments);
size_t attention_backward_workspace(int dtype, const AttentionShape& shape);

// ---- Division of the work -------------------------------------------------------------------------------------------

enum class AttentionPass { output, query_gradient, key_gradient };

// A block owns rows: queries, or for key_gradient keys. It goes over all of the others, some columns of the matrix of
// scores at a time.
struct AttentionDivision {
  int warps, row_tiles;  // a warp has row_tiles * 16 of the rows
  int columns;
  int accumulated;  // columns of an output that a block sums, all or half of a bucket
  int blocks;       // that a multiprocessor holds

  constexpr int threads() const { return warps * 32; }
  constexpr int rows() const { return warps * row_tiles * 16; }
};

// Kernels are compiled for sizes of heads up to one of these; the rest of a row is zeros. tf32 beyond 128 would need
// more shared memory than there is, and is left to CUDA cores.
constexpr int attention_bucket(Arithmetic arithmetic, int64_t size) {
  if (arithmetic == Arithmetic::half) return size <= 32 ? 32 : size <= 64 ? 64 : size <= 128 ? 128 : 256;
  if (arithmetic == Arithmetic::tf32) return size <= 64 ? 64 : 128;
  return size <= 64 ? 64 : 256;
}

// Whether there is a second kernel, for scores that nothing changes but a window: where registers then allow more
// columns, for the usual sizes.
constexpr bool attention_has_plain(AttentionPass pass, Arithmetic arithmetic, int bucket) {
  return arithmetic == Arithmetic::half && (bucket == 64 || (bucket == 128 && pass != AttentionPass::query_gradient));
}

// What shared memory of 163 KiB and 255 registers a thread hold. On tensor cores a warp takes 32 rows where its sums
// fit: each fragment of columns then serves two products, and shared memory keeps up with them. Sums of both gradients
// of keys are twice as many: 16 rows, and beyond 128 columns one gradient a block. plain: as above.
constexpr AttentionDivision attention_division(AttentionPass pass, Arithmetic arithmetic, int bucket, bool plain) {
  const bool forward = pass == AttentionPass::output, of_keys = pass == AttentionPass::key_gradient;
  if (arithmetic == Arithmetic::half) {
    if (bucket == 256) return {8, 1, forward ? 32 : 16, 256, 1};
    if (of_keys && (bucket == 128 || !plain)) return {8, 1, plain ? 64 : 32, bucket, 1};
    if (bucket == 128 && forward && !plain) return {8, 1, 64, 128, 1};
    if (forward) return {4, 2, plain ? 64 : 32, bucket, 2};
    return {4, 2, bucket == 64 && plain && !of_keys ? 64 : 32, bucket, bucket == 128 ? 1 : 2};
  }
  if (arithmetic == Arithmetic::tf32) {
    if (bucket == 128) return {8, 1, forward ? 32 : 16, 128, 1};
    return {4, 2, forward ? 32 : 16, 64, forward ? 2 : 1};
  }
  if (arithmetic == Arithmetic::float32) {
    if (bucket == 256) return {forward ? 4 : 2, 1, forward ? 32 : 8, 256, 1};
    return {4, 1, 32, 64, 2};
  }
  if (bucket == 256) return {forward ? 2 : 1, 1, forward ? 16 : 8, 128, 1};
  return {4, 1, 16, 64, 1};
}

}  // namespace fastdl::cuda
