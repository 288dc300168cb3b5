// Recurrent layers and cells. A layer's whole recurrence is one persistent kernel where the recurrent weights fit into
// the shared memory of all multiprocessors (as in Diamos et al., 2016), else a launch of the same code for each
// product.
//
// A block keeps the weights of a few units of h, of all their gates, and makes those units of some rows of the batch;
// so the gates meet in the block. At each step it reads the whole h of its rows, which all blocks of these rows have
// made, and waits for them at a barrier. The warps share the depth of the product: each element of h is read once a
// block, from L2 into the registers that the products take it from, and the weights are read from where each lane has
// put its own. Where a sum is taken in which order depends on sizes alone: the same bits in every run.
//
// Clusters could take the barrier's place, and bring h by way of distributed shared memory: what reads h is
// `Fetched`, what writes it `put_h`, and `wait_for_all` is the barrier.
#include "activation.cuh"
#include "matmul.cuh"
#pragma once
#include "activation.cuh"
#include "matmul.cuh"
#include "rnn.h"

namespace fastdl::cuda::recurrent {

constexpr int kThreads = kRecurrentWarps * 32;

// ---- Steps ----------------------------------------------------------------------------------------------------------

// A walk over the steps of a batch, whose rows lie step after step; from the first or from the last one.
struct Walk {
  const int64_t* batch_sizes;       // null: batch each
  int64_t batch, steps, step, row;  // the present step and its first row
  bool backwards;

  __host__ __device__ Walk(const int64_t* batch_sizes, const Sequence& sequence, bool backwards)
      : batch_sizes(batch_sizes),
        batch(sequence.batch),
        steps(sequence.steps),
        step(backwards ? sequence.steps - 1 : 0),
        row(0),
        backwards(backwards) {
    if (backwards) row = sequence.rows - count();
  }
  // Sequences that have this step; 0 outside.
  __host__ __device__ int64_t count() const {
    if (step < 0 || step >= steps) return 0;
    return batch_sizes ? batch_sizes[step] : batch;
  }
  __host__ __device__ Walk next() const {
    Walk after = *this;
    if (!backwards) after.row += count();
    after.step += backwards ? -1 : 1;
    if (backwards) after.row -= after.count();
    return after;
  }
};

// A step of the walk: in the order of the recurrence, or against it for the gradients, with one step more at the end.
struct Step {
  int64_t index, first, count;     // its first row, and how many
  int64_t done;                    // rows of the step before
  int64_t next_first, next_count;  // of the step after: rows from there on are at their end

  __host__ __device__ Step(int64_t index, const Walk& walk, int64_t done)
      : index(index), first(walk.row), count(walk.count()), done(done) {
    const Walk after = walk.next();
    next_first = after.row;
    next_count = after.count();
  }
};

// ---- Gates ----------------------------------------------------------------------------------------------------------

// What becomes of a product.
enum class End { rnn, lstm, gru, projection, rnn_gradient, lstm_gradient, gru_gradient, projection_gradient };

template <End end>
constexpr int kGates = end == End::lstm || end == End::lstm_gradient ? 4
                       : end == End::gru || end == End::gru_gradient ? 3
                                                                     : 1;

// A step of one unit: z, the gates' sums, becomes the gates (gru: r z n); hidden_n is gru's product inside the one with
// r; carry is c of lstm and h of gru, before and after the step. Returns h (of lstm before a projection).
template <End end, class T, class C = Compute<T>>
__device__ __forceinline__ C make_step(C (&z)[4], C hidden_n, bool relu, C& carry) {
  if constexpr (end == End::lstm) {
#pragma unroll
    for (int g = 0; g < 4; ++g) z[g] = g == 2 ? std::tanh(z[g]) : Math<T>::sigmoid(z[g]);
    carry = z[1] * carry + z[0] * z[2];
    return z[3] * std::tanh(carry);
  } else if constexpr (end == End::gru) {
    z[0] = Math<T>::sigmoid(z[0]);
    z[1] = Math<T>::sigmoid(z[1]);
    z[2] = std::tanh(z[2] + z[0] * hidden_n);
    carry = z[2] + z[1] * (carry - z[2]);
    return carry;
  } else {
    return relu ? activate<Activation::relu, T>(z[0], C(0)) : std::tanh(z[0]);
  }
}

// The reverse: from the gates (gru: r z n and its hidden_n; rnn: h itself), lstm's new c, and c of lstm or h of gru
// before the step, the gradients dz of the gates' sums and of hidden_n. grad_h is that of the h returned above; carry,
// on entry lstm's gradient of the new c, on return that of c (lstm) or h (gru) before the step, products aside.
template <End end, class T, class C = Compute<T>>
__device__ __forceinline__ void step_gradient(const C (&gate)[4], C c, C before, C grad_h, bool relu, C& carry,
                                              C (&dz)[4], C& grad_hidden_n) {
  if constexpr (end == End::lstm_gradient) {
    const C tanh_c = std::tanh(c), grad_c = carry + grad_h * gate[3] * (1 - tanh_c * tanh_c);
    dz[0] = grad_c * gate[2] * (gate[0] * (1 - gate[0]));
    dz[1] = grad_c * before * (gate[1] * (1 - gate[1]));
    dz[2] = grad_c * gate[0] * (1 - gate[2] * gate[2]);
    dz[3] = grad_h * tanh_c * (gate[3] * (1 - gate[3]));
    carry = grad_c * gate[1];
  } else if constexpr (end == End::gru_gradient) {
    dz[2] = grad_h * (1 - gate[1]) * (1 - gate[2] * gate[2]);
    dz[1] = grad_h * (before - gate[2]) * (gate[1] * (1 - gate[1]));
    dz[0] = dz[2] * gate[3] * (gate[0] * (1 - gate[0]));
    grad_hidden_n = dz[2] * gate[0];
    carry = grad_h * gate[1];
  } else {
    dz[0] = relu ? activate_backward<Activation::relu, T>(grad_h, gate[0], C(0))
                 : activate_backward<Activation::tanh, T>(grad_h, gate[0], C(0));
  }
}

// ---- What a kernel is given -----------------------------------------------------------------------------------------

// An operand [rows, depth] and a weight [gates * units, depth]; rows of both are whole chunks of 16 bytes, 16-byte
// aligned.
template <class T>
struct Pair {
  const T* rows;
  int64_t row_stride, alternate;  // rows of odd steps lie so much further
  int64_t last_row;               // that may be read
  const T* weight;
  int64_t weight_stride;
  int depth;
  int hole;  // the slot of a group that has no weight here; slots after it have the gate before
};

template <class T>
struct Phase {
  Pair<T> pairs[2];  // a cell adds two products
  int pair_count, slots, groups;
  int64_t units;
  End end;
};

// State between steps: rows as Pair has them, for even and odd steps, a step writing those that the next one reads.
template <class T>
struct State {
  T* data;
  int64_t stride, alternate;

  __device__ __forceinline__ T* row(int64_t step, int64_t row) const {
    return data + (step & 1) * alternate + row * stride;
  }
};

template <class T>
struct Task {
  Phase<T> phases[2];
  int phase_count;
  Sequence sequence;
  bool relu, backward;
  int rows, depth_warps, tiles;  // of the plan
  unsigned* arrived;             // [row blocks] at the barrier
  State<T> state;                // forward h, backward the gradients of the gates' sums (gru: hidden_n's in n's place)
  State<T> hidden;               // with a projection: forward o tanh(c), backward the whole gradient of h
  Compute<T>* carry;             // [batch, hidden] between steps, in single precision for 16 bits
  const T* before;               // [batch, hidden]: cx, or hx of gru; in a cell the carry itself
  int64_t before_stride;         // of its rows
  // Forward.
  const T *projected, *bias_ih, *bias_hh, *bias_hn;
  T *output, *h_n, *c_n, *gates, *cells;
  // Backward; output, gates and cells of above are read.
  const T *grad_output, *grad_h_n, *grad_c_n;
  T *grad_projected, *grad_hidden_n, *grad_hx, *grad_cx, *grad_projection;
};

// ---- Products -------------------------------------------------------------------------------------------------------

struct Words {  // 16 bytes
  uint32_t word[4];
};

__device__ __forceinline__ Words load_words(const void* address) {
  return __builtin_bit_cast(Words, *static_cast<const uint4*>(address));
}

// What other blocks have written in this kernel lies in L2.
__device__ __forceinline__ Words load_shared_words(const void* address) {
  return __builtin_bit_cast(Words, __ldcg(static_cast<const uint4*>(address)));
}

// Where a strip's row begins in its pair's weight, in chunks of 16 bytes; kNowhere if there is none.
constexpr uint32_t kNowhere = ~0u;
template <class T>
__device__ __forceinline__ uint32_t weight_row(const Phase<T>& phase, const Pair<T>& pair, int strip, int row,
                                               int64_t first_unit) {
  const int slot = strip % phase.slots;
  const int64_t unit = first_unit + strip / phase.slots * 8 + row;
  if (slot == pair.hole || unit >= phase.units) return kNowhere;
  return uint32_t(((slot - (slot > pair.hole)) * phase.units + unit) * (pair.weight_stride * int64_t(sizeof(T)) / 16));
}

// Copies a block's weights to shared memory: chunks of depth, strips, lanes, 16 bytes each. Lane 4 r + q has the q-th
// 16 bytes of the strip's row r.
template <class T>
__device__ __forceinline__ char* keep_weights(char* shared, const Phase<T>& phase, int64_t first_unit) {
  constexpr int width = 16 / sizeof(T);
  const Pair<T>& pair = phase.pairs[0];
  const int strips = phase.slots * phase.groups;
  const int chunks = int((pair.depth + 4 * width - 1) / (4 * width));
#pragma unroll 1
  for (int i = threadIdx.x; i < chunks * strips * 32; i += kThreads) {
    const int lane = i % 32, strip = i / 32 % strips;
    const int depth = (i / 32 / strips * 4 + lane % 4) * width;
    const uint32_t row = weight_row(phase, pair, strip, lane / 4, first_unit);
    const bool inside = row != kNowhere && depth < pair.depth;
    ptx::cp_async16(shared + int64_t(i) * 16, pair.weight + (inside ? int64_t(row) * width + depth : 0),
                    inside ? 16 : 0);
  }
  ptx::cp_async_commit();
  return shared + int64_t(chunks) * strips * 512;
}

// The sums of a warp: strips x tiles of 8 x 8. Lane 4 r + q has row r and the columns (rows of the batch) 2 q and 2 q
// + 1.
template <class T, Arithmetic arithmetic, bool resident>
struct Sums {
  static constexpr int kStrips = most_strips(arithmetic), kTiles = kRecurrentTiles, kWidth = 16 / sizeof(T);
  static constexpr bool kTensorCores = arithmetic == Arithmetic::half || arithmetic == Arithmetic::tf32;
  // Chunks on their way from memory. Weights that come along take registers; CUDA cores multiply longer than a chunk is
  // on its way.
  static constexpr int kAhead = !kTensorCores ? 1 : resident ? 4 : 2;

  Compute<T> sum[kStrips / 2][kTiles][4] = {};

  struct Fetched {
    Words rows[kTiles], weights[resident ? 1 : kStrips];
  };

  // Adds the product of a pair's rows with the block's strips. weights: of this pair in shared memory, if resident.
  // exchange: of this warp. first_row: of the warp's first tile.
  __device__ __forceinline__ void add(const Phase<T>& phase, const Pair<T>& pair, int64_t step, int64_t first_unit,
                                      int64_t first_row, int tiles, int depth_warp, int depth_warps,
                                      const Words* weights, Words* exchange) {
    const int lane = threadIdx.x % 32, strips = phase.slots * phase.groups;
    const int chunks = int((pair.depth + 4 * kWidth - 1) / (4 * kWidth));
    const T* rows[kTiles];
    uint32_t weight_rows[resident ? 1 : kStrips];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      rows[i] =
          pair.rows + (step & 1) * pair.alternate + min(first_row + i * 8 + lane / 4, pair.last_row) * pair.row_stride;
    }
    if constexpr (!resident) {
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        weight_rows[i] = i < strips ? weight_row(phase, pair, i, lane / 4, first_unit) : kNowhere;
      }
    }
    auto fetch = [&](Fetched& fetched, int chunk) {
      const int depth = (chunk * 4 + lane % 4) * kWidth;
      const bool inside = depth < pair.depth;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        fetched.rows[i] = i < tiles && inside ? load_shared_words(rows[i] + depth) : Words{};
      }
      if constexpr (!resident) {
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
          fetched.weights[i] = Words{};
          if (weight_rows[i] != kNowhere && inside) {
            fetched.weights[i] = load_words(pair.weight + int64_t(weight_rows[i]) * kWidth + depth);
          }
        }
      }
    };
    Fetched ring[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(ring[i], depth_warp + i * depth_warps);
#pragma unroll 1
    for (int chunk = depth_warp; chunk < chunks; chunk += kAhead * depth_warps) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int present = chunk + i * depth_warps;
        auto refill = [&] { fetch(ring[i], present + kAhead * depth_warps); };
        if (present < chunks) {
          const Words* chunk_weights = resident ? weights + int64_t(present) * strips * 32 : nullptr;
          multiply(ring[i], strips, tiles, chunk_weights, exchange, refill);
        }
      }
    }
  }

  // Calls refill() as soon as `fetched` is free.
  template <class Refill>
  __device__ __forceinline__ void multiply(Fetched& fetched, int strips, int tiles, const Words* weights,
                                           Words* exchange, const Refill& refill) {
    const int lane = threadIdx.x % 32;
    if constexpr (kTensorCores) {
      // A lane's 16 bytes are in any order of depth, the same for both operands: two steps of the matrix instruction.
      auto convert = [](Words& words) {
        if constexpr (arithmetic == Arithmetic::tf32) {
#pragma unroll
          for (uint32_t& word : words.word) word = ptx::to_tf32(float_of(word));
        }
      };
#pragma unroll
      for (int j = 0; j < kTiles; ++j) convert(fetched.rows[j]);
#pragma unroll
      for (int i = 0; i < kStrips; i += 2) {
        if (i < strips) {
          Words strip[2];
          if constexpr (resident) {
            strip[0] = weights[i * 32 + lane];
            strip[1] = i + 1 < strips ? weights[i * 32 + 32 + lane] : Words{};
          } else {
            strip[0] = fetched.weights[i];
            strip[1] = fetched.weights[i + 1];
          }
          convert(strip[0]);
          convert(strip[1]);
#pragma unroll
          for (int half = 0; half < 4; half += 2) {
            const uint32_t a[4] = {strip[0].word[half], strip[1].word[half], strip[0].word[half + 1],
                                   strip[1].word[half + 1]};
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              const uint32_t b[2] = {fetched.rows[j].word[half], fetched.rows[j].word[half + 1]};
              if (j < tiles) ptx::mma<T>(sum[i / 2][j], a, b);
            }
          }
        }
      }
      refill();
    } else {
      // Lanes exchange what each of them has read, and multiply 8 bytes of depth at once.
      constexpr int width = kWidth / 2;
      using Values = Vector<T, width>;
      auto read = [](const Words* words, int index, int part) {
        return reinterpret_cast<const Values*>(words + index * 4)[part];
      };
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < tiles) exchange[j * 32 + lane] = fetched.rows[j];
      }
      if constexpr (!resident) {
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
          if (i < strips) exchange[(tiles + i) * 32 + lane] = fetched.weights[i];
        }
        weights = exchange + tiles * 32;
      }
      __syncwarp();
      refill();
#pragma unroll 1
      for (int part = 0; part < kRecurrentChunk / 8; ++part) {
        Values rows[kTiles][2];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            if (j < tiles) rows[j][k] = read(exchange, j * 8 + lane % 4 * 2 + k, part);
          }
        }
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
          if (i < strips) {
            const Values weight = read(weights, i * 8 + lane / 4, part);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              if (j < tiles) {
#pragma unroll
                for (int k = 0; k < 2; ++k) {
#pragma unroll
                  for (int d = 0; d < width; ++d) {
                    sum[i / 2][j][i % 2 * 2 + k] += rows[j][k].element[d] * weight.element[d];
                  }
                }
              }
            }
          }
        }
      }
    }
  }

  // Leaves the sums for the block, pitch tiles to a strip; adds them to those of a pair before. What there is no weight
  // for is 0, which its products with zeros are not if the rows have infinities.
  __device__ __forceinline__ void store(Compute<T>* partial, int strips, int tiles, int pitch, int slots, int hole,
                                        bool add) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const bool empty = !resident && i % slots == hole;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (i < strips && j < tiles) {
          Compute<T>* to = partial + ((i * pitch + j) * 32 + lane) * 2;
          Compute<T> pair[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            pair[k] = (empty ? 0 : sum[i / 2][j][i % 2 * 2 + k]) + (!resident && add ? to[k] : 0);
          }
          cuda::store(to, pair);
        }
      }
    }
  }
};

// ---- Ends: what becomes of the sums of one unit of one row ----------------------------------------------------------

template <class T>
struct Inputs {
  Compute<T> gate[4], carry;
  Compute<T> outer;  // of the gradient; forward gru's bias inside n
  Compute<T> c, before;
};

template <class T>
struct Place {
  int64_t row, unit;  // of the batch, of h
};

// Reads what a unit needs beside the sums, before they are there.
template <End end, class T>
__device__ __forceinline__ void read_inputs(Inputs<T>& inputs, const Task<T>& task, const Step& step,
                                            const Place<T>& place) {
  constexpr int gates = kGates<end>;
  const auto [row, unit] = place;
  const int64_t hidden = task.sequence.hidden, state = task.sequence.state;
  const int64_t at = (step.first + row) * hidden + unit, own = row * hidden + unit;
  if constexpr (end == End::rnn || end == End::lstm || end == End::gru) {
#pragma unroll
    for (int g = 0; g < gates; ++g) {
      Compute<T> value = 0;
      if (task.projected) value = widen(task.projected[((step.first + row) * gates + g) * hidden + unit]);
      if (task.bias_ih) value += widen(task.bias_ih[g * hidden + unit]);
      if (task.bias_hh && !(end == End::gru && g == 2)) value += widen(task.bias_hh[g * hidden + unit]);
      inputs.gate[g] = value;
    }
    if (end == End::gru) inputs.outer = task.bias_hn ? widen(task.bias_hn[unit]) : Compute<T>(0);
    if (end != End::rnn)
      inputs.carry = task.carry ? task.carry[own] : widen(task.before[row * task.before_stride + unit]);
  } else if constexpr (end != End::projection) {
    const bool present = row < step.count, joins = row >= step.done;
    inputs.outer = inputs.carry = 0;
    if (end == End::projection_gradient || task.phase_count == 1) {
      const int64_t outer_at = (step.first + row) * state + unit;
      if (joins && task.grad_h_n) inputs.outer = widen(task.grad_h_n[row * state + unit]);
      if (present && task.grad_output) inputs.outer += widen(task.grad_output[outer_at]);
    }
    if (end == End::lstm_gradient || end == End::gru_gradient) {
      if (!joins) inputs.carry = task.carry[own];
      if (end == End::lstm_gradient && joins && task.grad_c_n) inputs.carry = widen(task.grad_c_n[own]);
      if (present) {
#pragma unroll
        for (int g = 0; g < 4; ++g) inputs.gate[g] = widen(task.gates[((step.first + row) * 4 + g) * hidden + unit]);
        const T* steps = end == End::lstm_gradient ? task.cells : task.output;
        if (end == End::lstm_gradient) inputs.c = widen(steps[at]);
        inputs.before =
            widen(row < step.next_count ? steps[(step.next_first + row) * hidden + unit] : task.before[own]);
      }
    } else if (end == End::rnn_gradient && present) {
      inputs.gate[0] = widen(task.output[at]);
    }
  }
}

// h of a unit, where all that need it will find it.
template <class T>
__device__ __forceinline__ void put_h(const Task<T>& task, const Step& step, const Place<T>& place, Compute<T> h) {
  const auto [row, unit] = place;
  const int64_t state = task.sequence.state;
  if (task.output) task.output[(step.first + row) * state + unit] = T(h);
  if (task.state.data) task.state.row(step.index + 1, row)[unit] = T(h);
  if (row >= step.next_count) task.h_n[row * state + unit] = T(h);
}

// sums[slot]: of the products.
template <End end, class T, class C = Compute<T>>
__device__ __forceinline__ void finish(Inputs<T>& inputs, const C (&sums)[4], const Task<T>& task, const Step& step,
                                       const Place<T>& place) {
  constexpr int gates = kGates<end>;
  const auto [row, unit] = place;
  const int64_t hidden = task.sequence.hidden, state = task.sequence.state;
  const int64_t own = row * hidden + unit;
  if constexpr (end == End::projection) {
    put_h(task, step, place, sums[0]);
  } else if constexpr (end == End::rnn || end == End::lstm || end == End::gru) {
    C(&gate)[4] = inputs.gate;
#pragma unroll
    for (int g = 0; g < gates; ++g) {
      if (end == End::gru && g == 2) {
        inputs.outer += sums[2];
        gate[2] += sums[3];
      } else {
        gate[g] += sums[g];
      }
    }
    const C h = make_step<end, T>(gate, inputs.outer, task.relu, inputs.carry);
    if constexpr (end != End::rnn) {
      if (task.carry) task.carry[own] = inputs.carry;
      if (task.gates) {
        T* to = task.gates + (step.first + row) * 4 * hidden + unit;
#pragma unroll
        for (int g = 0; g < gates; ++g) to[g * hidden] = T(gate[g]);
        if (end == End::gru) to[3 * hidden] = T(inputs.outer);
      }
    }
    if constexpr (end == End::lstm) {
      if (row >= step.next_count) task.c_n[own] = T(inputs.carry);
      if (task.cells) task.cells[(step.first + row) * hidden + unit] = T(inputs.carry);
      if (task.phase_count == 2) {
        task.hidden.row(0, row)[unit] = T(h);
        return;
      }
    }
    put_h(task, step, place, h);
  } else {
    const bool present = row < step.count, whole = end == End::projection_gradient || task.phase_count == 1;
    C grad_h = inputs.outer + (end == End::gru_gradient ? inputs.carry : C(0));
    if (whole ? row < step.done : present) grad_h += sums[0];
    if (!present) {  // the row has left
      if (whole) task.grad_hx[row * state + unit] = T(grad_h);
      if (end == End::lstm_gradient) task.grad_cx[own] = T(inputs.carry);
    } else if constexpr (end == End::projection_gradient) {
      task.grad_projection[(step.first + row) * state + unit] = T(grad_h);
      task.hidden.row(0, row)[unit] = T(grad_h);
    } else {
      C dz[4], grad_hidden_n;
      step_gradient<end, T>(inputs.gate, inputs.c, inputs.before, grad_h, task.relu, inputs.carry, dz, grad_hidden_n);
      if (end != End::rnn_gradient) task.carry[own] = inputs.carry;
      T* to = task.state.row(step.index + 1, row) + unit;
#pragma unroll
      for (int g = 0; g < gates; ++g) {
        task.grad_projected[((step.first + row) * gates + g) * hidden + unit] = T(dz[g]);
        if (end == End::gru_gradient && g == 2) {
          task.grad_hidden_n[(step.first + row) * hidden + unit] = T(grad_hidden_n);
          dz[g] = grad_hidden_n;
        }
        to[g * hidden] = T(dz[g]);
      }
    }
  }
}

template <class Function>
__device__ __forceinline__ void with_end(End end, const Function& function) {
  switch (end) {
    case End::rnn:
      return function.template operator()<End::rnn>();
    case End::lstm:
      return function.template operator()<End::lstm>();
    case End::gru:
      return function.template operator()<End::gru>();
    case End::projection:
      return function.template operator()<End::projection>();
    case End::rnn_gradient:
      return function.template operator()<End::rnn_gradient>();
    case End::lstm_gradient:
      return function.template operator()<End::lstm_gradient>();
    case End::gru_gradient:
      return function.template operator()<End::gru_gradient>();
    case End::projection_gradient:
      return function.template operator()<End::projection_gradient>();
  }
}

// ---- Kernels --------------------------------------------------------------------------------------------------------

// One product of one step, and what becomes of it.
template <class T, Arithmetic arithmetic, bool resident>
__device__ __forceinline__ void run_phase(const Task<T>& task, const Phase<T>& phase, const Step& step,
                                          const Words* weights, char* shared) {
  // Units whose inputs a thread has read before the product ends. float64 and weights that come along take registers.
  constexpr int at_once = resident && sizeof(T) < 8 ? 2 : 1;
  using C = Compute<T>;
  const int warp = threadIdx.x / 32;
  const int strips = phase.slots * phase.groups, block_units = phase.groups * 8;
  const int64_t first_unit = int64_t(blockIdx.x) * block_units;
  if (first_unit >= phase.units) return;
  const int units = int(min(phase.units - first_unit, int64_t(block_units)));
  // The rows that there are, and those that have a product.
  const bool late = phase.end == End::lstm_gradient && task.phase_count == 2;
  const int64_t block_end = int64_t(blockIdx.y + 1) * task.rows;
  const int64_t end = min(block_end, task.backward ? max(step.count, step.done) : step.count);
  const int64_t product_end = min(block_end, task.backward && !late ? step.done : step.count);
  const int teams = kRecurrentWarps / task.depth_warps, team = warp / task.depth_warps;
  const int pass_rows = teams * kRecurrentTiles * 8;
  const int warp_sums = strips * task.tiles * 64;
  C* partial = reinterpret_cast<C*>(shared);
  Words* exchange = reinterpret_cast<Words*>(shared + kRecurrentWarps * warp_sums * sizeof(C));
  exchange += warp * 32 * (task.tiles + (resident ? 0 : strips));

#pragma unroll 1
  for (int64_t first_row = block_end - task.rows; first_row < end; first_row += pass_rows) {
    const int pairs = int(min(end - first_row, int64_t(pass_rows))) * units;
#pragma unroll 1
    for (int begin = 0; begin < pairs; begin += at_once * kThreads) {
      Inputs<T> inputs[at_once];
      auto place_of = [&](int pair) { return Place<T>{first_row + pair / units, first_unit + pair % units}; };
      with_end(phase.end, [&]<End end>() {
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
          const int pair = begin + i * kThreads + int(threadIdx.x);
          if (pair < pairs) read_inputs<end>(inputs[i], task, step, place_of(pair));
        }
      });
      if (begin == 0) {
        const int64_t warp_row = first_row + team * kRecurrentTiles * 8;
        const int tiles = clamp((product_end - warp_row + 7) / 8, kRecurrentTiles);
        if (first_row > block_end - task.rows) __syncthreads();  // the last ones have been read
#pragma unroll 1
        for (int i = 0; i < phase.pair_count; ++i) {
          const Pair<T>& pair = phase.pairs[i];
          Sums<T, arithmetic, resident> sums;
          if (tiles > 0) {
            sums.add(phase, pair, step.index, first_unit, warp_row, tiles, warp % task.depth_warps, task.depth_warps,
                     weights, exchange);
          }
          sums.store(partial + warp * warp_sums, strips, tiles, task.tiles, phase.slots, pair.hole, i > 0);
        }
        __syncthreads();
      }
      with_end(phase.end, [&]<End end>() {
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
          const int pair = begin + i * kThreads + int(threadIdx.x);
          if (pair >= pairs) continue;
          const int row = pair / units, unit = pair % units;
          C totals[4] = {};
          if (first_row + row < product_end) {
            const C* from = partial + row / 32 * task.depth_warps * warp_sums;
            from +=
                ((unit / 8 * phase.slots * task.tiles + row % 32 / 8) * 32 + unit % 8 * 4 + row % 8 / 2) * 2 + row % 2;
#pragma unroll 1
            for (int w = 0; w < task.depth_warps; ++w, from += warp_sums) {
#pragma unroll
              for (int slot = 0; slot < 4; ++slot) {
                if (slot < phase.slots) totals[slot] += from[slot * task.tiles * 64];
              }
            }
          }
          finish<end>(inputs[i], totals, task, step, place_of(pair));
        }
      });
    }
  }
}

// Waits until all blocks of the same rows have come here; `visits` counts how often.
__device__ __forceinline__ void wait_for_all(unsigned* arrived, unsigned& visits) {
  visits += gridDim.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::arrive(arrived + blockIdx.y);
    while (int(ptx::arrivals(arrived + blockIdx.y) - visits) < 0) __nanosleep(20);
  }
  __syncthreads();
}

template <Arithmetic arithmetic, bool persistent>
constexpr int kLeastShared = int(recurrent_sums_bytes(arithmetic, 1, 1, persistent));

// All steps: a cooperative launch of (unit blocks, row blocks).
template <class T, Arithmetic arithmetic>
__global__ void __launch_bounds__(kThreads, 1) recurrence_kernel(const __grid_constant__ Task<T> task) {
  FDL_DYN_SHARED(char, shared, (kLeastShared<arithmetic, true>));
  const Words* weights[2];
  char* rest = shared;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weights[i] = reinterpret_cast<const Words*>(rest);
    if (i < task.phase_count) {
      rest = keep_weights(rest, task.phases[i], int64_t(blockIdx.x) * task.phases[i].groups * 8);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  unsigned visits = 0;
  const Sequence& sequence = task.sequence;
  Walk walk(sequence.device_batch_sizes, sequence, sequence.reverse != task.backward);
  int64_t done = 0;
  const int64_t steps = sequence.steps + task.backward;
#pragma unroll 1
  for (int64_t i = 0; i < steps; ++i) {
    const Step step(i, walk, done);
#pragma unroll 1
    for (int phase = 0; phase < task.phase_count; ++phase) {
      if (i + phase > 0) wait_for_all(task.arrived, visits);
      run_phase<T, arithmetic, true>(task, task.phases[phase], step, phase ? weights[1] : weights[0], rest);
    }
    done = step.count;
    walk = walk.next();
  }
}

// One phase of one step, of a recurrence or a cell.
template <class T, Arithmetic arithmetic>
__global__ void __launch_bounds__(kThreads, 1)
    recurrent_step_kernel(const __grid_constant__ Task<T> task, const Step step, int phase) {
  FDL_DYN_SHARED(char, shared, (kLeastShared<arithmetic, false>));
  run_phase<T, arithmetic, false>(task, task.phases[phase], step, nullptr, shared);
}

// What a recurrence begins with: rows of the state as hx, or 0, and 0 behind them; the carry; nobody at the barrier.
template <class T>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const __grid_constant__ Task<T> task, const T* hx, int64_t columns, int64_t state_size,
                 int64_t hidden_size, int64_t carry_size, int barriers) {
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, distance = int64_t(gridDim.x) * kThreads;
  for (int64_t i = first; i < state_size; i += distance) {
    const int64_t row = i % task.state.alternate / task.state.stride, column = i % task.state.stride;
    const bool inside = hx && row < task.sequence.batch && column < columns;
    task.state.data[i] = inside ? hx[row * columns + column] : T(0.f);
  }
  for (int64_t i = first; i < hidden_size; i += distance) task.hidden.data[i] = T(0.f);
  for (int64_t i = first; i < carry_size; i += distance) task.carry[i] = widen(task.before[i]);
  for (int64_t i = first; i < barriers; i += distance) task.arrived[i] = 0;
}

// ---- Host -----------------------------------------------------------------------------------------------------------

template <class T>
int64_t whole_chunks(int64_t columns) {
  constexpr int64_t width = 16 / sizeof(T);
  return ceil_div(columns, width) * width;
}

// The parts of a recurrence's workspace; from null, only their size is counted.
template <class T>
struct Memory {
  State<T> state, hidden;
  int64_t state_size, hidden_size, carry_size;
  Compute<T>* carry;
  unsigned* arrived;
  int barriers;
  size_t bytes = 0;

  // columns: of the state; projected: of what is between the two products of a step, or 0.
  Memory(const Sequence& sequence, int64_t columns, int64_t projected, bool carries, void* workspace) {
    auto take = [&]<class E>(E*& part, int64_t count) {
      part = workspace ? reinterpret_cast<E*>(static_cast<char*>(workspace) + bytes) : nullptr;
      bytes += ceil_div<size_t>(count * sizeof(E), 16) * 16;
    };
    const int64_t stride = whole_chunks<T>(columns), hidden_stride = whole_chunks<T>(projected);
    state_size = 2 * sequence.batch * stride;
    hidden_size = sequence.batch * hidden_stride;
    carry_size = carries ? sequence.batch * sequence.hidden : 0;
    barriers = int(ceil_div<int64_t>(sequence.batch, 8));
    take(state.data, state_size);
    take(hidden.data, hidden_size);
    take(carry, carry_size);
    take(arrived, barriers);
    state.stride = stride;
    state.alternate = sequence.batch * stride;
    hidden.stride = hidden_stride;
    hidden.alternate = 0;
  }
};

inline bool has_carry(int mode) { return mode == kLstm || mode == kGru; }

inline bool cooperative() {
#ifdef FDL_EMULATE
  return true;
#else
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute");
  return value != 0;
#endif
}

inline End end_of(int mode) { return mode == kLstm ? End::lstm : mode == kGru ? End::gru : End::rnn; }
inline End gradient_of(int mode) {
  return mode == kLstm ? End::lstm_gradient : mode == kGru ? End::gru_gradient : End::rnn_gradient;
}

template <class T>
Pair<T> pair_of(const State<T>& state, const Rows& weight, int64_t depth, int64_t batch) {
  return {state.data,
          state.stride,
          state.alternate,
          batch - 1,
          static_cast<const T*>(weight.data),
          weight.stride,
          int(whole_chunks<T>(depth)),
          4};
}

template <class T>
Memory<T> forward_memory(int mode, const Sequence& sequence, bool projection, void* workspace) {
  return {sequence, sequence.state, projection ? sequence.hidden : 0, has_carry(mode), workspace};
}

template <class T>
Memory<T> backward_memory(int mode, const Sequence& sequence, bool projection, void* workspace) {
  return {sequence, gates_of(mode) * sequence.hidden, projection ? sequence.state : 0, has_carry(mode), workspace};
}

template <class T>
RecurrentPlan plan_of(const Task<T>& task, Arithmetic arithmetic, bool persistent) {
  RecurrentProduct products[2];
  for (int i = 0; i < task.phase_count; ++i) {
    const Phase<T>& phase = task.phases[i];
    int64_t depth = 0;
    for (int j = 0; j < phase.pair_count; ++j) depth += phase.pairs[j].depth;
    products[i] = {phase.slots, phase.units, depth};
  }
  return recurrent_plan(arithmetic, products, task.phase_count, task.sequence.batch, persistent, device_limits());
}

template <class T>
void take_plan(Task<T>& task, const RecurrentPlan& plan) {
  for (int i = 0; i < task.phase_count; ++i) task.phases[i].groups = plan.groups[i];
  task.rows = plan.rows;
  task.depth_warps = plan.depth_warps;
  task.tiles = plan.tiles();
}

// Calls function<arithmetic>().
template <class T, class Function>
void dispatch_arithmetic(bool allow_tf32, const Function& function) {
  if constexpr (sizeof(T) == 2) {
    function.template operator()<Arithmetic::half>();
  } else if constexpr (sizeof(T) == 8) {
    function.template operator()<Arithmetic::float64>();
  } else if (allow_tf32) {
    function.template operator()<Arithmetic::tf32>();
  } else {
    function.template operator()<Arithmetic::float32>();
  }
}

template <class T, Arithmetic arithmetic>
void launch_step(const Task<T>& task, const RecurrentPlan& plan, const Step& step, cudaStream_t stream) {
  for (int i = 0; i < task.phase_count; ++i) {
    const int64_t unit_blocks = ceil_div<int64_t>(task.phases[i].units, task.phases[i].groups * 8);
    launch(recurrent_step_kernel<T, arithmetic>,
           Shape(dim3(unsigned(unit_blocks), unsigned(plan.row_blocks)), dim3(kThreads), plan.shared_bytes, stream),
           task, step, i);
  }
}

template <class T>
void run(const char* name, Task<T>& task, const Memory<T>& memory, const T* hx, int64_t columns, bool allow_tf32,
         RecurrentPath path, cudaStream_t stream) {
  task.state = memory.state;
  task.hidden = memory.hidden;
  task.carry = memory.carry_size ? memory.carry : nullptr;
  task.arrived = memory.arrived;
  const Sequence& sequence = task.sequence;
  dispatch_arithmetic<T>(allow_tf32, [&]<Arithmetic arithmetic>() {
    RecurrentPlan plan{};
    // A single step would keep weights for nothing.
    const bool on_device = !sequence.batch_sizes || sequence.device_batch_sizes;
    if (path == RecurrentPath::automatic ? sequence.steps > 1 && on_device && cooperative()
                                         : path == RecurrentPath::persistent) {
      require(on_device, name, "device_batch_sizes", 0, "an address, with batch_sizes and path 2");
      plan = plan_of(task, arithmetic, true);
      require(plan.unit_blocks || path == RecurrentPath::automatic, name, "path", int(path),
              "0 or 1: the weights don't fit into shared memory");
    }
    if (plan.unit_blocks == 0) plan = plan_of(task, arithmetic, false);
    take_plan(task, plan);

    const int64_t blocks = ceil_div<int64_t>(std::max(memory.state_size, memory.carry_size), kThreads);
    launch(begin_kernel<T>, Shape(dim3(unsigned(std::min(blocks, kMaximumBlocks))), dim3(kThreads), 0, stream), task,
           hx, columns, memory.state_size, memory.hidden_size, task.backward ? 0 : memory.carry_size, memory.barriers);
    if (plan.persistent) {
      Shape shape(dim3(unsigned(plan.unit_blocks), unsigned(plan.row_blocks)), dim3(kThreads), plan.shared_bytes,
                  stream);
      shape.cooperative = true;
      launch(recurrence_kernel<T, arithmetic>, shape, task);
      return;
    }
    Walk walk(sequence.batch_sizes, sequence, sequence.reverse != task.backward);
    int64_t done = 0;
    for (int64_t i = 0; i < sequence.steps + task.backward; ++i, walk = walk.next()) {
      const Step step(i, walk, done);
      launch_step<T, arithmetic>(task, plan, step, stream);
      done = step.count;
    }
  });
}

}  // namespace fastdl::cuda::recurrent
