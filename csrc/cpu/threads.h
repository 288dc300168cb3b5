// Teams of threads and their scratch memory.
#pragma once
#include <stdlib.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.h"

namespace fastdl::ISA {

// body(thread, team) on up to `threads` threads; a nested or limited region gives fewer, so work is shared out by
// `team`
template <class F>
INLINE void parallel(int64_t threads, F body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}
// all threads of a team wait for each other; a team of one inside a larger region must not
INLINE void barrier(int team) {
  if (team > 1) {
#pragma omp barrier
  }
}
// f(i) for this thread's contiguous share of [0, count)
template <class F>
INLINE void for_share(int64_t count, int thread, int team, F f) {
  for (int64_t i = count * thread / team; i < count * (thread + 1) / team; i++) f(i);
}

// One block a thread and slot (a type that names it), kept for the next call because fresh memory costs page faults.
// Kernels bound what they ask for by slicing their work, so what is kept is bounded too.
struct ScratchBlock {
  void* data = nullptr;
  size_t bytes = 0;
  ~ScratchBlock() { free(data); }
};
inline void* scratch_bytes(ScratchBlock& block, size_t bytes) {
  if (block.bytes < bytes) {
    free(block.data);
    block.bytes = round_up(bytes, 4096);
    block.data = aligned_alloc(4096, block.bytes);
    if (!block.data) abort();  // kernels are compiled without exceptions
  }
  return block.data;
}
template <class Slot>
void* scratch_bytes(size_t bytes) {
  static thread_local ScratchBlock block;
  return scratch_bytes(block, bytes);
}
template <class T, class Slot>
T* scratch(int64_t count) {
  return static_cast<T*>(scratch_bytes<Slot>(count * sizeof(T)));
}
// slots that products and sums of all families share
struct shared_panels;
struct private_panels;
struct chunk_sums;
struct split_sums;
struct column_sums;

}  // namespace fastdl::ISA
