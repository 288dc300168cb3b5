// Matrix products C = A B^T: cache blocking and threads around Core. Finished tiles go to an epilogue.
#pragma once
#include "gemm_amx.h"
#include "gemm_core.h"
#include "threads.h"

namespace fastdl::ISA {

// A finished piece of C, in blocks of block_columns columns that lie one after the other: element (row + i, column + j)
// at values[j / block_columns * block_size + i * block_columns + j % block_columns]
template <class Sum>
struct Tile {
  int64_t row, column, rows, columns;
  const Sum* values;
  int64_t block_columns, block_size;

  // f(row, column, n, vector) for each vector of n lanes, most often a full one
  template <class F>
  INLINE void for_each_vector(F f) const {
    constexpr int width = lanes<Sum>;
    for (int64_t i = 0; i < rows; i++) {
      const Sum* from = values + i * block_columns;
      for (int64_t first = 0; first < columns; first += block_columns, from += block_size) {
        int64_t j = 0, end = min(columns - first, block_columns);
        for (; j + width <= end; j += width) f(row + i, column + first + j, width, load(from + j));
        if (j < end) f(row + i, column + first + j, end - j, load(from + j, end - j));
      }
    }
  }
};

// What receives the tiles: any callable of a Tile, by reference, so that gemm is compiled once for all of them.
template <class Sum>
struct Epilogue {
  const void* callable;
  void (*call)(const void*, const Tile<Sum>&);

  template <class F>
  Epilogue(const F& f)
      : callable(&f), call([](const void* f_, const Tile<Sum>& tile) { (*static_cast<const F*>(f_))(tile); }) {}
  void operator()(const Tile<Sum>& tile) const { call(callable, tile); }
};

// What a thread keeps at hand: a block of private panels in half the second-level cache (1 to 2 MiB), and all shared
// panels of one chunk of k in the third.
constexpr int64_t private_bytes = 384 << 10;
constexpr int64_t chunk_bytes = 4096;      // of a row of k
constexpr int64_t pack_step = 128;         // rows of k packed at a time where they are not contiguous
constexpr int64_t run_length = 256;        // words of k summed in registers
constexpr int64_t strip_bytes = 16 << 10;  // of C, finished together in the first-level cache
constexpr int64_t max_slice_rows = 2048, max_slice_columns = 4096;  // bound the scratch memory

// Tiles of C for one team; every thread of the team calls it with the same arguments. The operand with fewer rows is
// packed once for all (shared), the other one block by block by the thread that multiplies the block (private).
template <class T>
struct TeamGemm {
  using C = Core<T>;
  using Word = typename C::Word;
  using Sum = typename C::Sum;

  static constexpr int64_t tile_size = C::max_rows * C::columns;
  static constexpr int64_t strip_tiles = strip_bytes / (tile_size * sizeof(Sum));

  Operand<T> a, b;
  int64_t k;
  Epilogue<Sum> epilogue;
  int height;
  int64_t chunk, a_panels, b_panels, blocks, pieces;
  bool a_is_shared;
  Word* shared = nullptr;
  Sum* sums = nullptr;  // of the chunks so far: C in tiles
  int64_t next_task = 0;

  TeamGemm(Operand<T> a_, Operand<T> b_, int64_t k_, const Epilogue<Sum>& epilogue_, int64_t threads)
      : a(a_), b(b_), k(k_), epilogue(epilogue_), height(C::height(a_.count)) {
    constexpr int64_t max_chunk = chunk_bytes / sizeof(Word) * C::depth;
    chunk = round_up(max(1, ceil_div(k, max(1, ceil_div(2 * k, 3 * max_chunk)))), 64);
    a_panels = ceil_div(a.count, height);
    b_panels = ceil_div(b.count, C::columns);
    a_is_shared = a.count < b.count;
    int64_t panels = a_is_shared ? b_panels : a_panels, others = a_is_shared ? a_panels : b_panels;
    int64_t panel_bytes = (a_is_shared ? b_size(chunk) : a_size(chunk)) * sizeof(Word);
    // as many blocks as fit the cache and balance the threads
    blocks = max(ceil_div(panels, max(1, private_bytes / panel_bytes)), threads == 1 ? 1 : 4 * threads);
    blocks = min(panels, round_up(blocks, threads));
    pieces = min(others, ceil_div(threads, blocks));
    shared = scratch<Word, shared_panels>(others * (a_is_shared ? a_size(chunk) : b_size(chunk)));
    if (chunk < k) sums = scratch<Sum, chunk_sums>(a_panels * b_panels * height * C::columns);
  }

  int64_t a_size(int64_t depth) const { return C::panel_size(height, depth); }
  int64_t b_size(int64_t depth) const { return C::panel_size(C::columns, depth); }
  int a_rows(int64_t panel) const { return static_cast<int>(min(height, a.count - panel * height)); }
  // Panels first .. last of either operand. Rows of k that are not contiguous are taken a few at a time over all
  // panels: each is likely to lie in a page of its own.
  void pack_a(Word* to, int64_t first, int64_t last, int64_t from, int64_t depth) const {
    int64_t step = a.k_stride == 1 ? max(1, depth) : pack_step;
    for (int64_t i = 0; i < depth; i += step)
      for (int64_t panel = first; panel < last; panel++)
        C::pack_a(to + (panel - first) * a_size(depth) + C::panel_offset(a_rows(panel), i),
                  a.at(panel * height, from + i), a_rows(panel), min(step, depth - i));
  }
  void pack_b(Word* to, int64_t first, int64_t last, int64_t from, int64_t depth) const {
    int64_t step = b.k_stride == 1 ? max(1, depth) : pack_step;
    for (int64_t i = 0; i < depth; i += step)
      for (int64_t panel = first; panel < last; panel++)
        C::pack_b(to + (panel - first) * b_size(depth) + C::panel_offset(C::columns, i),
                  b.at(panel * C::columns, from + i), min(step, depth - i));
  }

  void run(int thread, int team) {
    C::begin();
    int64_t from = 0;
    do {
      int64_t depth = min(chunk, k - from);
      if (thread == 0) next_task = 0;
      int64_t shared_count = a_is_shared ? a_panels : b_panels;
      int64_t first = shared_count * thread / team, last = shared_count * (thread + 1) / team;
      if (a_is_shared)
        pack_a(shared + first * a_size(depth), first, last, from, depth);
      else
        pack_b(shared + first * b_size(depth), first, last, from, depth);
      barrier(team);
      int64_t packed_block = -1;
      while (true) {
        int64_t task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED);
        if (task >= blocks * pieces) break;
        run_task(task / pieces, task % pieces, packed_block, from, depth);
        packed_block = task / pieces;
      }
      from += depth;
      if (from < k) barrier(team);
    } while (from < k);
    C::end();
  }

  void run_task(int64_t block, int64_t piece, int64_t packed_block, int64_t from, int64_t depth) {
    int64_t panels = a_is_shared ? b_panels : a_panels, others = a_is_shared ? a_panels : b_panels;
    int64_t first = panels * block / blocks, last = panels * (block + 1) / blocks;
    int64_t other_first = others * piece / pieces, other_last = others * (piece + 1) / pieces;
    int64_t size = a_is_shared ? b_size(depth) : a_size(depth);
    int64_t other_size = a_is_shared ? a_size(depth) : b_size(depth);
    Word* own = scratch<Word, private_panels>((last - first) * size);
    if (block != packed_block) {
      if (a_is_shared)
        pack_b(own, first, last, from, depth);
      else
        pack_a(own, first, last, from, depth);
    }
    // the panels of A and B in reach of this task
    int64_t i_first = a_is_shared ? other_first : first, i_last = a_is_shared ? other_last : last;
    int64_t j_first = a_is_shared ? first : other_first, j_last = a_is_shared ? last : other_last;
    int64_t a_step = a_size(depth), b_step = b_size(depth);
    auto a_at = [&](int64_t i) { return a_is_shared ? shared + i * a_step : own + (i - first) * a_step; };
    auto b_at = [&](int64_t j) { return a_is_shared ? own + (j - first) * b_step : shared + j * b_step; };
    if (!sums && (other_last - other_first) * other_size * static_cast<int64_t>(sizeof(Word)) <= private_bytes) {
      // All panels lie in the second-level cache: the epilogue writes long pieces of C's rows.
      int64_t fitting = strip_bytes / (b_step * static_cast<int64_t>(sizeof(Word)));
      if (fitting >= 4) {  // short panels: B's of a strip stay in the first-level cache for all rows
        int64_t step = min(fitting, strip_tiles);
        for (int64_t j = j_first; j < j_last; j += step)
          for (int64_t i = i_first; i < i_last; i++)
            run_strip(i, j, min(j + step, j_last), a_at(i), b_at(j), b_step, depth);
      } else {
        for (int64_t i = i_first; i < i_last; i++)
          for (int64_t j = j_first; j < j_last; j += strip_tiles)
            run_strip(i, j, min(j + strip_tiles, j_last), a_at(i), b_at(j), b_step, depth);
      }
      return;
    }
    // Use each shared panel as often as possible.
    auto tile = [&](int64_t i, int64_t j) { run_tile(i, j, a_at(i), b_at(j), from, depth); };
    for (int64_t other = other_first; other < other_last; other++)
      for (int64_t panel = first; panel < last; panel++) a_is_shared ? tile(other, panel) : tile(panel, other);
  }

  // Tiles (i, j_first) .. (i, j_last) of a C that is complete after this chunk.
  void run_strip(int64_t i, int64_t j_first, int64_t j_last, const Word* a_panel, const Word* b_panel, int64_t b_step,
                 int64_t depth) {
    alignas(64) Sum strip[strip_tiles * tile_size];
    for (int64_t j = 0; j < j_last - j_first; j++)
      multiply(i, j_first + j, a_panel, b_panel + j * b_step, strip + j * tile_size, 0, depth);
    int64_t columns = min((j_last - j_first) * C::columns, b.count - j_first * C::columns);
    epilogue(Tile<Sum>{i * height, j_first * C::columns, a_rows(i), columns, strip, C::columns, tile_size});
  }

  void run_tile(int64_t i, int64_t j, const Word* a_panel, const Word* b_panel, int64_t from, int64_t depth) {
    alignas(64) Sum small[tile_size];
    Sum* c = sums ? sums + (i * b_panels + j) * height * C::columns : small;
    multiply(i, j, a_panel, b_panel, c, from, depth);
    int64_t columns = min(C::columns, b.count - j * C::columns);
    if (from + depth >= k) epilogue(Tile<Sum>{i * height, j * C::columns, a_rows(i), columns, c, C::columns, 0});
  }

  void multiply(int64_t i, int64_t j, const Word* a_panel, const Word* b_panel, Sum* c, int64_t from, int64_t depth) {
    int rows = a_rows(i);
    int64_t columns = min(C::columns, b.count - j * C::columns);
    constexpr int64_t run = run_length * C::depth;
    int64_t i0 = 0;
    do {  // in parts, because a sum of sums is more accurate than one long running sum
      C::multiply(min(run, depth - i0), a_panel + C::panel_offset(rows, i0), b_panel + C::panel_offset(C::columns, i0),
                  c, from + i0 > 0, rows, columns);
      i0 += run;
    } while (i0 < depth);
  }
};

// Long k, small C: each thread sums its own part of k; the parts are added in order.
template <class T>
void gemm_split_k(Operand<T> a, Operand<T> b, int64_t k, int64_t splits, Epilogue<typename Core<T>::Sum> epilogue) {
  using Sum = typename Core<T>::Sum;
  int64_t m = a.count, n = b.count, part = round_up(ceil_div(k, splits), 64);
  Sum* sums = scratch<Sum, split_sums>(splits * m * n);
  parallel(splits, [&](int thread, int team) {
    for (int64_t split = thread; split < splits; split += team) {
      Sum* c = sums + split * m * n;
      auto keep = [=](const Tile<Sum>& tile) {
        tile.for_each_vector([=](int64_t i, int64_t j, int64_t lanes, Vector<Sum> v)
                                 __attribute__((always_inline)) { store(c + i * n + j, v, lanes); });
      };
      int64_t from = min(k, split * part);
      TeamGemm<T>(a.at(0, from), b.at(0, from), min(part, k - from), keep, 1).run(0, 1);
    }
    barrier(team);
    for_share(m, thread, team, [&](int64_t i) {
      for (int64_t j = 0; j < n; j += lanes<Sum>) {
        Sum* c = sums + i * n + j;
        Vector<Sum> total = load(c, n - j);
        for (int64_t split = 1; split < splits; split++) total += load(c + split * m * n, n - j);
        store(c, total, n - j);
      }
      epilogue(Tile<Sum>{i, 0, 1, n, sums + i * n, n, 0});
    });
  });
}

// epilogue(tile) for tiles that together are A B^T, from several threads at once; a is [m, k], b is [n, k]
template <class T>
void gemm(Operand<T> a, Operand<T> b, int64_t k, int threads, Epilogue<typename Core<T>::Sum> epilogue) {
  using Sum = typename Core<T>::Sum;
  constexpr int64_t work_per_thread = 1 << 19;  // multiplications; below, starting a thread costs more than it saves
  int64_t m = a.count, n = b.count;
  if (m > max_slice_rows || n > max_slice_columns) {
    for (int64_t i = 0; i < m; i += max_slice_rows)
      for (int64_t j = 0; j < n; j += max_slice_columns) {
        Operand<T> a_slice = a.at(i, 0), b_slice = b.at(j, 0);
        a_slice.count = min(a_slice.count, max_slice_rows);
        b_slice.count = min(b_slice.count, max_slice_columns);
        gemm(a_slice, b_slice, k, threads, Epilogue<Sum>([=](const Tile<Sum>& tile) {
               Tile<Sum> moved = tile;
               moved.row += i, moved.column += j;
               epilogue(moved);
             }));
      }
    return;
  }
  int64_t useful = max(1, min(threads, m * n * max(k, 16) / work_per_thread));
  int64_t splits = min(useful, k / 1024);
  if (splits > 1 && m * n <= 128 * 1024) return gemm_split_k(a, b, k, splits, epilogue);
  TeamGemm<T> team_gemm(a, b, k, epilogue, useful);
  parallel(useful, [&](int thread, int team) { team_gemm.run(thread, team); });
}

}  // namespace fastdl::ISA
