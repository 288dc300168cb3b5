#pragma once
#include "common.h"

namespace fastdl {

// output[i] = table[indices[i]]
struct EmbeddingArguments {
  const void* table;       // [rows, row_bytes]
  const int64_t* indices;  // [count]
  void* output;            // [count, row_bytes]
  int64_t count, rows, row_bytes;
  int threads;
};

// grad_table[v] = the sum of grad_output[i] over the i with indices[i] = v, but 0 for the padding row; divided by their
// number if `by_frequency`
struct EmbeddingBackwardArguments {
  int dtype;
  const void* grad_output;                // [count, columns]
  const int64_t* indices;                 // [count]
  void* grad_table;                       // [rows, columns]
  int64_t* workspace;                     // [rows + 1 + count]
  int64_t count, rows, columns, padding;  // padding: -1 for none
  bool by_frequency;
  int threads;
};

// Both give the place of the first index that is no row, and then do nothing; else -1.
#define FASTDL_CPU_EMBEDDING(KERNEL)                      \
  KERNEL(int64_t, embedding, (const EmbeddingArguments&)) \
  KERNEL(int64_t, embedding_backward, (const EmbeddingBackwardArguments&))

}  // namespace fastdl
