// Embedding: what the kernels are given. Plain C++.
#pragma once
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace fastdl::cuda {

// output[count, columns] = table[rows, columns] at indices[count]; NaN where there is no such row
void embedding(int dtype, const void* table, const int64_t* indices, void* output, int64_t count, int64_t rows,
               int64_t columns, cudaStream_t stream);

// bytes of workspace for embedding_backward
int64_t embedding_workspace(int dtype, int64_t count, int64_t columns);

// grad_table[rows, columns], zeros before: the sums of the rows of grad_output[count, columns] by their indices. index,
// order: [count], the sorted indices and their places in grad_output; scale: [count] in the dtype of computation, what
// a row's sum is multiplied by, or null; padding: the row that stays 0, or -1.
void embedding_backward(int dtype, const void* grad_output, const int64_t* index, const int64_t* order,
                        const void* scale, void* grad_table, int64_t count, int64_t rows, int64_t columns,
                        int64_t padding, void* workspace, cudaStream_t stream);

}  // namespace fastdl::cuda
