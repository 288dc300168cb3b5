// How the batch normalisation kernels go over an array [outer, channels, inner]. Plain C++: pure functions of numbers,
// tested alone. They know nothing of the device, so the result is the same on all.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastdl::cuda {

constexpr int kBatchNormThreads = 256;
// Of a block that keeps all that it reads.
constexpr int kBatchNormWholeThreads = 512;

// Vectors that a thread of such a block keeps: 128 bytes, half of the registers that leave room for a second block.
constexpr int batch_norm_kept(int width) { return width > 1 ? 8 : 16; }

// A column is a sequence of vectors that a block's threads go down. In planes it is all of a channel. Else it is one
// vector of neighbours in each outer slice, for each of which a thread keeps sums of its own: a lane of the column.
struct BatchNormPlan {
  int width;              // elements of a vector
  int lanes;              // 1 or width
  int64_t columns;        // side by side
  int64_t column_stride;  // elements from one column to the next
  int64_t items;          // vectors of a column
  int64_t row_items;      // of these, how many lie side by side
  int64_t spread;         // lanes side by side that are of one channel
  int block_columns;      // of a block, a power of two; its other threads share their items
  bool whole;             // a block keeps its columns in registers: one kernel does it all

  int64_t column_blocks() const { return (columns + block_columns - 1) / block_columns; }
};

// full: elements of 16 bytes, or 1 where an array is not aligned. operands: arrays that `whole` has to keep.
inline BatchNormPlan batch_norm_plan(int full, int64_t outer, int64_t channels, int64_t inner, int operands) {
  if (channels == 1) {  // one run of memory
    inner *= outer;
    outer = 1;
  }
  auto plan = [&](bool planes, int width) {
    const int64_t columns = planes ? channels : channels * inner / width;
    BatchNormPlan result{width,
                         planes ? 1 : width,
                         columns,
                         planes ? inner : width,
                         planes ? outer * (inner / width) : outer,
                         planes ? inner / width : 1,
                         planes ? 1 : inner,
                         1,
                         false};
    auto widen_block = [&](int most) {
      while (!planes && result.block_columns < most && result.block_columns < columns) result.block_columns *= 2;
    };
    widen_block(4);  // 64 bytes side by side use memory well, and leave most threads for the items
    const int64_t rows = kBatchNormWholeThreads / result.block_columns;
    result.whole = result.spread == 1 && result.items <= rows * (batch_norm_kept(width) / operands);
    if (!result.whole) widen_block(32);
    return result;
  };
  const bool odd = inner % full != 0, rows = channels * inner % full == 0;
  if (inner == 1) return plan(false, rows ? full : 1);
  if (!odd) return plan(true, full);
  // Odd planes, 7 x 7 say: no vector lies inside a channel. Small ones are bound by launches, so one kernel is best.
  const BatchNormPlan single = plan(true, 1);
  if (single.whole || !rows) return single;
  // Else vectors across channels. Their lanes leave partial sums, which for 16 bits cost as much as 8 / outer passes
  // over the array; single elements cost about one pass more each time.
  return outer >= 8 ? plan(false, full) : single;
}

// A column's items are cut into parts: as many as most_blocks allow, of whole steps, so many items as a block takes at
// once.
struct Partition {
  int64_t parts, part;
};

inline Partition partition(int64_t column_blocks, int64_t items, int64_t step, int64_t most_blocks) {
  const int64_t steps = (items + step - 1) / step;
  const int64_t parts = std::clamp<int64_t>(most_blocks / column_blocks, 1, steps);
  const int64_t part = (steps + parts - 1) / parts * step;
  return {(items + part - 1) / part, part};
}

}  // namespace fastdl::cuda
