// Attention without the matrix of scores in memory: the softmax of a block of keys is corrected when the next block has
// larger scores (Milakov and Gimelshein, 2018; Dao et al., 2022), and the backward makes the scores again from their
// logsumexp. Queries go down, keys across: a row of scores is words for the products with values that follow.
#include "kernels/attention.h"

#include "activation.h"
#include "gemm_core.h"
#include "philox.h"
#include "threads.h"

namespace fastdl::ISA {
FASTDL_CPU_ATTENTION(DECLARE)
namespace {

struct attention_blocks;

// ---- small parts ----
template <class S>
constexpr S infinity = static_cast<S>(__builtin_inff());
// A sequence of the batch: its rows, and where its queries stand among its keys.
struct Span {
  int64_t queries, keys, first_query, first_key, shift, left, right;

  Span(const AttentionShape& shape, const AttentionScores& scores, int64_t b)
      : queries(shape.queries), keys(shape.keys), first_query(0), first_key(0), left(scores.left), right(scores.right) {
    if (shape.query_offsets) {
      first_query = shape.query_offsets[b], queries = shape.query_offsets[b + 1] - first_query;
      first_key = shape.key_offsets[b], keys = shape.key_offsets[b + 1] - first_key;
    }
    shift = scores.bottom_right ? keys - queries : 0;
  }
  // the keys [begin(i), end(i)) that query i sees; both grow with i
  int64_t begin(int64_t i) const { return left < 0 ? 0 : max(0, i + shift - left); }
  int64_t end(int64_t i) const { return right < 0 ? keys : max(0, min(keys, i + shift + right + 1)); }
};

int64_t longest(const AttentionShape& shape) {
  if (!shape.query_offsets) return shape.queries;
  int64_t most = 0;
  for (int64_t b = 0; b < shape.batch; b++) most = max(most, shape.query_offsets[b + 1] - shape.query_offsets[b]);
  return most;
}

constexpr int64_t block_keys = 256;
constexpr int64_t row_words =
    272;  // of A's rows: at most 256, and an odd number of lines so that rows spread over sets

// ---- products ----
// c[i * c_stride + j] (+)= sum over words of a[i * row_words + word] * b[word * b_stride + j], for `vectors` vectors
template <class Words, int rows, int vectors>
__attribute__((noinline)) void multiply_rows(int64_t words, const typename Words::Word* a,
                                             const typename Words::Word* b, int64_t b_stride, typename Words::Sum* c,
                                             int64_t c_stride, bool accumulate) {
  using Word = Vector<typename Words::Word>;
  using Sum = Vector<typename Words::Sum>;
  constexpr int width = lanes<typename Words::Sum>;
  Sum sums[rows][vectors] = {};
  for (int64_t k = 0; k < words; k++, b += b_stride) {
    Word b_k[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) b_k[j] = load(b + j * width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      Word a_ik = broadcast<Word>(a[i * row_words + k]);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; j++) sums[i][j] = Words::multiply_add(sums[i][j], a_ik, b_k[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) {
      typename Words::Sum* to = c + i * c_stride + j * width;
      store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
    }
}

template <class T>
struct Attention {
  using W = Words<T>;
  using Word = typename W::Word;
  using Sum = typename W::Sum;
  using V = Vector<Sum>;
  static constexpr int depth = W::depth, width = lanes<Sum>, columns = 2 * width;
  static constexpr int max_rows = vector_bytes == 64 ? 14 : 6;
  static constexpr int64_t most_forward_rows = 16 * max_rows, backward_rows = 56 / max_rows * max_rows;
  using Element = std::conditional_t<depth == 1, Word, T>;  // of a row of words
  // fp16, and bf16 without instructions of its own, share float's tiles
  using Product = std::conditional_t<std::is_same_v<Word, float>, Words<float>, W>;

  static int64_t words(int64_t k) { return ceil_div(k, depth); }
  // of a panel of `columns` rows of k
  static int64_t panel_size(int64_t k) { return round_up(words(k) * columns + lanes<Word>, 64); }
  static Sum* sums_of(Word* row) { return reinterpret_cast<Sum*>(row); }

  // c[rows, used_columns] (+)= a b
  static void multiply(int64_t words, const Word* a, const Word* b, int64_t b_stride, Sum* c, int64_t c_stride,
                       bool accumulate, int64_t rows, int64_t used_columns) {
    static constexpr auto tiles = table(std::make_integer_sequence<int, max_rows>());
    tiles.of[used_columns > width][rows - 1](words, a, b, b_stride, c, c_stride, accumulate);
  }
  // the words of `rows` rows of k, zeros up to a whole vector
  static void pack_rows(Word* to, Operand<T> a, int64_t rows, int64_t k) {
    constexpr int n = lanes<Word>;
    if (a.k_stride == 1) {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t word = 0; word < words(k); word += n)
          store(to + i * row_words + word, W::along_k(a.data + i * a.stride + word * depth, k - word * depth));
      return;
    }
    for (int64_t i = 0; i < rows; i += n)
      for (int64_t word = 0; word < words(k); word += n) {
        Vector<Word> square[n];
#pragma GCC unroll 16
        for (int j = 0; j < n; j++) {
          int64_t first = (word + j) * depth;
          square[j] = first < k ? W::across(a.data + i * a.stride + first * a.k_stride, a.k_stride, k - first, rows - i)
                                : Vector<Word>{};
        }
        transpose(square);
        for (int j = 0; j < min(n, rows - i); j++) store(to + (i + j) * row_words + word, square[j]);
      }
  }
  // panels of the rows of b
  static void pack_panels(Word* to, Operand<T> b, int64_t k) {
    for (; b.count > 0; b = b.at(columns, 0), to += panel_size(k)) pack_panel<T>(to, columns, b, k);
  }
  // c[i, panel] (+)= a b for all panels of `used` rows of b
  static void multiply_panels(int64_t k, const Word* a, const Word* panels, int64_t panel, int64_t used, Sum* c,
                              int64_t c_stride, bool accumulate, int64_t rows) {
    for (int64_t j = 0; j < used; j += columns, panels += panel)
      multiply(k, a, panels, columns, c + j, c_stride, accumulate, rows, used - j);
  }

  // the rows of one head, `stride` apart
  struct Rows {
    const T* data;
    int64_t stride;

    Rows(const Heads<const void*>& heads, int64_t b, int64_t h, int64_t row)
        : data(static_cast<const T*>(heads.data) + b * heads.batch_stride + h * heads.head_stride +
               row * heads.row_stride),
          stride(heads.row_stride) {}
  };
  static T* row_of(const Heads<void*>& heads, int64_t b, int64_t h, int64_t row) {
    return static_cast<T*>(heads.data) + b * heads.batch_stride + h * heads.head_stride + row * heads.row_stride;
  }

  // What changes the scores of query i: computed where a row is not whole.
  struct Row {
    int64_t begin, end;  // of the keys it sees
    int mask_kind;
    const void* mask;
    Sum position, slope;

    Row(const AttentionScores& scores, const Span& span, int64_t b, int64_t h, int64_t i)
        : begin(span.begin(i)), end(span.end(i)), mask_kind(scores.mask_kind), mask(nullptr), slope(0) {
      int64_t at = b * scores.mask_batch_stride + h * scores.mask_head_stride + i * scores.mask_row_stride;
      if (mask_kind == boolean_mask) mask = static_cast<const uint8_t*>(scores.mask) + at;
      if (mask_kind == additive_mask) mask = static_cast<const T*>(scores.mask) + at;
      if (mask_kind == wide_additive_mask) mask = static_cast<const Sum*>(scores.mask) + at;
      position = static_cast<Sum>(i + span.shift);
      if (scores.slopes) slope = static_cast<const Sum*>(scores.slopes)[b * scores.slopes_batch_stride + h];
    }
    bool is_whole(int64_t first, int64_t last) const {
      return mask_kind == no_mask && slope == 0 && begin <= first && last <= end;
    }
    // s[first, last) of the keys from key0, scaled and changed; a whole number of vectors
    void change(Sum* s, int64_t key0, int64_t first, int64_t last, Sum scale) const {
      using Index = std::conditional_t<sizeof(Sum) == 4, int32_t, int64_t>;
      V low = broadcast<V>(static_cast<Sum>(begin - key0)), high = broadcast<V>(static_cast<Sum>(end - key0));
      for (int64_t j = first; j < last; j += width) {
        V z = load(s + j) * scale, at = iota<Sum>() + static_cast<Sum>(j), never = broadcast<V>(-infinity<Sum>);
        int64_t n = end - key0 - j;
        if (mask_kind == additive_mask && n > 0) z += load(static_cast<const T*>(mask) + key0 + j, n);
        if (mask_kind == wide_additive_mask && n > 0) z += load(static_cast<const Sum*>(mask) + key0 + j, n);
        if (slope != 0) {
          V distance = (position - static_cast<Sum>(key0)) - at;
          z -= slope * (distance < 0 ? -distance : distance);
        }
        if (mask_kind == boolean_mask && n > 0) {
          typedef uint8_t Bytes __attribute__((vector_size(width)));
          Bytes bytes = {};
          __builtin_memcpy(&bytes, static_cast<const uint8_t*>(mask) + key0 + j, min(n, width));
          z = __builtin_convertvector(bytes, Vector<Index>) != 0 ? z : never;
        }
        store(s + j, at >= low && at < high ? z : never);
      }
    }
  };

  // What is left of the probabilities: 0, or 1 / (1 - p). One Philox call serves four queries.
  struct Dropout {
    Sum* factors;  // [4][row_words]
    uint64_t seed;
    uint32_t threshold, head;
    Sum kept;
    bool active;
    int64_t quad = -1, at_key = -1;

    Dropout(Sum* factors_, const AttentionScores& scores, int64_t head_)
        : factors(factors_), seed(scores.seed), head(static_cast<uint32_t>(head_)), active(scores.dropout > 0) {
      double scaled = scores.dropout * 0x1p32;
      threshold = scaled < 0x1p32 - 1 ? static_cast<uint32_t>(scaled) : UINT32_MAX;
      kept = scores.dropout < 1 ? static_cast<Sum>(1 / (1 - scores.dropout)) : 0;
    }
    // those of query i for block_keys keys from key0
    const Sum* row(int64_t i, int64_t key0) {
      if (i / 4 != quad || key0 != at_key) {
        quad = i / 4, at_key = key0;
        constexpr int n = lanes<uint32_t>;
        for (int64_t j = 0; j < block_keys; j += n) {
          Philox::Counters c[4] = {};
          for (int lane = 0; lane < n; lane++) c[0][lane] = static_cast<uint32_t>(key0 + j + lane);
          c[1] += static_cast<uint32_t>(quad);
          c[2] += head;
          Philox::rounds(c, seed);
          for (int word = 0; word < 4; word++) {
            alignas(64) uint32_t random[n];
            __builtin_memcpy(random, &c[word], sizeof random);
            for (int lane = 0; lane < n; lane++)
              factors[word * row_words + j + lane] = random[lane] >= threshold ? kept : 0;
          }
        }
      }
      return factors + i % 4 * row_words;
    }
  };

  // ---- forward ----
  static void forward(const AttentionArguments& arguments) {
    const AttentionShape& shape = arguments.shape;
    int64_t rows = longest(shape), heads = shape.batch * shape.heads, threads = arguments.threads;
    if (rows == 0 || heads == 0) return;
    constexpr int64_t work_per_thread = 1 << 17;  // multiplications; below, starting a thread costs more than it saves
    threads = max(1, min(threads, heads * rows * shape.keys * shape.size / work_per_thread));
    int64_t strips = ceil_div(rows, max_rows);
    int64_t in_block = threads == 1 ? 16 : max(1, min(16, heads * strips / (4 * threads)));
    int64_t blocks = ceil_div(strips, in_block), next = 0;
    int64_t step = min(rows, in_block * max_rows);
    parallel(threads, [&](int, int) {
      while (true) {
        int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (task >= heads * blocks) break;
        int64_t block = blocks - 1 - task / heads, head = task % heads;  // under causality the last have the most work
        forward_block(arguments, head / shape.heads, head % shape.heads, block * step, step);
      }
    });
  }

  static void forward_block(const AttentionArguments& arguments, int64_t b, int64_t h, int64_t q0, int64_t step) {
    const AttentionShape& shape = arguments.shape;
    const AttentionScores& scores = arguments.scores;
    const Span span(shape, scores, b);
    int64_t rows = min(step, span.queries - q0), size = shape.size, value_size = shape.value_size;
    if (rows <= 0) return;
    int64_t height = ceil_div(rows, ceil_div(rows, max_rows)), value_columns = round_up(value_size, columns);
    const Rows query(arguments.query, b, h, span.first_query + q0);
    const Rows key(arguments.key, b, h / shape.group, span.first_key);
    const Rows value(arguments.value, b, h / shape.group, span.first_key);

    int64_t key_panels = panel_size(size) * ceil_div(block_keys, columns);
    int64_t value_panels = panel_size(block_keys) * ceil_div(value_size, columns);
    Memory<6> memory({key_panels, value_panels, step * row_words, max_rows * row_words, 4 * row_words,
                      step * value_columns + 2 * most_forward_rows});
    auto *k_panels = memory.template at<Word>(0), *v_panels = memory.template at<Word>(1);
    auto *q_rows = memory.template at<Word>(2), *p_rows = memory.template at<Word>(3);
    Dropout dropout(memory.template at<Sum>(4), scores, b * shape.heads + h);
    Sum *sums = memory.template at<Sum>(5), *tops = sums + step * value_columns, *totals = tops + most_forward_rows;
    Sum* s_rows = sums_of(p_rows);
    const Sum scale = static_cast<Sum>(scores.scale);

    pack_rows(q_rows, {query.data, query.stride, 1, rows}, rows, size);
    for (int64_t i = 0; i < rows; i++) tops[i] = -infinity<Sum>, totals[i] = 0;
    __builtin_memset(sums, 0, rows * value_columns * sizeof(Sum));
    for (int64_t k0 = span.begin(q0), last = span.end(q0 + rows - 1); k0 < last; k0 += block_keys) {
      int64_t keys = min(block_keys, last - k0);
      pack_panels(k_panels, {key.data + k0 * key.stride, key.stride, 1, keys}, size);
      pack_panels(v_panels, {value.data + k0 * value.stride, 1, value.stride, value_size}, keys);
      for (int64_t i0 = 0; i0 < rows; i0 += height) {
        int64_t strip = min(height, rows - i0);
        int64_t from = max(0, span.begin(q0 + i0) - k0) / columns * columns;
        int64_t to = min(keys, span.end(q0 + i0 + strip - 1) - k0), whole = round_up(to, width);
        if (from >= to) continue;
        multiply_panels(words(size), q_rows + i0 * row_words, k_panels + from / columns * panel_size(size),
                        panel_size(size), to - from, s_rows + from, row_words, false, strip);
        for (int64_t i = i0; i < i0 + strip; i++) {
          Sum *s = s_rows + (i - i0) * row_words, factor = scale;
          const Row row(scores, span, b, h, q0 + i);
          if (!row.is_whole(k0 + from, k0 + whole)) {
            row.change(s, k0, from, whole, scale);
            factor = 1;
          }
          V highest = broadcast<V>(-infinity<Sum>), second = highest;
          int64_t j = from;
          for (; j + columns <= whole; j += columns) {
            highest = larger(highest, load(s + j) * factor);
            second = larger(second, load(s + j + width) * factor);
          }
          if (j < whole) highest = larger(highest, load(s + j) * factor);
          Sum top = max_of(tops[i], largest_of_lanes(larger(highest, second)));
          Sum base = top == -infinity<Sum> ? 0 : top;  // of a row that has seen nothing but masks
          Sum decay = top == tops[i] ? 1 : exp_at_most_89(broadcast<V>(tops[i] - base))[0];
          V total = {};
          const Sum* left = dropout.active ? dropout.row(q0 + i, k0) : nullptr;
          for (j = from; j < whole; j += width) {
            V p = exp_at_most_89(load(s + j) * factor - base);
            total += p;
            if (left) p *= load(left + j);
            store(reinterpret_cast<Element*>(s) + j, p);  // in the scores' place, never ahead of them
          }
          tops[i] = top;
          totals[i] = totals[i] * decay + sum_of_lanes(total);
          if (decay != 1)
            for (int64_t d = 0; d < value_columns; d += width) {
              Sum* o = sums + i * value_columns + d;
              store(o, load(o) * decay);
            }
        }
        multiply_panels(words(to - from), p_rows + from / depth, v_panels + from / depth * columns, panel_size(keys),
                        value_size, sums + i0 * value_columns, value_columns, true, strip);
      }
    }
    Sum* logsumexp = static_cast<Sum*>(arguments.logsumexp) + lse_row(shape, span, b, h, q0);
    for (int64_t i = 0; i < rows; i++) {
      T* output = row_of(arguments.output, b, h, span.first_query + q0 + i);
      Sum inverse = totals[i] == 0 ? 0 : 1 / totals[i];
      for (int64_t d = 0; d < value_size; d += width)
        store(output + d, load(sums + i * value_columns + d) * inverse, value_size - d);
      logsumexp[i] = tops[i] + static_cast<Sum>(::log(static_cast<double>(totals[i])));
    }
  }
  static Sum max_of(Sum a, Sum b) { return a > b ? a : b; }
  static int64_t lse_row(const AttentionShape& shape, const Span& span, int64_t b, int64_t h, int64_t i) {
    return ((shape.query_offsets ? 0 : b) * shape.heads + h) * shape.queries + span.first_query + i;
  }

  // ---- backward ----
  // With P the probabilities, D what dropout leaves of them and O the output: dV = (P D)^T dO, dP = (dO V^T) D,
  // dS = P (dP - rowsum(O dO)), dQ = dS K, dK = dS^T Q. The gradients of a block of keys are summed transposed, so that
  // P and dS are words down and across as they were made; those of queries over the blocks of keys in the workspace.

  static int64_t workspace_rows(const AttentionShape& shape) { return shape.group * longest(shape); }
  static int64_t gradient_columns(const AttentionShape& shape) { return round_up(shape.size, columns); }
  // of a slot: dQ, logsumexp and rowsum(O dO)
  static int64_t slot_size(const AttentionShape& shape) {
    return round_up(workspace_rows(shape) * (gradient_columns(shape) + 2), 64);
  }
  // A head of keys is one task or, where there are fewer than threads, several that share its blocks of keys.
  static int64_t splits(const AttentionShape& shape, int64_t threads) {
    int64_t pairs = shape.batch * (shape.heads / shape.group);
    return pairs >= threads ? 1 : max(1, min(ceil_div(threads, max(1, pairs)), ceil_div(shape.keys, block_keys)));
  }
  static int64_t workspace_size(const AttentionShape& shape, int64_t threads) {
    int64_t parts = splits(shape, threads);
    return slot_size(shape) * (parts == 1 ? threads : parts * shape.batch * (shape.heads / shape.group));
  }

  static void backward(const AttentionBackwardArguments& arguments) {
    const AttentionShape& shape = arguments.shape;
    int64_t key_heads = shape.heads / shape.group, pairs = shape.batch * key_heads, next = 0;
    int64_t parts = splits(shape, arguments.threads), size = slot_size(shape);
    Sum* workspace = static_cast<Sum*>(arguments.workspace);
    parallel(min(arguments.threads, max(1, pairs * parts)), [&](int thread, int) {
      while (true) {
        int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (task >= pairs * parts) break;
        int64_t b = task / parts / key_heads, key_head = task / parts % key_heads;
        Sum* slot = workspace + (parts == 1 ? thread : task) * size;
        backward_keys(arguments, b, key_head, task % parts, parts, slot);
        if (parts == 1) finish_queries(arguments, b, key_head, slot, 1);
      }
    });
    if (parts == 1) return;
    for (int64_t pair = 0; pair < pairs; pair++)
      finish_queries(arguments, pair / key_heads, pair % key_heads, workspace + pair * parts * size, parts);
  }

  struct Buffers {
    Word *k_panels, *v_panels, *k_columns, *q_rows, *o_rows, *q_columns, *o_columns, *p_pairs, *ds_pairs, *ds_rows;
    Sum *s_rows, *dp_rows, *dk, *dv, *factors;
  };

  // the part-th of the parts of a head's keys: their gradients, and what they add to the queries'
  static void backward_keys(const AttentionBackwardArguments& arguments, int64_t b, int64_t key_head, int64_t part,
                            int64_t parts, Sum* dq) {
    const AttentionShape& shape = arguments.shape;
    const AttentionScores& scores = arguments.scores;
    const Span span(shape, scores, b);
    int64_t size = shape.size, value_size = shape.value_size, dq_columns = gradient_columns(shape);
    int64_t group = shape.group, rows = span.queries;
    Sum *logsumexp = dq + workspace_rows(shape) * dq_columns, *delta = logsumexp + workspace_rows(shape);
    int64_t size_lines = round_up(size, lanes<Word>), value_lines = round_up(value_size, lanes<Word>);
    int64_t panels = ceil_div(block_keys, columns);
    Memory<15> memory({panel_size(size) * panels, panel_size(value_size) * panels,
                       panel_size(block_keys) * ceil_div(size, columns), backward_rows * row_words,
                       backward_rows * row_words, size_lines * row_words, value_lines * row_words,
                       backward_rows * row_words, backward_rows * row_words, max_rows * row_words, max_rows * row_words,
                       max_rows * row_words, size_lines * row_words, value_lines * row_words, 4 * row_words});
    Buffers to;
    Word** word_buffers[] = {&to.k_panels,  &to.v_panels,  &to.k_columns, &to.q_rows,   &to.o_rows,
                             &to.q_columns, &to.o_columns, &to.p_pairs,   &to.ds_pairs, &to.ds_rows};
    for (int i = 0; i < 10; i++) *word_buffers[i] = memory.template at<Word>(i);
    Sum** sum_buffers[] = {&to.s_rows, &to.dp_rows, &to.dk, &to.dv, &to.factors};
    for (int i = 0; i < 5; i++) *sum_buffers[i] = memory.template at<Sum>(10 + i);

    for (int64_t g = 0; g < group; g++) row_statistics(arguments, span, b, key_head * group + g, g, logsumexp, delta);
    __builtin_memset(dq, 0, group * rows * dq_columns * sizeof(Sum));
    const Rows key(arguments.key, b, key_head, span.first_key);
    const Rows value(arguments.value, b, key_head, span.first_key);
    int64_t blocks = ceil_div(span.keys, block_keys);
    for (int64_t k0 = blocks * part / parts * block_keys; k0 < blocks * (part + 1) / parts * block_keys;
         k0 += block_keys) {
      int64_t keys = min(block_keys, span.keys - k0);
      Operand<T> k{key.data + k0 * key.stride, key.stride, 1, keys};
      pack_panels(to.k_panels, k, size);
      pack_panels(to.v_panels, {value.data + k0 * value.stride, value.stride, 1, keys}, value_size);
      pack_panels(to.k_columns, {k.data, 1, key.stride, size}, keys);
      __builtin_memset(to.dk, 0, size * row_words * sizeof(Sum));
      __builtin_memset(to.dv, 0, value_size * row_words * sizeof(Sum));
      for (int64_t g = 0; g < group; g++)
        for (int64_t q0 = 0; q0 < rows; q0 += backward_rows) {
          int64_t some = min(backward_rows, rows - q0), at = g * rows + q0;
          int64_t from = max(0, span.begin(q0) - k0) / columns * columns;
          int64_t last = min(keys, span.end(q0 + some - 1) - k0);
          if (from < last)
            backward_block(arguments, span, b, key_head * group + g, q0, some, k0, from, last, keys, to,
                           dq + at * dq_columns, logsumexp + at, delta + at);
        }
      finish_keys(arguments.grad_key, b, key_head, span.first_key + k0, keys, size, to.dk,
                  static_cast<Sum>(scores.scale));
      finish_keys(arguments.grad_value, b, key_head, span.first_key + k0, keys, value_size, to.dv, 1);
    }
  }

  // the gradients of queries from the sums of all parts
  static void finish_queries(const AttentionBackwardArguments& arguments, int64_t b, int64_t key_head, const Sum* dq,
                             int64_t parts) {
    if (!arguments.grad_query.data) return;
    const AttentionShape& shape = arguments.shape;
    const Span span(shape, arguments.scores, b);
    const Sum scale = static_cast<Sum>(arguments.scores.scale);
    int64_t dq_columns = gradient_columns(shape);
    for (int64_t row = 0; row < shape.group * span.queries; row++, dq += dq_columns) {
      int64_t h = key_head * shape.group + row / span.queries;
      T* to = row_of(arguments.grad_query, b, h, span.first_query + row % span.queries);
      for (int64_t d = 0; d < shape.size; d += width) {
        V total = load(dq + d);
        for (int64_t part = 1; part < parts; part++) total += load(dq + part * slot_size(shape) + d);
        store(to + d, total * scale, shape.size - d);
      }
    }
  }

  // logsumexp, infinity for a row that saw nothing, so that its probabilities are 0; rowsum(O dO) - its gradient
  static void row_statistics(const AttentionBackwardArguments& arguments, const Span& span, int64_t b, int64_t h,
                             int64_t g, Sum* logsumexp, Sum* delta) {
    const Rows output(arguments.output, b, h, span.first_query);
    const Rows grad(arguments.grad_output, b, h, span.first_query);
    int64_t from = lse_row(arguments.shape, span, b, h, 0), n = arguments.shape.value_size;
    const Sum *given = static_cast<const Sum*>(arguments.logsumexp) + from,
              *more = static_cast<const Sum*>(arguments.grad_logsumexp);
    for (int64_t i = 0; i < span.queries; i++) {
      V total = {};
      for (int64_t d = 0; d < n; d += width)
        total += load(output.data + i * output.stride + d, n - d) * load(grad.data + i * grad.stride + d, n - d);
      delta[g * span.queries + i] = sum_of_lanes(total) - (more ? more[from + i] : 0);
      logsumexp[g * span.queries + i] = given[i] == -infinity<Sum> ? infinity<Sum> : given[i];
    }
  }

  // The rows' share in all gradients, from keys [from, last) of the block
  static void backward_block(const AttentionBackwardArguments& arguments, const Span& span, int64_t b, int64_t h,
                             int64_t q0, int64_t rows, int64_t k0, int64_t from, int64_t last, int64_t keys,
                             const Buffers& to, Sum* dq, const Sum* logsumexp, const Sum* delta) {
    const AttentionShape& shape = arguments.shape;
    const AttentionScores& scores = arguments.scores;
    int64_t size = shape.size, value_size = shape.value_size, dq_columns = gradient_columns(shape);
    const Sum scale = static_cast<Sum>(scores.scale);
    const Rows query(arguments.query, b, h, span.first_query + q0);
    const Rows grad(arguments.grad_output, b, h, span.first_query + q0);
    pack_rows(to.q_rows, {query.data, query.stride, 1, rows}, rows, size);
    pack_rows(to.o_rows, {grad.data, grad.stride, 1, rows}, rows, value_size);
    if (arguments.grad_key.data) pack_rows(to.q_columns, {query.data, 1, query.stride, size}, size, rows);
    if (arguments.grad_value.data) pack_rows(to.o_columns, {grad.data, 1, grad.stride, value_size}, value_size, rows);
    Dropout dropout(to.factors, scores, b * shape.heads + h);
    int64_t panel = from / columns, whole = round_up(last, width);
    Word* ds_rows = depth == 1 ? to.ds_pairs : to.ds_rows;
    for (int64_t i0 = 0; i0 < rows; i0 += max_rows) {
      int64_t strip = min(max_rows, rows - i0);
      multiply_panels(words(size), to.q_rows + i0 * row_words, to.k_panels + panel * panel_size(size), panel_size(size),
                      last - from, to.s_rows + from, row_words, false, strip);
      multiply_panels(words(value_size), to.o_rows + i0 * row_words, to.v_panels + panel * panel_size(value_size),
                      panel_size(value_size), last - from, to.dp_rows + from, row_words, false, strip);
      Word* strip_rows = depth == 1 ? ds_rows + i0 * row_words : ds_rows;
      for (int64_t i = 0; i < strip; i++) {
        Sum *s = to.s_rows + i * row_words, *dp = to.dp_rows + i * row_words, factor = scale;
        const Row row(scores, span, b, h, q0 + i0 + i);
        if (!row.is_whole(k0 + from, k0 + whole)) {
          row.change(s, k0, from, whole, scale);
          factor = 1;
        }
        const Sum* left = dropout.active ? dropout.row(q0 + i0 + i, k0) : nullptr;
        const Sum lse = logsumexp[i0 + i], d = delta[i0 + i];
        for (int64_t j = from; j < whole; j += width) {
          V p = exp_at_most_89(load(s + j) * factor - lse), grad_p = load(dp + j), remains = p;
          if (left) {
            V kept = load(left + j);
            grad_p *= kept;
            remains *= kept;
          }
          V ds = p * (grad_p - d);
          if constexpr (depth == 1) {
            store(sums_of(to.p_pairs + (i0 + i) * row_words) + j, remains);
            store(sums_of(strip_rows + i * row_words) + j, ds);
          } else {
            store(s + j, remains);
            store(dp + j, ds);
            store(reinterpret_cast<Element*>(strip_rows + i * row_words) + j, ds);
          }
        }
        if (arguments.grad_mask) {
          Sum* grad_mask = static_cast<Sum*>(arguments.grad_mask) +
                           ((b * shape.heads + h) * shape.queries + q0 + i0 + i) * shape.keys + k0;
          const Sum* ds = depth == 1 ? sums_of(strip_rows + i * row_words) : dp;
          for (int64_t j = from; j < last; j += width) store(grad_mask + j, load(ds + j), last - j);
        }
      }
      if constexpr (depth == 2) {
        pair_rows(to.p_pairs + i0 / 2 * row_words, to.s_rows, strip, from, whole);
        pair_rows(to.ds_pairs + i0 / 2 * row_words, to.dp_rows, strip, from, whole);
      }
      if (arguments.grad_query.data)
        multiply_panels(words(last - from), strip_rows + from / depth, to.k_columns + from / depth * columns,
                        panel_size(keys), size, dq + i0 * dq_columns, dq_columns, true, strip);
    }
    if (arguments.grad_value.data) add_transposed(to.dv, to.o_columns, to.p_pairs, value_size, rows, from, last);
    if (arguments.grad_key.data) add_transposed(to.dk, to.q_columns, to.ds_pairs, size, rows, from, last);
  }

  // words of two rows each, zeros where there is no second
  static void pair_rows(Word* to, const Sum* rows, int64_t count, int64_t from, int64_t whole) {
    if constexpr (depth == 2)
      for (int64_t i = 0; i < count; i += 2, to += row_words)
        for (int64_t j = from; j < whole; j += width) {
          Ints first = __builtin_convertvector(narrow(T{}, load(rows + i * row_words + j)), Ints), second = {};
          if (i + 1 < count) second = __builtin_convertvector(narrow(T{}, load(rows + (i + 1) * row_words + j)), Ints);
          store(to + j, first | second << 16);
        }
  }

  // c[size, keys] += a[size, rows] b[rows, keys]
  static void add_transposed(Sum* c, const Word* a, const Word* b, int64_t size, int64_t rows, int64_t from,
                             int64_t last) {
    int64_t height = ceil_div(size, ceil_div(size, max_rows));
    for (int64_t j = from; j < last; j += columns)
      for (int64_t d = 0; d < size; d += height)
        multiply(words(rows), a + d * row_words, b + j, row_words, c + d * row_words + j, row_words, true,
                 min(height, size - d), last - j);
  }

  // the rows of a gradient from its sums[size, keys]
  static void finish_keys(const Heads<void*>& gradient, int64_t b, int64_t h, int64_t first_row, int64_t keys,
                          int64_t size, const Sum* sums, Sum scale) {
    if (!gradient.data) return;
    for (int64_t j = 0; j < keys; j += width)
      for (int64_t d = 0; d < size; d += width) {
        V square[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; i++) square[i] = load(sums + (d + i) * row_words + j) * scale;
        transpose(square);
        for (int i = 0; i < min(width, keys - j); i++)
          store(row_of(gradient, b, h, first_row + j + i) + d, square[i], size - d);
      }
  }

 private:
  // Parts of this thread's memory, each with a number of words or sums
  template <int parts>
  struct Memory {
    static_assert(sizeof(Word) == sizeof(Sum));
    void* at_[parts];
    explicit Memory(const int64_t (&counts)[parts]) {
      int64_t total = 0;
      for (int64_t count : counts) total += round_up(count, 64);
      Word* next = scratch<Word, attention_blocks>(total);
      for (int i = 0; i < parts; i++) at_[i] = next, next += round_up(counts[i], 64);
    }
    template <class E>
    E* at(int part) const {
      return static_cast<E*>(at_[part]);
    }
  };

  using Function = void (*)(int64_t, const Word*, const Word*, int64_t, Sum*, int64_t, bool);
  struct Table {
    Function of[2][max_rows];
  };
  template <int... i>
  static constexpr Table table(std::integer_sequence<int, i...>) {
    return {{{multiply_rows<Product, i + 1, 1>...}, {multiply_rows<Product, i + 1, 2>...}}};
  }
};

}  // namespace

void attention(const AttentionArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) { Attention<typename decltype(type)::type>::forward(arguments); });
}
void attention_backward(const AttentionBackwardArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) { Attention<typename decltype(type)::type>::backward(arguments); });
}
int64_t attention_backward_workspace(int dtype, const AttentionShape& shape, int threads) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto type) {
    using A = Attention<typename decltype(type)::type>;
    bytes = A::workspace_size(shape, threads) * sizeof(typename A::Sum);
  });
  return bytes;
}

}  // namespace fastdl::ISA
