// Small kernels, one for each thing that CUDA threads can do to each other: wrong ones, named after their bug, and
// right ones that must stay clean.
#include <vector>

#include "ptx.cuh"
#include "zoo.h"

namespace zoo {
namespace {

using namespace fastdl::cuda;

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[0] = 1;
  } else {
    out[1] = 1;
    __syncthreads();
  }
}

__global__ void divergent_shuffle(int* out) {
  int value = threadIdx.x;
  if (threadIdx.x % 2) {
    value = __shfl_xor_sync(~0u, value, 2);
  } else {
    value = __shfl_xor_sync(~0u, value, 4) + 1;
  }
  out[threadIdx.x] = value;
}

__global__ void mask_of_absent_lanes(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(~0u, int(threadIdx.x), 1);
}

__global__ void race_between_blocks(int* out) {
  if (threadIdx.x == 0) out[0] += 1;
}

__global__ void race_within_a_block(int* out) { out[threadIdx.x / 2] = threadIdx.x; }

__global__ void no_syncwarp(int* out) {
  FDL_SHARED(int, shared, [32]);
  shared[threadIdx.x] = threadIdx.x;
  if (!BUG("no __syncwarp")) __syncwarp();
  out[threadIdx.x] = shared[31 - threadIdx.x];
}

__global__ void uninitialised_shared(float* out) {
  FDL_SHARED(float, shared, [64]);
  if (threadIdx.x < 60 || !BUG("uninitialised shared memory")) shared[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void shared_index(int* out, int row) {
  FDL_SHARED(int, shared, [2][4][8]);
  int* first = &shared[0][0][0];
  first[row * 8 + threadIdx.x % 8] = 1;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = shared[0][0][0];
}

__global__ void shared_dimension(int* out, int row) {  // past a dimension, within the array
  FDL_SHARED(int, shared, [2][4][8]);
  shared[0][row][threadIdx.x % 8] = 1;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = shared[1][0][0];
}

__global__ void dynamic_shared_index(int* out, int index) {
  FDL_DYN_SHARED(int, shared, sizeof(int));
  shared[index] = 1;
  out[0] = 1;
}

__global__ void misaligned_vector(float* out, const float* in) {
  out[threadIdx.x] = reinterpret_cast<const float4*>(in + 1)->x;
}

__global__ void integer_overflow(float* out, int n) { out[threadIdx.x == 0 ? n * n / 65536 : 0] = 1; }

__global__ void exit_with_copies_in_flight(int* out, const int* in) {
  FDL_SHARED_ALIGNED(16, int, shared, [128]);
  ptx::cp_async16(&shared[threadIdx.x * 4], in, 16);
  ptx::cp_async_commit();
  out[0] = 0;
}

__global__ void misaligned_ldmatrix(uint32_t* out) {
  FDL_SHARED_ALIGNED(16, float16, shared, [8][24]);
  for (int i = threadIdx.x; i < 8 * 24; i += 32) shared[i / 24][i % 24] = float16(0.f);
  __syncwarp();
  uint32_t matrix[1];
  ptx::ldmatrix(matrix, &shared[threadIdx.x % 8][BUG("misaligned ldmatrix") ? 4 : 8]);
  out[threadIdx.x] = matrix[0];
}

__global__ void last_block(float* part, unsigned* finished, float* out) {
  FDL_SHARED(bool, last, [1]);
  FDL_SHARED(float, shared, [32]);
  shared[threadIdx.x] = 1.f;
  __syncwarp();
  const bool fence = !BUG("last block without fence");
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < 32; ++i) sum += shared[i];
    part[blockIdx.x] = sum;
    if (fence) __threadfence();
    last[0] = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last[0] && threadIdx.x == 0) {
    if (fence) __threadfence();
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += part[i];
    *out = sum;
  }
}

__device__ void grid_barrier(unsigned* arrived, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < target) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

__global__ void steps_across_the_grid(int* state, unsigned* arrived, int steps) {  // as a persistent RNN does
  for (int t = 0; t < steps; ++t) {
    if (threadIdx.x == 0) {
      state[(t + 1) * gridDim.x + blockIdx.x] = state[t * gridDim.x + (blockIdx.x + 1) % gridDim.x] + 1;
    }
    if (!BUG("no grid barrier")) grid_barrier(arrived, (t + 1) * gridDim.x);
  }
}

__global__ void histogram(int* out) {
  FDL_SHARED(int, bins, [4]);
  if (threadIdx.x < 4) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&bins[threadIdx.x % 4], 1);
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(&out[threadIdx.x], bins[threadIdx.x]);
}

__global__ void early_exit(int* out, int threads) {
  if (int(threadIdx.x) >= threads) return;
  __syncthreads();
  out[threadIdx.x] = __popc(__ballot_sync(__activemask(), 1));
}

__global__ void votes(int* out) {
  const int t = threadIdx.x;
  out[t] = __syncthreads_count(t % 3 == 0) + 1000 * __syncthreads_or(t == 5) + 2000 * __syncthreads_and(t < 63);
  out[64 + t] = int(__match_any_sync(~0u, t % 4)) == 0x11111111 << t % 4;
}

Shape shape(unsigned blocks, unsigned threads, size_t shared = 0) {
  return Shape(dim3(blocks), dim3(threads), shared, nullptr);
}

// Runs function(ints, floats) on fresh heap arrays of 4096, so that ASan sees their ends.
template <class Function>
double run(Function function) {
  std::vector<int> ints(4096, 0);
  std::vector<float> floats(4096, 0.f);
  return function(ints.data(), floats.data()) ? 0. : 9.;
}

#define CASE(name, ...) \
  {name, [] { return run([](int* ints [[maybe_unused]], float* floats [[maybe_unused]]) { __VA_ARGS__ }); }}

}  // namespace

extern const std::vector<Case> execution_cases = {
    CASE("divergent barrier", launch(divergent_barrier, shape(1, 64), ints); return true;),
    CASE("divergent shuffle", launch(divergent_shuffle, shape(1, 32), ints); return true;),
    CASE("mask of absent lanes", launch(mask_of_absent_lanes, shape(1, 32), ints); return true;),
    CASE("race between blocks", launch(race_between_blocks, shape(4, 32), ints); return ints[0] == 4;),
    CASE("race within a block", launch(race_within_a_block, shape(1, 32), ints); return true;),
    CASE("syncwarp", launch(no_syncwarp, shape(1, 32), ints); return ints[0] == 31 && ints[31] == 0;),
    CASE("shared memory", launch(uninitialised_shared, shape(1, 64), floats);
         for (int i = 0; i < 64; ++i) if (floats[i] != 1.f) return false; return true;),
    CASE("shared index", launch(shared_index, shape(1, 8), ints, 4 + 4 * BUG("shared array index")); return true;),
    CASE("shared dimension", launch(shared_dimension, shape(1, 8), ints, 3 + BUG("shared dimension index"));
         return true;),
    CASE("dynamic shared index", launch(dynamic_shared_index, shape(1, 1, 100), ints, 24 + BUG("dynamic shared index"));
         return true;),
    CASE("misaligned vector", launch(misaligned_vector, shape(1, 2), floats, (const float*)floats); return true;),
    CASE("integer overflow", launch(integer_overflow, shape(1, 2), floats, 65536); return true;),
    CASE("exit with copies in flight", alignas(16) static int in[4] = {};
         launch(exit_with_copies_in_flight, shape(1, 32), ints, (const int*)in); return true;),
    CASE("ldmatrix address", launch(misaligned_ldmatrix, shape(1, 32), (uint32_t*)ints); return true;),
    CASE("last block", unsigned finished = 0; launch(last_block, shape(6, 32), floats, &finished, &floats[100]);
         return floats[100] == 192.f;),
    CASE("grid barrier", unsigned arrived = 0; Shape all = shape(8, 64); all.cooperative = true;
         launch(steps_across_the_grid, all, ints, &arrived, 5);
         for (int i = 0; i < 8; ++i) if (ints[40 + i] != 5) return false; return true;),
    CASE("histogram", launch(histogram, shape(3, 128), ints); return ints[0] == 96 && ints[3] == 96;),
    CASE("early exit", launch(early_exit, shape(1, 64), ints, 40); return ints[39] == 8 && ints[0] == 32;),
    CASE("votes", launch(votes, shape(1, 64), ints);
         for (int i = 0; i < 64; ++i) if (ints[i] != 1022 || ints[64 + i] != 1) return false; return true;),
};

}  // namespace zoo
