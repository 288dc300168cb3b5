// Recurrent layers: what the kernels are given, and how a step is laid over the device. Plain C++; the plans are pure
// functions of numbers, tested alone.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "tiles.h"

typedef struct CUstream_st* cudaStream_t;

namespace fastdl::cuda {

enum RecurrentMode { kRnnTanh, kRnnRelu, kLstm, kGru, kRecurrentModes };

constexpr int gates_of(int mode) { return mode == kLstm ? 4 : mode == kGru ? 3 : 1; }

// ---- Arguments: G gates, as above (lstm i f g o; gru r z n); all arrays but weights and a cell's rows contiguous
// -----

struct Sequence {
  const int64_t* batch_sizes;         // [steps] on the host, or null: every sequence has all steps
  const int64_t* device_batch_sizes;  // the same on the device, or null: a launch for each step
  int64_t rows, batch, steps, hidden, state;
  bool reverse;
};

enum class RecurrentPath { automatic, steps, persistent };

// Rows of weights begin 16-byte aligned, `stride` elements from each other, and end with zeros if their depth isn't a
// whole number of 16 bytes. So do the rows of a cell's input and hx.
struct Rows {
  const void* data;
  int64_t stride;
};

struct RecurrenceArguments {
  int dtype, mode;
  Sequence sequence;
  const void* projected;  // [rows, G * hidden]: the input's part of the gates, with biases
  const void* hx;         // [batch, state]
  const void* cx;         // [batch, hidden], lstm
  Rows weight_hh;         // [G * hidden, state]
  const void* bias_hn;    // [hidden] or null, gru
  Rows weight_hr;         // [state, hidden] or null, lstm
  void* output;           // [rows, state]
  void* h_n;              // [batch, state]
  void* c_n;              // [batch, hidden], lstm
  void* gates;            // [rows, 4 * hidden] or null: lstm's i f g o, gru's r z n and the product inside n
  void* cells;            // [rows, hidden] or null: lstm's c
  bool allow_tf32;
  RecurrentPath path;
  void* workspace;  // as recurrence_workspace says, 16-byte aligned
  cudaStream_t stream;
};

struct RecurrenceBackwardArguments {
  int dtype, mode;
  Sequence sequence;
  const void* grad_output;       // [rows, state] or null
  const void* grad_h_n;          // [batch, state] or null
  const void* grad_c_n;          // [batch, hidden] or null
  const void *output, *hx, *cx;  // as above
  Rows weight_hh_transposed;     // [state, G * hidden]
  Rows weight_hr_transposed;     // [hidden, state] or null
  const void *gates, *cells;     // as above
  void* grad_projected;          // [rows, G * hidden]
  void* grad_hidden_n;           // [rows, hidden], gru: of the product inside n
  void* grad_hx;                 // [batch, state]
  void* grad_cx;                 // [batch, hidden], lstm
  void* grad_projection;         // [rows, state], with weight_hr: the whole gradient of h
  bool allow_tf32;
  RecurrentPath path;
  void* workspace;
  cudaStream_t stream;
};

// h, c = one step from hx, cx
struct CellArguments {
  int dtype, mode;
  Rows input;                     // [batch, input_size]
  Rows hx;                        // [batch, hidden]
  const void* cx;                 // [batch, hidden], lstm
  Rows weight_ih;                 // [G * hidden, input_size]
  Rows weight_hh;                 // [G * hidden, hidden]
  const void *bias_ih, *bias_hh;  // [G * hidden] or null
  void* h;                        // [batch, hidden]
  void* c;                        // [batch, hidden], lstm
  void* gates;                    // [batch, 4 * hidden] or null
  int64_t batch, input_size, hidden;
  bool allow_tf32;
  cudaStream_t stream;
};

struct CellBackwardArguments {
  int dtype, mode;
  const void *grad_h, *grad_c;  // [batch, hidden] or null
  const void* before;           // [batch, hidden]: lstm's cx, gru's hx
  const void* after;            // [batch, hidden]: lstm's c, rnn's h
  const void* gates;            // [batch, 4 * hidden], lstm and gru
  void* grad_gates_input;       // [batch, G * hidden]
  void* grad_gates_hidden;      // [batch, G * hidden], gru
  void* grad_before;            // [batch, hidden]: of lstm's cx, and gru's hx, products aside
  int64_t batch, hidden;
  cudaStream_t stream;
};

void recurrence(const RecurrenceArguments& arguments);
size_t recurrence_workspace(int dtype, int mode, const Sequence& sequence, bool projection);
void recurrence_backward(const RecurrenceBackwardArguments& arguments);
size_t recurrence_backward_workspace(int dtype, int mode, const Sequence& sequence, bool projection);
void recurrent_cell(const CellArguments& arguments);
void recurrent_cell_backward(const CellBackwardArguments& arguments);

// ---- Plans ----------------------------------------------------------------------------------------------------------

// A step is one product of the batch's rows with a weight, or two if there is a projection. Units of h come in groups
// of 8, and a group has 8 rows of the weight for each gate: a strip. A block has some groups, with all of their gates,
// and some rows of the batch, which come in tiles of 8. Its warps share the depth of its products, or its rows if they
// are many: a warp takes up to 4 tiles at once.
constexpr int kRecurrentWarps = 8, kRecurrentTiles = 4;
// Strips of a block. Sums in float64 take two registers.
constexpr int most_strips(Arithmetic arithmetic) { return arithmetic == Arithmetic::float64 ? 4 : 8; }
// Bytes of depth that a warp multiplies at once, 16 a lane.
constexpr int kRecurrentChunk = 64;

constexpr int element_bytes(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::half ? 2 : arithmetic == Arithmetic::float64 ? 8 : 4;
}
constexpr int64_t recurrent_chunks(Arithmetic arithmetic, int64_t depth) {
  return (depth * element_bytes(arithmetic) + kRecurrentChunk - 1) / kRecurrentChunk;
}

struct RecurrentProduct {
  int slots;             // strips of a group: gates, and one more where a gate's two products stay apart
  int64_t units, depth;  // depth: of both operands if there are two
};

struct RecurrentPlan {
  bool persistent;  // one launch for all steps, the weights in shared memory; else a launch for each product
  int unit_blocks, row_blocks;
  int groups[2];    // of a block, by product
  int rows;         // of a block, whole tiles
  int depth_warps;  // warps that share the depth; each such team has 32 rows at once
  size_t shared_bytes;

  int tiles() const { return std::min(rows / 8, kRecurrentTiles); }
};

// Shared memory of the warps' partial sums; on CUDA cores also of the operands that lanes exchange.
constexpr size_t recurrent_sums_bytes(Arithmetic arithmetic, int strips, int tiles, bool persistent) {
  const bool tensor_cores = arithmetic == Arithmetic::half || arithmetic == Arithmetic::tf32;
  const int compute_bytes = arithmetic == Arithmetic::float64 ? 8 : 4;
  const int exchanged = tensor_cores ? 0 : tiles + (persistent ? 0 : strips);
  return size_t(kRecurrentWarps) * (strips * tiles * 64 * compute_bytes + exchanged * 512);
}
constexpr size_t recurrent_weight_bytes(Arithmetic arithmetic, int strips, int64_t depth) {
  return size_t(recurrent_chunks(arithmetic, depth)) * strips * 512;
}

// The plan with the least estimated time of a step; persistent with unit_blocks 0: there is none, as the weights don't
// fit into the shared memory of all multiprocessors. count: of products.
inline RecurrentPlan recurrent_plan(Arithmetic arithmetic, const RecurrentProduct* products, int count, int64_t batch,
                                    bool persistent, DeviceLimits device) {
  auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int most = most_strips(arithmetic);
  const bool tensor_cores = arithmetic == Arithmetic::half || arithmetic == Arithmetic::tf32;
  // Per cycle and multiprocessor: bytes from L2 and from shared memory, multiplications.
  constexpr double kL2 = 24, kShared = 128;
  const double speed = arithmetic == Arithmetic::half      ? 1024
                       : arithmetic == Arithmetic::tf32    ? 512
                       : arithmetic == Arithmetic::float32 ? 96
                                                           : 48;
  const int64_t tiles = ceil_div(batch, 8), groups = ceil_div(products[0].units, 8);

  RecurrentPlan best{};
  double best_cost = 0;
  for (int first = 1; first * products[0].slots <= most; ++first) {
    const int64_t unit_blocks = ceil_div(groups, first);
    if (persistent && unit_blocks > device.multiprocessors) continue;
    RecurrentPlan plan{persistent, int(unit_blocks), 1, {first, 0}, 8, kRecurrentWarps, 0};
    int strips = first * products[0].slots;
    size_t weights = recurrent_weight_bytes(arithmetic, strips, products[0].depth);
    if (count == 2) {
      plan.groups[1] = int(ceil_div(ceil_div(products[1].units, 8), unit_blocks));
      const int more = plan.groups[1] * products[1].slots;
      if (more > most) {
        if (persistent) continue;
        plan.groups[1] = most / products[1].slots;  // a launch of its own, of more blocks
      }
      weights += recurrent_weight_bytes(arithmetic, plan.groups[1] * products[1].slots, products[1].depth);
      strips = std::max(strips, plan.groups[1] * products[1].slots);
    }
    // More rows a block read the weights less often, fewer rows keep more multiprocessors busy.
    for (int64_t block_tiles = 1; block_tiles < tiles * 2; block_tiles *= 2) {
      const int64_t used = std::min(block_tiles, tiles), row_blocks = ceil_div(tiles, used);
      const int64_t blocks = unit_blocks * row_blocks;
      if ((persistent && blocks > device.multiprocessors) || row_blocks > 65535) continue;
      plan.rows = int(used * 8);
      plan.row_blocks = int(row_blocks);
      int teams = 1;
      while (teams < kRecurrentWarps && teams * kRecurrentTiles < used) teams *= 2;
      plan.depth_warps = kRecurrentWarps / teams;
      plan.shared_bytes = recurrent_sums_bytes(arithmetic, strips, plan.tiles(), persistent);
      if (persistent) plan.shared_bytes += weights;
      if (plan.shared_bytes > size_t(device.shared_bytes)) continue;
      const int64_t passes = ceil_div(used, teams * kRecurrentTiles);
      double cost = 0;
      for (int i = 0; i < count; ++i) {
        const int block_strips = plan.groups[i] * products[i].slots;
        const double depth = double(recurrent_chunks(arithmetic, products[i].depth)) * kRecurrentChunk;
        const double weight_bytes = depth * block_strips * 8;
        const double multiplied = tensor_cores ? (block_strips + 1) / 2 * 16 : block_strips * 8;
        cost += depth * plan.rows / kL2 + plan.rows * multiplied * depth / element_bytes(arithmetic) / speed;
        cost += passes * weight_bytes * (persistent ? teams / kShared : 1 / kL2);
      }
      cost *= double(ceil_div(blocks, device.multiprocessors));
      if (best.unit_blocks == 0 || cost < best_cost) {
        best = plan;
        best_cost = cost;
      }
    }
  }
  best.persistent = persistent;
  return best;
}

}  // namespace fastdl::cuda
