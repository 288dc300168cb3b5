// The gradients of attention: probabilities are made again from their logsumexp, in a kernel for gradients of queries
// and masks, and one for those of keys and values. That is a third more products than one kernel for all needs, which
// would have to add to queries' gradients by atomics, in any order.
#include "attention.cuh"

namespace fastdl::cuda {

using namespace flash;

namespace {

// What both kernels read of each query: the logsumexp, infinity where nothing is seen, so that probabilities are 0; and
// delta, the sum of output times its gradient, less the logsumexp's. The rows of a sequence begin at a multiple of
// kStatisticRows and are filled up to one, as no query.
constexpr int64_t kStatisticRows = 64;

inline int64_t statistic_rows(const AttentionShape& shape) {  // of a head
  const int64_t most = shape.queries + (shape.query_offsets ? kStatisticRows * shape.batch : 0);
  return ceil_div(most, kStatisticRows) * kStatisticRows;
}
inline int64_t statistic_heads(const AttentionShape& shape) {
  return shape.heads * (shape.query_offsets ? 1 : shape.batch);
}

template <class T>
struct BackwardTask : Task<T> {
  View<const T> grad_output, output;
  View<T> grad_query, grad_key, grad_value;
  const Compute<T>*given_logsumexp, *grad_logsumexp;  // [batch or 1, heads, queries]
  Compute<T>*logsumexp, *delta;                       // [heads, rows], rows as statistic_rows says
  Compute<T>* grad_mask;                              // [batch, heads, queries, keys] or null
  int64_t rows;

  // The place in logsumexp and delta of a head's first query.
  __device__ __forceinline__ int64_t statistics(const Block& block, int head) const {
    if (!this->query_offsets) return (int64_t(block.batch) * this->heads + head) * rows;
    return head * rows + (block.first_query / kStatisticRows + block.batch) * kStatisticRows;
  }
};

constexpr int kStatisticThreads = 256, kRowLanes = 16;  // lanes that share a row

template <class T>
__global__ void __launch_bounds__(kStatisticThreads) statistics_kernel(const __grid_constant__ BackwardTask<T> task) {
  using C = Compute<T>;
  constexpr int width = 16 / sizeof(T), rows = kStatisticThreads / kRowLanes;
  const int blocks =
      (task.longest_queries + int(kStatisticRows) - 1) / int(kStatisticRows) * int(kStatisticRows) / rows;
  const int head_index = blockIdx.x / blocks;
  const Block block = block_of(task, head_index / task.heads, head_index % task.heads, blockIdx.x % blocks * rows);
  const int query = block.row + threadIdx.x / kRowLanes, first = threadIdx.x % kRowLanes;
  const int entry = entry_of(task, block);
  C sum = 0;
  if (query < block.queries) {
    const T* const output = task.output.at(entry, block.head, block.first_query + query);
    const T* const grad = task.grad_output.at(entry, block.head, block.first_query + query);
    if (task.output.vectors && task.grad_output.vectors && task.value_size % width == 0) {
#pragma unroll 1
      for (int i = first * width; i < task.value_size; i += kRowLanes * width) {
        const auto a = *reinterpret_cast<const Chunk<T>*>(output + i), b = *reinterpret_cast<const Chunk<T>*>(grad + i);
#pragma unroll
        for (int k = 0; k < width; ++k) sum += widen(a.element[k]) * widen(b.element[k]);
      }
    } else {
#pragma unroll 1
      for (int i = first; i < task.value_size; i += kRowLanes) sum += widen(output[i]) * widen(grad[i]);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kRowLanes; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  const int filled = (block.queries + int(kStatisticRows) - 1) / int(kStatisticRows) * int(kStatisticRows);
  if (first != 0 || query >= filled) return;
  C logsumexp = kInfinity<C>;
  if (query < block.queries) {
    const int64_t from = (int64_t(entry) * task.heads + block.head) * task.queries + block.first_query + query;
    const C given = task.given_logsumexp[from];
    if (given != -kInfinity<C>) logsumexp = given;
    if (task.grad_logsumexp) sum -= task.grad_logsumexp[from];
  }
  const int64_t to = task.statistics(block, block.head) + query;
  task.logsumexp[to] = logsumexp;
  task.delta[to] = sum;
}

template <class C>
__device__ __forceinline__ C probability(C score, C logsumexp) {
  return power_of_2((score - logsumexp) * C(kLog2E));
}

// A block has kRows queries of a head.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    query_gradient_kernel(const __grid_constant__ BackwardTask<typename Traits::T> task) {
  using T = typename Traits::T;
  using C = typename Traits::C;
  using Product = typename Traits::Product;
  using Lines = typename Traits::Lines;
  constexpr int rows = Traits::kRows, columns = Traits::kColumns, threads = Traits::kThreads;
  using Mine = Share<Lines, threads>;
  FDL_DYN_SHARED(char, shared, Traits::kBytes);
  char *const shared_query = shared, *const shared_grad = shared + Traits::kRowBytes;
  char* const stages = shared_grad + Traits::kRowBytes;

  FDL_SHARED(Block, shared_block, [1]);
  FDL_SHARED(Seen, shared_seen, [Traits::kDivision.warps]);
  FDL_SHARED(C, shared_statistics, [2][rows]);  // logsumexp, delta
  const Block& block = shared_block[0];

  const int first_column = int(blockIdx.x) % Traits::kHalves * Traits::kAccumulated;
  const int block_index = blockIdx.x / Traits::kHalves;
  const int blocks = (task.longest_queries + rows - 1) / rows, head_index = block_index / blocks;
  const Block mine =
      block_of(task, head_index / task.heads, head_index % task.heads, (blocks - 1 - block_index % blocks) * rows);
  if (mine.row >= mine.queries || (first_column > 0 && first_column >= task.size)) return;
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
  const int warp_offset = warp_row * Traits::kLineBytes;
  for (int i = threadIdx.x; i < rows; i += threads) {
    const int64_t at = task.statistics(mine, mine.head) + mine.row + i;
    shared_statistics[0][i] = mine.row + i < mine.queries ? task.logsumexp[at] : kInfinity<C>;
    shared_statistics[1][i] = mine.row + i < mine.queries ? task.delta[at] : C(0);
  }
  typename Traits::OutputSums sums = {};

  auto copy_stage = [&](int key0, int stage) {
    char* const to = stages + stage * Traits::kStageBytes;
    copy_rows<Lines, columns, threads>(to, key, task.key, block.keys - key0, task.size);
    copy_rows<Lines, columns, threads>(to + Traits::kColumnBytes, value, task.value, block.keys - key0,
                                       task.value_size);
    ptx::cp_async_commit();
    key += columns * task.key.row_stride;
    value += columns * task.value.row_stride;
  };
  if (first_key < end_key) {
    const int64_t row = mine.first_query + mine.row;
    const T* const query = task.query.at(entry, mine.head, row);
    const T* const grad = task.grad_output.at(entry, mine.head, row);
    copy_rows<Lines, rows, threads>(shared_query, Mine::first(query, task.query.row_stride), task.query,
                                    mine.queries - mine.row, task.size);
    copy_rows<Lines, rows, threads>(shared_grad, Mine::first(grad, task.grad_output.row_stride), task.grad_output,
                                    mine.queries - mine.row, task.value_size);
    copy_stage(first_key, 0);
  }
  const C *const logsumexp = shared_statistics[0] + warp_row + lane_row(), *const delta = logsumexp + rows;
  int stage = 0;
#pragma unroll 1
  for (int key0 = first_key; key0 < end_key; key0 += columns, stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, the other has been read
    if (key0 + columns < end_key) copy_stage(key0 + columns, stage ^ 1);
    if (key0 >= seen.end || key0 + columns <= seen.begin) continue;
    const char *const keys = stages + stage * Traits::kStageBytes, *const values = keys + Traits::kColumnBytes;

    typename Traits::ScoreSums p = {}, ds = {};
    Product::multiply(p, shared_query + warp_offset, keys, task.size);
    const int query0 = block.row + warp_row;
    change_scores<false, Traits::kPlain>(p, task, block, block.head, query0, key0, true,
                                         key0 >= seen.all_begin && key0 + columns <= seen.all_end);
    for_each<Traits::kRowTiles, Traits::kColumnTiles>(
        [&](int i, int j, int e) { p[i][j][e] = probability(p[i][j][e], logsumexp[i * 16 + e / 2 * 8]); });
    Product::multiply(ds, shared_grad + warp_offset, values, task.value_size);
    if (!Traits::kPlain && task.seed) {
      drop<false, Traits::kRowTiles, Traits::kColumnTiles>(
          task, block, block.head, query0, key0, [&](int i, int j, int e, C factor) { ds[i][j][e] *= factor; });
    }
    for_each<Traits::kRowTiles, Traits::kColumnTiles>(
        [&](int i, int j, int e) { ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - delta[i * 16 + e / 2 * 8]); });
    if (!Traits::kPlain && task.grad_mask && first_column == 0) {
      using At = Place<false>;
      const At at(query0, key0);
      const int64_t row = (int64_t(block.batch) * task.heads + block.head) * task.queries + at.query;
      C* const to = task.grad_mask + row * task.keys + at.key;
      for_each<Traits::kRowTiles, Traits::kColumnTiles>([&](int i, int j, int e) {
        const int more = At::queries(i, j, e), after = At::keys(i, j, e);
        if (more < block.queries - at.query && after < block.keys - at.key) {
          to[int64_t(more) * task.keys + after] = ds[i][j][e];
        }
      });
    }
    Product::multiply_rows(sums, ds, keys + first_column * int(sizeof(T)), task.size - first_column,
                           Traits::staging(shared));
  }
  if (!task.grad_query.data) return;
  const int query0 = block.row + warp_row;
  store_rows<Traits>(task.grad_query.at(entry_of(task, block), block.head, block.first_query + query0), task.grad_query,
                     shared_query + warp_offset, block.queries - query0, task.size, first_column, sums,
                     [&](int, int) { return task.scale; });
}

// A block has kRows keys of a head of keys, and goes over the queries of all heads that share it. It makes both
// gradients, or where a thread's registers don't hold their sums one, or a half of one.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    key_gradient_kernel(const __grid_constant__ BackwardTask<typename Traits::T> task) {
  using T = typename Traits::T;
  using C = typename Traits::C;
  using Product = typename Traits::Product;
  using Lines = typename Traits::Lines;
  constexpr int rows = Traits::kRows, columns = Traits::kColumns, threads = Traits::kThreads;
  using Mine = Share<Lines, threads>;
  FDL_DYN_SHARED(char, shared, Traits::kBytes);
  char *const shared_key = shared, *const shared_value = shared + Traits::kRowBytes;
  char* const stages = shared_value + Traits::kRowBytes;

  FDL_SHARED(Block, shared_block, [1]);
  FDL_SHARED(Seen, shared_seen, [Traits::kDivision.warps + 1]);  // by warps, and by the block
  const Block& block = shared_block[0];

  const int part = blockIdx.x % Traits::kParts, block_index = blockIdx.x / Traits::kParts;
  const int first_column = part % Traits::kHalves * Traits::kAccumulated;
  const bool of_value =
      (Traits::kBoth || part < Traits::kHalves) && task.grad_value.data && first_column < task.value_size;
  const bool of_key = (Traits::kBoth || part >= Traits::kHalves) && task.grad_key.data && first_column < task.size;
  const int blocks = (task.longest_keys + rows - 1) / rows, head_index = block_index / blocks;
  const int key_heads = task.heads / task.group;
  const Block mine = block_of(task, head_index / key_heads, head_index % key_heads, block_index % blocks * rows);
  if (mine.row >= mine.keys || !(of_value || of_key)) return;
  const int warp = threadIdx.x / 32, warp_row = warp * Traits::kWarpRows, last = mine.keys - 1;
  shared_seen[warp] =
      Seen::of<true>(task, mine, mine.row + warp_row, min(mine.row + warp_row + Traits::kWarpRows - 1, last));
  if (threadIdx.x == 0) {
    shared_block[0] = mine;
    shared_seen[Traits::kDivision.warps] = Seen::of<true>(task, mine, mine.row, min(mine.row + rows - 1, last));
  }
  __syncthreads();

  const Seen &seen = shared_seen[warp], &block_seen = shared_seen[Traits::kDivision.warps];
  const int warp_offset = warp_row * Traits::kLineBytes;
  typename Traits::OutputSums sums[Traits::kBoth ? 2 : 1] = {};  // of value, of key

  auto copy_stage = [&](int head, int query0, int stage) {
    char* const to = stages + stage * Traits::kStageBytes;
    const int entry = entry_of(task, block);
    const int64_t row = block.first_query + query0;
    copy_rows<Lines, columns, threads>(to, Mine::first(task.query.at(entry, head, row), task.query.row_stride),
                                       task.query, block.queries - query0, task.size);
    copy_rows<Lines, columns, threads>(to + Traits::kColumnBytes,
                                       Mine::first(task.grad_output.at(entry, head, row), task.grad_output.row_stride),
                                       task.grad_output, block.queries - query0, task.value_size);
    constexpr int chunks = Traits::kStatisticBytes / 16, width = 16 / int(sizeof(C));
    if (int(threadIdx.x) < chunks * 2) {
      const C* const from = int(threadIdx.x) < chunks ? task.logsumexp : task.delta;
      ptx::cp_async16(to + Traits::kColumnBytes * 2 + threadIdx.x * 16,
                      from + task.statistics(block, head) + query0 + threadIdx.x % chunks * width, 16);
    }
    ptx::cp_async_commit();
  };
  // Over one head of queries after the other.
  auto first_query = [&] { return block_seen.begin / columns * columns; };
  int head = mine.head * task.group, query0 = first_query(), stage = 0;
  const int end_head = query0 < block_seen.end ? head + task.group : head;
  if (head < end_head) {
    const int entry = entry_of(task, mine);
    const int64_t row = mine.first_key + mine.row;
    const T* const key = task.key.at(entry, mine.head, row);
    const T* const value = task.value.at(entry, mine.head, row);
    copy_rows<Lines, rows, threads>(shared_key, Mine::first(key, task.key.row_stride), task.key, mine.keys - mine.row,
                                    task.size);
    copy_rows<Lines, rows, threads>(shared_value, Mine::first(value, task.value.row_stride), task.value,
                                    mine.keys - mine.row, task.value_size);
    copy_stage(head, query0, 0);
  }
#pragma unroll 1
  while (head < end_head) {
    const int this_head = head, this_query = query0, this_stage = stage;
    stage ^= 1;
    query0 += columns;
    if (query0 >= block_seen.end) query0 = first_query(), ++head;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, the other has been read
    if (head < end_head) copy_stage(head, query0, stage);
    if (this_query >= seen.end || this_query + columns <= seen.begin) continue;
    const char* const queries = stages + this_stage * Traits::kStageBytes;
    const char* const grads = queries + Traits::kColumnBytes;
    const C* const logsumexp = reinterpret_cast<const C*>(grads + Traits::kColumnBytes) + lane_column();
    const C* const delta = logsumexp + columns;

    typename Traits::ScoreSums p = {};
    Product::multiply(p, shared_key + warp_offset, queries, task.size);
    const int key0 = block.row + warp_row;
    change_scores<true, Traits::kPlain>(p, task, block, this_head, this_query, key0, true,
                                        this_query >= seen.all_begin && this_query + columns <= seen.all_end);
    for_each<Traits::kRowTiles, Traits::kColumnTiles>(
        [&](int i, int j, int e) { p[i][j][e] = probability(p[i][j][e], logsumexp[j * 8 + e % 2]); });
    typename Traits::ScoreSums factors;
    if (!Traits::kPlain && task.seed) {
      drop<true, Traits::kRowTiles, Traits::kColumnTiles>(
          task, block, this_head, this_query, key0, [&](int i, int j, int e, C factor) { factors[i][j][e] = factor; });
    }
    const bool drops = !Traits::kPlain && task.seed;
    if (of_value) {
      typename Traits::ScoreSums left;
      for_each<Traits::kRowTiles, Traits::kColumnTiles>(
          [&](int i, int j, int e) { left[i][j][e] = drops ? p[i][j][e] * factors[i][j][e] : p[i][j][e]; });
      Product::multiply_rows(sums[0], left, grads + first_column * int(sizeof(T)), task.value_size - first_column,
                             Traits::staging(shared));
    }
    if (of_key) {
      typename Traits::ScoreSums ds = {};
      Product::multiply(ds, shared_value + warp_offset, grads, task.value_size);
      for_each<Traits::kRowTiles, Traits::kColumnTiles>([&](int i, int j, int e) {
        if (drops) ds[i][j][e] *= factors[i][j][e];
        ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - delta[j * 8 + e % 2]);
      });
      Product::multiply_rows(sums[Traits::kBoth], ds, queries + first_column * int(sizeof(T)), task.size - first_column,
                             Traits::staging(shared));
    }
  }
  const int entry = entry_of(task, block), key0 = block.row + warp_row, count = block.keys - key0;
  const int64_t row = block.first_key + key0;
  if (of_value) {
    store_rows<Traits>(task.grad_value.at(entry, block.head, row), task.grad_value, shared_value + warp_offset, count,
                       task.value_size, first_column, sums[0], [](int, int) { return C(1); });
  }
  if (of_key) {
    store_rows<Traits>(task.grad_key.at(entry, block.head, row), task.grad_key, shared_key + warp_offset, count,
                       task.size, first_column, sums[Traits::kBoth], [&](int, int) { return task.scale; });
  }
}

}  // namespace

size_t attention_backward_workspace(int dtype, const AttentionShape& shape) {
  const size_t bytes = dtype == 3 ? sizeof(double) : sizeof(float);
  return size_t(statistic_rows(shape) * statistic_heads(shape)) * 2 * bytes;
}

void attention_backward(const AttentionBackwardArguments& arguments) {
  const char* name = "attention_backward";
  const AttentionShape& shape = arguments.shape;
  check_attention(name, shape, arguments.scores);
  require(arguments.workspace && aligned(16, arguments.workspace), name, "workspace", arguments.workspace,
          "16-byte aligned");
  dispatch_attention(
      name, arguments.dtype, arguments.allow_tf32, shape, arguments.scores,
      [&]<class T, Arithmetic arithmetic, int bucket, bool plain>() {
        using C = Compute<T>;
        const int64_t rows = statistic_rows(shape);
        C* const logsumexp = static_cast<C*>(arguments.workspace);
        const BackwardTask<T> task{task_of<T>(arguments),
                                   view_of<const T>(arguments.grad_output),
                                   view_of<const T>(arguments.output),
                                   view_of<T>(arguments.grad_query),
                                   view_of<T>(arguments.grad_key),
                                   view_of<T>(arguments.grad_value),
                                   static_cast<const C*>(arguments.logsumexp),
                                   static_cast<const C*>(arguments.grad_logsumexp),
                                   logsumexp,
                                   logsumexp + rows * statistic_heads(shape),
                                   static_cast<C*>(arguments.grad_mask),
                                   rows};
        const int64_t heads = shape.batch * shape.heads, key_heads = heads / shape.group;
        const int64_t filled = ceil_div(shape.longest_queries, kStatisticRows) * kStatisticRows;
        launch(statistics_kernel<T>,
               grid_of(name, heads, filled / (kStatisticThreads / kRowLanes), kStatisticThreads, 0, arguments.stream),
               task);
        if (arguments.grad_query.data || arguments.grad_mask) {
          using Kernel = TraitsOf<T, arithmetic, bucket, plain, Pass::query_gradient>;
          const int64_t blocks = ceil_div<int64_t>(shape.longest_queries, Kernel::kRows) * Kernel::kHalves;
          launch(query_gradient_kernel<Kernel>,
                 grid_of(name, heads, blocks, Kernel::kThreads, Kernel::kBytes, arguments.stream), task);
        }
        if (arguments.grad_key.data || arguments.grad_value.data) {
          using Kernel = TraitsOf<T, arithmetic, bucket, plain, Pass::key_gradient>;
          const int64_t blocks = ceil_div<int64_t>(shape.longest_keys, Kernel::kRows) * Kernel::kParts;
          launch(key_gradient_kernel<Kernel>,
                 grid_of(name, key_heads, blocks, Kernel::kThreads, Kernel::kBytes, arguments.stream), task);
        }
      });
}

}  // namespace fastdl::cuda
