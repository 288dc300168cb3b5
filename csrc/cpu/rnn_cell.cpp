// Recurrent cells: one step, both products, biases and gates together; and the gradients of the gates.
#include "rnn.h"

namespace fastdl::ISA {
FASTDL_CPU_RNN(DECLARE)

// Lane j of the result is the sum of the lanes of v[j].
template <int distance = 1, class V, int n>
INLINE V sums_of_lanes(V (&v)[n]) {
  V half[n / 2];
#pragma GCC unroll 8
  for (int i = 0; i < n; i += 2) {
    exchange<distance>(v[i], v[i + 1], std::make_integer_sequence<int, lanes<Scalar<V>>>());
    half[i / 2] = v[i] + v[i + 1];
  }
  if constexpr (n == 2)
    return half[0];
  else
    return sums_of_lanes<2 * distance>(half);
}

// sums[j] += the lanes of weight[j] * x, k elements; of the rows of weight only `rows` exist, the last stands in for
// the others
template <class T, int n>
INLINE void add_products(Vector<typename Words<T>::Sum> (&sums)[n], const T* x, const T* weight, int64_t k,
                         int64_t rows) {
  constexpr int64_t step = lanes<typename Words<T>::Word> * Words<T>::depth;
  const T* row[n];
  for (int j = 0; j < n; j++) row[j] = weight + min(j, rows - 1) * k;
  int64_t i = 0;
  for (; i + step <= k; i += step) {
    auto x_i = Words<T>::along_k(x + i, step);
#pragma GCC unroll 16
    for (int j = 0; j < n; j++) sums[j] = Words<T>::multiply_add(sums[j], Words<T>::along_k(row[j] + i, step), x_i);
  }
  if (i == k) return;
  auto x_i = Words<T>::along_k(x + i, k - i);
#pragma GCC unroll 16
  for (int j = 0; j < n; j++) sums[j] = Words<T>::multiply_add(sums[j], Words<T>::along_k(row[j] + i, k - i), x_i);
}

template <class T, int mode>
struct Cell {
  using R = Rows<T>;
  using S = typename R::Sum;
  using V = Vector<S>;
  static constexpr int gates = gates_of<mode>, width = lanes<S>, columns = R::columns;
  static constexpr int tile = R::max_rows * columns, products = mode == gru ? 4 : gates;
  static constexpr int64_t few = 6;  // sequences for which packing the weights costs more than it saves

  const CellArguments& arguments;
  const int64_t batch, size, hidden;
  const T *input, *hx, *cx, *weight_ih, *weight_hh, *bias_ih, *bias_hh;
  T *h, *c, *saved;

  explicit Cell(const CellArguments& a)
      : arguments(a),
        batch(a.batch),
        size(a.input_size),
        hidden(a.hidden),
        input(static_cast<const T*>(a.input)),
        hx(static_cast<const T*>(a.hx)),
        cx(static_cast<const T*>(a.cx)),
        weight_ih(static_cast<const T*>(a.weight_ih)),
        weight_hh(static_cast<const T*>(a.weight_hh)),
        bias_ih(static_cast<const T*>(a.bias_ih)),
        bias_hh(static_cast<const T*>(a.bias_hh)),
        h(static_cast<T*>(a.h)),
        c(static_cast<T*>(a.c)),
        saved(static_cast<T*>(a.gates)) {}

  // One vector of units of one sequence. z: the sums of both products; of gru's n, the hidden one's stands alone.
  INLINE void finish(int64_t r, int64_t unit, int64_t n, V (&z)[products]) const {
    V sums[gates], hidden_n{}, carry{};
#pragma GCC unroll 4
    for (int g = 0; g < gates; g++) {
      sums[g] = z[g];
      if (bias_ih) sums[g] += load(bias_ih + g * hidden + unit, n);
      if (bias_hh && !(mode == gru && g == 2)) sums[g] += load(bias_hh + g * hidden + unit, n);
    }
    if constexpr (mode == gru) {
      hidden_n = z[3];
      if (bias_hh) hidden_n += load(bias_hh + 2 * hidden + unit, n);
    }
    if constexpr (mode == lstm || mode == gru) carry = load((mode == lstm ? cx : hx) + r * hidden + unit, n);
#pragma GCC unroll 4
    for (int g = 0; g < independent_gates_of<mode>; g++) sums[g] = activate_gate<mode>(g, sums[g]);
    V h_ = finish_step<mode>(sums, hidden_n, carry);
    store(h + r * hidden + unit, h_, n);
    if constexpr (mode == lstm) store(c + r * hidden + unit, carry, n);
    if constexpr (mode == lstm || mode == gru)
      if (saved) {
        T* to = saved + r * 4 * hidden + unit;
#pragma GCC unroll 4
        for (int g = 0; g < gates; g++) store(to + g * hidden, sums[g], n);
        if constexpr (mode == gru) store(to + 3 * hidden, hidden_n, n);
      }
  }

  // Few sequences: bound by reading the weights, which are taken as they lie, both matrices in one pass.
  void run_few() const {
    int64_t vectors = ceil_div(hidden, width), threads = useful_threads();
    parallel(threads, [&](int thread, int team) {
      for_share(vectors, thread, team, [&](int64_t vector) {
        int64_t unit = vector * width, n = hidden - unit;
        V z[few][products];
        for (int g = 0; g < gates; g++)  // for all sequences, while the weights are in the first-level cache
          for (int64_t r = 0; r < batch; r++) {
            V sums[width] = {};
            int64_t row = g * hidden + unit;
            add_products<T>(sums, input + r * size, weight_ih + row * size, size, n);
            if (mode == gru && g == 2) {
              z[r][g] = sums_of_lanes(sums);
              for (V& sum : sums) sum = V{};
            }
            add_products<T>(sums, hx + r * hidden, weight_hh + row * hidden, hidden, n);
            z[r][mode == gru && g == 2 ? products - 1 : g] = sums_of_lanes(sums);
          }
        for (int64_t r = 0; r < batch; r++) finish(r, unit, n, z[r]);
      });
    });
  }

  // Otherwise each thread packs the weights of its units, block by block, for all sequences. Sequences are taken in
  // slices that bound the memory.
  void run_many() const {
    constexpr int64_t slice = 256;
    const int64_t input_stride = R::stride(size), hidden_stride = R::stride(hidden);
    const int64_t input_panel = R::panel_size(size), hidden_panel = R::panel_size(hidden);
    using Element = typename R::Element;
    int64_t rows = R::padded(min(batch, slice)), blocks = ceil_div(hidden, columns);
    Element* inputs = scratch<Element, shared_panels>(rows * (input_stride + hidden_stride));
    Element* states = inputs + rows * input_stride;
    parallel(useful_threads(), [&](int thread, int team) {
      R::begin();
      auto* panels = scratch<typename R::Word, private_panels>(gates * (input_panel + hidden_panel));
      for (int64_t first = 0; first < batch; first += slice) {
        int64_t count = min(slice, batch - first);
        if (first) barrier(team);
        for_share(R::padded(count), thread, team, [&](int64_t r) {
          R::set_row(inputs + r * input_stride, input + (first + r) * size, r < count ? size : 0, size);
          R::set_row(states + r * hidden_stride, hx + (first + r) * hidden, r < count ? hidden : 0, hidden);
        });
        barrier(team);
        int64_t packed = -1;
        for_tiles<R>(count, blocks, thread, team, [&](int64_t block, int64_t r0, int64_t tile_rows) {
          int64_t unit = block * columns, units = min(columns, hidden - unit);
          if (block != packed)
            for (int g = 0; g < gates; g++) {
              int64_t row = g * hidden + unit;
              auto* panel = panels + g * (input_panel + hidden_panel);
              R::pack(panel, {weight_ih + row * size, size, 1, units}, size);
              R::pack(panel + input_panel, {weight_hh + row * hidden, hidden, 1, units}, hidden);
            }
          packed = block;
          alignas(64) S sums[products * tile];
          for (int g = 0; g < gates; g++) {
            const auto* panel = panels + g * (input_panel + hidden_panel);
            bool apart = mode == gru && g == 2;
            R::multiply(size, inputs + r0 * input_stride, input_stride, panel, sums + g * tile, false, tile_rows,
                        units);
            R::multiply(hidden, states + r0 * hidden_stride, hidden_stride, panel + input_panel,
                        sums + (apart ? 3 : g) * tile, !apart, tile_rows, units);
          }
          for (int64_t r = 0; r < tile_rows; r++)
            for_vectors<S>(block, hidden, [&](int64_t at, int64_t n, int offset) __attribute__((always_inline)) {
              V z[products];
#pragma GCC unroll 4
              for (int g = 0; g < products; g++) z[g] = load(sums + g * tile + r * columns + offset);
              finish(first + r0 + r, at, n, z);
            });
        });
      }
      R::end();
    });
  }

  int64_t useful_threads() const {
    // a few sequences cost little more than reading the weights
    return max(1, min(arguments.threads, max(batch, 4) * gates * hidden * (size + hidden) / (1 << 19)));
  }
};

template <class T, int mode>
static void cell_gradient_of(const CellBackwardArguments& arguments) {
  using S = Compute<T>;
  constexpr int gates = gates_of<mode>, width = lanes<S>;
  const T *grad_h = static_cast<const T*>(arguments.grad_h), *grad_c = static_cast<const T*>(arguments.grad_c);
  const T *before = static_cast<const T*>(arguments.before), *after = static_cast<const T*>(arguments.after);
  const T* saved = static_cast<const T*>(arguments.gates);
  T* grad_input = static_cast<T*>(arguments.grad_gates_input);
  T *grad_hidden = static_cast<T*>(arguments.grad_gates_hidden), *grad_before = static_cast<T*>(arguments.grad_before);
  int64_t hidden = arguments.hidden, batch = arguments.batch;
  parallel(max(1, min(arguments.threads, batch * hidden / 8192)), [&](int thread, int team) {
    for_share(batch, thread, team, [&](int64_t r) {
      for (int64_t unit = 0; unit < hidden; unit += width) {
        int64_t n = hidden - unit, at = r * hidden + unit;
        Vector<S> a[4]{}, c{}, before_{}, carry{}, dz[gates], dz_hidden_n;
        if constexpr (mode == lstm || mode == gru) {
#pragma GCC unroll 4
          for (int g = 0; g < 4; g++) a[g] = load(saved + (4 * r + g) * hidden + unit, n);
          before_ = load(before + at, n);
        } else {
          a[0] = load(after + at, n);
        }
        if constexpr (mode == lstm) {
          c = load(after + at, n);
          if (grad_c) carry = load(grad_c + at, n);
        }
        gates_gradient<mode>(a, c, before_, grad_h ? load(grad_h + at, n) : Vector<S>{}, carry, dz, dz_hidden_n);
        if constexpr (mode == lstm || mode == gru) store(grad_before + at, carry, n);
#pragma GCC unroll 4
        for (int g = 0; g < gates; g++) {
          int64_t to = (r * gates + g) * hidden + unit;
          store(grad_input + to, dz[g], n);
          if constexpr (mode == gru) store(grad_hidden + to, g == 2 ? dz_hidden_n : dz[g], n);
        }
      }
    });
  });
}

void recurrent_cell(const CellArguments& arguments) {
  with_dtype_and_mode(arguments.dtype, arguments.mode, [&](auto type, auto mode) {
    Cell<typename decltype(type)::type, decltype(mode)::value> cell(arguments);
    arguments.batch <= cell.few ? cell.run_few() : cell.run_many();
  });
}

void recurrent_cell_backward(const CellBackwardArguments& arguments) {
  with_dtype_and_mode(arguments.dtype, arguments.mode, [&](auto type, auto mode) {
    cell_gradient_of<typename decltype(type)::type, decltype(mode)::value>(arguments);
  });
}

}  // namespace fastdl::ISA
