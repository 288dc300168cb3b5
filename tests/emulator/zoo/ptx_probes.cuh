// Probe kernels that pin down every twin of ptx.cuh against plain host arithmetic and the PTX manual's tables, stated
// here as (lane, element) -> (row, column) maps independent of the emulator's code. The emulator's tests run them on
// every build; confirm_ptx.cu runs the same cases on a GPU: a case that passes in both confirms the twin.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>

#include "ptx.cuh"
#include "zoo.h"

namespace zoo {

using namespace fastdl::cuda;

// Memory that host and device both see, filled with ones (NaN).
template <class T>
struct Pinned {
  explicit Pinned(size_t count) : count(count) {
#ifdef FDL_EMULATE
    void* memory;
    if (posix_memalign(&memory, 128, count * sizeof(T))) abort();
    data = static_cast<T*>(memory);
#else
    check(cudaMallocHost(&data, count * sizeof(T)), "cudaMallocHost");
#endif
    memset(static_cast<void*>(data), 0xff, count * sizeof(T));
  }
  ~Pinned() {
#ifdef FDL_EMULATE
    free(data);
#else
    cudaFreeHost(data);
#endif
  }
  Pinned(const Pinned&) = delete;
  T& operator[](size_t i) { return data[i]; }
  size_t count;
  T* data;
};

// All blocks are resident: they may wait for each other.
template <class... Parameters, class... Arguments>
void run_probe(void (*kernel)(Parameters...), int blocks, int threads, Arguments... arguments) {
  Shape shape(dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, nullptr);
  shape.cooperative = true;
  launch(kernel, shape, arguments...);
#ifndef FDL_EMULATE
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
#endif
}

// ---- mma ------------------------------------------------------------------------------------------------------------

// PTX ISA, "Matrix fragments for mma.m16n8k16 / m16n8k8": groupID = lane / 4, threadID_in_group = lane % 4.
template <class T>
struct Fragments {
  static constexpr bool wide = sizeof(T) == 4;  // tf32: m16n8k8, else m16n8k16
  static constexpr int depth = wide ? 8 : 16, a_elements = wide ? 4 : 8, b_elements = wide ? 2 : 4;
  static int a_row(int lane, int i) {
    const bool lower = wide ? (i == 1 || i == 3) : (i == 2 || i == 3 || i == 6 || i == 7);
    return lower ? lane / 4 + 8 : lane / 4;
  }
  static int a_column(int lane, int i) {
    if (wide) return i < 2 ? lane % 4 : lane % 4 + 4;
    return i < 4 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8;
  }
  static int b_row(int lane, int i) {
    if (wide) return i == 0 ? lane % 4 : lane % 4 + 4;
    return i < 2 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8;
  }
  static int b_column(int lane, int) { return lane / 4; }
  static int d_row(int lane, int i) { return i < 2 ? lane / 4 : lane / 4 + 8; }
  static int d_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }
};

template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {  // fragments of each lane
  const int lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) sum[i] = d[lane * 4 + i];
  ptx::mma<T>(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

// Small integers, whose every sum is exact: a wrong place shows. Reals: within what fp32 sums allow, as hardware
// aligns the addends of one instruction to the largest and may truncate; operands that T holds exactly.
template <class T, bool integers>
double mma_case() {
  using F = Fragments<T>;
  std::mt19937 generator(3);
  auto value = [&] {
    if (integers) return T(float(int(generator() % 17) - 8));
    const float real = std::normal_distribution<float>()(generator);
    if constexpr (!F::wide) return T(real);
    uint32_t bits;
    memcpy(&bits, &real, 4);
    bits &= ~0x1fffu;  // 10 bits of mantissa
    float rounded;
    memcpy(&rounded, &bits, 4);
    return T(rounded);
  };
  T a[16][16], b[16][8];
  for (auto& row : a)
    for (auto& x : row) x = value();
  for (auto& row : b)
    for (auto& x : row) x = value();
  Pinned<T> fragment_a(32 * F::a_elements), fragment_b(32 * F::b_elements);
  Pinned<float> d(32 * 4);
  for (int i = 0; i < 32 * 4; ++i) d[i] = 2;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < F::a_elements; ++i)
      fragment_a[lane * F::a_elements + i] = a[F::a_row(lane, i)][F::a_column(lane, i)];
    for (int i = 0; i < F::b_elements; ++i)
      fragment_b[lane * F::b_elements + i] = b[F::b_row(lane, i)][F::b_column(lane, i)];
  }
  run_probe(mma_kernel<T>, 1, 32, reinterpret_cast<const uint32_t*>(fragment_a.data),
            reinterpret_cast<const uint32_t*>(fragment_b.data), d.data);
  double worst = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      double expected = 2, magnitude = 2;
      for (int k = 0; k < F::depth; ++k) {
        const double product = double(float(a[F::d_row(lane, i)][k])) * double(float(b[k][F::d_column(lane, i)]));
        expected += product;
        magnitude += std::fabs(product);
      }
      const double error = std::fabs(d[lane * 4 + i] - expected) / (integers ? 1e-30 : magnitude * 0x1p-20);
      worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
  }
  return worst;
}

// ---- ldmatrix -------------------------------------------------------------------------------------------------------

template <int count, bool transposed>
__global__ void ldmatrix_kernel(uint32_t* out, int pitch) {  // element (m, r, c) of matrix m is 64 m + 8 r + c
  FDL_SHARED_ALIGNED(16, uint16_t, shared, [4 * 8 * 72]);
  for (int i = threadIdx.x; i < count * 64; i += 32) shared[i / 8 * pitch + i % 8] = uint16_t(i);
  __syncwarp();
  uint32_t matrices[count];
  const int row = threadIdx.x % (8 * count);
  ptx::ldmatrix<count, transposed>(matrices, &shared[row * pitch]);
  for (int i = 0; i < count; ++i) out[threadIdx.x * count + i] = matrices[i];
}

template <int count, bool transposed>
double ldmatrix_case() {
  Pinned<uint32_t> out(32 * count);
  run_probe(ldmatrix_kernel<count, transposed>, 1, 32, out.data, 8);
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < count; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4, column = lane % 4 * 2 + half;
        const int expected = i * 64 + (transposed ? column * 8 + row : row * 8 + column);
        wrong += int(out[lane * count + i] >> 16 * half & 0xffff) != expected;
      }
    }
  }
  return wrong * 10.;
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

// Thread t copies 16 bytes in each of three groups, t % 17 of them from memory and the rest zeros, and uses the groups
// one after the other, as a multistage pipeline does.
__global__ void cp_async_kernel(const unsigned char* in, unsigned char* out) {
  FDL_SHARED_ALIGNED(16, unsigned char, shared, [3 * 64 * 16]);
  const int t = threadIdx.x, bytes = t % 17;
  for (int stage = 0; stage < 3; ++stage) {
    const int offset = (stage * 64 + t) * 16;
    ptx::cp_async16(&shared[offset], &in[offset], bytes);
    ptx::cp_async_commit();
  }
  auto give = [&](int stage) {  // what another thread has copied
    __syncthreads();
    for (int i = 0; i < 16; ++i) {
      const int offset = (stage * 64 + 63 - t) * 16 + i;
      out[offset] = shared[offset];
    }
  };
  ptx::cp_async_wait<2>();
  give(0);
  ptx::cp_async_wait<1>();
  give(1);
  ptx::cp_async_wait<0>();
  give(2);
}

inline double cp_async_case() {
  Pinned<unsigned char> in(3 * 64 * 16), out(3 * 64 * 16);
  for (size_t i = 0; i < in.count; ++i) in[i] = static_cast<unsigned char>(i % 251 + 1);
  run_probe(cp_async_kernel, 1, 64, in.data, out.data);
  int wrong = 0;
  for (size_t i = 0; i < in.count; ++i) wrong += out[i] != (i % 16 < i / 16 % 64 % 17 ? in[i] : 0);
  return wrong * 10.;
}

// ---- tf32 -----------------------------------------------------------------------------------------------------------

__global__ void tf32_kernel(const float* in, uint32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = ptx::to_tf32(in[i]);
}

// To the nearest 10 bits of mantissa, ties away from zero: ties, both neighbours of each, both signs, every exponent.
inline double tf32_rounding_case() {
  constexpr uint32_t low_bits[] = {0, 1, 0x0fff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x3000, 0x5000, 0x7ff000, 0x7fffff};
  constexpr int lows = sizeof low_bits / sizeof low_bits[0], count = 253 * lows * 2;
  Pinned<float> in(count);
  Pinned<uint32_t> out(count), bits(count);
  for (int i = 0; i < count; ++i) {  // normal numbers below the largest exponent
    bits[i] = uint32_t(i % 2) << 31 | uint32_t(i / 2 / lows + 1) << 23 | low_bits[i / 2 % lows];
    memcpy(&in[i], &bits[i], 4);
  }
  run_probe(tf32_kernel, 1, 128, in.data, out.data, count);
  int wrong = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t below = bits[i] & ~0x1fffu, rest = bits[i] & 0x1fffu;
    wrong += out[i] != (rest >= 0x1000u ? below + 0x2000u : below);
  }
  return wrong * 10.;
}

// ---- Among threads --------------------------------------------------------------------------------------------------

__global__ void votes_kernel(int* out) {
  const int t = threadIdx.x;
  out[t] = __syncthreads_count(t % 3 == 0) + 1000 * __syncthreads_or(t == 5) + 2000 * __syncthreads_and(t < 63);
  out[64 + t] = int(__match_any_sync(~0u, t % 4)) == 0x11111111 << t % 4;
  out[128 + t] = __shfl_xor_sync(~0u, t, 5) + 100 * __shfl_down_sync(~0u, t, 3) + 10000 * __shfl_up_sync(~0u, t, 2);
}

inline double votes_case() {
  Pinned<int> out(192);
  run_probe(votes_kernel, 1, 64, out.data);
  int wrong = 0;
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32, warp = t - lane;
    const int down = lane + 3 < 32 ? t + 3 : t, up = lane < 2 ? t : t - 2;
    wrong += out[t] != 1022 || out[64 + t] != 1 || out[128 + t] != warp + (lane ^ 5) + 100 * down + 10000 * up;
  }
  return wrong * 10.;
}

// ---- Among blocks ---------------------------------------------------------------------------------------------------

static __device__ unsigned arrived = 0;  // over all runs

// Each block writes, arrives, waits for all, and reads what another has written.
__global__ void arrivals_kernel(int* data, int* out, unsigned all) {
  const int t = threadIdx.x, threads = blockDim.x;
  data[blockIdx.x * threads + t] = int(blockIdx.x) * threads + t;
  __syncthreads();
  if (t == 0) {
    ptx::arrive(&arrived);
    while (ptx::arrivals(&arrived) < all) {
    }
  }
  __syncthreads();
  out[blockIdx.x * threads + t] = data[(blockIdx.x + 1) % gridDim.x * threads + threads - 1 - t];
}

inline double arrivals_case() {
  constexpr int blocks = 8, threads = 64, runs = 4;
  static unsigned before = 0;
  int wrong = 0;
  for (int run = 0; run < runs; ++run) {
    Pinned<int> data(blocks * threads), out(blocks * threads);
    run_probe(arrivals_kernel, blocks, threads, data.data, out.data, before += blocks);
    for (int b = 0; b < blocks; ++b) {
      for (int t = 0; t < threads; ++t) wrong += out[b * threads + t] != (b + 1) % blocks * threads + threads - 1 - t;
    }
  }
  return wrong * 10.;
}

// ---- Values ---------------------------------------------------------------------------------------------------------

static __global__ void exp2_kernel(const float* in, float* out, int* same, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    out[i] = ptx::exp2(in[i]);
    same[i] = ptx::anew(i);
  }
}

inline double exp2_case() {
  constexpr int count = 4096;
  Pinned<float> in(count), out(count);
  Pinned<int> same(count);
  std::mt19937 generator(4);
  for (int i = 0; i < count; ++i) in[i] = std::uniform_real_distribution<float>(-160, 130)(generator);
  const float special[] = {0, -INFINITY, INFINITY, NAN, -126, 127};
  for (int i = 0; i < 6; ++i) in[i] = special[i];
  run_probe(exp2_kernel, 1, 64, in.data, out.data, same.data, count);
  double worst = 0;
  for (int i = 0; i < count; ++i) {
    const double exact = std::exp2(double(in[i])), got = out[i];
    if (same[i] != i) return 10;
    if (std::isnan(exact) != std::isnan(got)) return 10;
    if (std::isnan(exact) || (exact > 3.4e38 && std::isinf(got)) || (exact < 0x1.00001p-126 && got == 0)) continue;
    worst = std::max(worst, std::fabs(got / exact - 1) * 0x1p22);  // 2 units in the last place
  }
  return worst;
}

inline const Case ptx_cases[] = {
    {"mma bf16", mma_case<bfloat16, true>},
    {"mma f16", mma_case<float16, true>},
    {"mma tf32", mma_case<float, true>},
    {"mma bf16 reals", mma_case<bfloat16, false>},
    {"mma f16 reals", mma_case<float16, false>},
    {"mma tf32 reals", mma_case<float, false>},
    {"tf32 rounding", tf32_rounding_case},
    {"exp2, anew", exp2_case},
    {"ldmatrix x1", ldmatrix_case<1, false>},
    {"ldmatrix x2", ldmatrix_case<2, false>},
    {"ldmatrix x4", ldmatrix_case<4, false>},
    {"ldmatrix x1.trans", ldmatrix_case<1, true>},
    {"ldmatrix x2.trans", ldmatrix_case<2, true>},
    {"ldmatrix x4.trans", ldmatrix_case<4, true>},
    {"cp.async", cp_async_case},
    {"shuffles, votes", votes_case},
    {"arrivals", arrivals_case},
};

}  // namespace zoo
