// A CPU emulator of CUDA's execution model, for tests: what kernel code sees when a host compiler compiles it. Every
// CUDA thread of a block is a fiber. The runtime (cuda_emu.cpp) is never compiled with sanitizers; everything here,
// being part of the kernel, is.
#pragma once
#ifndef FDL_EMULATE
#error "cuda_emu.h is for the CPU emulation build only"
#endif
#include <cuda.h>  // CUtensorMap: types only, libcuda is not linked
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __noinline__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ EMU_ERROR_use_FDL_SHARED_instead_of___shared__

namespace emu {

struct Thread {
  uint3 threadIdx, blockIdx;
  dim3 blockDim, gridDim;
  unsigned lane;
};
extern Thread* self;  // the running CUDA thread: all fibers share one OS thread

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

enum class Schedule { forward, reverse, random };
enum class Async { early, late, random };  // when asynchronous operations complete: at issue, at the wait, or either

// What a run may vary. A correct kernel passes with every setting.
struct Config {
  Schedule schedule = Schedule::forward;
  Async async = Async::late;
  uint64_t seed = 1;
  int resident = 1;    // blocks that run at the same time; 0: all
  bool strict = true;  // also refuse what merely happens to work, such as one collective reached from two places
  bool proxy = true;   // under TSan, check fence.proxy.async too
  size_t shared_limit = 227 * 1024;
};
extern Config config;

struct Stats {
  uint64_t blocks, switches, collectives, barriers, mma, ldmatrix, ldmatrix_conflicts, cp_async, wgmma, tma_load,
      tma_store;
};
extern Stats stats;

using Site = std::source_location;  // file, line and column: two calls on one line stay distinct
#define EMU_SITE ::emu::Site site = ::emu::Site::current()

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void launch(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& body, dim3 cluster = dim3(1),
            bool cooperative = false);

// ---- Blocks and warps -----------------------------------------------------------------------------------------------
void barrier(int id, int threads, Site);         // threads 0: every live thread of the block
void barrier_arrive(int id, int threads, Site);  // without waiting
enum class Reduce { count, all, any };
int barrier_reduce(Reduce, int predicate, Site);
void syncwarp(unsigned mask, Site);
void shuffle(unsigned mask, int source_lane, void* value, unsigned bytes, Site);  // source_lane < 0: keep one's own
unsigned ballot(unsigned mask, bool predicate, Site);
unsigned match_any(unsigned mask, uint64_t value, Site);
unsigned active();  // lanes of this warp that have not exited
void yield();       // scheduling point: atomics, fences, __nanosleep
void fence();

// ---- Shared memory --------------------------------------------------------------------------------------------------
void* shared_array(const void* key, size_t bytes, size_t alignment);
void* dyn_shared(size_t alignment, size_t stated);
bool in_shared(const void* address, size_t bytes);
template <class T>
inline T* shared_ref(size_t alignment, const void* key) {
  return static_cast<T*>(shared_array(key, sizeof(T), alignment));
}

// ---- sm_80: cp.async, ldmatrix, mma ---------------------------------------------------------------------------------
struct Copy {
  void* destination;
  const void* source;
  int source_bytes;  // of 16; the rest is filled with zeros
};
bool cp_async_defer(const Copy&);  // false: complete it now
void cp_async_commit();
bool cp_async_take(int pending, Copy*);  // the next copy that must be complete
void ldmatrix_exchange(uint32_t* registers, int count, bool transposed, const void* row, const uint32_t (&data)[4],
                       Site);
enum class Mma { bf16, f16, tf32 };  // m16n8k16, m16n8k16, m16n8k8
void mma(float* d, const uint32_t* a, const uint32_t* b, Mma, Site);

// These touch memory, so they are instrumented: the accesses belong to the calling thread.
inline void complete(const Copy& copy) {
  auto* destination = static_cast<uint32_t*>(copy.destination);
  auto* source = static_cast<const uint32_t*>(copy.source);
  for (int i = 0; i < 4; ++i) {
    uint32_t word = 0;
    const int bytes = copy.source_bytes - i * 4;
    if (bytes >= 4) {
      word = source[i];
    } else if (bytes > 0) {
      memcpy(&word, source + i, size_t(bytes));
    }
    destination[i] = word;
  }
}

inline void cp_async16(void* destination, const void* source, int source_bytes, Site site) {
  if ((uintptr_t(destination) | uintptr_t(source)) & 15) {
    fail("cp.async at %s:%d: %p or %p is not 16-byte aligned", site.file_name(), int(site.line()), destination, source);
  }
  if (source_bytes < 0 || source_bytes > 16) {
    fail("cp.async at %s:%d: %d source bytes of 16", site.file_name(), int(site.line()), source_bytes);
  }
  if (!in_shared(destination, 16)) {
    fail("cp.async at %s:%d: %p is not in this block's shared memory", site.file_name(), int(site.line()), destination);
  }
  const Copy copy{destination, source, source_bytes};
  if (cp_async_defer(copy)) {
    for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(destination)[i] = ~0u;  // NaN until it is waited for
  } else {
    complete(copy);
  }
}

inline void cp_async_wait(int pending) {
  for (Copy copy; cp_async_take(pending, &copy);) complete(copy);
}

inline void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row, Site site) {
  uint32_t data[4] = {};
  if (int(self->lane) < 8 * count) {  // the other lanes' addresses are not used
    if (uintptr_t(row) & 15) {
      fail("ldmatrix at %s:%d: row %p is not 16-byte aligned", site.file_name(), int(site.line()), row);
    }
    if (!in_shared(row, 16)) {
      fail("ldmatrix at %s:%d: row %p is not in this block's shared memory", site.file_name(), int(site.line()), row);
    }
    for (int i = 0; i < 4; ++i) data[i] = static_cast<const uint32_t*>(row)[i];
  }
  ldmatrix_exchange(registers, count, transposed, row, data, site);
}

// ---- sm_90: mbarriers, TMA, wgmma, clusters (cuda_emu_sm90.inc) -----------------------------------------------------
uint32_t shared_addr(const void*);  // address in the 32-bit shared window
void encode_tensor_map(CUtensorMap*, int element_bytes, int rank, void* base, const uint64_t* extent,
                       const uint64_t* stride, const uint32_t* box, bool swizzle);
void mbar_init(void* bar, unsigned count, Site);
void mbar_init_fence();
void mbar_arrive(void* bar, unsigned expect_bytes, bool arrive, Site);
bool mbar_wait(void* bar, unsigned parity, bool block, Site);
void fence_proxy_async(bool global);
void tma_load(void* destination, const CUtensorMap*, void* bar, const int* at, int rank, unsigned cta_mask, Site);
void tma_store(const CUtensorMap*, const void* source, const int* at, int rank, Site);
void bulk_commit();
void bulk_wait(int pending, bool read_only);
void wgmma(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate, bool bf16,
           bool a_transposed, bool b_transposed, Site);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending, Site);
unsigned cluster_rank();
unsigned cluster_size();
void* mapa(const void* address, unsigned rank, Site);
void cluster_arrive(Site);
void cluster_wait(Site);
void st_async(void* destination, const void* value, unsigned bytes, void* bar, Site);

template <class T, class Function>
inline T atomic(T* address, Function function) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  static_assert(sizeof(T) == sizeof(Bits));
  yield();
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(bits, __ATOMIC_RELAXED), new_bits;
  T old_value;
  do {
    memcpy(static_cast<void*>(&old_value), &old_bits, sizeof old_bits);
    const T new_value = function(old_value);
    memcpy(&new_bits, &new_value, sizeof new_value);
  } while (!__atomic_compare_exchange_n(bits, &old_bits, new_bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old_value;
}

}  // namespace emu

// ---- What CUDA C++ declares -----------------------------------------------------------------------------------------
#define threadIdx (::emu::self->threadIdx)
#define blockIdx (::emu::self->blockIdx)
#define blockDim (::emu::self->blockDim)
#define gridDim (::emu::self->gridDim)
constexpr int warpSize = 32;

inline void __syncthreads(EMU_SITE) { emu::barrier(0, 0, site); }
inline int __syncthreads_count(int p, EMU_SITE) { return emu::barrier_reduce(emu::Reduce::count, p, site); }
inline int __syncthreads_and(int p, EMU_SITE) { return emu::barrier_reduce(emu::Reduce::all, p, site); }
inline int __syncthreads_or(int p, EMU_SITE) { return emu::barrier_reduce(emu::Reduce::any, p, site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE) { emu::syncwarp(mask, site); }
inline unsigned __activemask() { return emu::active(); }
inline unsigned __ballot_sync(unsigned mask, int p, EMU_SITE) { return emu::ballot(mask, p != 0, site); }
inline int __any_sync(unsigned mask, int p, EMU_SITE) { return emu::ballot(mask, p != 0, site) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_SITE) { return emu::ballot(mask, p == 0, site) == 0; }

template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, EMU_SITE) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return emu::match_any(mask, bits, site);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_SITE) {
  const int first = int(emu::self->lane) & ~(width - 1);
  emu::shuffle(mask, first + (source & (width - 1)), &value, sizeof value, site);
  return value;
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  const int lane = int(emu::self->lane), position = lane & (width - 1);
  emu::shuffle(mask, position >= int(delta) ? lane - int(delta) : -1, &value, sizeof value, site);
  return value;
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  const int lane = int(emu::self->lane), position = lane & (width - 1);
  emu::shuffle(mask, position + int(delta) < width ? lane + int(delta) : -1, &value, sizeof value, site);
  return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMU_SITE) {
  const int lane = int(emu::self->lane), source = lane ^ lane_mask, first = lane & ~(width - 1);
  emu::shuffle(mask, source < first + width ? source : -1, &value, sizeof value, site);
  return value;
}

inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() { emu::fence(); }
inline void __nanosleep(unsigned) { emu::yield(); }

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
inline void __stcg(T* p, T value) {
  *p = value;
}

template <class T>
inline T atomicAdd(T* p, std::type_identity_t<T> value) {
  return emu::atomic(p, [=](T old) { return T(old + value); });
}
template <class T>
inline T atomicMax(T* p, std::type_identity_t<T> value) {
  return emu::atomic(p, [=](T old) { return old > value ? old : value; });
}
template <class T>
inline T atomicMin(T* p, std::type_identity_t<T> value) {
  return emu::atomic(p, [=](T old) { return old < value ? old : value; });
}
template <class T>
inline T atomicExch(T* p, std::type_identity_t<T> value) {
  return emu::atomic(p, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return emu::atomic(p, [=](T old) { return old == compare ? value : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return emu::atomic(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// Device mathematics with no host declaration; <cmath> has expf, fmaxf, tanhf and the like.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f ? a * 0 : a / b; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
inline std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  return a < b ? b : a;
}
