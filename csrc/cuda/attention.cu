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
  using Lines = typename Traits::Lines;
  constexpr int rows = Traits::kRows, columns = Traits::kColumns, threads = Traits::kThreads;
  using Mine = Share<Lines, threads>;
  FDL_DYN_SHARED(char, shared, Traits::kBytes);
  char *const shared_query = shared, *const shared_key = shared + Traits::kRowBytes;
  char* const shared_value = shared_key + Traits::kColumnBytes;

  FDL_SHARED(Block, shared_block, [1]);
  FDL_SHARED(Seen, shared_seen, [Traits::kDivision.warps]);
  const Block& block = shared_block[0];

  const int first_column = int(blockIdx.x) % Traits::kHalves * Traits::kAccumulated;
  const int block_index = blockIdx.x / Traits::kHalves;
  const int blocks = (task.longest_queries + rows - 1) / rows, head_index = block_index / blocks;
  const Block mine =
      block_of(task, head_index / task.heads, head_index % task.heads, (blocks - 1 - block_index % blocks) * rows);
  if (mine.row >= mine.queries || first_column >= task.value_size) return;
  const int warp = threadIdx.x / 32, warp_row = warp * Traits::kWarpRows, last = mine.queries - 1;
  shared_seen[warp] =
      Seen::of<false>(task, mine, mine.row + warp_row, min(mine.row + warp_row + Traits::kWarpRows - 1, last));
  if (threadIdx.x == 0) shared_block[0] = mine;
  __syncthreads();

  const Seen& seen = shared_seen[warp];
  const Seen block_seen = Seen::of<false>(task, mine, mine.row, min(mine.row + rows - 1, last));
  const int first_key = block_seen.begin / columns * columns, end_key = block_seen.end;
  const int entry = entry_of(task, mine), key_head = mine.head / task.group;
  const int64_t key_row = mine.first_key + first_key;
  const T* key = Mine::first(task.key.at(entry, key_head, key_row), task.key.row_stride);
  const T* value = Mine::first(task.value.at(entry, key_head, key_row), task.value.row_stride);
  char* const warp_lines = shared_query + warp_row * Traits::kLineBytes;
  Softmax<Traits> softmax;
  typename Traits::OutputSums sums = {};

  auto copy_columns = [&](char* to, const T*& source, const View<const T>& view, int key0, int size) {
    copy_rows<Lines, columns, threads>(to, source, view, block.keys - key0, size);
    ptx::cp_async_commit();
    source += columns * view.row_stride;
  };
  if (first_key < end_key) {
    const T* const query = task.query.at(entry, mine.head, mine.first_query + mine.row);
    copy_rows<Lines, rows, threads>(shared_query, Mine::first(query, task.query.row_stride), task.query,
                                    mine.queries - mine.row, task.size);
    copy_columns(shared_key, key, task.key, first_key, task.size);
  }
#pragma unroll 1
  for (int key0 = first_key; key0 < end_key; key0 += columns) {
    const bool sees = key0 < seen.end && key0 + columns > seen.begin;
    ptx::cp_async_wait<0>();
    __syncthreads();  // the keys are there, the last values have been read
    copy_columns(shared_value, value, task.value, key0, task.value_size);
    typename Traits::ScoreSums s = {};
    if (sees) Product::multiply(s, warp_lines, shared_key, task.size);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the values are there, the keys have been read
    if (key0 + columns < end_key) copy_columns(shared_key, key, task.key, key0 + columns, task.size);
    if (!sees) continue;
    const bool all = key0 >= seen.all_begin && key0 + columns <= seen.all_end;
    const bool scaled = !Traits::kPlain && task.scaled;
    const int query0 = block.row + warp_row;
    if (scaled || !all) change_scores<false, Traits::kPlain>(s, task, block, block.head, query0, key0, scaled, all);
    softmax.update(s, sums, task.unit);
    if (!Traits::kPlain && task.seed) {
      drop<false, Traits::kRowTiles, Traits::kColumnTiles>(
          task, block, block.head, query0, key0, [&](int i, int j, int e, C factor) { s[i][j][e] *= factor; });
    }
    Product::multiply_rows(sums, s, shared_value + first_column * int(sizeof(T)), task.value_size - first_column,
                           Traits::staging(shared));
  }

  C factor[Traits::kRowTiles][2];
  const int query0 = block.row + warp_row, count = block.queries - query0, batch = entry_of(task, block);
  C* const logsumexp =
      task.logsumexp + (int64_t(batch) * task.heads + block.head) * task.queries + block.first_query + query0;
#pragma unroll
  for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const C total = quad_sum(softmax.total[i][half]);
      const C top =
          !Traits::kPlain && task.scaled ? softmax.top[i][half] : rounded_product(softmax.top[i][half], task.scale);
      factor[i][half] = total == 0 ? C(0) : 1 / total;
      const int row = i * 16 + half * 8 + lane_row();
      if (first_column == 0 && lane_column() == 0 && row < count) {
        logsumexp[row] = total == 0 ? -kInfinity<C> : top + logarithm(total);
      }
    }
  }
  store_rows<Traits>(task.output.at(batch, block.head, block.first_query + query0), task.output, warp_lines, count,
                     task.value_size, first_column, sums, [&](int i, int half) { return factor[i][half]; });
}

}  // namespace

void attention(const AttentionArguments& arguments) {
  const char* name = "attention";
  const AttentionShape& shape = arguments.shape;
  check_attention(name, shape, arguments.scores);
  dispatch_attention(
      name, arguments.dtype, arguments.allow_tf32, shape, arguments.scores,
      [&]<class T, Arithmetic arithmetic, int bucket, bool plain>() {
        using Kernel = TraitsOf<T, arithmetic, bucket, plain, Pass::output>;
        ForwardTask<T> task{task_of<T>(arguments), view_of<T>(arguments.output),
                            static_cast<Compute<T>*>(arguments.logsumexp)};
        const int64_t blocks = ceil_div<int64_t>(shape.longest_queries, Kernel::kRows) * Kernel::kHalves;
        launch(attention_kernel<Kernel>,
               grid_of(name, shape.batch * shape.heads, blocks, Kernel::kThreads, Kernel::kBytes, arguments.stream),
               task);
      });
}

}  // namespace fastdl::cuda
