// Attention without the matrix of scores in memory: the sums so far are corrected when later keys have larger scores
// (Milakov and Gimelshein, 2018; Dao et al., 2022).
#include "attention.cuh"

namespace fastdl::cuda {

using namespace flash;

namespace {

template <class T>
struct ForwardTask : Task<T> {
  View<T> output;
  Compute<T>* logsumexp;  // [batch or 1, heads, queries]
};

// Row statistics of a warp: the largest score so far, and this lane's part of the sum of exponentials of what the
// scores differ from it by.
template <class Traits>
struct Softmax {
  using C = typename Traits::C;
  C top[Traits::kRowTiles][2], total[Traits::kRowTiles][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) top[i][half] = -kInfinity<C>, total[i][half] = 0;
    }
  }

  // Makes exponentials of scores, and corrects sums. unit: of the scores, in powers of 2.
  __device__ __forceinline__ void update(typename Traits::ScoreSums& s, typename Traits::OutputSums& sums, C unit) {
#pragma unroll
    for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        C most = top[i][half];
#pragma unroll
        for (int j = 0; j < Traits::kColumnTiles; ++j) {
          most = max(most, max(s[i][j][half * 2], s[i][j][half * 2 + 1]));
        }
        most = quad_max(most);
        const C base = most == -kInfinity<C> ? C(0) : most;  // of a row that has seen nothing
        const C correction = power_of_2((top[i][half] - base) * unit);
        top[i][half] = most;
        C sum = total[i][half] * correction;
#pragma unroll
        for (int j = 0; j < Traits::kColumnTiles; ++j) {
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[i][j][e] = power_of_2((s[i][j][e] - base) * unit);
            sum += s[i][j][e];
          }
        }
        total[i][half] = sum;
#pragma unroll
        for (int j = 0; j < Traits::kAccumulated / 8; ++j) {
          sums[i][j][half * 2] *= correction;
          sums[i][j][half * 2 + 1] *= correction;
        }
      }
    }
  }
};

// A block has kRows queries of a head; the last queries, which see the most under causality, come first.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    attention_kernel(const __grid_constant__ ForwardTask<typename Traits::T> task) {
  using T = typename Traits::T;
  using C = typename Traits::C;
  using Product = typename Traits::Product;
  constexpr int rows = Traits::kRows, columns = Traits::kColumns, threads = Traits::kThreads;
  FDL_DYN_SHARED(char, shared, Traits::kBytes);
  char *const shared_query = shared, *const shared_key = shared + Traits::kRowBytes;
  char* const shared_value = shared_key + Traits::kColumnBytes;

  const int part = blockIdx.x % Traits::kHalves, block_index = blockIdx.x / Traits::kHalves;
  const int blocks = (task.longest_queries + rows - 1) / rows, head_index = block_index / blocks;
  const Head head(task, head_index / task.heads, head_index % task.heads);
  const int query0 = (blocks - 1 - block_index % blocks) * rows;
  const int first_column = part * Traits::kAccumulated;
  if (query0 >= head.queries || first_column >= task.value_size) return;

  const int last_query = min(query0 + rows, head.queries) - 1;
  const int first_key = max(0, query0 + head.shift - head.left) / columns * columns;
  const int end_key = min(head.keys, last_query + head.shift + head.right + 1);
  const int batch = task.query_offsets ? 0 : head.batch, key_head = head.index / task.group;
  const T* const key = task.key.at(batch, key_head, head.first_key);
  const T* const value = task.value.at(batch, key_head, head.first_key);

  const int warp_row = threadIdx.x / 32 * Traits::kWarpRows;
  const int warp_query = query0 + warp_row, warp_last = min(warp_query + Traits::kWarpRows, head.queries) - 1;
  char* const warp_lines = shared_query + warp_row * Traits::kLineBytes;
  // Products stay unscaled where nothing is added to them.
  const bool scaled = task.mask_kind != kNoMask || task.slopes || !(task.scale > 0);
  const C unit = scaled ? C(kLog2E) : task.scale * C(kLog2E);

  Softmax<Traits> softmax;
  typename Traits::OutputSums sums = {};

  auto copy_key = [&](int key0) {
    copy_rows<typename Traits::Lines, columns, threads>(shared_key, key + key0 * task.key.row_stride,
                                                        task.key.row_stride, task.key.vectors, head.keys - key0,
                                                        task.size);
    ptx::cp_async_commit();
  };
  if (first_key < end_key) {
    copy_rows<typename Traits::Lines, rows, threads>(
        shared_query, task.query.at(batch, head.index, head.first_query + query0), task.query.row_stride,
        task.query.vectors, head.queries - query0, task.size);
    copy_key(first_key);
  }
#pragma unroll 1
  for (int key0 = first_key; key0 < end_key; key0 += columns) {
    const int last_key = key0 + columns - 1;
    const bool sees = head.sees(warp_query, warp_last, key0, last_key);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the keys are there, the last values have been read
    copy_rows<typename Traits::Lines, columns, threads>(shared_value, value + key0 * task.value.row_stride,
                                                        task.value.row_stride, task.value.vectors, head.keys - key0,
                                                        task.value_size);
    ptx::cp_async_commit();
    typename Traits::ScoreSums s = {};
    if (sees) Product::multiply(s, warp_lines, shared_key, task.size);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the values are there, the keys have been read
    if (key0 + columns < end_key) copy_key(key0 + columns);
    if (!sees) continue;
    const bool all = head.sees_all(warp_query, warp_last, key0, last_key);
    if (scaled || !all) change_scores<false>(s, task, head, warp_query, key0, scaled, all);
    softmax.update(s, sums, unit);
    if (task.seed) {
      drop<false, Traits::kRowTiles, Traits::kColumnTiles>(
          task, head, warp_query, key0, [&](int i, int j, int e, C factor) { s[i][j][e] *= factor; });
    }
    Product::multiply_rows(sums, s, shared_value + part * Traits::kAccumulatedBytes, task.value_size - first_column,
                           Traits::staging(shared));
  }

  C factor[Traits::kRowTiles][2];
  C* const logsumexp =
      task.logsumexp + (int64_t(batch) * task.heads + head.index) * task.queries + head.first_query + warp_query;
#pragma unroll
  for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const C total = quad_sum(softmax.total[i][half]);
      const C top = scaled ? softmax.top[i][half] : rounded_product(softmax.top[i][half], task.scale);
      factor[i][half] = total == 0 ? C(0) : 1 / total;
      const int row = i * 16 + half * 8 + lane_row();
      if (part == 0 && lane_column() == 0 && warp_query + row <= warp_last) {
        logsumexp[row] = total == 0 ? -kInfinity<C> : top + logarithm(total);
      }
    }
  }
  store_rows<Traits>(task.output.at(batch, head.index, head.first_query + warp_query), task.output.row_stride,
                     task.output.vectors, warp_lines, warp_last - warp_query + 1, task.value_size, first_column, sums,
                     [&](int i, int half) { return factor[i][half]; });
}

}  // namespace

void attention(const AttentionArguments& arguments) {
  const char* name = "attention";
  const AttentionShape& shape = arguments.shape;
  check_attention(name, shape, arguments.scores);
  dispatch_attention(name, arguments.dtype, arguments.allow_tf32, shape,
                     [&]<class T, Arithmetic arithmetic, int bucket>() {
                       using Kernel = Traits<T, arithmetic, bucket, Pass::output>;
                       ForwardTask<T> task{task_of<T>(arguments), view_of<T>(arguments.output),
                                           static_cast<Compute<T>*>(arguments.logsumexp)};
                       const int64_t blocks =
                           ceil_div<int64_t>(shape.longest_queries, Kernel::kRows) * Kernel::kHalves;
                       launch(attention_kernel<Kernel>,
                              grid_of(name, shape.batch * shape.heads, blocks, Kernel::kThreads, Kernel::kBytes,
                                      arguments.stream),
                              task);
                     });
}

}  // namespace fastdl::cuda
