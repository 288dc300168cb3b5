// The library's recurrence, as plant.py has prepared it, against steps in double precision.
#include "zoo.h"
// BUG comes first
#include <vector>

#include "planted_rnn.cuh"
#include "reference.h"

namespace zoo {
namespace {

using namespace fastdl::cuda;
using namespace fastdl::cuda::recurrent;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// A layer's forward, or for RnnTanh its backward, of sequences of which half have one step less.
template <class T>
struct Layer {
  static constexpr int kSteps = 4;
  // What one rounding to T and sums in single precision allow.
  static constexpr double kAllowed = sizeof(T) == 2 ? 1. / 128 : 1e-5;
  const int mode, batch, hidden, gates = gates_of(mode), rows, stride = int(whole_chunks<T>(hidden));
  std::vector<int64_t> sizes;
  Array<T> projected, hx, cx, weight, output, h_n, c_n;

  Layer(int mode, int batch, int hidden)
      : mode(mode),
        batch(batch),
        hidden(hidden),
        rows((kSteps - 1) * batch + (batch + 1) / 2),
        sizes(kSteps, batch),
        projected(size_t(rows) * gates * hidden),
        hx(size_t(batch) * hidden),
        cx(size_t(batch) * hidden),
        weight(size_t(gates) * hidden * stride),
        output(size_t(rows) * hidden),
        h_n(size_t(batch) * hidden),
        c_n(size_t(batch) * hidden) {
    sizes.back() = (batch + 1) / 2;
    for (int i = 0; i < rows * gates * hidden; ++i) projected[i] = T(uniform());
    for (int i = 0; i < batch * hidden; ++i) hx[i] = cx[i] = T(uniform());
    for (int i = 0; i < gates * hidden * stride; ++i) weight[i] = T(i % stride < hidden ? uniform() / 4 : 0);
  }

  Sequence sequence() const { return {sizes.data(), sizes.data(), rows, batch, kSteps, hidden, hidden, false}; }

  template <class Prepare>
  void call(Memory<T> (*memory_of)(int, const Sequence&, bool, void*), const T* first, int columns, RecurrentPath path,
            const Prepare& prepare) {
    Array<char> workspace(memory_of(mode, sequence(), false, nullptr).bytes);
    const auto memory = memory_of(mode, sequence(), false, workspace.data);
    Task<T> task{};
    task.phase_count = 1;
    task.sequence = sequence();
    task.before = mode == kLstm ? cx.data : hx.data;
    task.output = output.data;
    prepare(task, memory);
    run("recurrence", task, memory, first, columns, false, path, nullptr);
  }

  double forward(RecurrentPath path) {
    call(forward_memory<T>, hx.data, hidden, path, [&](Task<T>& task, const Memory<T>& memory) {
      const Rows rows_of_weight{weight.data, stride};
      task.phases[0] = {{pair_of(memory.state, rows_of_weight, hidden, batch)}, 1, gates, 0, hidden, end_of(mode)};
      task.projected = projected.data;
      task.h_n = h_n.data;
      task.c_n = c_n.data;
    });
    double worst = 0;
    std::vector<double> c(batch * hidden);
    for (int i = 0; i < batch * hidden; ++i) c[i] = float(cx[i]);
    for (int step = 0; step < kSteps; ++step) {
      for (int row = 0; row < sizes[step]; ++row) {
        const T* before = step ? &output[((step - 1) * batch + row) * hidden] : &hx[row * hidden];
        for (int unit = 0; unit < hidden; ++unit) {
          double z[4];
          for (int g = 0; g < gates; ++g) {
            z[g] = float(projected[((step * batch + row) * gates + g) * hidden + unit]);
            z[g] += dot(before, &weight[(g * hidden + unit) * stride], 0, hidden).value;
          }
          double& carry = c[row * hidden + unit];
          if (mode == kLstm) carry = sigmoid(z[1]) * carry + sigmoid(z[0]) * std::tanh(z[2]);
          const double h = mode == kLstm ? sigmoid(z[3]) * std::tanh(carry) : std::tanh(z[0]);
          worst = worse(worst, std::fabs(float(output[(step * batch + row) * hidden + unit]) - h) / kAllowed);
          if (step + 1 == kSteps || row >= sizes[step + 1]) {
            worst = worse(worst, std::fabs(float(h_n[row * hidden + unit]) - h) / kAllowed);
            if (mode == kLstm) worst = worse(worst, std::fabs(float(c_n[row * hidden + unit]) - carry) / kAllowed);
          }
        }
      }
    }
    return worst;
  }

  double backward(RecurrentPath path) {
    Array<T> grad_output(size_t(rows) * hidden), grad_projected(size_t(rows) * hidden), grad_hx(size_t(batch) * hidden);
    for (int i = 0; i < rows * hidden; ++i) output[i] = T(uniform()), grad_output[i] = T(uniform());
    call(backward_memory<T>, nullptr, hidden, path, [&](Task<T>& task, const Memory<T>& memory) {
      const Rows rows_of_weight{weight.data, stride};
      task.phases[0] = {{pair_of(memory.state, rows_of_weight, hidden, batch)}, 1, 1, 0, hidden, gradient_of(mode)};
      task.backward = true;
      task.grad_output = grad_output.data;
      task.grad_projected = grad_projected.data;
      task.grad_hx = grad_hx.data;
    });
    double worst = 0;
    for (int step = kSteps - 1; step >= -1; --step) {
      for (int row = 0; row < (step < 0 ? batch : sizes[step]); ++row) {
        const bool joins = step + 1 == kSteps || row >= sizes[step + 1];
        for (int unit = 0; unit < hidden; ++unit) {
          double grad = 0;
          if (!joins) {
            grad = dot(&grad_projected[((step + 1) * batch + row) * hidden], &weight[unit * stride], 0, hidden).value;
          }
          double got = step < 0 ? float(grad_hx[row * hidden + unit]) : 0;
          if (step >= 0) {
            const int at = (step * batch + row) * hidden + unit;
            const double h = float(output[at]);
            grad = (grad + float(grad_output[at])) * (1 - h * h);
            got = float(grad_projected[at]);
          }
          worst = worse(worst, std::fabs(got - grad) / (kAllowed * (1 + std::fabs(grad))));
        }
      }
    }
    return worst;
  }
};

constexpr RecurrentPath kSteps = RecurrentPath::steps, kPersistent = RecurrentPath::persistent;

}  // namespace

extern const std::vector<Case> rnn_cases = {
    {"recurrence bf16", [] { return Layer<bfloat16>(kLstm, 3, 20).forward(kPersistent); }},
    {"recurrence float32", [] { return Layer<float>(kLstm, 3, 33).forward(kPersistent); }},
    {"recurrence float32, by steps", [] { return Layer<float>(kRnnTanh, 3, 140).forward(kSteps); }},
    {"recurrence of many rows", [] { return Layer<bfloat16>(kRnnTanh, 1030, 2).forward(kPersistent); }},
    {"recurrence gradient", [] { return Layer<bfloat16>(kRnnTanh, 5, 140).backward(kPersistent); }},
};

}  // namespace zoo
