// Which tile computes a product on CUDA cores or tensor cores, and into how many parts its depth is split. Plain C++:
// pure functions of numbers, tested alone.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastdl::cuda {

enum class Arithmetic { half, tf32, float32, float64 };  // half: bfloat16 and float16

// The part of a product that one block computes, a warp at a time; 32 threads a warp.
struct Tile {
  int rows, columns;            // of the product
  int depth_bytes;              // of each row and column of the operands that a stage of the pipeline holds
  int stages;                   // of the pipeline
  int warp_rows, warp_columns;  // of the product that one warp computes
  bool flexible;                // takes operands of any stride, and the activation's gradient on the way in

  constexpr int threads() const { return rows / warp_rows * (columns / warp_columns) * 32; }
};

// 64 x 64 a warp is what shared memory can feed: each step of 16 reads 4 KiB for 64 Ki products, half of its bandwidth.
// 256 columns are what L2 can feed: 24 bytes a cycle and multiprocessor, 32 with 128. One block fills a multiprocessor.
constexpr Tile kLargeTile{128, 256, 128, 3, 64, 64, false};
// Where the large tile would leave multiprocessors idle, or is more than their shared memory holds.
constexpr Tile kMediumTile{128, 128, 64, 4, 64, 64, false};
// On CUDA cores: 8 x 8 products a thread, twice the warps.
constexpr Tile kPlainTile{128, 128, 64, 4, 32, 64, false};
// For the rest: small products, operands without 16-byte alignment or unit stride, fused activation gradients.
constexpr Tile kSmallTile{64, 64, 128, 4, 32, 32, true};

// The same for float64: 4 x 4 products a thread, as each takes two registers.
constexpr Tile kDoubleTile{64, 64, 128, 4, 16, 32, true};

enum class TileName { large, medium, plain, small, float64 };
constexpr Tile kTiles[] = {kLargeTile, kMediumTile, kPlainTile, kSmallTile, kDoubleTile};
// Blocks of each that a multiprocessor holds: what registers allow, and shared memory of 164 KiB. The compiler is held
// to it by __launch_bounds__.
constexpr int kResidentBlocks[] = {1, 2, 1, 2, 1};

// Sums wait in shared memory for the epilogue, a warp's behind the other's; the padding spreads them over the banks.
constexpr int kStagingPadding = 8;

// Shared memory of a block: the pipeline, with a third operand for a gradient, and later in its place the sums.
constexpr int shared_bytes(const Tile& tile, bool gradient, int compute_bytes) {
  const int stage = (tile.rows * (gradient ? 2 : 1) + tile.columns) * tile.depth_bytes;
  const int staging =
      tile.rows * (tile.columns / tile.warp_columns) * (tile.warp_columns + kStagingPadding) * compute_bytes;
  return std::max(tile.stages * stage, staging);
}

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // that a block may have
};

struct Plan {
  TileName tile;
  int splits;           // of the depth
  int64_t split_depth;  // the depth of all splits but the last; whole stages
};

// The plan with the least estimated time for a product [rows, depth] x [depth, columns]. The estimate is the busiest
// multiprocessor's: its blocks times a block's products, over the tile's speed.
// flexible: only flexible tiles will do. may_split: the caller has a workspace for partial sums. batch: of how many
// such products, that run at the same time.
inline Plan choose_plan(Arithmetic arithmetic, int64_t rows, int64_t columns, int64_t depth, bool flexible,
                        bool gradient, bool may_split, DeviceLimits device, int64_t batch = 1) {
  struct Candidate {
    TileName name;
    double speed;  // relative, of a full multiprocessor
  };
  const bool tensor_cores = arithmetic == Arithmetic::half || arithmetic == Arithmetic::tf32;
  // The large tile first: 1 by definition. The medium one is held back by L2. Small warps' tiles need twice the
  // shared-memory traffic, which CUDA cores notice less.
  const Candidate candidates[] = {{TileName::large, tensor_cores ? 1.0 : 0.0},
                                  {TileName::medium, tensor_cores ? 0.85 : 0.0},
                                  {TileName::plain, arithmetic == Arithmetic::float32 ? 1.0 : 0.0},
                                  {TileName::small, tensor_cores                        ? 0.5
                                                    : arithmetic == Arithmetic::float32 ? 0.7
                                                                                        : 0.0},
                                  {TileName::float64, arithmetic == Arithmetic::float64 ? 1.0 : 0.0}};
  const int element_bytes = arithmetic == Arithmetic::half ? 2 : arithmetic == Arithmetic::float64 ? 8 : 4;
  const int compute_bytes = arithmetic == Arithmetic::float64 ? 8 : 4;
  // Beside the products, in steps of depth: a tile's prologue and epilogue; and a partial sum written and read again.
  constexpr double kTileDepth = 128, kPartialDepth = 650;
  constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32};

  Plan best{};
  double best_cost = 0;
  for (const auto& [name, speed] : candidates) {
    const Tile& tile = kTiles[int(name)];
    if (speed == 0 || (flexible && !tile.flexible)) continue;
    if (shared_bytes(tile, gradient, compute_bytes) > device.shared_bytes) continue;
    const int64_t tile_depth = tile.depth_bytes / element_bytes;
    const int64_t stages = (depth + tile_depth - 1) / tile_depth;
    const int64_t tiles = batch * ((rows + tile.rows - 1) / tile.rows) *
                          std::max<int64_t>(1, (columns + tile.columns - 1) / tile.columns);
    for (const int splits : kSplits) {
      const int64_t split_stages = (stages + splits - 1) / splits;
      if (splits > 1 && (!may_split || split_stages < tile.stages || split_stages * (splits - 1) >= stages)) continue;
      const double blocks = double((tiles * splits + device.multiprocessors - 1) / device.multiprocessors);
      // Latency shows while a multiprocessor is not full.
      const double share = std::min(1.0, (blocks + 1) / (kResidentBlocks[int(name)] + 1));
      const double products = double(split_stages * tile_depth + kTileDepth) * tile.rows * tile.columns;
      double cost = blocks * products / (speed * share);
      const double partials = double(batch) * splits * double(rows) * double(columns);
      if (splits > 1) cost += kPartialDepth * partials / device.multiprocessors;
      if (best.splits == 0 || cost < best_cost) {
        best = {name, splits, split_stages * tile_depth};
        best_cost = cost;
      }
    }
  }
  return best;
}

}  // namespace fastdl::cuda
