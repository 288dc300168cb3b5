// The Hopper main loop: activation(input @ weight^T + bias) for 16-bit operands, both K-major, by TMA and wgmma.
//
// A block has three warpgroups and stays for many tiles. The producer, one thread, loads tiles of both operands into a
// ring of stages; `full` and `empty` mbarriers hand each stage over and back. Two consumers multiply: they share a
// tile, or take turns (ping-pong), one multiplying while the other ends its tile. Results leave through shared memory
// by TMA.
#pragma once
#include <cstring>

#include "epilogue.cuh"
#include "sm90.cuh"

namespace fastdl::cuda::hopper {

using namespace sm90;

// How the work is cut. columns_: of a tile; ping_pong_: each consumer has tiles of its own; cluster_: blocks, one below
// the other, that load half of their common weight tile each, for both.
template <int columns_, bool ping_pong_, int cluster_>
struct Plan {
  static constexpr int kRows = 128, kColumns = columns_, kCluster = cluster_;
  static constexpr bool kPingPong = ping_pong_;
  static constexpr int kDepth = 64;  // of a step: one 128-byte line of the swizzle
  static constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
  static constexpr int kBlocks = kPingPong ? kRows / 64 : kRows / 64 / kConsumers;  // of 64 rows, for a consumer
  static constexpr int kBox = 64;                                                   // results leave in 64 x 64 boxes
  static constexpr int kStageBytes = (kRows + kColumns) * kDepth * 2;
  static constexpr int kSharedBytes = 227 * 1024, kResultBytes = kConsumers * 2 * kBox * kBox * 2;
  static constexpr int kStages = (kSharedBytes - kResultBytes - 1024) / kStageBytes;
  // Row tiles that running blocks work on at a time, so that what they read of both operands is smallest: 132 tiles
  // in a square.
  static constexpr int kGroup = (kColumns == 256 ? 16 : 12) / kCluster;
  static_assert(kBlocks * kColumns == 256,
                "128 accumulators a thread: more would not fit, fewer would waste bandwidth");
  static_assert(kStages >= 3, "fewer stages can't hide the latency of loads");
};

// 128 x 128, ping-pong: nothing waits for the end of a tile. For few tiles, or few steps in each.
using Narrow = Plan<128, true, 1>;
// 128 x 256, in pairs that share the weight: half of the narrow plan's loads. For large products.
using Wide = Plan<256, false, 2>;

// Every array is made of 1024-byte swizzle atoms: 8 lines of 128 bytes.
template <class T, class Plan>
struct Shared {
  T input[Plan::kStages][Plan::kRows * Plan::kDepth];
  T weight[Plan::kStages][Plan::kColumns * Plan::kDepth];
  T result[Plan::kConsumers][2][Plan::kBox * Plan::kBox];
  Mbarrier full[Plan::kStages], empty[Plan::kStages];
  Mbarrier turn[Plan::kConsumers];  // ping-pong: the other consumer has issued its last multiplication
};

// A place in the ring of stages. Producer and consumers walk it in the same order.
template <int stages>
struct Ring {
  int stage = 0;
  unsigned parity = 0;  // of this lap
  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int steps) {
    stage += steps;
    parity ^= stage / stages & 1;
    stage %= stages;
  }
};

// The tiles, of this block's cluster, in groups of kGroup rows of tiles; within a group column by column.
template <class Plan>
struct Tiles {
  int rows, columns;  // in tiles; a cluster's tiles count as one
  __device__ __forceinline__ Tiles(int M, int N)
      : rows((M + Plan::kRows * Plan::kCluster - 1) / (Plan::kRows * Plan::kCluster)),
        columns((N + Plan::kColumns - 1) / Plan::kColumns) {}
  __device__ __forceinline__ int count() const { return rows * columns; }
  // The first row and column of this block's part of tile `index`.
  __device__ __forceinline__ int2 place(int index, int rank) const {
    const int group = index / (Plan::kGroup * columns);
    const int height = min(Plan::kGroup, rows - group * Plan::kGroup);
    const int within = index - group * Plan::kGroup * columns;
    const int row = (group * Plan::kGroup + within % height) * Plan::kCluster + rank;
    return make_int2(row * Plan::kRows, within / height * Plan::kColumns);
  }
};

template <class T>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  uint32_t word;
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// Ends a consumer's tile: bias, preactivation, activation, and the way to memory in boxes of 64 x 64, which take turns
// in two buffers; with a preactivation, it has the first and the output the second. buffer: the output's last.
template <class T, Activation kind, class Plan>
__device__ __forceinline__ void store_tile(float (&sums)[Plan::kBlocks][Plan::kColumns / 2],
                                           T (&buffers)[2][Plan::kBox * Plan::kBox], const CUtensorMap* output_map,
                                           const CUtensorMap* preactivation_map, const Epilogue<T>& epilogue, int row,
                                           int column, int consumer, int& buffer) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool leader = __shfl_sync(0xffffffffu, warp, 0) == 0 && elect_one();  // the same thread every time
#pragma unroll
  for (int part = 0; part < Plan::kColumns / Plan::kBox; ++part) {
    const int box_column = column + part * Plan::kBox;
    if (box_column >= epilogue.columns) break;
    float bias[8][2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) epilogue.add_bias(box_column + i * 8 + lane % 4 * 2, bias[i]);
#pragma unroll
    for (int block = 0; block < Plan::kBlocks; ++block) {
      if (!epilogue.preactivation) buffer ^= 1;
      if (leader) {  // until the buffer's last store has read it
        if (epilogue.preactivation) {
          bulk_wait_read<0>();
        } else {
          bulk_wait_read<1>();
        }
      }
      barrier_sync(1 + consumer, 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // 16 columns: two 8x8 matrices above two
        uint32_t z[4], y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int first = part * 32 + i * 8 + j * 2;
          const float (&shift)[2] = bias[i * 2 + j / 2];
          const float z0 = sums[block][first] + shift[0], z1 = sums[block][first + 1] + shift[1];
          z[j] = round_pair<T>(z0, z1);
          y[j] = round_pair<T>(activate<kind, T>(z0, epilogue.parameter), activate<kind, T>(z1, epilogue.parameter));
        }
        const int place = swizzle128(warp * 16 + lane % 16, i * 32 + lane / 16 * 16);
        stmatrix(reinterpret_cast<char*>(buffers[buffer]) + place, y);
        if (epilogue.preactivation) stmatrix(reinterpret_cast<char*>(buffers[0]) + place, z);
      }
      fence_proxy_async_shared();
      barrier_sync(1 + consumer, 128);
      if (leader) {
        tma_store_2d(output_map, buffers[buffer], box_column, row + block * 64);
        if (epilogue.preactivation) tma_store_2d(preactivation_map, buffers[0], box_column, row + block * 64);
        bulk_commit();
      }
    }
  }
}

template <class T, Activation kind, class Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1) matmul_kernel(
    const __grid_constant__ CUtensorMap input_map,          // [M, K], boxes of kRows x kDepth
    const __grid_constant__ CUtensorMap weight_map,         // [N, K], kColumns / kCluster x kDepth
    const __grid_constant__ CUtensorMap output_map,         // [M, N], kBox x kBox
    const __grid_constant__ CUtensorMap preactivation_map,  // [M, N], kBox x kBox; unused if there is none
    const __grid_constant__ Epilogue<T> epilogue, int K) {
#if defined(FDL_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Memory = Shared<T, Plan>;
  FDL_DYN_SHARED_ALIGNED(1024, Memory, shared, sizeof(Memory));
  constexpr int cluster = Plan::kCluster;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);  // uniform, and the compiler knows
  const int lane = threadIdx.x % 32, warpgroup = warp / 4, rank = cluster > 1 ? int(cluster_rank()) : 0;
  const Tiles<Plan> tiles(int(epilogue.rows), int(epilogue.columns));
  const int steps = (K + Plan::kDepth - 1) / Plan::kDepth, first = blockIdx.x / cluster, stride = gridDim.x / cluster;
  if (threadIdx.x == 0) {
    constexpr int warps = 4 * (Plan::kPingPong ? 1 : Plan::kConsumers) * cluster;  // that read a stage
    for (int i = 0; i < Plan::kStages; ++i) {
      mbarrier_init(&shared->full[i], 1);
      mbarrier_init(&shared->empty[i], warps);
    }
    for (int i = 0; i < Plan::kConsumers; ++i) mbarrier_init(&shared->turn[i], 4);
    mbarrier_init_fence();
  }
  if constexpr (cluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  Ring<Plan::kStages> ring;

  if (warpgroup == Plan::kConsumers) {
    registers_decrease<40>();
    if (warp == Plan::kConsumers * 4 && elect_one()) {
      for (int tile = first; tile < tiles.count(); tile += stride) {
        const int2 place = tiles.place(tile, rank);
        for (int step = 0; step < steps; ++step, ring.advance()) {
          Mbarrier* full = &shared->full[ring.stage];
          const int depth = step * Plan::kDepth;
          if constexpr (cluster > 1) {
            mbarrier_wait_cluster(&shared->empty[ring.stage], ring.parity ^ 1);
          } else {
            mbarrier_wait(&shared->empty[ring.stage], ring.parity ^ 1);  // the first lap finds them empty
          }
          mbarrier_arrive_expect(full, Plan::kStageBytes);
          tma_load_2d(shared->input[ring.stage], &input_map, full, depth, place.x);
          if constexpr (cluster > 1) {
            constexpr int share = Plan::kColumns / cluster;
            tma_load_2d_multicast(shared->weight[ring.stage] + rank * share * Plan::kDepth, &weight_map, full, depth,
                                  place.y + rank * share, (1 << cluster) - 1);
          } else {
            tma_load_2d(shared->weight[ring.stage], &weight_map, full, depth, place.y);
          }
        }
      }
    }
  } else {
    registers_increase<232>();
    const int consumer = warpgroup, other = 1 - consumer;
    int buffer = 1;
    unsigned turn_parity = consumer == 0;  // consumer 0's first turn is at once
    auto release = [&](int stage) {
      if constexpr (cluster > 1) {
        if (lane < cluster) mbarrier_arrive_peer(&shared->empty[stage], unsigned(lane));
      } else {
        if (lane == 0) mbarrier_arrive(&shared->empty[stage]);
      }
    };
    if (Plan::kPingPong && consumer == 1) ring.skip(steps);
    for (int tile = first + (Plan::kPingPong ? consumer * stride : 0); tile < tiles.count();
         tile += Plan::kPingPong ? 2 * stride : stride) {
      if constexpr (Plan::kPingPong) {
        // Also what makes `full`'s parity unambiguous: all loads before this tile's have been seen to complete.
        mbarrier_wait(&shared->turn[consumer], turn_parity);
        turn_parity ^= 1;
      }
      float sums[Plan::kBlocks][Plan::kColumns / 2];
      const int first_row = Plan::kPingPong ? 0 : consumer * 64;  // of the tile
      int previous = 0;
      for (int step = 0; step < steps; ++step, ring.advance()) {
        mbarrier_wait(&shared->full[ring.stage], ring.parity);
        const uint64_t input = descriptor(shared_address(shared->input[ring.stage]) + first_row * 128);
        const uint64_t weight = descriptor(shared_address(shared->weight[ring.stage]));
        wgmma_fence(sums);
#pragma unroll
        for (int k = 0; k < Plan::kDepth / 16; ++k) {
#pragma unroll
          for (int block = 0; block < Plan::kBlocks; ++block) {
            wgmma<T, Plan::kColumns>(sums[block], input + block * (64 * 128 / 16) + k * 2, weight + k * 2, step | k);
          }
        }
        wgmma_commit();
        wgmma_wait<1>(sums);  // all but this step: the previous stage has been read
        if (step > 0) release(previous);
        previous = ring.stage;
      }
      if (Plan::kPingPong && lane == 0) mbarrier_arrive(&shared->turn[other]);
      wgmma_wait<0>(sums);
      release(previous);
      if constexpr (Plan::kPingPong) ring.skip(steps);
      const int2 place = tiles.place(tile, rank);
      store_tile<T, kind, Plan>(sums, shared->result[consumer], &output_map, &preactivation_map, epilogue,
                                place.x + first_row, place.y, consumer, buffer);
    }
    if (warp % 4 == 0 && elect_one()) bulk_wait_read<0>();  // shared memory must outlive its stores
  }
  if constexpr (cluster > 1) {
    __syncwarp();
    cluster_sync();  // and what peers load into it and signal in it
  }
#endif
}

}  // namespace fastdl::cuda::hopper
