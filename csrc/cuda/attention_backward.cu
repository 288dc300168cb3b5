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

  // The first query's place in logsumexp and delta.
  __device__ __forceinline__ int64_t statistics(const Head& head) const {
    if (!this->query_offsets) return (int64_t(head.batch) * this->heads + head.index) * rows;
    return head.index * rows + (head.first_query / kStatisticRows + head.batch) * kStatisticRows;
  }
};

constexpr int kStatisticThreads = 256, kRowLanes = 16;  // lanes that share a row

template <class T>
__global__ void __launch_bounds__(kStatisticThreads) statistics_kernel(const __grid_constant__ BackwardTask<T> task) {
  using C = Compute<T>;
  constexpr int width = 16 / sizeof(T), rows = kStatisticThreads / kRowLanes;
  const int blocks = (task.longest_queries + int(kStatisticRows) - 1) / int(kStatisticRows) * int(kStatisticRows) / rows;
  const int head_index = blockIdx.x / blocks;
  const Head head(task, head_index / task.heads, head_index % task.heads);
  const int query = blockIdx.x % blocks * rows + threadIdx.x / kRowLanes, first = threadIdx.x % kRowLanes;
  const int batch = task.query_offsets ? 0 : head.batch;
  C sum = 0;
  if (query < head.queries) {
    const T* const output = task.output.at(batch, head.index, head.first_query + query);
    const T* const grad = task.grad_output.at(batch, head.index, head.first_query + query);
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
  const int filled = (head.queries + int(kStatisticRows) - 1) / int(kStatisticRows) * int(kStatisticRows);
  if (first != 0 || query >= filled) return;
  C logsumexp = kInfinity<C>;
  if (query < head.queries) {
    const int64_t from = (int64_t(batch) * task.heads + head.index) * task.queries + head.first_query + query;
    const C given = task.given_logsumexp[from];
    if (given != -kInfinity<C>) logsumexp = given;
    if (task.grad_logsumexp) sum -= task.grad_logsumexp[from];
  }
  const int64_t to = task.statistics(head) + query;
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
  using C = typename Traits::C;
  using Product = typename Traits::Product;
  using Lines = typename Traits::Lines;
  constexpr int rows = Traits::kRows, columns = Traits::kColumns, threads = Traits::kThreads;
  FDL_DYN_SHARED(char, shared, Traits::kBytes);
  char *const shared_query = shared, *const shared_grad = shared + Traits::kRowBytes;
  char* const stages = shared_grad + Traits::kRowBytes;

  const int part = blockIdx.x % Traits::kHalves, block_index = blockIdx.x / Traits::kHalves;
  const int blocks = (task.longest_queries + rows - 1) / rows, head_index = block_index / blocks;
  const Head head(task, head_index / task.heads, head_index % task.heads);
  const int query0 = (blocks - 1 - block_index % blocks) * rows;  // the heaviest first
  const int first_column = part * Traits::kAccumulated;
  if (query0 >= head.queries || (first_column >= task.size && part > 0)) return;

  const int last_query = min(query0 + rows, head.queries) - 1;
  const int first_key = max(0, query0 + head.shift - head.left) / columns * columns;
  const int end_key = min(head.keys, last_query + head.shift + head.right + 1);
  const int batch = task.query_offsets ? 0 : head.batch, key_head = head.index / task.group;

  const int warp_row = threadIdx.x / 32 * Traits::kWarpRows;
  const int warp_query = query0 + warp_row, warp_last = min(warp_query + Traits::kWarpRows, head.queries) - 1;
  const int warp_offset = warp_row * Traits::kLineBytes;
  C logsumexp[Traits::kRowTiles][2], delta[Traits::kRowTiles][2];
#pragma unroll
  for (int i = 0; i < Traits::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = warp_query + i * 16 + half * 8 + lane_row();
      const int64_t at = task.statistics(head) + query;
      logsumexp[i][half] = query < head.queries ? task.logsumexp[at] : kInfinity<C>;
      delta[i][half] = query < head.queries ? task.delta[at] : C(0);
    }
  }
  typename Traits::OutputSums sums = {};

  auto copy_stage = [&](int key0, int stage) {
    char* const to = stages + stage * Traits::kStageBytes;
    copy_rows<Lines, columns, threads>(to, task.key.at(batch, key_head, head.first_key + key0), task.key.row_stride,
                                       task.key.vectors, head.keys - key0, task.size);
    copy_rows<Lines, columns, threads>(to + Traits::kColumnBytes,
                                       task.value.at(batch, key_head, head.first_key + key0), task.value.row_stride,
                                       task.value.vectors, head.keys - key0, task.value_size);
    ptx::cp_async_commit();
  };
  if (first_key < end_key) {
    const int64_t row = head.first_query + query0;
    copy_rows<Lines, rows, threads>(shared_query, task.query.at(batch, head.index, row), task.query.row_stride,
                                    task.query.vectors, head.queries - query0, task.size);
    copy_rows<Lines, rows, threads>(shared_grad, task.grad_output.at(batch, head.index, row),
                                    task.grad_output.row_stride, task.grad_output.vectors, head.queries - query0,
                                    task.value_size);
    copy_stage(first_key, 0);
  }
  int stage = 0;
#pragma unroll 1
  for (int key0 = first_key; key0 < end_key; key0 += columns, stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, the other has been read
    if (key0 + columns < end_key) copy_stage(key0 + columns, stage ^ 1);
    const int last_key = key0 + columns - 1;
    if (!head.sees(warp_query, warp_last, key0, last_key)) continue;
    const char *const key = stages + stage * Traits::kStageBytes, *const value = key + Traits::kColumnBytes;

    typename Traits::ScoreSums p = {}, ds = {};
    Product::multiply(p, shared_query + warp_offset, key, task.size);
    Product::multiply(ds, shared_grad + warp_offset, value, task.value_size);
    change_scores<false>(p, task, head, warp_query, key0, true, head.sees_all(warp_query, warp_last, key0, last_key));
    if (task.seed) {
      drop<false, Traits::kRowTiles, Traits::kColumnTiles>(
          task, head, warp_query, key0, [&](int i, int j, int e, C factor) { ds[i][j][e] *= factor; });
    }
    for_each<Traits::kRowTiles, Traits::kColumnTiles>([&](int i, int j, int e) {
      ds[i][j][e] = probability(p[i][j][e], logsumexp[i][e / 2]) * (ds[i][j][e] - delta[i][e / 2]);
    });
    if (task.grad_mask && part == 0) {
      C* const to = task.grad_mask + (int64_t(head.batch) * task.heads + head.index) * task.queries * task.keys;
      for_each<Traits::kRowTiles, Traits::kColumnTiles>([&](int i, int j, int e) {
        const Element<false> at(warp_query, key0, i, j, e);
        if (at.query < head.queries && at.key < head.keys) to[int64_t(at.query) * task.keys + at.key] = ds[i][j][e];
      });
    }
    Product::multiply_rows(sums, ds, key + part * Traits::kAccumulatedBytes, task.size - first_column,
                           Traits::staging(shared));
  }
  if (!task.grad_query.data) return;
  store_rows<Traits>(task.grad_query.at(batch, head.index, head.first_query + warp_query), task.grad_query.row_stride,
                     task.grad_query.vectors, shared_query + warp_offset, warp_last - warp_query + 1, task.size,
                     first_column, sums, [&](int, int) { return task.scale; });
}

// A block has kRows keys of a head of keys, and goes over the queries of all heads that share it. It makes both
// gradients, or where a thread's registers don't hold their sums one, or a half of one.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    key_gradient_kernel(const __grid_constant__ BackwardTask<typename Traits::T> task) {
  using C = typename Traits::C;
  using Product = typename Traits::Product;
  using Lines = typename Traits::Lines;
  constexpr int rows = Traits::kRows, columns = Traits::kColumns, threads = Traits::kThreads;
  FDL_DYN_SHARED(char, shared, Traits::kBytes);
  char *const shared_key = shared, *const shared_value = shared + Traits::kRowBytes;
  char* const stages = shared_value + Traits::kRowBytes;

  const int part = blockIdx.x % Traits::kParts, block_index = blockIdx.x / Traits::kParts;
  const int first_column = part % Traits::kHalves * Traits::kAccumulated;
  const int first_byte = part % Traits::kHalves * Traits::kAccumulatedBytes;
  const bool of_value = (Traits::kBoth || part < Traits::kHalves) && task.grad_value.data &&
                        first_column < task.value_size;
  const bool of_key = (Traits::kBoth || part >= Traits::kHalves) && task.grad_key.data && first_column < task.size;
  const int blocks = (task.longest_keys + rows - 1) / rows, head_index = block_index / blocks;
  const int key_heads = task.heads / task.group, key_head = head_index % key_heads;
  Head head(task, head_index / key_heads, key_head * task.group);
  const int key0 = block_index % blocks * rows;
  if (key0 >= head.keys || !(of_value || of_key)) return;

  const int last_key = min(key0 + rows, head.keys) - 1;
  const int first_query = max(0, key0 - head.right - head.shift) / columns * columns;
  const int end_query = min(head.queries, last_key + head.left - head.shift + 1);
  // Of one head of queries, then of the next.
  const int steps = end_query > first_query ? (end_query - first_query + columns - 1) / columns : 0;
  const int batch = task.query_offsets ? 0 : head.batch;

  const int warp_row = threadIdx.x / 32 * Traits::kWarpRows;
  const int warp_key = key0 + warp_row, warp_last = min(warp_key + Traits::kWarpRows, head.keys) - 1;
  const int warp_offset = warp_row * Traits::kLineBytes;
  typename Traits::OutputSums sums[Traits::kBoth ? 2 : 1] = {};  // of value, of key

  auto copy_stage = [&](int step, int stage) {
    char* const to = stages + stage * Traits::kStageBytes;
    const int query0 = first_query + step % steps * columns;
    const Head of(task, head.batch, key_head * task.group + step / steps);
    const int64_t row = of.first_query + query0;
    copy_rows<Lines, columns, threads>(to, task.query.at(batch, of.index, row), task.query.row_stride,
                                       task.query.vectors, of.queries - query0, task.size);
    copy_rows<Lines, columns, threads>(to + Traits::kColumnBytes, task.grad_output.at(batch, of.index, row),
                                       task.grad_output.row_stride, task.grad_output.vectors, of.queries - query0,
                                       task.value_size);
    constexpr int chunks = Traits::kStatisticBytes / 16, width = 16 / int(sizeof(C));
    if (int(threadIdx.x) < chunks * 2) {
      const C* const from = int(threadIdx.x) < chunks ? task.logsumexp : task.delta;
      ptx::cp_async16(to + Traits::kColumnBytes * 2 + threadIdx.x * 16,
                      from + task.statistics(of) + query0 + threadIdx.x % chunks * width, 16);
    }
    ptx::cp_async_commit();
  };
  if (steps > 0) {
    copy_rows<Lines, rows, threads>(shared_key, task.key.at(batch, key_head, head.first_key + key0),
                                    task.key.row_stride, task.key.vectors, head.keys - key0, task.size);
    copy_rows<Lines, rows, threads>(shared_value, task.value.at(batch, key_head, head.first_key + key0),
                                    task.value.row_stride, task.value.vectors, head.keys - key0, task.value_size);
    copy_stage(0, 0);
  }
#pragma unroll 1
  for (int step = 0; step < steps * task.group; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, the other has been read
    if (step + 1 < steps * task.group) copy_stage(step + 1, (step + 1) % 2);
    const int query0 = first_query + step % steps * columns, last_query = min(query0 + columns, head.queries) - 1;
    if (!head.sees(query0, last_query, warp_key, warp_last)) continue;
    head.index = key_head * task.group + step / steps;
    const char* const query = stages + step % 2 * Traits::kStageBytes;
    const char* const grad = query + Traits::kColumnBytes;
    const C* const logsumexp = reinterpret_cast<const C*>(grad + Traits::kColumnBytes);
    const C* const delta = logsumexp + columns;

    typename Traits::ScoreSums p = {};
    Product::multiply(p, shared_key + warp_offset, query, task.size);
    change_scores<true>(p, task, head, query0, warp_key, true,
                        head.sees_all(query0, last_query, warp_key, warp_last));
    for_each<Traits::kRowTiles, Traits::kColumnTiles>([&](int i, int j, int e) {
      p[i][j][e] = probability(p[i][j][e], logsumexp[j * 8 + lane_column() + e % 2]);
    });
    typename Traits::ScoreSums factors;
    if (task.seed) {
      drop<true, Traits::kRowTiles, Traits::kColumnTiles>(
          task, head, query0, warp_key, [&](int i, int j, int e, C factor) { factors[i][j][e] = factor; });
    }
    if (of_value) {
      typename Traits::ScoreSums left;
      for_each<Traits::kRowTiles, Traits::kColumnTiles>(
          [&](int i, int j, int e) { left[i][j][e] = task.seed ? p[i][j][e] * factors[i][j][e] : p[i][j][e]; });
      Product::multiply_rows(sums[0], left, grad + first_byte, task.value_size - first_column,
                             Traits::staging(shared));
    }
    if (of_key) {
      typename Traits::ScoreSums ds = {};
      Product::multiply(ds, shared_value + warp_offset, grad, task.value_size);
      for_each<Traits::kRowTiles, Traits::kColumnTiles>([&](int i, int j, int e) {
        if (task.seed) ds[i][j][e] *= factors[i][j][e];
        ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - delta[j * 8 + lane_column() + e % 2]);
      });
      Product::multiply_rows(sums[Traits::kBoth], ds, query + first_byte, task.size - first_column,
                             Traits::staging(shared));
    }
  }
  const int64_t row = head.first_key + warp_key;
  const int count = warp_last - warp_key + 1;
  if (of_value) {
    store_rows<Traits>(task.grad_value.at(batch, key_head, row), task.grad_value.row_stride, task.grad_value.vectors,
                       shared_value + warp_offset, count, task.value_size, first_column, sums[0],
                       [](int, int) { return C(1); });
  }
  if (of_key) {
    store_rows<Traits>(task.grad_key.at(batch, key_head, row), task.grad_key.row_stride, task.grad_key.vectors,
                       shared_key + warp_offset, count, task.size, first_column, sums[Traits::kBoth],
                       [&](int, int) { return task.scale; });
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
      name, arguments.dtype, arguments.allow_tf32, shape, [&]<class T, Arithmetic arithmetic, int bucket>() {
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
          using Kernel = Traits<T, arithmetic, bucket, Pass::query_gradient>;
          const int64_t blocks = ceil_div<int64_t>(shape.longest_queries, Kernel::kRows) * Kernel::kHalves;
          launch(query_gradient_kernel<Kernel>,
                 grid_of(name, heads, blocks, Kernel::kThreads, Kernel::kBytes, arguments.stream), task);
        }
        if (arguments.grad_key.data || arguments.grad_value.data) {
          using Kernel = Traits<T, arithmetic, bucket, Pass::key_gradient>;
          const int64_t blocks = ceil_div<int64_t>(shape.longest_keys, Kernel::kRows) * Kernel::kParts;
          launch(key_gradient_kernel<Kernel>,
                 grid_of(name, key_heads, blocks, Kernel::kThreads, Kernel::kBytes, arguments.stream), task);
        }
      });
}

}  // namespace fastdl::cuda
