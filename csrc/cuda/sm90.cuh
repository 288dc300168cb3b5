// Hopper (sm_90a) instructions, one function each, beside their emulation twins: mbarriers, TMA, wgmma, named barriers,
// clusters; and the tensor maps that TMA reads. Terms: a block's peers are the other blocks of its cluster; an
// mbarrier's phases alternate in parity, the first has parity 0, and the one before it counts as complete.
#pragma once
#include <cuda.h>  // CUtensorMap and enums only: libcuda is never linked

#include "common.cuh"

namespace fastdl::cuda::sm90 {

using Mbarrier = uint64_t;

// wgmma's descriptor of an operand in shared memory with 128-byte swizzle, made of 1024-byte aligned lines of 64 16-bit
// elements. K-major: a line is a row, the next 16 of K are +2 (32 bytes). M/N-major: a line is one k, the next 16 of K
// are +128, and the next 64 rows are `block_bytes` away.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t block_bytes = 16,
                                               uint32_t group_bytes = 1024) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(block_bytes >> 4) << 16 | uint64_t(group_bytes >> 4) << 32 |
         uint64_t(1) << 62;
}

// Where TMA with 128-byte swizzle puts byte `column` (< 128) of a row in a 1024-byte aligned tile of 128-byte rows.
__device__ __forceinline__ int swizzle128(int row, int column) { return row * 128 + (column ^ (row & 7) << 4); }

#ifndef FDL_EMULATE

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// True in one lane of a converged warp. The compiler knows that it is one, unlike with lane == 0.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected;
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Shows this thread's new mbarriers to TMA and to the cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase wait for that many bytes of TMA loads.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives at a block's mbarrier of the same name.
__device__ __forceinline__ void mbarrier_arrive_peer(Mbarrier* barrier, unsigned rank) {
  asm volatile(
      "{\n.reg .b32 r;\nmapa.shared::cluster.u32 r, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits for the completion of the phase of this parity, which must be the current one or the one before.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}

// The same where peers arrive.
__device__ __forceinline__ void mbarrier_wait_cluster(Mbarrier* barrier, unsigned parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// Whether that phase has completed.
__device__ __forceinline__ bool mbarrier_test(Mbarrier* barrier, unsigned parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done;
}

// ---- TMA ------------------------------------------------------------------------------------------------------------

// Shows this thread's plain writes to TMA and wgmma: to shared memory, or anywhere, which costs a GPU-wide fence.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;\n" ::: "memory"); }

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Loads the map's box at the given coordinates, innermost first; its bytes count towards the mbarrier.
__device__ __forceinline__ void tma_load_2d(void* destination, const CUtensorMap* map, Mbarrier* barrier, int x,
                                            int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
          shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* destination, const CUtensorMap* map, Mbarrier* barrier, int x, int y,
                                            int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];\n" ::
          "r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Loads it to the same place in every block of the mask, and counts its bytes there.
__device__ __forceinline__ void tma_load_2d_multicast(void* destination, const CUtensorMap* map, Mbarrier* barrier,
                                                      int x, int y, unsigned rank_mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;\n" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(static_cast<unsigned short>(rank_mask))
      : "memory");
}

__device__ __forceinline__ void tma_store_2d(const CUtensorMap* map, const void* source, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(map),
               "r"(shared_address(source)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tma_store_3d(const CUtensorMap* map, const void* source, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];\n" ::"l"(map),
               "r"(shared_address(source)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Groups of this thread's stores: wait until all but the newest `pending` have been read, or written.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(pending) : "memory");
}
template <int pending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(pending) : "memory");
}

// ---- Warps and warpgroups -------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Sets the registers that each thread of this warpgroup has.
template <int count>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(count));
}

// Stores four 8x8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i (16 bytes, aligned).
// Register i of lane l holds elements (l / 4, l % 4 * 2) and the next of matrix i.
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

// Makes the compiler set these registers before here, and read them after: it does not know when wgmma changes them.
template <int count>
__device__ __forceinline__ void pin(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int blocks, int count>
__device__ __forceinline__ void pin(float (&d)[blocks][count]) {
#pragma unroll
  for (int i = 0; i < blocks; ++i) pin(d[i]);
}

// Between plain accesses to accumulators and a wgmma on them.
template <class Accumulators>
__device__ __forceinline__ void wgmma_fence(Accumulators& d) {
  pin(d);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits for all of this warpgroup's groups but the newest `pending`.
template <int pending, class Accumulators>
__device__ __forceinline__ void wgmma_wait(Accumulators& d) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
  pin(d);
}

#define FDL_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define FDL_THIRTY "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," FDL_TEN(1) FDL_TEN(2)
#define FDL_SIXTY FDL_THIRTY FDL_TEN(3) FDL_TEN(4) FDL_TEN(5)
#define FDL_NAMES64 FDL_THIRTY "%30,%31"
#define FDL_NAMES128 FDL_SIXTY "%60,%61,%62,%63"
#define FDL_NAMES256 \
  FDL_SIXTY FDL_TEN(6) FDL_TEN(7) FDL_TEN(8) FDL_TEN(9) FDL_TEN(10) FDL_TEN(11) "%120" \
                                                                                ",%121,%122,%123,%124,%125,%126,%127"
#define FDL_EIGHT(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FDL_VALUES64 FDL_EIGHT(0), FDL_EIGHT(8), FDL_EIGHT(16), FDL_EIGHT(24)
#define FDL_VALUES128 FDL_VALUES64, FDL_EIGHT(32), FDL_EIGHT(40), FDL_EIGHT(48), FDL_EIGHT(56)
#define FDL_VALUES256                                                                                       \
  FDL_VALUES128, FDL_EIGHT(64), FDL_EIGHT(72), FDL_EIGHT(80), FDL_EIGHT(88), FDL_EIGHT(96), FDL_EIGHT(104), \
      FDL_EIGHT(112), FDL_EIGHT(120)
// a .. e, a .. g: numbers of the operands after the columns / 2 accumulators
#define FDL_WGMMA_SHARED(columns, type, a, b, c, d, e)                                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns              \
               "k16.f32." type "." type " {" FDL_NAMES##columns "}, %" #a ", %" #b ", p, 1, 1, %" #d ", %" #e ";\n}\n" \
               : FDL_VALUES##columns                                                                                   \
               : "l"(left), "l"(right), "r"(accumulate), "n"(left_transposed), "n"(right_transposed))
#define FDL_WGMMA_REGISTERS(columns, type, a, b, c, d, e, f, g)                                                  \
  asm volatile(                                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #f ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type \
      "." type " {" FDL_NAMES##columns "}, {%" #a ",%" #b ",%" #c ",%" #d "}, %" #e ", p, 1, 1, %" #g ";\n}\n"   \
      : FDL_VALUES##columns                                                                                      \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(accumulate), "n"(right_transposed))
#define FDL_WGMMA(form, columns, ...)               \
  if constexpr (std::is_same_v<T, bfloat16>) {      \
    FDL_WGMMA_##form(columns, "bf16", __VA_ARGS__); \
  } else {                                          \
    static_assert(std::is_same_v<T, float16>);      \
    FDL_WGMMA_##form(columns, "f16", __VA_ARGS__);  \
  }

// d (64 x columns) = (accumulate ? d : 0) + left (64 x 16) * right (16 x columns), by a warpgroup, in the background. d
// may not be touched until it has been waited for. Transposed: the operand is M/N-major, not K-major. Element i of d is
// at row threadIdx.x % 128 / 32 * 16 + i / 2 % 2 * 8 + lane / 4, column i / 4 * 8 + lane % 4 * 2 + i % 2.
template <class T, int columns, bool left_transposed = false, bool right_transposed = false>
__device__ __forceinline__ void wgmma(float (&d)[columns / 2], uint64_t left, uint64_t right, int accumulate) {
  static_assert(columns == 64 || columns == 128 || columns == 256);
  if constexpr (columns == 64) FDL_WGMMA(SHARED, 64, 32, 33, 34, 35, 36)
  if constexpr (columns == 128) FDL_WGMMA(SHARED, 128, 64, 65, 66, 67, 68)
  if constexpr (columns == 256) FDL_WGMMA(SHARED, 256, 128, 129, 130, 131, 132)
}
// The same with the left operand in registers, laid out as mma.sync's.
template <class T, int columns, bool right_transposed = false>
__device__ __forceinline__ void wgmma(float (&d)[columns / 2], const uint32_t (&left)[4], uint64_t right,
                                      int accumulate) {
  static_assert(columns == 64 || columns == 128 || columns == 256);
  if constexpr (columns == 64) FDL_WGMMA(REGISTERS, 64, 32, 33, 34, 35, 36, 37, 38)
  if constexpr (columns == 128) FDL_WGMMA(REGISTERS, 128, 64, 65, 66, 67, 68, 69, 70)
  if constexpr (columns == 256) FDL_WGMMA(REGISTERS, 256, 128, 129, 130, 131, 132, 133, 134)
}
#undef FDL_TEN
#undef FDL_THIRTY
#undef FDL_SIXTY
#undef FDL_NAMES64
#undef FDL_NAMES128
#undef FDL_NAMES256
#undef FDL_EIGHT
#undef FDL_VALUES64
#undef FDL_VALUES128
#undef FDL_VALUES256
#undef FDL_WGMMA_SHARED
#undef FDL_WGMMA_REGISTERS
#undef FDL_WGMMA

// ---- Clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// A block's variable of the same name.
template <class T>
__device__ __forceinline__ T* peer_address(T* pointer, unsigned rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;\n" : "=l"(address) : "l"(pointer), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// Stores to a block's variable in the background; the bytes count towards its mbarrier. Both are given by own
// addresses.
__device__ __forceinline__ void store_async(uint32_t* pointer, unsigned rank, uint32_t value, Mbarrier* barrier) {
  asm volatile(
      "{\n.reg .b32 r, s;\nmapa.shared::cluster.u32 r, %0, %3;\nmapa.shared::cluster.u32 s, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [r], %1, [s];\n}\n" ::"r"(shared_address(pointer)),
      "r"(value), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

#else

inline uint32_t shared_address(const void* pointer) { return emu::shared_addr(pointer); }
inline bool elect_one(EMU_SITE) {
  emu::ballot(~0u, true, site);
  return emu::self->lane == 0;
}

inline void mbarrier_init(Mbarrier* barrier, unsigned arrivals, EMU_SITE) { emu::mbar_init(barrier, arrivals, site); }
inline void mbarrier_init_fence() { emu::mbar_init_fence(); }
inline void mbarrier_arrive(Mbarrier* barrier, EMU_SITE) { emu::mbar_arrive(barrier, 0, true, site); }
inline void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes, EMU_SITE) {
  emu::mbar_arrive(barrier, bytes, true, site);
}
inline void mbarrier_arrive_peer(Mbarrier* barrier, unsigned rank, EMU_SITE) {
  emu::mbar_arrive(emu::mapa(barrier, rank, site), 0, true, site);
}
inline void mbarrier_wait(Mbarrier* barrier, unsigned parity, EMU_SITE) { emu::mbar_wait(barrier, parity, true, site); }
inline void mbarrier_wait_cluster(Mbarrier* barrier, unsigned parity, EMU_SITE) {
  emu::mbar_wait(barrier, parity, true, site);
}
inline bool mbarrier_test(Mbarrier* barrier, unsigned parity, EMU_SITE) {
  return emu::mbar_wait(barrier, parity, false, site);
}

inline void fence_proxy_async_shared() { emu::fence_proxy_async(false); }
inline void fence_proxy_async() { emu::fence_proxy_async(true); }
inline void tma_prefetch(const CUtensorMap*) {}
inline void tma_load_2d(void* destination, const CUtensorMap* map, Mbarrier* barrier, int x, int y, EMU_SITE) {
  const int at[] = {x, y};
  emu::tma_load(destination, map, barrier, at, 2, 0, site);
}
inline void tma_load_3d(void* destination, const CUtensorMap* map, Mbarrier* barrier, int x, int y, int z, EMU_SITE) {
  const int at[] = {x, y, z};
  emu::tma_load(destination, map, barrier, at, 3, 0, site);
}
inline void tma_load_2d_multicast(void* destination, const CUtensorMap* map, Mbarrier* barrier, int x, int y,
                                  unsigned rank_mask, EMU_SITE) {
  const int at[] = {x, y};
  emu::tma_load(destination, map, barrier, at, 2, rank_mask, site);
}
inline void tma_store_2d(const CUtensorMap* map, const void* source, int x, int y, EMU_SITE) {
  const int at[] = {x, y};
  emu::tma_store(map, source, at, 2, site);
}
inline void tma_store_3d(const CUtensorMap* map, const void* source, int x, int y, int z, EMU_SITE) {
  const int at[] = {x, y, z};
  emu::tma_store(map, source, at, 3, site);
}
inline void bulk_commit() { emu::bulk_commit(); }
template <int pending>
inline void bulk_wait_read() {
  emu::bulk_wait(pending, true);
}
template <int pending>
inline void bulk_wait() {
  emu::bulk_wait(pending, false);
}

inline void barrier_sync(int id, int threads, EMU_SITE) { emu::barrier(id, threads, site); }
inline void barrier_arrive(int id, int threads, EMU_SITE) { emu::barrier_arrive(id, threads, site); }
template <int count>
inline void registers_increase() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
}
template <int count>
inline void registers_decrease() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
}
inline void stmatrix(void* row, const uint32_t (&r)[4], EMU_SITE) {
  if (uintptr_t(row) & 15 || !emu::in_shared(row, 16)) {
    emu::fail("stmatrix at %s:%d: row %p is not 16 aligned bytes of shared memory", site.file_name(), int(site.line()),
              row);
  }
  for (int i = 0; i < 4; ++i) {
    void* target = row;
    emu::shuffle(~0u, 8 * i + int(emu::self->lane) / 4, &target, sizeof target, site);
    static_cast<uint32_t*>(target)[emu::self->lane % 4] = r[i];
  }
}

template <class Accumulators>
inline void wgmma_fence(Accumulators&) {
  emu::wgmma_fence();
}
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int pending, class Accumulators>
inline void wgmma_wait(Accumulators&, EMU_SITE) {
  emu::wgmma_wait(pending, site);
}
template <class T, int columns, bool left_transposed = false, bool right_transposed = false>
inline void wgmma(float (&d)[columns / 2], uint64_t left, uint64_t right, int accumulate, EMU_SITE) {
  constexpr bool is_bfloat16 = std::is_same_v<T, bfloat16>;
  emu::wgmma(d, columns, nullptr, left, right, accumulate, is_bfloat16, left_transposed, right_transposed, site);
}
template <class T, int columns, bool right_transposed = false>
inline void wgmma(float (&d)[columns / 2], const uint32_t (&left)[4], uint64_t right, int accumulate, EMU_SITE) {
  constexpr bool is_bfloat16 = std::is_same_v<T, bfloat16>;
  emu::wgmma(d, columns, left, 0, right, accumulate, is_bfloat16, false, right_transposed, site);
}

inline unsigned cluster_rank() { return emu::cluster_rank(); }
inline void cluster_sync(EMU_SITE) {
  emu::cluster_arrive(site);
  emu::cluster_wait(site);
}
template <class T>
inline T* peer_address(T* pointer, unsigned rank, EMU_SITE) {
  return static_cast<T*>(emu::mapa(pointer, rank, site));
}
inline void store_async(uint32_t* pointer, unsigned rank, uint32_t value, Mbarrier* barrier, EMU_SITE) {
  emu::st_async(emu::mapa(pointer, rank, site), &value, 4, emu::mapa(barrier, rank, site), site);
}

#endif

// ---- Host: tensor maps ----------------------------------------------------------------------------------------------

// An array as TMA sees it. extent and box: innermost first, in elements; stride: of the dimensions after the innermost,
// in elements. What is read outside is 0, what is written outside is dropped. Throws std::invalid_argument for what TMA
// can't address.
template <class T, int rank>
CUtensorMap tensor_map(const T* base, const uint64_t (&extent)[rank], const uint64_t (&stride)[rank - 1],
                       const uint32_t (&box)[rank], bool swizzled = true) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  constexpr const char* name = "tensor_map";
  require(aligned(16, base), name, "base", static_cast<const void*>(base), "16-byte aligned");
  uint64_t stride_bytes[rank - 1];
  for (int i = 0; i < rank; ++i) {
    require(extent[i] > 0 && extent[i] <= uint64_t(1) << 32, name, "extent", extent[i], "1 to 2^32");
    require(box[i] > 0 && box[i] <= 256, name, "box", box[i], "1 to 256");
  }
  for (int i = 0; i < rank - 1; ++i) {
    stride_bytes[i] = stride[i] * sizeof(T);
    require(stride_bytes[i] % 16 == 0 && stride_bytes[i] < uint64_t(1) << 40, name, "stride", stride[i],
            "a multiple of 16 bytes, below 2^40");
  }
  const uint64_t line = box[0] * sizeof(T);
  require(swizzled ? line == 128 : line % 16 == 0, name, "box[0]", box[0],
          swizzled ? "128 bytes, for the swizzle" : "a multiple of 16 bytes");
  CUtensorMap map;
#ifdef FDL_EMULATE
  emu::encode_tensor_map(&map, sizeof(T), rank, const_cast<T*>(base), extent, stride_bytes, box, swizzled);
#else
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;  // through the runtime: nothing links libcuda
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  cuuint64_t extents[rank], strides[rank - 1];
  cuuint32_t boxes[rank], steps[rank];
  for (int i = 0; i < rank; ++i) {
    extents[i] = extent[i];
    boxes[i] = box[i];
    steps[i] = 1;
    if (i) strides[i - 1] = stride_bytes[i - 1];
  }
  constexpr auto type =
      std::is_same_v<T, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status =
      encode(&map, type, rank, const_cast<T*>(base), extents, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(status)));
#endif
  return map;
}

}  // namespace fastdl::cuda::sm90
