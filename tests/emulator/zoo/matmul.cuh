// A small tensor-core matmul: C[M,N] = relu(A[M,K] * W[N,K]^T + bias[N]); bf16 in and out of shared memory through
// cp.async, ldmatrix and mma.sync, fp32 accumulation.
#pragma once
#include "ptx.cuh"
#include "zoo.h"

namespace zoo {

using namespace fastdl::cuda;

constexpr int BM = 64, BN = 64, BK = 32, MATMUL_THREADS = 128;
constexpr int PITCH = BK + 8;  // 80-byte rows: ldmatrix without bank conflicts

template <bool vectors, int pitch>
__device__ __forceinline__ void load_tile(bfloat16 (*tile)[pitch], const bfloat16* source, int first_row, int rows,
                                          int first_k, int K) {
#pragma unroll
  for (int i = 0; i < BM * BK / 8 / MATMUL_THREADS; ++i) {
    const int chunk = threadIdx.x + i * MATMUL_THREADS, r = chunk / (BK / 8), k = chunk % (BK / 8) * 8;
    const int row = first_row + r, column = first_k + k;
    const int to = BUG("shared out of bounds") && r == 63 ? 64 : r;  // a row past the end of the second stage
    if constexpr (vectors) {
      const bool inside = row < rows && column < K;
      ptx::cp_async16(&tile[to][k], inside ? source + size_t(row) * K + column : source, inside ? 16 : 0);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool inside = row < rows && column + j < K;
        tile[to][k + j] = inside ? source[size_t(row) * K + column + j] : bfloat16(0.f);
      }
    }
  }
}

template <class Output, bool vectors, int pitch>
__global__ void __launch_bounds__(MATMUL_THREADS)
    matmul_kernel(const bfloat16* A, const bfloat16* W, const float* bias, Output* C, int M, int N, int K) {
  FDL_SHARED_ALIGNED(16, bfloat16, tile_a, [2][BM][pitch]);
  FDL_SHARED_ALIGNED(16, bfloat16, tile_w, [2][BN][pitch]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp % 2 * 32, warp_n = warp / 2 * 32;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = (K + BK - 1) / BK;
  float sum[2][4][4] = {};
  load_tile<vectors>(tile_a[0], A, m0, M, 0, K);
  load_tile<vectors>(tile_w[0], W, n0, N, 0, K);
  ptx::cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2;
    if (step + 1 < steps) {
      load_tile<vectors>(tile_a[stage ^ 1], A, m0, M, (step + 1) * BK, K);
      load_tile<vectors>(tile_w[stage ^ 1], W, n0, N, (step + 1) * BK, K);
    }
    ptx::cp_async_commit();
    if (!BUG("no cp.async wait")) ptx::cp_async_wait<1>();
    if (!BUG("no barrier before compute")) __syncthreads();
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      uint32_t a[2][4], w[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::ldmatrix(a[i], &tile_a[stage][warp_m + i * 16 + lane % 16][k + lane / 16 * 8]);
        ptx::ldmatrix(w[i], &tile_w[stage][warp_n + i * 16 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t b[2] = {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]};
          ptx::mma<bfloat16>(sum[i][j], a[i], b);
        }
      }
    }
    if (!BUG("no barrier before reuse")) __syncthreads();  // the next step overwrites this stage
  }
  ptx::cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int m = m0 + warp_m + i * 16 + lane / 4 + r / 2 * 8, n = n0 + warp_n + j * 8 + lane % 4 * 2 + r % 2;
        const float shift = n < N || BUG("global out of bounds") ? bias[n] : 0.f;
        if (m < M && n < N) C[size_t(m) * N + n] = Output(fmaxf(sum[i][j][r] + shift, 0.f));
      }
    }
  }
}

template <class Output, int pitch = PITCH>
void matmul(const bfloat16* A, const bfloat16* W, const float* bias, Output* C, int M, int N, int K) {
  const Shape shape(dim3(ceil_div(N, BN), ceil_div(M, BM)), dim3(MATMUL_THREADS), 0, nullptr);
  if (K % 8 == 0 && aligned(16, A, W)) {
    launch(matmul_kernel<Output, true, pitch>, shape, A, W, bias, C, M, N, K);
  } else {
    launch(matmul_kernel<Output, false, pitch>, shape, A, W, bias, C, M, N, K);
  }
}

}  // namespace zoo
