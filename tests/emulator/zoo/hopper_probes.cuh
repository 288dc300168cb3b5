// Probe kernels that pin down every Hopper twin against plain host arithmetic. The emulator's tests run them on every
// build; confirm_sm90.cu runs the same cases on a GPU once: a case that passes in both confirms the twin, exactly
// (integer data).
#pragma once
#include <cstdio>
#include <cstring>
#include <vector>

#include "sm90.cuh"
#include "zoo.h"
namespace zoo {
using namespace fastdl::cuda;
using namespace sm90;
inline void sync_ok() {
#ifndef FDL_EMULATE
  cudaError_t e = cudaGetLastError();
  if (e == cudaSuccess) e = cudaDeviceSynchronize();
  if (e != cudaSuccess) throw std::runtime_error(cudaGetErrorString(e));
#endif
}
template <class T>
struct Dev {  // memory that host and device both see
  size_t n;
  T* p;
  explicit Dev(size_t n_) : n(n_) {
#ifdef FDL_EMULATE
    void* q;
    if (posix_memalign(&q, 128, n * sizeof(T))) abort();
    p = static_cast<T*>(q);
#else
    if (cudaMallocManaged(&p, n * sizeof(T)) != cudaSuccess) throw std::runtime_error("cudaMallocManaged");
#endif
    memset(static_cast<void*>(p), 0xff, n * sizeof(T));
  }
  ~Dev() {
#ifdef FDL_EMULATE
    free(p);
#else
    cudaFree(p);
#endif
  }
  T& operator[](size_t i) { return p[i]; }
};
template <class T>
T small(int i) {
  return T(float((i * 7 + i / 5 * 3) % 9 - 4));
}  // integers: every sum is exact

// ---- wgmma: operands written by plain stores through swizzle128(), so this does not depend on TMA
enum { SS, RS, SS_MN };
template <typename T, int N, int MODE>
__global__ void __launch_bounds__(128) wgmma_probe(const T* A, const T* B, float* D) {
#if defined(FDL_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FDL_DYN_SHARED_ALIGNED(1024, unsigned char, s, 8192 + N * 128);
  const int t = threadIdx.x, l = t & 31, w = t / 32;
  auto put = [&](unsigned char* base, int r, int k, T v) {
    *reinterpret_cast<T*>(base + (MODE == SS_MN ? r / 64 * 8192 + swizzle128(k, r % 64 * 2) : swizzle128(r, k * 2))) =
        v;
  };
  for (int i = t; i < 64 * 64; i += 128) put(s, i / 64, i % 64, A[i]);
  for (int i = t; i < N * 64; i += 128) put(s + 8192, i / 64, i % 64, B[i]);
  if (!BUG("wgmma operand not fenced")) fence_proxy_async_shared();
  __syncthreads();
  const uint64_t a = descriptor(shared_address(s), MODE == SS_MN ? 8192 : 16),
                 b = descriptor(shared_address(s) + 8192, MODE == SS_MN ? 8192 : 16);
  float d[N / 2];
  uint32_t ar[4][4];
  for (int i = 0; i < N / 2; ++i) d[i] = 3.f;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    for (int r = 0; r < 4; ++r)
      ar[k][r] = *reinterpret_cast<const uint32_t*>(
          &A[(w * 16 + l / 4 + (r & 1) * 8) * 64 + k * 16 + l % 4 * 2 + (r >> 1) * 8]);
  wgmma_fence(d);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (MODE == SS) wgmma<T, N>(d, a + 2 * k, b + 2 * k, k > 0);  // the first one ignores d
    if constexpr (MODE == RS) wgmma<T, N>(d, ar[k], b + 2 * k, 1);
    if constexpr (MODE == SS_MN) wgmma<T, N, 1, 1>(d, a + 128 * k, b + 128 * k, 1);  // 16 K lines of 128 bytes
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int i = 0; i < N / 2; ++i) D[(w * 16 + (i >> 1 & 1) * 8 + l / 4) * N + i / 4 * 8 + l % 4 * 2 + (i & 1)] = d[i];
#endif
}
template <typename T, int N, int MODE>
double wgmma_case() {
  Dev<T> A(4096), B(64u * N);
  Dev<float> D(64u * N);
  for (int i = 0; i < 64 * 64; ++i) A[i] = small<T>(i);
  for (int i = 0; i < N * 64; ++i) B[i] = small<T>(i + 11);
  launch(wgmma_probe<T, N, MODE>, Shape(dim3(1), dim3(128), size_t(8192 + N * 128), nullptr), A.p, B.p, D.p);
  sync_ok();
  int bad = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < N; ++n) {
      float r = MODE == SS ? 0.f : 3.f;
      for (int k = 0; k < 64; ++k) r += float(A[m * 64 + k]) * float(B[n * 64 + k]);
      bad += r != D[size_t(m) * N + n];
    }
  return bad * 10.;
}

// ---- TMA: the raw image of a loaded box, out-of-bounds fill at both ends, and a clipped store
struct Box {
  int rank;
  int c[3], to[3];
};
template <int RANK>
__global__ void tma_probe(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap out,
                          uint32_t* image, int bytes, Box b) {
#if defined(FDL_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FDL_DYN_SHARED_ALIGNED(1024, unsigned char, s, 1);
  FDL_SHARED_ALIGNED(8, Mbarrier, bar, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    mbarrier_init_fence();
    if constexpr (RANK == 2)
      tma_load_2d(s, &in, bar, b.c[0], b.c[1]);
    else
      tma_load_3d(s, &in, bar, b.c[0], b.c[1], b.c[2]);  // load before expect: also legal
    mbarrier_arrive_expect(bar, unsigned(bytes));
  }
  __syncthreads();
  mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) image[i] = reinterpret_cast<uint32_t*>(s)[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (RANK == 2)
      tma_store_2d(&out, s, b.to[0], b.to[1]);
    else
      tma_store_3d(&out, s, b.to[0], b.to[1], b.to[2]);
    bulk_commit();
    bulk_wait<0>();
  }
#endif
}
template <int RANK, bool SW>
double tma_case() {
  const int X = 100, Y = 21, Z = RANK == 3 ? 3 : 1, LX = 104, BX = SW ? 64 : 24, BY = 12, BZ = RANK == 3 ? 2 : 1,
            bytes = BX * BY * BZ * 2;
  int bad = 0;
  for (Box b :
       {Box{RANK, {64, 16, 2}, {56, 12, 2}}, Box{RANK, {-8, -3, -1}, {-16, -2, -1}}, Box{RANK, {0, 0, 0}, {0, 5, 1}}}) {
    Dev<bfloat16> in(size_t(LX) * Y * Z), out(size_t(LX) * Y * Z);
    Dev<uint32_t> img(size_t(bytes) / 4);
    for (size_t i = 0; i < in.n; ++i) in[i] = __float2bfloat16(float(i % 251 + 1));
    memset(static_cast<void*>(out.p), 0, out.n * 2);
    CUtensorMap mi, mo;
    if constexpr (RANK == 2) {
      uint32_t box[2] = {uint32_t(BX), uint32_t(BY)};
      mi = tensor_map<bfloat16, 2>(in.p, {X, uint64_t(Y)}, {LX}, box, SW);
      mo = tensor_map<bfloat16, 2>(out.p, {X, uint64_t(Y)}, {LX}, box, SW);
    } else {
      uint32_t box[3] = {uint32_t(BX), uint32_t(BY), uint32_t(BZ)};
      mi = tensor_map<bfloat16, 3>(in.p, {X, uint64_t(Y), uint64_t(Z)}, {LX, uint64_t(LX * Y)}, box, SW);
      mo = tensor_map<bfloat16, 3>(out.p, {X, uint64_t(Y), uint64_t(Z)}, {LX, uint64_t(LX * Y)}, box, SW);
    }
    launch(tma_probe<RANK>, Shape(dim3(1), dim3(32), size_t(bytes), nullptr), mi, mo, img.p, bytes, b);
    sync_ok();
    const bfloat16* im = reinterpret_cast<const bfloat16*>(img.p);
    std::vector<float> want(out.n, 0.f);
    for (int z = 0; z < BZ; ++z)
      for (int y = 0; y < BY; ++y)
        for (int x = 0; x < BX; ++x) {
          auto inside = [&](const int* c) {
            return c[0] + x >= 0 && c[0] + x < X && c[1] + y >= 0 && c[1] + y < Y &&
                   (RANK == 2 || (c[2] + z >= 0 && c[2] + z < Z));
          };
          auto at = [&](const int* c) {
            return (size_t(RANK == 3 ? c[2] + z : 0) * Y + size_t(c[1] + y)) * LX + size_t(c[0] + x);
          };
          float v = inside(b.c) ? float(in[at(b.c)]) : 0.f;
          int o = ((z * BY + y) * BX + x) * 2;
          if (SW) o ^= (o >> 7 & 7) << 4;
          bad += float(im[o / 2]) != v;
          if (inside(b.to)) want[at(b.to)] = v;
        }
    for (size_t i = 0; i < out.n; ++i) bad += float(out[i]) != want[i];
  }
  return bad * 10.;
}

// ---- mbarrier: phase parity, arrival count, transaction bytes; named barrier with bar.arrive
__global__ void mbar_probe(int* out) {
#if defined(FDL_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FDL_SHARED_ALIGNED(8, Mbarrier, bar, [1]);
  FDL_SHARED(int, x, [1]);
  if (threadIdx.x == 0) {
    int n = 0;
    auto state = [&] { out[n++] = mbarrier_test(bar, 0) * 2 + mbarrier_test(bar, 1); };
    mbarrier_init(bar, 2);
    mbarrier_init_fence();
    state();  // 1: "phase -1" counts as complete
    mbarrier_arrive(bar);
    state();  // 1
    mbarrier_arrive(bar);
    state();  // 2: phase 0 complete
    mbarrier_arrive(bar);
    mbarrier_arrive(bar);
    state();  // 1: phase 1 complete
    x[0] = 41;
  }
  if (threadIdx.x < 32)
    barrier_arrive(3, 64);
  else {
    barrier_sync(3, 64);
    if (threadIdx.x == 32) out[4] = x[0] + 1;
  }
#endif
}
inline double mbar_case() {
  Dev<int> o(5);
  launch(mbar_probe, Shape(dim3(1), dim3(64), 0, nullptr), o.p);
  sync_ok();
  const int want[5] = {1, 1, 2, 1, 42};
  int bad = 0;
  for (int i = 0; i < 5; ++i) bad += o[i] != want[i];
  return bad * 10.;
}

// ---- clusters: st.async + remote mbarrier, remote arrive, DSMEM read through mapa, multicast TMA
__global__ void __launch_bounds__(32) cluster_probe(const __grid_constant__ CUtensorMap in, uint32_t* out) {
#if defined(FDL_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FDL_SHARED_ALIGNED(1024, unsigned char, tile, [1024]);
  FDL_SHARED_ALIGNED(16, uint32_t, got, [32]);
  FDL_SHARED_ALIGNED(16, uint32_t, mine, [32]);
  FDL_SHARED_ALIGNED(8, Mbarrier, bar, [3]);
  const unsigned me = cluster_rank(), peer = me ^ 1, t = threadIdx.x;
  if (t == 0) {
    for (int i = 0; i < 3; ++i) mbarrier_init(&bar[i], 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(&bar[0], BUG("too few cluster bytes") ? 124 : 128);
    mbarrier_arrive_expect(&bar[2], 1024);
  }
  mine[t] = 1000 * me + t;
  if (!BUG("no cluster sync after init")) cluster_sync();
  store_async(&got[t], peer, 100 * me + t, &bar[0]);
  if (t == 0) mbarrier_arrive_peer(&bar[1], peer);
  if (t == 0 && me == 0) tma_load_2d_multicast(tile, &in, &bar[2], 0, 0, 3);
  mbarrier_wait_cluster(&bar[0], 0);
  mbarrier_wait_cluster(&bar[1], 0);
  mbarrier_wait(&bar[2], 0);
  uint32_t* o = out + blockIdx.x * 96;
  o[t] = got[t];
  o[32 + t] = *peer_address(&mine[t], peer);
  o[64 + t] = reinterpret_cast<uint32_t*>(tile)[t * 8];
  if (!BUG("no cluster sync at exit")) cluster_sync();  // nobody exits while a peer may still read its shared memory
#endif
}
inline double cluster_case() {
  Dev<bfloat16> in(512);
  Dev<uint32_t> o(4 * 96);
  int bad = 0;
  for (int i = 0; i < 512; ++i) in[i] = __float2bfloat16(float(i % 256));
  Shape shape(dim3(4), dim3(32), 0, nullptr);
  shape.cluster = dim3(2);
  launch(cluster_probe, shape, tensor_map<bfloat16, 2>(in.p, {64, 8}, {64}, {64, 8}), o.p);
  sync_ok();
  for (unsigned b = 0; b < 4; ++b)
    for (unsigned t = 0; t < 32; ++t) {
      unsigned p = (b & 1) ^ 1, off = t * 32, src = off ^ (off >> 7 & 7) << 4;
      uint32_t v;
      memcpy(&v, reinterpret_cast<char*>(in.p) + src, 4);
      bad += o[b * 96 + t] != 100 * p + t;
      bad += o[b * 96 + 32 + t] != 1000 * p + t;
      bad += o[b * 96 + 64 + t] != v;
    }
  return bad * 10.;
}
// ---- stmatrix: the element that lane l of a warp holds in register i goes to matrix i, row l / 4, column l % 4 * 2
__global__ void stmatrix_probe(uint32_t* out) {
#if defined(FDL_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  FDL_SHARED_ALIGNED(16, uint32_t, rows, [32][4]);
  const unsigned lane = threadIdx.x;
  uint32_t registers[4];
  for (unsigned i = 0; i < 4; ++i) registers[i] = 100 * i + lane;
  stmatrix(rows[31 - lane], registers);  // row r of matrix i at row 31 - (8 i + r) of the array
  if (!BUG("no __syncwarp after stmatrix")) __syncwarp();
  for (unsigned i = 0; i < 4; ++i) out[lane * 4 + i] = rows[lane][i];
#endif
}
inline double stmatrix_case() {
  Dev<uint32_t> out(128);
  launch(stmatrix_probe, Shape(dim3(1), dim3(32), 0, nullptr), out.p);
  sync_ok();
  int bad = 0;
  for (unsigned row = 0; row < 32; ++row)
    for (unsigned i = 0; i < 4; ++i) bad += out[(31 - row) * 4 + i] != 100 * (row / 8) + row % 8 * 4 + i;
  return bad * 10.;
}
struct Confirm {
  const char* name;
  double (*f)();
};
inline const Confirm confirm_cases[] = {{"mbarrier, bar.arrive", mbar_case},
                                        {"tma 2d swizzled", tma_case<2, true>},
                                        {"tma 2d plain", tma_case<2, false>},
                                        {"tma 3d swizzled", tma_case<3, true>},
                                        {"tma 3d plain", tma_case<3, false>},
                                        {"wgmma bf16 n64 ss", wgmma_case<bfloat16, 64, SS>},
                                        {"wgmma bf16 n128 ss", wgmma_case<bfloat16, 128, SS>},
                                        {"wgmma bf16 n256 ss", wgmma_case<bfloat16, 256, SS>},
                                        {"wgmma f16 n64 ss", wgmma_case<float16, 64, SS>},
                                        {"wgmma bf16 n64 rs", wgmma_case<bfloat16, 64, RS>},
                                        {"wgmma f16 n128 rs", wgmma_case<float16, 128, RS>},
                                        {"wgmma bf16 n128 mn-major", wgmma_case<bfloat16, 128, SS_MN>},
                                        {"wgmma f16 n256 mn-major", wgmma_case<float16, 256, SS_MN>},
                                        {"stmatrix", stmatrix_case},
                                        {"cluster, dsmem, multicast", cluster_case}};
}  // namespace zoo
