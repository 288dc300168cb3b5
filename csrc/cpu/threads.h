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

// One block a thread and slot, kept for the next call because fresh memory costs page faults. Kernels bound what they
// ask for by slicing their work, so what is kept is bounded too.
enum ScratchSlot {
  attention_blocks,
  shared_panels,
  private_panels,
  chunk_sums,
  split_sums,
  column_sums,
  pooling_values,
  pooling_results,
  pooling_codes,
  pooling_runs,
  pooling_windows,
  pooling_divisors,
  slot_count
};
struct ScratchBlock {
  void* data = nullptr;
  size_t bytes = 0;
  ~ScratchBlock() { free(data); }
};
inline void* scratch_bytes(ScratchSlot slot, size_t bytes) {
  static thread_local ScratchBlock blocks[slot_count];
  ScratchBlock& block = blocks[slot];
  if (block.bytes < bytes) {
    free(block.data);
    block.bytes = round_up(bytes, 4096);
    block.data = aligned_alloc(4096, block.bytes);
    if (!block.data) abort();  // kernels are compiled without exceptions
  }
  return block.data;
}
template <class T>
T* scratch(ScratchSlot slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, count * sizeof(T)));
}

}  // namespace fastdl::ISA
