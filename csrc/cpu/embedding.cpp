// Embedding: rows of a table by their indices, and the table's gradient, whose rows are each summed by one thread in
// the order of the indices.
#include "kernels/embedding.h"

#include "simd.h"
#include "threads.h"

namespace fastdl::ISA {
FASTDL_CPU_EMBEDDING(DECLARE)

constexpr int64_t embedding_thread_bytes = 65536;  // worth a thread of their own

static int64_t first_bad_index(const int64_t* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; i++)
    if (indices[i] < 0 || indices[i] >= rows) return i;
  return -1;
}

// Asks for a row ahead: it may lie anywhere, so no hardware does.
INLINE void fetch(const void* row, int64_t bytes) {
  for (int64_t byte = 0; byte < min(bytes, 4096); byte += 64) __builtin_prefetch(static_cast<const char*>(row) + byte);
}

int64_t embedding(const EmbeddingArguments& a) {
  if (int64_t bad = first_bad_index(a.indices, a.count, a.rows); bad >= 0) return bad;
  const char* table = static_cast<const char*>(a.table);
  char* output = static_cast<char*>(a.output);
  int64_t threads = max(1, min(a.threads, a.count * a.row_bytes / embedding_thread_bytes));
  parallel(threads, [&](int thread, int team) {
    for_share(a.count, thread, team, [&](int64_t i) {
      if (i + 1 < a.count) fetch(table + a.indices[i + 1] * a.row_bytes, a.row_bytes);
      __builtin_memcpy(output + i * a.row_bytes, table + a.indices[i] * a.row_bytes, a.row_bytes);
    });
  });
  return -1;
}

struct embedding_row;

template <class T>
static void backward_of(const EmbeddingBackwardArguments& a) {
  using S = Compute<T>;
  using V = Vector<S>;
  const T* grad = static_cast<const T*>(a.grad_output);
  T* table = static_cast<T*>(a.grad_table);
  // A counting sort: row v has the places places[ends[v - 1]] to places[ends[v]], in their order.
  int64_t *ends = a.workspace, *places = ends + a.rows + 1;
  __builtin_memset(ends, 0, (a.rows + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < a.count; i++) ends[a.indices[i] + 1]++;
  for (int64_t v = 0; v < a.rows; v++) ends[v + 1] += ends[v];
  for (int64_t i = 0; i < a.count; i++) places[ends[a.indices[i]]++] = i;
  auto begin_of = [&](int64_t v) { return v ? ends[v - 1] : 0; };
  // Rows are shared out by their work: one unit for a row, one for each of its terms.
  auto first_row = [&](int64_t work) {
    int64_t low = 0, high = a.rows;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (begin_of(middle) + middle < work)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  int64_t work = a.rows + a.count, bytes = work * a.columns * static_cast<int64_t>(sizeof(T));
  parallel(max(1, min(a.threads, bytes / embedding_thread_bytes)), [&](int thread, int team) {
    S* sums = scratch<S, embedding_row>(round_up(a.columns, lanes<S>));
    for (int64_t v = first_row(work * thread / team), end = first_row(work * (thread + 1) / team); v < end; v++) {
      int64_t begin = begin_of(v), terms = v == a.padding ? 0 : ends[v] - begin;
      T* row = table + v * a.columns;
      if (terms == 0) {
        __builtin_memset(row, 0, a.columns * sizeof(T));
        continue;
      }
      if (terms == 1) {
        __builtin_memcpy(row, grad + places[begin] * a.columns, a.columns * sizeof(T));
        continue;
      }
      S scale = a.by_frequency ? 1 / static_cast<S>(terms) : 1;
      auto place = [&](int64_t term) { return grad + places[begin + term] * a.columns; };
      for (int64_t c = 0; c < a.columns; c += lanes<S>) store(sums + c, V{});
      for (int64_t term = 0; term < terms; term += 2) {  // by twos, for half the additions to memory
        const T *first = place(term), *second = term + 1 < terms ? place(term + 1) : nullptr;
        for (int64_t next = term + 2; next < min(term + 4, terms); next++) fetch(place(next), a.columns * sizeof(T));
        for (int64_t c = 0; c < a.columns; c += lanes<S>) {
          V x = load(first + c, a.columns - c);
          if (second) x += load(second + c, a.columns - c);
          store(sums + c, load(sums + c) + x);
        }
      }
      for (int64_t c = 0; c < a.columns; c += lanes<S>) store(row + c, load(sums + c) * scale, a.columns - c);
    }
  });
}

int64_t embedding_backward(const EmbeddingBackwardArguments& a) {
  if (int64_t bad = first_bad_index(a.indices, a.count, a.rows); bad >= 0) return bad;
  with_dtype(a.dtype, [&](auto type) { backward_of<typename decltype(type)::type>(a); });
  return -1;
}

}  // namespace fastdl::ISA
