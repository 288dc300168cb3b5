// What the kernels of recurrent layers share: the order of rows in a sequence, products of a step's rows with packed
// weights, and the arithmetic of the gates.
#pragma once
#include <sched.h>

#include "activation.h"
#include "gemm_amx.h"
#include "kernels/rnn.h"
#include "threads.h"

namespace fastdl::ISA {

// ---- modes ----
template <int mode>
constexpr int gates_of = mode == lstm  ? 4
                         : mode == gru ? 3
                                       : 1;
template <int mode>
constexpr int saved_gates_of = mode == lstm || mode == gru ? 4 : 0;  // gru: r z n and q

// calls f with Type<T> and Constant<mode>, once checked by the caller
template <class F>
INLINE void with_dtype_and_mode(int dtype, int mode, F f) {
  with_dtype(dtype, [&](auto type) {
    if (mode == rnn_tanh) f(type, Constant<rnn_tanh>());
    if (mode == rnn_relu) f(type, Constant<rnn_relu>());
    if (mode == lstm) f(type, Constant<lstm>());
    if (mode == gru) f(type, Constant<gru>());
  });
}

// Gates that need nothing but their sum; of gru's, n is not one.
template <int mode>
constexpr int independent_gates_of = mode == lstm  ? 4
                                     : mode == gru ? 2
                                                   : 0;
template <int mode, class V>
INLINE V activate_gate(int gate, V z) {
  return mode == lstm && gate == 2 ? tanh(z) : sigmoid(z);
}

// The rest of a step for one vector of units: z, the gates above and the other sums, becomes all gates. hidden_n is
// gru's product inside the one with r; carry is c of lstm and h of gru, before and after the step. Returns h (of lstm
// before a projection).
template <int mode, class V>
INLINE V finish_step(V (&z)[gates_of<mode>], V hidden_n, V& carry) {
  if constexpr (mode == lstm) {
    carry = z[1] * carry + z[0] * z[2];
    return z[3] * tanh(carry);
  } else if constexpr (mode == gru) {
    z[2] = tanh(z[2] + z[0] * hidden_n);
    carry = z[2] + z[1] * (carry - z[2]);
    return carry;
  } else {
    return carry = activate<mode == rnn_tanh ? fastdl::tanh : fastdl::relu>(z[0], 0);
  }
}

// The reverse: from activations a (gru: r z n q; rnn: h itself), lstm's new c, and c of lstm or h of gru before the
// step, the gradients dz of the sums; gru's hidden_n. grad_h is that of the h returned above; carry, on entry lstm's
// gradient of the new c, on return that of c (lstm) or h (gru) before the step, products aside.
template <int mode, class V>
INLINE void gates_gradient(const V (&a)[4], V c, V before, V grad_h, V& carry, V (&dz)[gates_of<mode>],
                           V& grad_hidden_n) {
  if constexpr (mode == lstm) {
    V tanh_c = tanh(c), grad_c = carry + grad_h * a[3] * (1 - tanh_c * tanh_c);
    dz[0] = grad_c * a[2] * (a[0] * (1 - a[0]));
    dz[1] = grad_c * before * (a[1] * (1 - a[1]));
    dz[2] = grad_c * a[0] * (1 - a[2] * a[2]);
    dz[3] = grad_h * tanh_c * (a[3] * (1 - a[3]));
    carry = grad_c * a[1];
  } else if constexpr (mode == gru) {
    dz[2] = grad_h * (1 - a[1]) * (1 - a[2] * a[2]);
    dz[1] = grad_h * (before - a[2]) * (a[1] * (1 - a[1]));
    dz[0] = dz[2] * a[3] * (a[0] * (1 - a[0]));
    grad_hidden_n = dz[2] * a[0];
    carry = grad_h * a[1];
  } else {
    dz[0] = gradient<mode == rnn_tanh ? fastdl::tanh : fastdl::relu>(grad_h, a[0], 0);
  }
}

// ---- the order of steps ----
// A walk over the steps of a batch, whose rows lie step after step; from the first or from the last one.
struct Walk {
  Sequence sequence;
  bool backwards;
  int64_t step, row;  // the present step and its first row

  Walk(const Sequence& sequence_, bool backwards_) : sequence(sequence_), backwards(backwards_) {
    step = backwards ? sequence.steps - 1 : 0;
    row = backwards ? sequence.rows - count() : 0;
  }
  // sequences that have this step; 0 outside
  int64_t count() const {
    if (step < 0 || step >= sequence.steps) return 0;
    return sequence.batch_sizes ? sequence.batch_sizes[step] : sequence.batch;
  }
  Walk next() const {
    Walk after = *this;
    if (!backwards) after.row += count();
    after.step += backwards ? -1 : 1;
    if (backwards) after.row -= after.count();
    return after;
  }
};

// ---- products ----
// c[i * columns + j] (+)= sum over words of a[i * stride + word] * b[word * columns + j]. Few sums are made in several
// chains, for one would wait for the latency of its additions.
template <class Words, int rows, int vectors, int columns>
__attribute__((noinline)) void multiply_rows(int64_t words, const typename Words::Word* a, int64_t stride,
                                             const typename Words::Word* b, typename Words::Sum* c, bool accumulate) {
  using Word = Vector<typename Words::Word>;
  using Sum = Vector<typename Words::Sum>;
  constexpr int width = lanes<typename Words::Sum>, chains = rows * vectors >= 8 ? 1 : rows * vectors >= 4 ? 2 : 4;
  Sum sums[chains][rows][vectors] = {};
  auto step = [&](int64_t k, int chain) __attribute__((always_inline)) {
    Word b_k[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) b_k[j] = load(b + k * columns + j * width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      Word a_ik = broadcast<Word>(a[i * stride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++) sums[chain][i][j] = Words::multiply_add(sums[chain][i][j], a_ik, b_k[j]);
    }
  };
  int64_t k = 0;
  for (; k + chains <= words; k += chains)
#pragma GCC unroll 4
    for (int chain = 0; chain < chains; chain++) step(k + chain, chain);
  if constexpr (chains > 1)
    for (; k < words; k++) step(k, 0);
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) {
      Sum sum = sums[0][i][j];
      if constexpr (chains > 1) sum += sums[1][i][j];
      if constexpr (chains > 2) sum += sums[2][i][j] + sums[3][i][j];
      typename Words::Sum* to = c + i * columns + j * width;
      store(to, accumulate ? load(to) + sum : sum);
    }
}

// Rows as they lie in memory times packed panels of `columns` rows of a weight. What changes at every step is not
// packed; what stays the same is.
template <class T>
struct Rows {
  using Word = typename Words<T>::Word;
  using Sum = typename Words<T>::Sum;
  static constexpr int depth = Words<T>::depth;
  using Element = std::conditional_t<depth == 1, Word, T>;  // of the rows
  static constexpr int max_rows = vector_bytes == 64 ? 14 : 6, columns = 2 * lanes<Sum>;

  // elements from row to row: whole lines, an odd number of them, so that rows spread over the sets of a cache
  static int64_t stride(int64_t k) {
    constexpr int64_t line = 64 / sizeof(Element);
    return (ceil_div(k, line) | 1) * line;
  }
  static int64_t panel_size(int64_t k) { return round_up(ceil_div(k, depth) * columns + lanes<Word>, 64); }
  // rows that a buffer of m rows needs
  static int64_t padded(int64_t m) { return m; }
  static int height(int64_t m) { return static_cast<int>(ceil_div(m, ceil_div(m, max_rows))); }
  static void begin() {}  // around each thread's use of multiply
  static void end() {}
  INLINE static void put(Element* to, Vector<Sum> v, int64_t n) { store(to, v, n); }
  // the first n elements of a row of k, then zeros
  static void set_row(Element* to, const T* from, int64_t n, int64_t k) {
    __builtin_memset(to, 0, stride(k) * sizeof(Element));
    for (int64_t i = 0; i < n; i += lanes<Sum>) put(to + i, load(from + i, n - i), n - i);
  }
  static void pack(Word* panel, Operand<T> weight, int64_t k) { pack_panel<T>(panel, columns, weight, k); }
  // c[rows, columns] (+)= a panel^T; of the columns the first used_columns matter, of a row's last word the elements
  // past k must be 0
  static void multiply(int64_t k, const Element* a, int64_t stride, const Word* panel, Sum* c, bool accumulate,
                       int64_t rows, int64_t used_columns) {
    static constexpr auto tiles = table(std::make_integer_sequence<int, max_rows>());
    constexpr int64_t run = 256;  // words summed in registers: a sum of sums is more accurate than a long running sum
    Function function = tiles.of[used_columns > lanes<Sum>][rows - 1];
    int64_t words = ceil_div(k, depth), i = 0;
    do {
      function(min(run, words - i), reinterpret_cast<const Word*>(a) + i, stride / depth, panel + i * columns, c,
               accumulate || i > 0);
      i += run;
    } while (i < words);
  }

 private:
  using Function = void (*)(int64_t, const Word*, int64_t, const Word*, Sum*, bool);
  struct Table {
    Function of[2][max_rows];
  };
  // fp16, and bf16 without instructions of its own, share float's tiles
  using Product = std::conditional_t<std::is_same_v<Word, float>, Words<float>, Words<T>>;
  template <int... i>
  static constexpr Table table(std::integer_sequence<int, i...>) {
    return {{{multiply_rows<Product, i + 1, 1, columns>...}, {multiply_rows<Product, i + 1, 2, columns>...}}};
  }
};

// f(block, row, rows) for this thread's share of the tiles of `rows` x `blocks`: block after block, so that the panels
// of a thread stay in its cache.
template <class R, class F>
INLINE void for_tiles(int64_t rows, int64_t blocks, int thread, int team, F f) {
  if (rows == 0) return;
  int64_t height = R::height(rows), panels = ceil_div(rows, height);
  for_share(blocks * panels, thread, team, [&](int64_t task) {
    int64_t row = task % panels * height;
    f(task / panels, row, min(height, rows - row));
  });
}

// f(unit, n, offset) for the vectors of a block of units, of which `size` exist in all; offset is into the block
template <class S, class F>
INLINE void for_vectors(int64_t block, int64_t size, F f) {
  constexpr int width = lanes<S>;
  int64_t begin = block * 2 * width;
#pragma GCC unroll 1
  for (int offset = 0; offset < 2 * width; offset += width)
    if (begin + offset < size) f(begin + offset, size - begin - offset, offset);
}

// Asks for n elements of rows r0 .. r0 + rows of a matrix, which the products that come first leave time to fetch.
template <class T>
INLINE void prefetch(const T* matrix, int64_t stride, int64_t r0, int64_t rows, int64_t n) {
  for (int64_t r = r0; r < r0 + rows; r++)
    for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(matrix + r * stride + i, 0, 2);
}

// ---- threads and memory ----
// Waits for a team at every step: spinning, because a step takes microseconds, then yielding, because on a shared
// processor the others may not be running.
class StepBarrier {
 public:
  // round: a counter of the thread's own, at first 0
  void wait(int team, int64_t& round) {
    if (team == 1) return;
    round += team;
    __atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL);
    for (int spins = 0; __atomic_load_n(&arrived_, __ATOMIC_ACQUIRE) < round; spins++) {
      if (spins >= 2000) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  alignas(64) int64_t arrived_ = 0;
};

// Parts of a workspace; from null, only their size is counted.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(reinterpret_cast<uintptr_t>(base)), at_(base ? (base_ + 63) / 64 * 64 : 64) {}
  template <class E>
  E* take(int64_t count) {
    uintptr_t begin = at_;
    at_ += round_up(count * sizeof(E), 64);
    return reinterpret_cast<E*>(begin);
  }
  int64_t bytes() const { return static_cast<int64_t>(at_ - base_); }

 private:
  uintptr_t base_, at_;
};

// multiplications that are worth a thread of their own at every step
constexpr int64_t step_work_per_thread = 1 << 15;
INLINE int64_t step_threads(int64_t multiplications, int threads) {
  return max(1, min(threads, multiplications / step_work_per_thread));
}

}  // namespace fastdl::ISA
