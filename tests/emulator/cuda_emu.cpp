// The emulator's runtime: fibers and their scheduler, barriers, warp operations, shared memory. Compile it WITHOUT
// -fsanitize=..., and define EMU_ASAN or EMU_TSAN to match the kernels' build.
#include "cuda_emu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_set_fiber_name(void*, const char*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#endif
#ifndef __x86_64__
#define EMU_USE_UCONTEXT
#include <ucontext.h>
#endif

namespace emu {

Thread* self;
Config config;
Stats stats{};

namespace {

struct Block;
struct Sm90Thread;
struct Sm90Block;

struct Context {
#ifdef EMU_USE_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer;
#endif
  char* stack = nullptr;
  size_t stack_size = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

enum State : uint8_t { ready, blocked, done };

struct Fiber {
  Thread thread;
  Context context;
  Block* block;
  int warp;
  State state;
  Site site;             // of a blocked thread's call,
  const char* what;      // what that call is,
  const void* waits_on;  // the object it waits on,
  unsigned waits_for;    // and the phase or count
  int barrier;           // id of the barrier that it waits at, or -1
  // cp.async: a ring of copies in flight [first_copy, last_copy), and of committed groups, each the value of last_copy
  // at its commit. Plain arrays: TSan must not see libc calls here as accesses of this thread.
  Copy copies[256];
  unsigned first_copy, last_copy;
  unsigned groups[32], first_group, last_group;
  Sm90Thread* sm90;
};

struct Collective {  // a warp operation that some lanes have reached
  const char* what;  // null: free
  unsigned mask, arrived;
  Site site;
  void* arguments[32];
};

struct Warp {
  int first;
  unsigned all, live, ready_lanes;
  Collective collectives[8];
};

struct Barrier {
  int arrived = 0, expected = 0, phase = 0;
  int votes[3] = {}, result[3] = {};
  Site site{};
};

struct SharedArray {
  const void* key;
  char* data;
  size_t size;
  char* raw;
  size_t raw_size;
  char* view;  // what the async proxy sees
  uint32_t address;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int live;
  Barrier barriers[16];
  std::vector<SharedArray> shared;
  size_t shared_total;
  void* dynamic;
  char* stacks = nullptr;
  size_t stacks_size = 0;
  unsigned rank;  // in its cluster
  std::vector<Block*>* cluster;
  Sm90Block* sm90 = nullptr;
};

std::vector<std::unique_ptr<Block>> resident;  // blocks that run now
std::vector<std::unique_ptr<std::vector<Block*>>> clusters;
auto& pool =
    *new std::vector<std::unique_ptr<Block>>;  // never destroyed: after a failure its threads are not ordered with exit
Context main_context;
Fiber* current;
const std::function<void()>* body;
size_t dynamic_bytes;
bool running, failed;
std::string error;
char fence_sync, done_sync, allocation_sync;  // addresses that TSan orders by

uint64_t random_state;
uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 32);
}

bool differ(const Site& a, const Site& b) {
  return a.line() != b.line() || a.column() != b.column() || strcmp(a.file_name(), b.file_name());
}

void tsan_acquire([[maybe_unused]] void* address) {
#ifdef EMU_TSAN
  __tsan_acquire(address);
#endif
}
void tsan_release([[maybe_unused]] void* address) {
#ifdef EMU_TSAN
  __tsan_release(address);
#endif
}

struct AsMain {  // bookkeeping under TSan: not an access by the running CUDA thread
#ifdef EMU_TSAN
  void* fiber = __tsan_get_current_fiber();
  AsMain() { __tsan_switch_to_fiber(main_context.tsan_fiber, 1); }
  ~AsMain() {
    __tsan_release(&allocation_sync);
    __tsan_switch_to_fiber(fiber, 1);
  }
#else
  AsMain() {}
  ~AsMain() {}
#endif
};

// In cuda_emu_sm90.inc:
bool complete_something();  // one asynchronous operation; false if none is in flight
bool wants_completion();    // a random time to do so
std::string describe(const Fiber&);
void sm90_setup(Block&);
void sm90_exit(Fiber&);
void sm90_teardown(Block&);
void release_cluster_barrier(Block&);

// ---- Contexts -------------------------------------------------------------------------------------------------------
#ifndef EMU_USE_UCONTEXT
extern "C" void emu_switch_stack(void** from, void* to);
asm(R"(.text
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch_stack,.-emu_switch_stack
.section .note.GNU-stack,"",@progbits
.text)");
#endif

void entry();

void make_context(Context& context) {
#ifdef EMU_USE_UCONTEXT
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = context.stack;
  context.registers.uc_stack.ss_size = context.stack_size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#else
  auto* top = reinterpret_cast<void**>(context.stack + context.stack_size) - 3;  // entry finds rsp = 8 mod 16 and
  top[0] = nullptr;                                                              // a return address of 0
  top[-1] = reinterpret_cast<void*>(&entry);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 7;
#endif
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool dying = false) {
  ++stats.switches;
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.asan_fake_stack, to.stack, to.stack_size);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, 1);  // 1: a switch orders nothing
#endif
#ifdef EMU_USE_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  emu_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

// ---- Scheduler ------------------------------------------------------------------------------------------------------
int pick_lane(unsigned lanes) {
  switch (config.schedule) {
    case Schedule::forward:
      return __builtin_ctz(lanes);
    case Schedule::reverse:
      return 31 - __builtin_clz(lanes);
    case Schedule::random:
      break;
  }
  const int start = int(random_bits() & 31);
  const unsigned rotated = (lanes >> start) | (start ? lanes << (32 - start) : 0);
  return (__builtin_ctz(rotated) + start) & 31;
}

// The next runnable thread, or null. It stays in the current warp while it can, for the greatest skew between warps,
// unless `away`: then the caller spins, and others must move.
Fiber* pick(bool away) {
  const bool random = config.schedule == Schedule::random;
  auto take = [](Block& block, Warp& warp) { return &block.fibers[size_t(warp.first + pick_lane(warp.ready_lanes))]; };
  if (current && !away && (!random || random_bits() % 16)) {
    Warp& warp = current->block->warps[size_t(current->warp)];
    if (warp.ready_lanes) return take(*current->block, warp);
  }
  size_t total = 0;
  for (auto& block : resident) total += block->warps.size();
  static size_t turn;
  const size_t start = random ? random_bits() % total : away ? ++turn % total : 0;
  for (size_t i = 0; i < total; ++i) {
    size_t index = (start + i) % total, b = 0;
    if (config.schedule == Schedule::reverse) index = total - 1 - index;
    while (index >= resident[b]->warps.size()) index -= resident[b++]->warps.size();
    Warp& warp = resident[b]->warps[index];
    if (warp.ready_lanes) return take(*resident[b], warp);
  }
  return nullptr;
}

void set_ready(Fiber& fiber) {
  fiber.state = ready;
  fiber.block->warps[size_t(fiber.warp)].ready_lanes |= 1u << fiber.thread.lane;
}

// Wakes the threads that wait on an object and whose `waits_for` satisfies the predicate.
template <class Predicate>
void wake(Block& block, const void* object, Predicate satisfied) {
  for (auto& fiber : block.fibers) {
    if (fiber.state == blocked && fiber.waits_on == object && satisfied(fiber.waits_for)) {
      fiber.waits_on = nullptr;
      set_ready(fiber);
    }
  }
}

std::string deadlock_report() {  // who waits for what, one line for threads that wait for the same thing
  std::map<std::string, std::vector<int>> waiting;
  for (auto& block : resident) {
    for (auto& fiber : block->fibers) {
      if (fiber.state != blocked) continue;
      char text[300];
      const uint3 at = fiber.thread.blockIdx;
      snprintf(text, sizeof text, "block (%u,%u,%u) waits in %s at %s:%d", at.x, at.y, at.z, fiber.what,
               fiber.site.file_name(), int(fiber.site.line()));
      waiting[text + describe(fiber)].push_back(int(&fiber - block->fibers.data()));
    }
  }
  std::string report = "deadlock: no thread can run";
  int lines = 0;
  for (auto& [what, threads] : waiting) {
    if (lines++ == 12) return report + "\n  ...";
    const int first = threads.front(), last = threads.back(), count = int(threads.size());
    report += "\n  ";
    if (count == 1) {
      report += "thread " + std::to_string(first);
    } else {
      report += "threads " + std::to_string(first) + "-" + std::to_string(last);
      if (last - first + 1 != count) report += " (" + std::to_string(count) + " of them)";
    }
    report += " of " + what;
  }
  return report;
}

// Switches away from the current thread, which is blocked, done or merely yields.
void leave(bool dying = false, bool away = false) {
  Fiber* me = current;
  if (wants_completion()) complete_something();
  Fiber* next;
  while (!(next = pick(away)) && complete_something()) {
  }
  if (next == me) return;
  if (!next) {
    bool all_done = true;
    for (auto& block : resident) all_done &= block->live == 0;
    if (!all_done && !failed) {
      AsMain as_main;
      failed = true;
      error = deadlock_report();
    }
    switch_context(me->context, main_context, dying);
    return;
  }
  current = next;
  self = &next->thread;
  switch_context(me->context, next->context, dying);
}

void block_current(const char* what, Site site) {
  Fiber* me = current;
  me->state = blocked;
  me->what = what;
  me->site = site;
  me->block->warps[size_t(me->warp)].ready_lanes &= ~(1u << me->thread.lane);
  leave();
}

void release_barrier(Block& block, Barrier& barrier) {
  const int id = int(&barrier - block.barriers);
  for (auto& fiber : block.fibers) {
    if (fiber.barrier != id) continue;
    fiber.barrier = -1;
    set_ready(fiber);
  }
  barrier.arrived = 0;
  for (int i = 0; i < 3; ++i) {
    barrier.result[i] = barrier.votes[i];
    barrier.votes[i] = 0;
  }
  barrier.site = {};
  ++barrier.phase;
  ++stats.barriers;
}

[[gnu::used]] void entry() {  // where every fiber starts
#ifdef EMU_ASAN
  const void* old_stack;
  size_t old_size;
  __sanitizer_finish_switch_fiber(nullptr, &old_stack, &old_size);
  if (!main_context.stack) {
    main_context.stack = static_cast<char*>(const_cast<void*>(old_stack));
    main_context.stack_size = old_size;
  }
#endif
  (*body)();
  Fiber* me = current;
  Block& block = *me->block;
  Warp& warp = block.warps[size_t(me->warp)];
  const unsigned bit = 1u << me->thread.lane;
  if (config.strict && me->first_copy != me->last_copy) {
    fail("thread exits with %u cp.async copies never waited for", me->last_copy - me->first_copy);
  }
  sm90_exit(*me);
  me->state = done;
  warp.ready_lanes &= ~bit;
  warp.live &= ~bit;
  --block.live;
  tsan_release(&done_sync);
  release_cluster_barrier(block);
  for (auto& barrier : block.barriers) {  // exited threads count as arrived
    if (barrier.arrived && !barrier.expected && barrier.arrived == block.live) release_barrier(block, barrier);
  }
  for (auto& collective : warp.collectives) {
    if (collective.what && collective.mask & bit) {
      fail("lane %u exits while lanes %08x wait for it in %s (mask %08x) at %s:%d", me->thread.lane, collective.arrived,
           collective.what, collective.mask, collective.site.file_name(), int(collective.site.line()));
    }
  }
  leave(true);
  abort();
}

// ---- Blocks and their memory ----------------------------------------------------------------------------------------
void* raw_allocate(size_t bytes) {
#ifdef EMU_TSAN
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
#else
  void* memory;
  if (posix_memalign(&memory, 128, bytes)) abort();
  return memory;
#endif
}

void raw_free(void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EMU_TSAN
  munmap(memory, bytes);
#else
  free(memory);
#endif
}

// A shared array aligned to exactly what its declaration promises, never more; filled with NaN; poisoned around under
// ASan.
char* add_shared(Block& block, const void* key, size_t size, size_t alignment) {
  AsMain as_main;  // the allocation and its fill belong to the launch, not to this thread
  const size_t raw_size = size + 256 + 3 * alignment;
  char* raw = static_cast<char*>(raw_allocate(raw_size));
  char* data = raw + 128;
  while ((uintptr_t(data) & (2 * alignment - 1)) != alignment) ++data;
  memset(data, 0xff, size);  // NaN in every floating-point format, -1 in every integer
#ifdef EMU_ASAN
  __asan_poison_memory_region(raw, raw_size);
  __asan_unpoison_memory_region(data, size);
#endif
  char* view = static_cast<char*>(malloc(size));
  memset(view, 0xff, size);
  // The address in the shared window has the same low bits as the host's, so that swizzles agree.
  uint32_t address = 1024;
  if (!block.shared.empty()) address = block.shared.back().address + uint32_t(block.shared.back().size);
  address += uint32_t((uintptr_t(data) - address) & 1023);
  block.shared.push_back({key, data, size, raw, raw_size, view, address});
  block.shared_total += size;
  if (block.shared_total > config.shared_limit) {
    fail("block uses %zu bytes of shared memory, limit %zu", block.shared_total, config.shared_limit);
  }
  return data;
}

void free_shared(Block& block) {
  for (auto& array : block.shared) {
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(array.raw, array.raw_size);
#endif
    raw_free(array.raw, array.raw_size);
    free(array.view);
  }
  block.shared.clear();
}

#if defined(EMU_ASAN) || defined(EMU_TSAN)
constexpr size_t stack_size = 256 * 1024;
#else
constexpr size_t stack_size = 64 * 1024;
#endif

void free_stacks(Block& block) {
  if (block.stacks) munmap(block.stacks, block.stacks_size);
  block.stacks = nullptr;
}

void setup(Block& block, dim3 grid, dim3 shape, uint3 index) {
  const size_t threads = size_t(shape.x) * shape.y * shape.z;
  if (block.fibers.size() != threads) {
    free_stacks(block);
    block.fibers.clear();
    block.fibers.resize(threads);
  }
  if (!block.stacks) {
    block.stacks_size = stack_size * threads;
    void* memory =
        mmap(nullptr, block.stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("cannot map the stacks of fibers");
    block.stacks = static_cast<char*>(memory);
    for (size_t i = 0; i < threads; ++i) mprotect(block.stacks + i * stack_size, 4096, PROT_NONE);  // guard pages
  }
  block.warps.assign((threads + 31) / 32, Warp{});
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    const unsigned n = unsigned(i), lane = n % 32;
    fiber.thread = {{n % shape.x, n / shape.x % shape.y, n / shape.x / shape.y}, index, shape, grid, lane};
    fiber.block = &block;
    fiber.warp = int(i / 32);
    fiber.state = ready;
    fiber.barrier = -1;
    fiber.waits_on = nullptr;
    fiber.first_copy = fiber.last_copy = fiber.first_group = fiber.last_group = 0;
    fiber.context.stack = block.stacks + i * stack_size;
    fiber.context.stack_size = stack_size;
    fiber.context.asan_fake_stack = nullptr;
    make_context(fiber.context);
#ifdef EMU_TSAN
    fiber.context.tsan_fiber = __tsan_create_fiber(0);
#endif
    Warp& warp = block.warps[i / 32];
    warp.first = int(i - lane);
    warp.all |= 1u << lane;
    warp.ready_lanes = warp.live = warp.all;
  }
  block.live = int(threads);
  for (auto& barrier : block.barriers) barrier = Barrier();
  block.shared_total = 0;
  block.shared.reserve(64);
  block.dynamic = nullptr;
  sm90_setup(block);
}

void teardown(Block& block) {
  sm90_teardown(block);
  free_shared(block);
#ifdef EMU_TSAN
  for (auto& fiber : block.fibers) __tsan_destroy_fiber(fiber.context.tsan_fiber);
  free_stacks(block);  // fresh shadow memory: the next block's stacks and barriers are unrelated to this block's
#elif defined(EMU_ASAN)
  if (failed) {
    __asan_unpoison_memory_region(block.stacks, block.stacks_size);
    free_stacks(block);
  }
#endif
}

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!running || !current) throw Error(text);
  if (!failed) {
    char where[160];
    const uint3 block = current->thread.blockIdx, thread = current->thread.threadIdx;
    snprintf(where, sizeof where, " [block (%u,%u,%u) thread (%u,%u,%u)]", block.x, block.y, block.z, thread.x,
             thread.y, thread.z);
    error = std::string(text) + where;
  }
  failed = true;
  switch_context(current->context, main_context);
  abort();
}

void launch(dim3 grid, dim3 shape, size_t dynamic_shared, const std::function<void()>& function, dim3 cluster,
            bool cooperative) {
  const size_t threads = size_t(shape.x) * shape.y * shape.z, blocks = size_t(grid.x) * grid.y * grid.z;
  const size_t cluster_blocks = size_t(cluster.x) * cluster.y * cluster.z;
  static std::mutex one_at_a_time;  // Python may launch from several threads
  const std::lock_guard lock(one_at_a_time);
  if (!threads || threads > 1024 || shape.z > 64 || !blocks || grid.y > 65535 || grid.z > 65535) {
    throw Error("invalid launch configuration");
  }
  if (!cluster_blocks || cluster_blocks > 16 || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
    throw Error("invalid cluster size");
  }
  if (cluster.y * cluster.z != 1) throw Error("only clusters along x are emulated");
  dynamic_bytes = dynamic_shared;
  random_state = config.seed * 0x9E3779B97F4A7C15ull + 1;
  body = &function;
  failed = false;
  running = true;
  error.clear();
  main_context.stack = nullptr;
  main_context.stack_size = 0;
#ifdef EMU_TSAN
  main_context.tsan_fiber = __tsan_get_current_fiber();
#endif
  size_t at_once = blocks;
  if (config.resident > 0 && !cooperative) {
    at_once = (size_t(config.resident) + cluster_blocks - 1) / cluster_blocks * cluster_blocks;
  }
  for (size_t begin = 0; begin < blocks && !failed; begin += at_once) {
    for (size_t i = begin; i < blocks && i < begin + at_once; ++i) {
      size_t index = i;  // whole clusters in reverse
      if (config.schedule == Schedule::reverse) {
        index = (blocks / cluster_blocks - 1 - i / cluster_blocks) * cluster_blocks + i % cluster_blocks;
      }
      std::unique_ptr<Block> block;
      if (pool.empty()) {
        block = std::make_unique<Block>();
      } else {
        block = std::move(pool.back());
        pool.pop_back();
      }
      if (index % cluster_blocks == 0) clusters.push_back(std::make_unique<std::vector<Block*>>());
      clusters.back()->push_back(block.get());
      block->cluster = clusters.back().get();
      block->rank = unsigned(index % cluster_blocks);
      const size_t x = index % grid.x, y = index / grid.x % grid.y, z = index / grid.x / grid.y;
      setup(*block, grid, shape, uint3{unsigned(x), unsigned(y), unsigned(z)});
      resident.push_back(std::move(block));
      ++stats.blocks;
    }
    current = nullptr;
    current = pick(false);
    self = &current->thread;
    switch_context(main_context, current->context);
    current = nullptr;
    self = nullptr;
    for (auto& block : resident) {
      teardown(*block);
      pool.push_back(std::move(block));
    }
    resident.clear();
    clusters.clear();
  }
  tsan_acquire(&done_sync);
  running = false;
  if (failed) throw Error(error);
}

// ---- Barriers, fences, shared memory --------------------------------------------------------------------------------
namespace {

// What TSan orders a barrier's phase by: an address in this block's first guard page, unique and never touched.
char* barrier_sync(Block& block, int id, int phase) { return block.stacks + (id * 2 + (phase & 1)) * 8; }

void join_barrier(Barrier& barrier, int id, int threads, Site site) {
  if (barrier.arrived == 0) {
    barrier.site = site;
    barrier.expected = threads;
  } else if (barrier.expected != threads || (id == 0 && config.strict && differ(barrier.site, site))) {
    // Named barriers may be reached from different calls.
    fail("divergent barrier %d: this thread at %s:%d, others at %s:%d", id, site.file_name(), int(site.line()),
         barrier.site.file_name(), int(barrier.site.line()));
  }
  ++barrier.arrived;
}

}  // namespace

void barrier(int id, int threads, Site site) {
  Fiber* me = current;
  Block& block = *me->block;
  Barrier& barrier = block.barriers[id];
  char* sync = barrier_sync(block, id, barrier.phase);
  tsan_release(sync);
  join_barrier(barrier, id, threads, site);
  me->barrier = id;
  if (barrier.arrived == (threads ? threads : block.live)) {
    release_barrier(block, barrier);
    if (config.schedule == Schedule::random) leave();
  } else {
    block_current("barrier", site);
  }
  tsan_acquire(sync);
}

void barrier_arrive(int id, int threads, Site site) {
  Block& block = *current->block;
  Barrier& barrier = block.barriers[id];
  tsan_release(barrier_sync(block, id, barrier.phase));
  join_barrier(barrier, id, threads, site);
  if (barrier.arrived == threads) release_barrier(block, barrier);
}

int barrier_reduce(Reduce operation, int predicate, Site site) {
  Barrier& barrier = current->block->barriers[0];
  barrier.votes[int(Reduce::count)] += predicate != 0;
  barrier.votes[int(Reduce::all)] += predicate == 0;
  barrier.votes[int(Reduce::any)] += predicate != 0;
  emu::barrier(0, 0, site);
  const int votes = barrier.result[int(operation)];
  return operation == Reduce::count ? votes : operation == Reduce::all ? votes == 0 : votes != 0;
}

void yield() {
  if (config.schedule == Schedule::random || resident.size() > 1) leave(false, true);
}

void fence() {
  tsan_acquire(&fence_sync);
  tsan_release(&fence_sync);
  yield();
}

void* shared_array(const void* key, size_t size, size_t alignment) {
  Block& block = *current->block;
  char* data = nullptr;
  for (auto& array : block.shared) {
    if (array.key == key) data = array.data;
  }
  if (!data) data = add_shared(block, key, size, alignment);
  tsan_acquire(&allocation_sync);
  return data;
}

void* dyn_shared(size_t alignment, size_t stated) {  // allocated at its declaration, aligned as that promises
  Block& block = *current->block;
  if (!dynamic_bytes || dynamic_bytes < stated) {
    fail("kernel states %zu bytes of dynamic shared memory but was launched with %zu", stated, dynamic_bytes);
  }
  if (!block.dynamic) block.dynamic = add_shared(block, nullptr, dynamic_bytes, alignment);
  tsan_acquire(&allocation_sync);
  return block.dynamic;
}

namespace {

SharedArray* find_shared(Block& block, const void* address, size_t bytes) {
  auto* first = static_cast<const char*>(address);
  for (auto& array : block.shared) {
    if (first >= array.data && first + bytes <= array.data + array.size) return &array;
  }
  return nullptr;
}

}  // namespace

bool in_shared(const void* address, size_t bytes) { return find_shared(*current->block, address, bytes); }

// ---- Warp operations ------------------------------------------------------------------------------------------------
namespace {

// A rendezvous of the lanes in mask. The last to arrive runs function(records, lanes) on everyone's record; then all go
// on.
template <class Record, class Function>
void collective(const char* what, unsigned mask, bool whole_warp, Record& record, Site site, Function function) {
  Fiber* me = current;
  Warp& warp = me->block->warps[size_t(me->warp)];
  const unsigned lane = me->thread.lane;
  const char* file = site.file_name();
  const int line = int(site.line());
  if (!(mask >> lane & 1)) fail("%s at %s:%d: calling lane %u is not in mask %08x", what, file, line, lane, mask);
  if (whole_warp && warp.live != ~0u) {
    fail("%s at %s:%d needs a full warp, live lanes are %08x", what, file, line, warp.live);
  }
  Collective* slot = nullptr;
  for (auto& other : warp.collectives) {
    if (!other.what || !(other.mask & mask)) continue;
    if (other.mask != mask || other.what != what || (config.strict && differ(other.site, site))) {
      fail("divergent warp collective: lane %u at %s mask %08x %s:%d, others at %s mask %08x %s:%d", lane, what, mask,
           file, line, other.what, other.mask, other.site.file_name(), int(other.site.line()));
    }
    slot = &other;
  }
  for (auto& other : warp.collectives) {
    if (slot || other.what) continue;
    slot = &other;
    *slot = {what, mask, 0, site, {}};
  }
  if (!slot) fail("too many warp operations at the same time");
  slot->arrived |= 1u << lane;
  slot->arguments[lane] = &record;
  if (slot->arrived != (mask & warp.live)) return block_current(what, site);
  if (config.strict && (mask & warp.all) != slot->arrived) {
    fail("%s at %s:%d: mask %08x names lanes that exited (live %08x)", what, file, line, mask, warp.live);
  }
  function(reinterpret_cast<Record* const*>(slot->arguments), slot->arrived);
  for (unsigned lanes = slot->arrived; lanes; lanes &= lanes - 1) {
    set_ready(me->block->fibers[size_t(warp.first + __builtin_ctz(lanes))]);
  }
  slot->what = nullptr;
  ++stats.collectives;
  if (config.schedule == Schedule::random && random_bits() % 4 == 0) leave();
}

template <class Function>
void for_lanes(unsigned lanes, Function function) {
  for (; lanes; lanes &= lanes - 1) function(__builtin_ctz(lanes));
}

// Every float16, converted before any fiber runs: TSan sees what CUDA's own conversion writes to the stack.
const std::vector<float> float16_values = [] {
  std::vector<float> values(1 << 16);
  for (size_t bits = 0; bits < values.size(); ++bits) {
    __half_raw raw;
    raw.x = uint16_t(bits);
    values[bits] = __half2float(__half(raw));
  }
  return values;
}();

float from_16_bits(uint16_t bits, bool bf16) {
  if (!bf16) return float16_values[bits];
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

}  // namespace

unsigned active() { return current->block->warps[size_t(current->warp)].live; }

void syncwarp(unsigned mask, Site site) {
  char* sync = current->block->stacks + 1024 + current->warp * 8;
  tsan_release(sync);
  int nothing = 0;
  collective("__syncwarp", mask, false, nothing, site, [](int* const*, unsigned) {});
  tsan_acquire(sync);
}

void shuffle(unsigned mask, int source_lane, void* value, unsigned bytes, Site site) {
  struct Record {
    int source;
    char in[16], out[16];
  } record{source_lane, {}, {}};
  __builtin_memcpy(record.in, value, bytes);
  collective("__shfl_sync", mask, false, record, site, [](Record* const* records, unsigned lanes) {
    for_lanes(lanes, [&](int lane) {
      Record& mine = *records[lane];
      if (mine.source < 0) {
        __builtin_memcpy(mine.out, mine.in, 16);
      } else if (lanes >> mine.source & 1) {
        __builtin_memcpy(mine.out, records[mine.source]->in, 16);
      } else {
        __builtin_memset(mine.out, 0xff, 16);  // the value of a lane that takes no part is undefined
      }
    });
  });
  __builtin_memcpy(value, record.out, bytes);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  struct Record {
    bool predicate;
    unsigned result;
  } record{predicate, 0};
  collective("vote", mask, false, record, site, [](Record* const* records, unsigned lanes) {
    unsigned result = 0;
    for_lanes(lanes, [&](int lane) { result |= unsigned(records[lane]->predicate) << lane; });
    for_lanes(lanes, [&](int lane) { records[lane]->result = result; });
  });
  return record.result;
}

unsigned match_any(unsigned mask, uint64_t value, Site site) {
  struct Record {
    uint64_t value;
    unsigned result;
  } record{value, 0};
  collective("match", mask, false, record, site, [](Record* const* records, unsigned lanes) {
    for_lanes(lanes, [&](int lane) {
      for_lanes(lanes, [&](int other) {
        if (records[other]->value == records[lane]->value) records[lane]->result |= 1u << other;
      });
    });
  });
  return record.result;
}

void ldmatrix_exchange(uint32_t* registers, int count, bool transposed, const void* row, const uint32_t (&data)[4],
                       Site site) {
  struct Record {
    const void* row;
    uint32_t data[4], out[4];
    int count;
    bool transposed;
  } record{row, {data[0], data[1], data[2], data[3]}, {}, count, transposed};
  collective("ldmatrix", ~0u, true, record, site, [](Record* const* records, unsigned) {
    ++stats.ldmatrix;
    for (int i = 0; i < records[0]->count; ++i) {
      uint16_t matrix[8][8];
      int used[8] = {}, worst = 0;  // rows in each group of four banks
      for (int r = 0; r < 8; ++r) {
        const Record& source = *records[i * 8 + r];
        __builtin_memcpy(matrix[r], source.data, 16);
        const int group = ++used[uintptr_t(source.row) / 16 % 8];
        worst = group > worst ? group : worst;
      }
      stats.ldmatrix_conflicts += uint64_t(worst - 1);
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = lane % 4 * 2;
        const bool t = records[lane]->transposed;
        records[lane]->out[i] =
            uint32_t(t ? matrix[c][r] : matrix[r][c]) | uint32_t(t ? matrix[c + 1][r] : matrix[r][c + 1]) << 16;
      }
    }
  });
  for (int i = 0; i < count; ++i) registers[i] = record.out[i];
}

void mma(float* d, const uint32_t* a, const uint32_t* b, Mma type, Site site) {
  struct Record {
    const uint32_t *a, *b;
    const float* d;
    Mma type;
    float out[4];
  } record{a, b, d, type, {}};
  collective("mma.sync", ~0u, true, record, site, [](Record* const* records, unsigned) {
    ++stats.mma;
    const Mma type = records[0]->type;
    const int depth = type == Mma::tf32 ? 8 : 16;
    float a[16][16] = {}, b[16][8] = {}, d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Record& mine = *records[lane];
      const int group = lane / 4, position = lane % 4;
      for (int r = 0; r < 4; ++r) {
        d[group + r / 2 * 8][position * 2 + r % 2] = mine.d[r];
        const int row = group + r % 2 * 8;
        if (type == Mma::tf32) {  // the hardware ignores the lowest 13 bits
          a[row][position + r / 2 * 4] = __int_as_float(int(mine.a[r] & ~0x1fffu));
          if (r < 2) b[position + r * 4][group] = __int_as_float(int(mine.b[r] & ~0x1fffu));
          continue;
        }
        for (int h = 0; h < 2; ++h) {
          const int column = position * 2 + h;
          a[row][column + r / 2 * 8] = from_16_bits(uint16_t(mine.a[r] >> (16 * h)), type == Mma::bf16);
          if (r < 2) b[column + r * 8][group] = from_16_bits(uint16_t(mine.b[r] >> (16 * h)), type == Mma::bf16);
        }
      }
    }
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < depth; ++k) {
        for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) records[lane]->out[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = record.out[i];
}

// ---- cp.async -------------------------------------------------------------------------------------------------------
bool cp_async_defer(const Copy& copy) {
  Fiber& me = *current;
  ++stats.cp_async;
  if (config.async == Async::early || (config.async == Async::random && random_bits() % 2)) return false;
  if (me.last_copy - me.first_copy == 256) fail("more than 256 cp.async in flight in one thread");
  me.copies[me.last_copy++ % 256] = copy;
  return true;
}

void cp_async_commit() {
  Fiber& me = *current;
  if (me.last_group - me.first_group == 32) ++me.first_group;  // forgetting a group only makes waits stricter
  me.groups[me.last_group++ % 32] = me.last_copy;
}

bool cp_async_take(int pending, Copy* copy) {
  Fiber& me = *current;
  const int groups = int(me.last_group - me.first_group);
  if (groups <= pending) return false;
  const unsigned end = me.groups[(me.last_group - 1 - unsigned(pending)) % 32];
  if (int(end - me.first_copy) <= 0) return false;
  *copy = me.copies[me.first_copy++ % 256];
  return true;
}

#include "cuda_emu_sm90.inc"

}  // namespace emu
