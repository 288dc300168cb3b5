// The core of matrix products C = A B^T: Words say how elements are packed into panels and multiplied, Core makes a
// small tile of C from two panels.
#pragma once
#include "simd.h"

namespace fastdl::ISA {

// element (i, k) at data[i * stride + k * k_stride], i < count; one of the strides is 1
template <class T>
struct Operand {
  const T* data;
  int64_t stride, k_stride, count;

  Operand at(int64_t i, int64_t k) const { return {data + i * stride + k * k_stride, stride, k_stride, count - i}; }
};

// ---- words: what a lane of a packed panel holds ----
// One element, widened to the type it is computed in.
template <class T>
struct Words {
  using Sum = Compute<T>;
  using Word = Sum;
  static constexpr int depth = 1;  // elements of k in a word

  // words k .. k + lanes of one row, of which only the first n elements exist, then zeros
  INLINE static Vector<Word> along_k(const T* p, int64_t n) { return load(p, n); }
  // word k of n rows, stored one after the other; k_left elements exist
  INLINE static Vector<Word> across(const T* p, int64_t, int64_t, int64_t n) { return load(p, n); }
  INLINE static Vector<Sum> multiply_add(Vector<Sum> sum, Vector<Word> a, Vector<Word> b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Two bfloat16, multiplied and added in pairs.
template <>
struct Words<bf16> {
  using Sum = float;
  using Word = int32_t;
  static constexpr int depth = 2;

  INLINE static Ints along_k(const bf16* p, int64_t n) {
    if (n >= 32) return (Ints)_mm512_loadu_si512(p);
    return (Ints)_mm512_maskz_loadu_epi16(lane_mask(n), p);
  }
  INLINE static Ints across(const bf16* p, int64_t k_stride, int64_t k_left, int64_t n) {
    Ints first = half_words(p, n);
    return k_left < 2 ? first : first | half_words(p + k_stride, n) << 16;
  }
  INLINE static Floats multiply_add(Floats sum, Ints a, Ints b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

 private:
  INLINE static Ints half_words(const bf16* p, int64_t n) {
    return (Ints)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)lane_mask(n), p));
  }
};
#endif

// panel[k * width + i] = word k of row i. Lanes past `width` spill into the next k's first lanes, so strips of rows are
// packed last first; a panel needs a vector of slack at its end.
template <class T>
void pack_panel(typename Words<T>::Word* panel, int width, Operand<T> source, int64_t depth) {
  using Word = typename Words<T>::Word;
  constexpr int n = lanes<Word>, step = Words<T>::depth;
  int rows = static_cast<int>(min(width, source.count));
  for (int i = (rows - 1) / n * n; i >= 0; i -= n) {
    Operand<T> strip = source.at(i, 0);
    Word* to = panel + i;
    if (source.k_stride != 1) {
      for (int64_t k = 0; k < depth; k += step, to += width)
        store(to, Words<T>::across(strip.data + k * strip.k_stride, strip.k_stride, depth - k, strip.count));
      continue;
    }
    for (int64_t k = 0; k < depth; k += n * step) {
      Vector<Word> square[n];
#pragma GCC unroll 16
      for (int j = 0; j < n; j++)  // lanes of absent rows repeat the last
        square[j] = Words<T>::along_k(strip.data + (i + j < rows ? j : rows - 1 - i) * strip.stride + k, depth - k);
      transpose(square);
      int words = static_cast<int>(min(n, ceil_div(depth - k, step)));
      for (int j = 0; j < words; j++, to += width) store(to, square[j]);
    }
  }
}

// ---- cores: tiles of C ----
// c[i * columns + j] (+)= sum over words of a[word * rows + i] * b[word * columns + j], for `vectors` vectors of j
template <class Words, int rows, int vectors, int columns>
__attribute__((noinline)) void multiply_tile(int64_t words, const typename Words::Word* a,
                                             const typename Words::Word* b, typename Words::Sum* c, bool accumulate) {
  using Word = Vector<typename Words::Word>;
  using Sum = Vector<typename Words::Sum>;
  constexpr int width = lanes<typename Words::Sum>;
  Sum sums[rows][vectors] = {};
  for (int64_t k = 0; k < words; k++, a += rows, b += columns) {
    Word b_k[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) b_k[j] = load(b + j * width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      Word a_ik = broadcast<Word>(a[i]);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++) sums[i][j] = Words::multiply_add(sums[i][j], a_ik, b_k[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) {
      typename Words::Sum* to = c + i * columns + j * width;
      store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
    }
}

// Tiles in vector registers: 32 of them hold 14 x 2 sums, 16 hold 6 x 2, besides b's two and a's one.
template <class T>
struct Core {
  using Word = typename Words<T>::Word;  // what panels are made of
  using Sum = typename Words<T>::Sum;
  static constexpr int max_rows = vector_bytes == 64 ? 14 : 6, columns = 2 * lanes<Sum>;

  // where element k of a panel of `rows` rows begins
  static int64_t panel_offset(int rows, int64_t k) { return k / depth * rows; }
  // words in such a panel, for finding the next one
  static int64_t panel_size(int rows, int64_t k) {
    return round_up(panel_offset(rows, k + depth - 1) + lanes<Word>, 64);
  }
  // the most even height for tiles of m rows
  static int height(int64_t m) { return static_cast<int>(ceil_div(m, ceil_div(m, max_rows))); }
  static constexpr int depth = Words<T>::depth;
  static void begin() {}  // around each thread's use of multiply
  static void end() {}
  static void pack_a(Word* panel, Operand<T> a, int rows, int64_t k) { pack_panel(panel, rows, a, k); }
  static void pack_b(Word* panel, Operand<T> b, int64_t k) { pack_panel(panel, columns, b, k); }
  // c[rows, columns] (+)= a b, of which the first used_columns matter
  static void multiply(int64_t k, const Word* a, const Word* b, Sum* c, bool accumulate, int rows,
                       int64_t used_columns) {
    static constexpr auto tiles = table(std::make_integer_sequence<int, max_rows>());
    tiles.of[used_columns > lanes<Sum>][rows - 1](ceil_div(k, depth), a, b, c, accumulate);
  }

 private:
  using Function = void (*)(int64_t, const Word*, const Word*, Sum*, bool);
  struct Table {
    Function of[2][max_rows];
  };
  // fp16, and bf16 without instructions of its own, share float's tiles
  using Product = std::conditional_t<std::is_same_v<Word, float>, Words<float>, Words<T>>;
  template <int... i>
  static constexpr Table table(std::integer_sequence<int, i...>) {
    return {{{multiply_tile<Product, i + 1, 1, columns>...}, {multiply_tile<Product, i + 1, 2, columns>...}}};
  }
};

}  // namespace fastdl::ISA
