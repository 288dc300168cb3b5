// Recurrent layers over a whole sequence, one layer in one direction, forward and backward through time. The weights
// are packed once; a thread has its own units at every step, so that their weights stay in its cache, and what it makes
// of them reaches the others at the one barrier of a step.
#include "rnn.h"

namespace fastdl::ISA {
FASTDL_CPU_RNN(DECLARE)

// ---- forward ----
template <class T>
struct ForwardMemory {
  using R = Rows<T>;
  typename R::Word *weight_hh, *weight_hr;
  typename R::Element *states[2], *hidden;  // h before and after a step; lstm's o tanh(c) where it is projected
  typename R::Sum* carry;                   // lstm's c, gru's h: a float for 16 bits
  int64_t carry_stride, bytes;

  ForwardMemory(const Sequence& s, int gates, bool projection, void* workspace) {
    Workspace all(workspace);
    weight_hh = all.take<typename R::Word>(ceil_div(s.hidden, R::columns) * gates * R::panel_size(s.state));
    for (auto& state : states) state = all.take<typename R::Element>(R::padded(s.batch) * R::stride(s.state));
    carry_stride = round_up(s.hidden, lanes<typename R::Sum>);
    carry = all.take<typename R::Sum>(s.batch * carry_stride);
    weight_hr = nullptr;
    hidden = nullptr;
    if (projection) {
      weight_hr = all.take<typename R::Word>(ceil_div(s.state, R::columns) * R::panel_size(s.hidden));
      hidden = all.take<typename R::Element>(R::padded(s.batch) * R::stride(s.hidden));
    }
    bytes = all.bytes();
  }
};

template <class T, int mode>
static void recurrence_of(const RecurrenceArguments& arguments) {
  using R = Rows<T>;
  using S = typename R::Sum;
  using Element = typename R::Element;
  constexpr int gates = gates_of<mode>, saved_gates = saved_gates_of<mode>, columns = R::columns;
  constexpr int tile = R::max_rows * columns;
  const Sequence& sequence = arguments.sequence;
  const int64_t hidden = sequence.hidden, state = sequence.state, batch = sequence.batch;
  const T *projected = static_cast<const T*>(arguments.projected), *hx = static_cast<const T*>(arguments.hx);
  const T *cx = static_cast<const T*>(arguments.cx), *weight_hh = static_cast<const T*>(arguments.weight_hh);
  const T *bias_hn = static_cast<const T*>(arguments.bias_hn), *weight_hr = static_cast<const T*>(arguments.weight_hr);
  T *output = static_cast<T*>(arguments.output), *h_n = static_cast<T*>(arguments.h_n);
  T *c_n = static_cast<T*>(arguments.c_n), *saved = static_cast<T*>(arguments.gates);
  T* cells = static_cast<T*>(arguments.cells);
  const ForwardMemory<T> memory(sequence, gates, weight_hr != nullptr, arguments.workspace);
  const int64_t state_stride = R::stride(state), hidden_stride = R::stride(hidden), carry_stride = memory.carry_stride;
  const int64_t panel = R::panel_size(state), panel_hr = R::panel_size(hidden);
  const int64_t blocks = ceil_div(hidden, columns), state_blocks = ceil_div(state, columns);
  StepBarrier barrier;

  parallel(step_threads(batch * gates * hidden * state, arguments.threads), [&](int thread, int team) {
    R::begin();
    int64_t round = 0;
    for_share(blocks * gates, thread, team, [&](int64_t i) {
      int64_t unit = i / gates * columns, row = i % gates * hidden + unit;
      R::pack(memory.weight_hh + i * panel, {weight_hh + row * state, state, 1, min(columns, hidden - unit)}, state);
    });
    if (weight_hr)
      for_share(state_blocks, thread, team, [&](int64_t i) {
        int64_t row = i * columns;
        R::pack(memory.weight_hr + i * panel_hr, {weight_hr + row * hidden, hidden, 1, min(columns, state - row)},
                hidden);
      });
    // Both buffers begin as hx: a sequence that joins later, as they do in reverse, finds its state in either.
    for_share(R::padded(batch), thread, team, [&](int64_t r) {
      for (Element* to : memory.states) R::set_row(to + r * state_stride, hx + r * state, r < batch ? state : 0, state);
      if (weight_hr) R::set_row(memory.hidden + r * hidden_stride, hx, 0, hidden);
      const T* from = mode == lstm ? cx : mode == gru ? hx : nullptr;
      if (from && r < batch)
        for (int64_t u = 0; u < hidden; u += lanes<S>)
          store(memory.carry + r * carry_stride + u, load(from + r * hidden + u, hidden - u));
    });
    barrier.wait(team, round);

    Walk walk(sequence, sequence.reverse);
    for (int64_t i = 0; i < sequence.steps; i++) {
      const int64_t count = walk.count(), first = walk.row;
      walk = walk.next();
      const int64_t next_count = walk.count();  // rows from here on are at their end
      const Element* before = memory.states[i & 1];
      Element* after = memory.states[~i & 1];
      auto put_h = [=](int64_t r, int64_t unit, int64_t n, Vector<S> h) __attribute__((always_inline)) {
        store(output + (first + r) * state + unit, h, n);
        R::put(after + r * state_stride + unit, h, n);
        if (r >= next_count) store(h_n + r * state + unit, h, n);
      };
      for_tiles<R>(count, blocks, thread, team, [&](int64_t block, int64_t r0, int64_t rows) {
        alignas(64) S products[gates * tile];
        int64_t units = min(columns, hidden - block * columns);
        for (int g = 0; g < gates; g++) {
          prefetch(projected + g * hidden + block * columns, gates * hidden, first + r0, rows, units);
          R::multiply(state, before + r0 * state_stride, state_stride, memory.weight_hh + (block * gates + g) * panel,
                      products + g * tile, false, rows, units);
        }
        // Two passes, for one long chain of dependent operations leaves a processor idle.
        constexpr int independent = independent_gates_of<mode>;
        for (int64_t r = r0; r < r0 + rows; r++)
          for_vectors<S>(block, hidden, [&](int64_t unit, int64_t n, int offset) __attribute__((always_inline)) {
            S* sums = products + (r - r0) * columns + offset;
            const T* input = projected + (first + r) * gates * hidden + unit;
#pragma GCC unroll 4
            for (int g = 0; g < independent; g++)
              store(sums + g * tile, activate_gate<mode>(g, load(input + g * hidden, n) + load(sums + g * tile)));
          });
        for (int64_t r = r0; r < r0 + rows; r++)
          for_vectors<S>(block, hidden, [&](int64_t unit, int64_t n, int offset) __attribute__((always_inline)) {
            const S* sums = products + (r - r0) * columns + offset;
            const T* input = projected + (first + r) * gates * hidden + unit;
            Vector<S> z[gates], hidden_n{};
#pragma GCC unroll 4
            for (int g = 0; g < independent; g++) z[g] = load(sums + g * tile);
            if constexpr (mode == gru) {
              z[2] = load(input + 2 * hidden, n);
              hidden_n = load(sums + 2 * tile);
              if (bias_hn) hidden_n += load(bias_hn + unit, n);
            } else if constexpr (mode != lstm) {
              z[0] = load(input, n) + load(sums);
            }
            S* carry = memory.carry + r * carry_stride + unit;
            Vector<S> c{};
            if constexpr (mode == lstm || mode == gru) c = load(carry);
            Vector<S> h = finish_step<mode>(z, hidden_n, c);
            if constexpr (mode == lstm || mode == gru) store(carry, c);
            if (mode == lstm && r >= next_count) store(c_n + r * hidden + unit, c, n);
            if (saved_gates && saved) {
              T* to = saved + (first + r) * saved_gates * hidden + unit;
#pragma GCC unroll 4
              for (int g = 0; g < gates; g++) store(to + g * hidden, z[g], n);
              if constexpr (mode == gru) store(to + 3 * hidden, hidden_n, n);
              if constexpr (mode == lstm) store(cells + (first + r) * hidden + unit, c, n);
            }
            if (mode == lstm && weight_hr)
              R::put(memory.hidden + r * hidden_stride + unit, h, n);
            else
              put_h(r, unit, n, h);
          });
      });
      barrier.wait(team, round);
      if (mode != lstm || !weight_hr) continue;
      for_tiles<R>(count, state_blocks, thread, team, [&](int64_t block, int64_t r0, int64_t rows) {
        alignas(64) S products[tile];
        R::multiply(hidden, memory.hidden + r0 * hidden_stride, hidden_stride, memory.weight_hr + block * panel_hr,
                    products, false, rows, state - block * columns);
        for (int64_t r = r0; r < r0 + rows; r++)
          for_vectors<S>(block, state, [&](int64_t unit, int64_t n, int offset) {
            put_h(r, unit, n, load(products + (r - r0) * columns + offset));
          });
      });
      barrier.wait(team, round);
    }
    R::end();
  });
}

void recurrence(const RecurrenceArguments& arguments) {
  with_dtype_and_mode(arguments.dtype, arguments.mode, [&](auto type, auto mode) {
    recurrence_of<typename decltype(type)::type, decltype(mode)::value>(arguments);
  });
}

int64_t recurrence_workspace(int dtype, int mode, const Sequence& sequence, bool projection) {
  int64_t bytes = 0;
  with_dtype_and_mode(dtype, mode, [&](auto type, auto mode_) {
    using T = typename decltype(type)::type;
    bytes = ForwardMemory<T>(sequence, gates_of<decltype(mode_)::value>, projection, nullptr).bytes;
  });
  return bytes;
}

// ---- backward ----
template <class T>
struct BackwardMemory {
  using R = Rows<T>;
  typename R::Word *weight_hh, *weight_hr;
  typename R::Element *grads[2], *grad_h;  // of the gates' sums, after and before a step; of a projected h
  typename R::Sum* carry;                  // lstm's gradient of c; gru's of h, products aside
  int64_t carry_stride, bytes;

  BackwardMemory(const Sequence& s, int gates, bool projection, void* workspace) {
    Workspace all(workspace);
    weight_hh = all.take<typename R::Word>(ceil_div(s.state, R::columns) * R::panel_size(gates * s.hidden));
    for (auto& grad : grads) grad = all.take<typename R::Element>(R::padded(s.batch) * R::stride(gates * s.hidden));
    carry_stride = round_up(s.hidden, lanes<typename R::Sum>);
    carry = all.take<typename R::Sum>(s.batch * carry_stride);
    weight_hr = nullptr;
    grad_h = nullptr;
    if (projection) {
      weight_hr = all.take<typename R::Word>(ceil_div(s.hidden, R::columns) * R::panel_size(s.state));
      grad_h = all.take<typename R::Element>(R::padded(s.batch) * R::stride(s.state));
    }
    bytes = all.bytes();
  }
};

template <class T, int mode>
static void recurrence_backward_of(const RecurrenceBackwardArguments& arguments) {
  using R = Rows<T>;
  using S = typename R::Sum;
  using Element = typename R::Element;
  constexpr int gates = gates_of<mode>, saved_gates = saved_gates_of<mode>, columns = R::columns;
  constexpr int tile = R::max_rows * columns;
  const Sequence& sequence = arguments.sequence;
  const int64_t hidden = sequence.hidden, state = sequence.state, batch = sequence.batch;
  const T* grad_output = static_cast<const T*>(arguments.grad_output);
  const T *grad_h_n = static_cast<const T*>(arguments.grad_h_n), *grad_c_n = static_cast<const T*>(arguments.grad_c_n);
  const T *output = static_cast<const T*>(arguments.output), *cells = static_cast<const T*>(arguments.cells);
  const T *hx = static_cast<const T*>(arguments.hx), *cx = static_cast<const T*>(arguments.cx);
  const T *weight_hh = static_cast<const T*>(arguments.weight_hh), *saved = static_cast<const T*>(arguments.gates);
  const T* weight_hr = static_cast<const T*>(arguments.weight_hr);
  T *grad_projected = static_cast<T*>(arguments.grad_projected), *grad_hx = static_cast<T*>(arguments.grad_hx);
  T *grad_cx = static_cast<T*>(arguments.grad_cx), *grad_projection = static_cast<T*>(arguments.grad_projection);
  T* grad_hidden_n = static_cast<T*>(arguments.grad_hidden_n);
  const BackwardMemory<T> memory(sequence, gates, weight_hr != nullptr, arguments.workspace);
  const int64_t grads_stride = R::stride(gates * hidden), state_stride = R::stride(state);
  const int64_t carry_stride = memory.carry_stride;
  const int64_t panel = R::panel_size(gates * hidden), panel_hr = R::panel_size(state);
  const int64_t blocks = ceil_div(hidden, columns), state_blocks = ceil_div(state, columns);
  StepBarrier barrier;

  parallel(step_threads(batch * gates * hidden * state, arguments.threads), [&](int thread, int team) {
    R::begin();
    int64_t round = 0;
    for_share(state_blocks, thread, team, [&](int64_t i) {
      int64_t unit = i * columns;
      R::pack(memory.weight_hh + i * panel, {weight_hh + unit, 1, state, min(columns, state - unit)}, gates * hidden);
    });
    if (weight_hr)
      for_share(blocks, thread, team, [&](int64_t i) {
        int64_t unit = i * columns;
        R::pack(memory.weight_hr + i * panel_hr, {weight_hr + unit, 1, hidden, min(columns, hidden - unit)}, state);
      });
    for_share(R::padded(batch), thread, team, [&](int64_t r) {
      for (Element* to : memory.grads) R::set_row(to + r * grads_stride, hx, 0, gates * hidden);
      if (weight_hr) R::set_row(memory.grad_h + r * state_stride, hx, 0, state);
    });
    barrier.wait(team, round);

    Walk walk(sequence, !sequence.reverse);
    int64_t done = 0;  // rows of the step before in this order, the next one in time
    for (int64_t i = 0; i <= sequence.steps; i++) {
      // A row joins with the gradients of h_n and c_n, and leaves with those of hx and cx.
      const int64_t count = walk.count(), first = walk.row;
      const Walk earlier = i < sequence.steps ? walk.next() : walk;
      const int64_t earlier_count = earlier.count(), earlier_first = earlier.row;
      const Element* from = memory.grads[i & 1];
      Element* to = memory.grads[~i & 1];
      // the gradient of h but for the part through the same step's output, from the product with weight_hh
      auto multiply = [&](int64_t block, int64_t r0, int64_t rows, S* products) __attribute__((always_inline)) {
        if (r0 < done)
          R::multiply(gates * hidden, from + r0 * grads_stride, grads_stride, memory.weight_hh + block * panel,
                      products, false, min(rows, done - r0), state - block * columns);
      };
      // the gradient of h, all of it; for a row that has left, stores it as hx's
      auto whole_gradient = [=](int64_t r, int64_t unit, int64_t n, const S* product, Vector<S> carry, Vector<S>& grad)
                                __attribute__((always_inline)) {
                                  grad = Vector<S>{};
                                  if (r < done) {
                                    grad = load(product) + carry;
                                    if (r >= count) return store(grad_hx + r * state + unit, grad, n);
                                  } else if (grad_h_n) {
                                    grad = load(grad_h_n + r * state + unit, n);
                                  }
                                  if (grad_output) grad += load(grad_output + (first + r) * state + unit, n);
                                };
      // the gradients of the gates' sums from the one of h (of lstm before a projection)
      auto put_gates = [=](int64_t r, int64_t unit, int64_t n, Vector<S> grad_h) __attribute__((always_inline)) {
        S* carry_at = memory.carry + r * carry_stride + unit;
        Vector<S> carry{};
        if constexpr (mode == lstm) {
          if (r < done)
            carry = load(carry_at);
          else if (grad_c_n)
            carry = load(grad_c_n + r * hidden + unit, n);
          if (r >= count) return store(grad_cx + r * hidden + unit, carry, n);
        }
        if (r >= count) return;
        const T* a_at = saved + (first + r) * saved_gates * hidden + unit;
        Vector<S> a[4]{}, c{}, before{}, dz[gates], dz_hidden_n;
#pragma GCC unroll 4
        for (int g = 0; g < saved_gates; g++) a[g] = load(a_at + g * hidden, n);
        if constexpr (mode == lstm || mode == gru) {
          const T *steps = mode == lstm ? cells : output, *x = mode == lstm ? cx : hx;
          before = load((r < earlier_count ? steps + (earlier_first + r) * hidden : x + r * hidden) + unit, n);
          if constexpr (mode == lstm) c = load(cells + (first + r) * hidden + unit, n);
        } else {
          a[0] = load(output + (first + r) * hidden + unit, n);
        }
        gates_gradient<mode>(a, c, before, grad_h, carry, dz, dz_hidden_n);
        if constexpr (mode == lstm || mode == gru) store(carry_at, carry);
#pragma GCC unroll 4
        for (int g = 0; g < gates; g++) {
          store(grad_projected + ((first + r) * gates + g) * hidden + unit, dz[g], n);
          if constexpr (mode == gru)
            if (g == 2) store(grad_hidden_n + (first + r) * hidden + unit, dz[g] = dz_hidden_n, n);
          R::put(to + r * grads_stride + g * hidden + unit, dz[g], n);
        }
      };
      if (weight_hr) {
        for_tiles<R>(max(count, done), state_blocks, thread, team, [&](int64_t block, int64_t r0, int64_t rows) {
          alignas(64) S products[tile];
          multiply(block, r0, rows, products);
          for (int64_t r = r0; r < r0 + rows; r++)
            for_vectors<S>(block, state, [&](int64_t unit, int64_t n, int offset) {
              Vector<S> grad;
              whole_gradient(r, unit, n, products + (r - r0) * columns + offset, Vector<S>{}, grad);
              if (r >= count) return;
              store(grad_projection + (first + r) * state + unit, grad, n);
              R::put(memory.grad_h + r * state_stride + unit, grad, n);
            });
        });
        barrier.wait(team, round);
      }
      for_tiles<R>(max(count, done), blocks, thread, team, [&](int64_t block, int64_t r0, int64_t rows) {
        alignas(64) S products[tile];
        int64_t unit = block * columns, units = min(columns, hidden - unit), used = min(rows, max(0, count - r0));
        if constexpr (mode == lstm || mode == gru)
          for (int g = 0; g < saved_gates; g++)
            prefetch(saved + g * hidden + unit, saved_gates * hidden, first + r0, used, units);
        if constexpr (mode == lstm) prefetch(cells + unit, hidden, first + r0, used, units);
        if (!weight_hr)
          multiply(block, r0, rows, products);
        else if (r0 < count)
          R::multiply(state, memory.grad_h + r0 * state_stride, state_stride, memory.weight_hr + block * panel_hr,
                      products, false, min(rows, count - r0), hidden - block * columns);
        for (int64_t r = r0; r < r0 + rows; r++)
          for_vectors<S>(block, hidden, [&](int64_t unit, int64_t n, int offset) __attribute__((always_inline)) {
            const S* product = products + (r - r0) * columns + offset;
            Vector<S> grad, direct{};
            if (weight_hr) {
              grad = r < count ? load(product) : Vector<S>{};
            } else {
              if (mode == gru && r < done) direct = load(memory.carry + r * carry_stride + unit);
              whole_gradient(r, unit, n, product, direct, grad);
            }
            put_gates(r, unit, n, grad);
          });
      });
      barrier.wait(team, round);
      done = count;
      walk = earlier;
    }
    R::end();
  });
}

void recurrence_backward(const RecurrenceBackwardArguments& arguments) {
  with_dtype_and_mode(arguments.dtype, arguments.mode, [&](auto type, auto mode) {
    recurrence_backward_of<typename decltype(type)::type, decltype(mode)::value>(arguments);
  });
}

int64_t recurrence_backward_workspace(int dtype, int mode, const Sequence& sequence, bool projection) {
  int64_t bytes = 0;
  with_dtype_and_mode(dtype, mode, [&](auto type, auto mode_) {
    using T = typename decltype(type)::type;
    bytes = BackwardMemory<T>(sequence, gates_of<decltype(mode_)::value>, projection, nullptr).bytes;
  });
  return bytes;
}

}  // namespace fastdl::ISA
