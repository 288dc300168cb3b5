// Matrix products of bfloat16 on AMX: tiles of 16 rows x 32 k (A) or 16 pairs of k x 16 columns (B), 1 KiB each.
#pragma once
#include "gemm_core.h"

#if defined(__AMX_BF16__)
namespace fastdl::ISA {

// Up to 16 rows, 32 of k, as 16 x 16 pairs of k, row by row (A) or pair by pair (B); zeros where there is no element,
// because 0 * NaN would spread.
inline void pack_amx_tile(bf16* tile, Operand<bf16> source, int64_t k, bool pair_major) {
  Ints square[16];
  if (source.k_stride == 1) {
    for (int i = 0; i < 16; i++)
      square[i] = i < source.count ? Words<bf16>::along_k(source.data + i * source.stride, k) : Ints{};
  } else {
    for (int pair = 0; pair < 16; pair++)
      square[pair] = 2 * pair < k ? Words<bf16>::across(source.data + 2 * pair * source.k_stride, source.k_stride,
                                                        k - 2 * pair, source.count)
                                  : Ints{};
  }
  if ((source.k_stride == 1) == pair_major) transpose(square);
  for (int i = 0; i < 16; i++) store(reinterpret_cast<int32_t*>(tile) + 16 * i, square[i]);
}

// 32 x 32 sums in four tile registers
template <>
struct Core<bf16> {
  using Word = bf16;
  using Sum = float;
  static constexpr int max_rows = 32, columns = 32, depth = 1;
  static constexpr int tile_elements = 512, k_step = 32;

  static int64_t panel_offset(int, int64_t k) { return k / k_step * 2 * tile_elements; }
  static int64_t panel_size(int rows, int64_t k) { return panel_offset(rows, k + k_step - 1); }
  static int height(int64_t) { return max_rows; }
  static void begin() {  // oneDNN loads configurations of its own, so every use loads ours
    alignas(64) static const struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    _tile_loadconfig(&configuration);
  }
  static void end() { _tile_release(); }
  static void pack_a(bf16* panel, Operand<bf16> a, int rows, int64_t k) {
    a.count = rows;
    pack(panel, a, k, false);
  }
  static void pack_b(bf16* panel, Operand<bf16> b, int64_t k) { pack(panel, b, k, true); }

  static void multiply(int64_t k, const bf16* a, const bf16* b, float* c, bool accumulate, int, int64_t) {
    constexpr int row_bytes = columns * sizeof(float);
    if (accumulate) {
      _tile_loadd(0, c, row_bytes);
      _tile_loadd(1, c + 16, row_bytes);
      _tile_loadd(2, c + 16 * columns, row_bytes);
      _tile_loadd(3, c + 16 * columns + 16, row_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < k; i += k_step, a += 2 * tile_elements, b += 2 * tile_elements) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + tile_elements, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + tile_elements, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row_bytes);
    _tile_stored(1, c + 16, row_bytes);
    _tile_stored(2, c + 16 * columns, row_bytes);
    _tile_stored(3, c + 16 * columns + 16, row_bytes);
  }

 private:
  static void pack(bf16* panel, Operand<bf16> source, int64_t k, bool pair_major) {
    for (int64_t i = 0; i < k; i += k_step, panel += 2 * tile_elements) {
      pack_amx_tile(panel, source.at(0, i), k - i, pair_major);
      if (source.count > 16)
        pack_amx_tile(panel + tile_elements, source.at(16, i), k - i, pair_major);
      else
        __builtin_memset(panel + tile_elements, 0, tile_elements * sizeof(bf16));
    }
  }
};

}  // namespace fastdl::ISA
#endif
