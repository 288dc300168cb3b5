// Recurrent layers and cells: arguments, and a cell's gradients. All else is in rnn.cuh.
#include "rnn.cuh"

namespace fastdl::cuda {

using namespace recurrent;

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) cell_backward_kernel(CellBackwardArguments arguments) {
  const int64_t hidden = arguments.hidden, count = arguments.batch * hidden;
  const auto* gates = static_cast<const T*>(arguments.gates);
  auto read = [](const void* array, int64_t i) {
    return array ? widen(static_cast<const T*>(array)[i]) : Compute<T>(0);
  };
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / hidden, unit = i % hidden;
    auto gradient = [&]<End end>() {
      constexpr int count_of = kGates<end>;
      Compute<T> gate[4] = {}, dz[4] = {}, grad_hidden_n = 0, carry = read(arguments.grad_c, i);
      if (end == End::rnn_gradient) gate[0] = read(arguments.after, i);
#pragma unroll
      for (int g = 0; g < (end == End::rnn_gradient ? 0 : 4); ++g) {
        gate[g] = widen(gates[(row * 4 + g) * hidden + unit]);
      }
      step_gradient<end, T>(gate, read(arguments.after, i), read(arguments.before, i), read(arguments.grad_h, i),
                            arguments.mode == kRnnRelu, carry, dz, grad_hidden_n);
#pragma unroll
      for (int g = 0; g < count_of; ++g) {
        const int64_t to = (row * count_of + g) * hidden + unit;
        static_cast<T*>(arguments.grad_gates_input)[to] = T(dz[g]);
        if (end == End::gru_gradient) {
          static_cast<T*>(arguments.grad_gates_hidden)[to] = T(g == 2 ? grad_hidden_n : dz[g]);
        }
      }
      if (end != End::rnn_gradient) static_cast<T*>(arguments.grad_before)[i] = T(carry);
    };
    if (arguments.mode == kLstm) {
      gradient.template operator()<End::lstm_gradient>();
    } else if (arguments.mode == kGru) {
      gradient.template operator()<End::gru_gradient>();
    } else {
      gradient.template operator()<End::rnn_gradient>();
    }
  }
}

// Checks codes and sizes.
void check_sequence(const char* name, int mode, const Sequence& sequence) {
  require(mode >= 0 && mode < kRecurrentModes, name, "mode", mode, "0 (rnn_tanh), 1 (rnn_relu), 2 (lstm) or 3 (gru)");
  require(sequence.batch >= 1, name, "batch", sequence.batch, "at least 1");
  require(sequence.steps >= 1, name, "steps", sequence.steps, "at least 1");
  for (const auto& [argument, size] : {std::pair("hidden", sequence.hidden), std::pair("state", sequence.state)}) {
    require(size >= 1 && size < (int64_t(1) << 28), name, argument, size, "1 to 2^28 - 1");
  }
  int64_t total = sequence.steps * sequence.batch, limit = sequence.batch;
  if (sequence.batch_sizes) {
    total = 0;
    for (int64_t i = 0; i < sequence.steps; ++i) {
      const int64_t size = sequence.batch_sizes[i];
      require(size >= 1 && size <= limit && (i > 0 || size == limit), name, "batch_sizes", size,
              "the batch, then numbers from 1 that do not grow");
      limit = size;
      total += size;
    }
  }
  require(total == sequence.rows, name, "rows", sequence.rows, "the sum of batch_sizes, or steps * batch");
}

void check_projection(const char* name, int mode, const Sequence& sequence, bool projection) {
  require(projection || sequence.state == sequence.hidden, name, "state", sequence.state, "hidden, without weight_hr");
  require(!projection || mode == kLstm, name, "mode", mode, "2 (lstm), with weight_hr");
}

void check_address(const char* name, const char* argument, const void* address) {
  require(address, name, argument, 0, "an address");
}

// count: of rows of a weight, whose chunks kernels count in 32 bits; 0 for a cell's rows.
void check_rows(const char* name, const char* argument, const Rows& rows, int64_t columns, int element_bytes,
                int64_t count) {
  check_address(name, argument, rows.data);
  require(aligned(16, rows.data), name, argument, rows.data, "16-byte aligned");
  require(rows.stride >= columns && rows.stride * element_bytes % 16 == 0, name, argument, rows.stride,
          "of a stride that holds its columns, a multiple of 16 bytes");
  require(count * (rows.stride * element_bytes / 16) < int64_t(kNowhere), name, argument, count,
          "rows of less than 64 GiB together");
}

}  // namespace

size_t recurrence_workspace(int dtype, int mode, const Sequence& sequence, bool projection) {
  size_t bytes = 0;
  dispatch_dtype("recurrence_workspace", dtype,
                 [&]<class T>() { bytes = forward_memory<T>(mode, sequence, projection, nullptr).bytes; });
  return bytes;
}

size_t recurrence_backward_workspace(int dtype, int mode, const Sequence& sequence, bool projection) {
  size_t bytes = 0;
  dispatch_dtype("recurrence_backward_workspace", dtype,
                 [&]<class T>() { bytes = backward_memory<T>(mode, sequence, projection, nullptr).bytes; });
  return bytes;
}

void recurrence(const RecurrenceArguments& arguments) {
  const char* name = "recurrence";
  const auto& [dtype, mode, sequence, projected, hx, cx, weight_hh, bias_hn, weight_hr, output, h_n, c_n, gates, cells,
               allow_tf32, path, workspace, stream] = arguments;
  const bool projection = weight_hr.data;
  check_sequence(name, mode, sequence);
  check_projection(name, mode, sequence, projection);
  check_address(name, "projected", projected);
  check_address(name, "hx", hx);
  check_address(name, "output", output);
  check_address(name, "h_n", h_n);
  check_address(name, "workspace", workspace);
  if (mode == kLstm) {
    check_address(name, "cx", cx);
    check_address(name, "c_n", c_n);
    if (gates) check_address(name, "cells", cells);
  }
  dispatch_dtype(name, dtype, [&]<class T>() {
    check_rows(name, "weight_hh", weight_hh, sequence.state, sizeof(T), gates_of(mode) * sequence.hidden);
    const auto memory = forward_memory<T>(mode, sequence, projection, workspace);
    Task<T> task{};
    task.phases[0] = {{pair_of(memory.state, weight_hh, sequence.state, sequence.batch)},
                      1,
                      gates_of(mode),
                      0,
                      sequence.hidden,
                      end_of(mode)};
    task.phase_count = 1;
    if (projection) {
      check_rows(name, "weight_hr", weight_hr, sequence.hidden, sizeof(T), sequence.state);
      task.phases[1] = {{pair_of(memory.hidden, weight_hr, sequence.hidden, sequence.batch)},
                        1,
                        1,
                        0,
                        sequence.state,
                        End::projection};
      task.phase_count = 2;
    }
    task.sequence = sequence;
    task.relu = mode == kRnnRelu;
    task.before = static_cast<const T*>(mode == kLstm ? cx : hx);
    task.projected = static_cast<const T*>(projected);
    task.bias_hn = static_cast<const T*>(bias_hn);
    task.output = static_cast<T*>(output);
    task.h_n = static_cast<T*>(h_n);
    task.c_n = static_cast<T*>(c_n);
    task.gates = static_cast<T*>(gates);
    task.cells = static_cast<T*>(cells);
    run(name, task, memory, static_cast<const T*>(hx), sequence.state, allow_tf32, path, stream);
  });
}

void recurrence_backward(const RecurrenceBackwardArguments& arguments) {
  const char* name = "recurrence_backward";
  const auto& [dtype, mode, sequence, grad_output, grad_h_n, grad_c_n, output, hx, cx, weight_hh, weight_hr, gates,
               cells, grad_projected, grad_hidden_n, grad_hx, grad_cx, grad_projection, allow_tf32, path, workspace,
               stream] = arguments;
  const bool projection = weight_hr.data;
  check_sequence(name, mode, sequence);
  check_projection(name, mode, sequence, projection);
  check_address(name, "output", output);
  check_address(name, "hx", hx);
  check_address(name, "grad_projected", grad_projected);
  check_address(name, "grad_hx", grad_hx);
  check_address(name, "workspace", workspace);
  if (has_carry(mode)) check_address(name, "gates", gates);
  if (mode == kGru) check_address(name, "grad_hidden_n", grad_hidden_n);
  if (mode == kLstm) {
    check_address(name, "cx", cx);
    check_address(name, "cells", cells);
    check_address(name, "grad_cx", grad_cx);
    if (projection) check_address(name, "grad_projection", grad_projection);
  }
  dispatch_dtype(name, dtype, [&]<class T>() {
    const int64_t columns = gates_of(mode) * sequence.hidden;
    check_rows(name, "weight_hh_transposed", weight_hh, columns, sizeof(T), sequence.state);
    const auto memory = backward_memory<T>(mode, sequence, projection, workspace);
    Task<T> task{};
    task.phases[0] = {{pair_of(memory.state, weight_hh, columns, sequence.batch)}, 1, 1, 0, sequence.state,
                      projection ? End::projection_gradient : gradient_of(mode)};
    task.phase_count = 1;
    if (projection) {
      check_rows(name, "weight_hr_transposed", weight_hr, sequence.state, sizeof(T), sequence.hidden);
      task.phases[1] = {{pair_of(memory.hidden, weight_hr, sequence.state, sequence.batch)},
                        1,
                        1,
                        0,
                        sequence.hidden,
                        End::lstm_gradient};
      task.phase_count = 2;
    }
    task.sequence = sequence;
    task.relu = mode == kRnnRelu;
    task.backward = true;
    task.before = static_cast<const T*>(mode == kLstm ? cx : hx);
    task.output = static_cast<T*>(const_cast<void*>(output));
    task.gates = static_cast<T*>(const_cast<void*>(gates));
    task.cells = static_cast<T*>(const_cast<void*>(cells));
    task.grad_output = static_cast<const T*>(grad_output);
    task.grad_h_n = static_cast<const T*>(grad_h_n);
    task.grad_c_n = static_cast<const T*>(grad_c_n);
    task.grad_projected = static_cast<T*>(grad_projected);
    task.grad_hidden_n = static_cast<T*>(grad_hidden_n);
    task.grad_hx = static_cast<T*>(grad_hx);
    task.grad_cx = static_cast<T*>(grad_cx);
    task.grad_projection = static_cast<T*>(grad_projection);
    run<T>(name, task, memory, nullptr, columns, allow_tf32, path, stream);
  });
}

void recurrent_cell(const CellArguments& arguments) {
  const char* name = "recurrent_cell";
  const auto& [dtype, mode, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, h, c, gates, batch, input_size,
               hidden, allow_tf32, stream] = arguments;
  const Sequence sequence{nullptr, nullptr, batch, batch, 1, hidden, hidden, false};
  check_sequence(name, mode, sequence);
  require(input_size >= 0, name, "input_size", input_size, "at least 0");
  check_address(name, "h", h);
  if (mode == kLstm) {
    check_address(name, "cx", cx);
    check_address(name, "c", c);
  }
  dispatch_dtype(name, dtype, [&]<class T>() {
    Task<T> task{};
    Phase<T>& phase = task.phases[0];
    auto add_pair = [&](const char* rows_name, const Rows& rows, const char* weight_name, const Rows& weight,
                        int64_t depth, int hole) {
      if (depth == 0) return;
      check_rows(name, rows_name, rows, depth, sizeof(T), 0);
      check_rows(name, weight_name, weight, depth, sizeof(T), gates_of(mode) * hidden);
      Pair<T>& pair = phase.pairs[phase.pair_count++];
      // The state is read only.
      const State<T> state{static_cast<T*>(const_cast<void*>(rows.data)), rows.stride, 0};
      pair = pair_of(state, weight, depth, batch);
      pair.hole = hole;
    };
    // gru: n of the input in a slot of its own.
    add_pair("input", input, "weight_ih", weight_ih, input_size, mode == kGru ? 2 : 4);
    add_pair("hx", hx, "weight_hh", weight_hh, hidden, mode == kGru ? 3 : 4);
    phase.slots = mode == kGru ? 4 : gates_of(mode);
    phase.units = hidden;
    phase.end = end_of(mode);
    task.phase_count = 1;
    task.sequence = sequence;
    task.relu = mode == kRnnRelu;
    task.before = static_cast<const T*>(mode == kLstm ? cx : hx.data);
    task.before_stride = mode == kLstm ? hidden : hx.stride;
    task.bias_ih = static_cast<const T*>(bias_ih);
    task.bias_hh = static_cast<const T*>(bias_hh);
    if (bias_hh && mode == kGru) task.bias_hn = task.bias_hh + 2 * hidden;
    task.h_n = static_cast<T*>(h);
    task.c_n = static_cast<T*>(c);
    task.gates = static_cast<T*>(gates);
    dispatch_arithmetic<T>(allow_tf32, [&]<Arithmetic arithmetic>() {
      const RecurrentPlan plan = plan_of(task, arithmetic, false);
      take_plan(task, plan);
      launch_step<T, arithmetic>(task, plan, Step(0, Walk(nullptr, sequence, false), 0), stream);
    });
  });
}

void recurrent_cell_backward(const CellBackwardArguments& arguments) {
  const char* name = "recurrent_cell_backward";
  check_sequence(name, arguments.mode,
                 {nullptr, nullptr, arguments.batch, arguments.batch, 1, arguments.hidden, arguments.hidden, false});
  check_address(name, "grad_gates_input", arguments.grad_gates_input);
  if (arguments.mode != kGru) check_address(name, "after", arguments.after);
  if (has_carry(arguments.mode)) {
    check_address(name, "before", arguments.before);
    check_address(name, "gates", arguments.gates);
    check_address(name, "grad_before", arguments.grad_before);
  }
  if (arguments.mode == kGru) check_address(name, "grad_gates_hidden", arguments.grad_gates_hidden);
  dispatch_dtype(name, arguments.dtype, [&]<class T>() {
    const int64_t blocks = std::min(ceil_div<int64_t>(arguments.batch * arguments.hidden, kThreads), kMaximumBlocks);
    launch(cell_backward_kernel<T>, Shape(dim3(unsigned(blocks)), dim3(kThreads), 0, arguments.stream), arguments);
  });
}

}  // namespace fastdl::cuda
