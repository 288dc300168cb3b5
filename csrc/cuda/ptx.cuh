// Every inline PTX instruction that kernels use, one function each, beside its emulation twin.
#pragma once
#include "common.cuh"

namespace fastdl::cuda::ptx {

#ifndef FDL_EMULATE

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory in the background: the first source_bytes, then zeros.
__device__ __forceinline__ void cp_async16(void* destination, const void* source, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(destination)),
               "l"(__cvta_generic_to_global(source)), "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all of this thread's groups but the newest `pending`.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

#define FDL_LDMATRIX(form, text, ...) \
  asm volatile("ldmatrix.sync.aligned.m8n8." form ".shared.b16 " text "\n" : __VA_ARGS__ : "r"(address) : "memory")

// Loads `count` 8x8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i (16 bytes,
// aligned). Register i of lane l gets elements (l / 4, l % 4 * 2) and the next of matrix i, or of its transpose.
template <int count, bool transposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[count], const void* row) {
  static_assert(count == 1 || count == 2 || count == 4);
  const uint32_t address = shared_address(row);
  if constexpr (count == 1 && !transposed) FDL_LDMATRIX("x1", "{%0}, [%1];", "=r"(r[0]));
  if constexpr (count == 1 && transposed) FDL_LDMATRIX("x1.trans", "{%0}, [%1];", "=r"(r[0]));
  if constexpr (count == 2 && !transposed) FDL_LDMATRIX("x2", "{%0,%1}, [%2];", "=r"(r[0]), "=r"(r[1]));
  if constexpr (count == 2 && transposed) FDL_LDMATRIX("x2.trans", "{%0,%1}, [%2];", "=r"(r[0]), "=r"(r[1]));
  if constexpr (count == 4 && !transposed) {
    FDL_LDMATRIX("x4", "{%0,%1,%2,%3}, [%4];", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]));
  }
  if constexpr (count == 4 && transposed) {
    FDL_LDMATRIX("x4.trans", "{%0,%1,%2,%3}, [%4];", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]));
  }
}
#undef FDL_LDMATRIX

#define FDL_MMA(shape, types)                                   \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types  \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
               "{%0,%1,%2,%3};\n"                               \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// d (16 x 8) += A (16 x 16) * B (16 x 8) for bfloat16 or float16; with T = float A is 16 x 8, B 8 x 8, both rounded to
// tf32 by the caller.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) FDL_MMA("m16n8k16", "bf16.bf16");
  if constexpr (std::is_same_v<T, float16>) FDL_MMA("m16n8k16", "f16.f16");
  if constexpr (std::is_same_v<T, float>) FDL_MMA("m16n8k8", "tf32.tf32");
}
#undef FDL_MMA

// Rounds to the nearest tf32, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(result) : "f"(value));
  return result;
}

// 2^x to 2 units in the last place; 0 below 2^-126.
__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// The same value, of which the compiler knows nothing: else it keeps what follows from it in registers, all through a
// loop of which few passes need it.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Counts an arrival: shows what this thread, and by a barrier before its block, has written to whoever sees the count.
__device__ __forceinline__ void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}

__device__ __forceinline__ unsigned arrivals(const unsigned* counter) {
  unsigned count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n"
               : "=r"(count)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return count;
}

#else

inline void cp_async16(void* destination, const void* source, int source_bytes, EMU_SITE) {
  emu::cp_async16(destination, source, source_bytes, site);
}

inline void cp_async_commit() { emu::cp_async_commit(); }

template <int pending>
inline void cp_async_wait() {
  emu::cp_async_wait(pending);
}

template <int count, bool transposed = false>
inline void ldmatrix(uint32_t (&r)[count], const void* row, EMU_SITE) {
  static_assert(count == 1 || count == 2 || count == 4);
  emu::ldmatrix(r, count, transposed, row, site);
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_SITE) {
  constexpr auto type = std::is_same_v<T, bfloat16>  ? emu::Mma::bf16
                        : std::is_same_v<T, float16> ? emu::Mma::f16
                                                     : emu::Mma::tf32;
  emu::mma(d, a, b, type, site);
}

inline uint32_t to_tf32(float value) { return (__float_as_uint(value) + 0x1000u) & ~0x1fffu; }

inline float exp2(float x) {
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0 : result;
}

inline int anew(int value) { return value; }

inline void arrive(unsigned* counter) {
  emu::yield();
  __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE);
}

inline unsigned arrivals(const unsigned* counter) {
  emu::yield();
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

#endif

}  // namespace fastdl::cuda::ptx
