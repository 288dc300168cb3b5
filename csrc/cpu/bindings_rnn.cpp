// The recurrent layers and cells of fastdl._C.cpu.
#include "bindings.h"

namespace fastdl {
namespace {

void check_mode(const char* function, int mode) {
  if (mode < 0 || mode >= mode_count) refuse(function, "mode", mode, "0 (rnn_tanh), 1 (rnn_relu), 2 (lstm) or 3 (gru)");
}

// batch_sizes: the address of the numbers, on the CPU, or 0
Sequence sequence_of(const char* function, uintptr_t batch_sizes, int64_t rows, int64_t batch, int64_t steps,
                     int64_t hidden, int64_t state, bool reverse) {
  if (batch < 1) refuse(function, "batch", batch, "1 or more");
  if (steps < 1) refuse(function, "steps", steps, "1 or more");
  if (hidden < 1) refuse(function, "hidden", hidden, "1 or more");
  if (state < 1) refuse(function, "state", state, "1 or more");
  const auto* sizes = pointer<const int64_t>(batch_sizes);
  int64_t total = 0, limit = batch;
  for (int64_t i = 0; i < steps; i++) {
    int64_t size = sizes ? sizes[i] : batch;
    if (size < 1 || size > limit || (i == 0 && size != batch))
      refuse(function, "batch_sizes", size, "the batch, then numbers from 1 that do not grow");
    limit = size;
    total += size;
  }
  if (total != rows) refuse(function, "rows", rows, "the sum of batch_sizes, or steps * batch");
  return {sizes, rows, batch, steps, hidden, state, reverse};
}

void recurrence(int dtype, int mode, uintptr_t projected, uintptr_t hx, uintptr_t cx, uintptr_t weight_hh,
                uintptr_t bias_hn, uintptr_t weight_hr, uintptr_t batch_sizes, uintptr_t output, uintptr_t h_n,
                uintptr_t c_n, uintptr_t gates, uintptr_t cells, int64_t rows, int64_t batch, int64_t steps,
                int64_t hidden, int64_t state, bool reverse, uintptr_t workspace, int64_t context) {
  const char* name = "recurrence";
  check_dtype(name, dtype);
  check_mode(name, mode);
  Sequence sequence = sequence_of(name, batch_sizes, rows, batch, steps, hidden, state, reverse);
  int threads = threads_of(name, context);
  check_address(name, "projected", projected);
  check_address(name, "hx", hx);
  check_address(name, "weight_hh", weight_hh);
  check_address(name, "output", output);
  check_address(name, "h_n", h_n);
  check_address(name, "workspace", workspace);
  if (mode == lstm) {
    check_address(name, "cx", cx);
    check_address(name, "c_n", c_n);
    if (gates) check_address(name, "cells", cells);
  }
  if (!weight_hr && state != hidden) refuse(name, "state", state, "hidden, without weight_hr");
  if (weight_hr && mode != lstm) refuse(name, "mode", mode, "2 (lstm), with weight_hr");
  kernels().recurrence({dtype, mode, sequence, pointer(projected), pointer(hx), pointer(cx), pointer(weight_hh),
                        pointer(bias_hn), pointer(weight_hr), pointer<void>(output), pointer<void>(h_n),
                        pointer<void>(c_n), pointer<void>(gates), pointer<void>(cells), pointer<void>(workspace),
                        threads});
}

void recurrence_backward(int dtype, int mode, uintptr_t grad_output, uintptr_t grad_h_n, uintptr_t grad_c_n,
                         uintptr_t output, uintptr_t hx, uintptr_t cx, uintptr_t weight_hh, uintptr_t weight_hr,
                         uintptr_t gates, uintptr_t cells, uintptr_t batch_sizes, uintptr_t grad_projected,
                         uintptr_t grad_hidden_n, uintptr_t grad_hx, uintptr_t grad_cx, uintptr_t grad_projection,
                         int64_t rows, int64_t batch, int64_t steps, int64_t hidden, int64_t state, bool reverse,
                         uintptr_t workspace, int64_t context) {
  const char* name = "recurrence_backward";
  check_dtype(name, dtype);
  check_mode(name, mode);
  Sequence sequence = sequence_of(name, batch_sizes, rows, batch, steps, hidden, state, reverse);
  int threads = threads_of(name, context);
  check_address(name, "output", output);
  check_address(name, "hx", hx);
  check_address(name, "weight_hh", weight_hh);
  check_address(name, "grad_projected", grad_projected);
  check_address(name, "grad_hx", grad_hx);
  check_address(name, "workspace", workspace);
  if (mode == lstm || mode == gru) check_address(name, "gates", gates);
  if (mode == gru) check_address(name, "grad_hidden_n", grad_hidden_n);
  if (mode == lstm) {
    check_address(name, "cx", cx);
    check_address(name, "cells", cells);
    check_address(name, "grad_cx", grad_cx);
  }
  if (!weight_hr && state != hidden) refuse(name, "state", state, "hidden, without weight_hr");
  if (weight_hr) {
    if (mode != lstm) refuse(name, "mode", mode, "2 (lstm), with weight_hr");
    check_address(name, "grad_projection", grad_projection);
  }
  kernels().recurrence_backward({dtype,
                                 mode,
                                 sequence,
                                 pointer(grad_output),
                                 pointer(grad_h_n),
                                 pointer(grad_c_n),
                                 pointer(output),
                                 pointer(hx),
                                 pointer(cx),
                                 pointer(weight_hh),
                                 pointer(weight_hr),
                                 pointer(gates),
                                 pointer(cells),
                                 pointer<void>(grad_projected),
                                 pointer<void>(grad_hidden_n),
                                 pointer<void>(grad_hx),
                                 pointer<void>(grad_cx),
                                 pointer<void>(grad_projection),
                                 pointer<void>(workspace),
                                 threads});
}

int64_t workspace_of(bool backward, int dtype, int mode, int64_t batch, int64_t hidden, int64_t state,
                     bool projection) {
  const char* name = backward ? "recurrence_backward_workspace" : "recurrence_workspace";
  check_dtype(name, dtype);
  check_mode(name, mode);
  Sequence sequence = sequence_of(name, 0, batch, batch, 1, hidden, state, false);
  auto function = backward ? kernels().recurrence_backward_workspace : kernels().recurrence_workspace;
  return function(dtype, mode, sequence, projection);
}

void recurrent_cell(int dtype, int mode, uintptr_t input, uintptr_t hx, uintptr_t cx, uintptr_t weight_ih,
                    uintptr_t weight_hh, uintptr_t bias_ih, uintptr_t bias_hh, uintptr_t h, uintptr_t c,
                    uintptr_t gates, int64_t batch, int64_t input_size, int64_t hidden, int64_t context) {
  const char* name = "recurrent_cell";
  check_dtype(name, dtype);
  check_mode(name, mode);
  check_size(name, "batch", batch);
  check_size(name, "input_size", input_size);
  check_size(name, "hidden", hidden);
  int threads = threads_of(name, context);
  if (batch == 0 || hidden == 0) return;
  if (input_size > 0) {
    check_address(name, "input", input);
    check_address(name, "weight_ih", weight_ih);
  }
  check_address(name, "hx", hx);
  check_address(name, "weight_hh", weight_hh);
  check_address(name, "h", h);
  if (mode == lstm) {
    check_address(name, "cx", cx);
    check_address(name, "c", c);
  }
  kernels().recurrent_cell({dtype, mode, pointer(input), pointer(hx), pointer(cx), pointer(weight_ih),
                            pointer(weight_hh), pointer(bias_ih), pointer(bias_hh), pointer<void>(h), pointer<void>(c),
                            pointer<void>(gates), batch, input_size, hidden, threads});
}

void recurrent_cell_backward(int dtype, int mode, uintptr_t grad_h, uintptr_t grad_c, uintptr_t before, uintptr_t after,
                             uintptr_t gates, uintptr_t grad_gates_input, uintptr_t grad_gates_hidden,
                             uintptr_t grad_before, int64_t batch, int64_t hidden, int64_t context) {
  const char* name = "recurrent_cell_backward";
  check_dtype(name, dtype);
  check_mode(name, mode);
  check_size(name, "batch", batch);
  check_size(name, "hidden", hidden);
  int threads = threads_of(name, context);
  if (batch == 0 || hidden == 0) return;
  check_address(name, "grad_gates_input", grad_gates_input);
  if (mode != gru) check_address(name, "after", after);
  if (mode == gru) check_address(name, "grad_gates_hidden", grad_gates_hidden);
  if (mode == lstm || mode == gru) {
    check_address(name, "before", before);
    check_address(name, "gates", gates);
    check_address(name, "grad_before", grad_before);
  }
  kernels().recurrent_cell_backward({dtype, mode, pointer(grad_h), pointer(grad_c), pointer(before), pointer(after),
                                     pointer(gates), pointer<void>(grad_gates_input), pointer<void>(grad_gates_hidden),
                                     pointer<void>(grad_before), batch, hidden, threads});
}

}  // namespace

void bind_rnn(py::module_& module) {
  module.def("recurrence", &recurrence, py::arg("dtype"), py::arg("mode"), py::arg("projected"), py::arg("hx"),
             py::arg("cx"), py::arg("weight_hh"), py::arg("bias_hn"), py::arg("weight_hr"), py::arg("batch_sizes"),
             py::arg("output"), py::arg("h_n"), py::arg("c_n"), py::arg("gates"), py::arg("cells"), py::arg("rows"),
             py::arg("batch"), py::arg("steps"), py::arg("hidden"), py::arg("state"), py::arg("reverse"),
             py::arg("workspace"), py::arg("context"), released(),
             "One layer in one direction over all steps; batch_sizes is the address of `steps` int64, or 0.");
  module.def("recurrence_backward", &recurrence_backward, py::arg("dtype"), py::arg("mode"), py::arg("grad_output"),
             py::arg("grad_h_n"), py::arg("grad_c_n"), py::arg("output"), py::arg("hx"), py::arg("cx"),
             py::arg("weight_hh"), py::arg("weight_hr"), py::arg("gates"), py::arg("cells"), py::arg("batch_sizes"),
             py::arg("grad_projected"), py::arg("grad_hidden_n"), py::arg("grad_hx"), py::arg("grad_cx"),
             py::arg("grad_projection"), py::arg("rows"), py::arg("batch"), py::arg("steps"), py::arg("hidden"),
             py::arg("state"), py::arg("reverse"), py::arg("workspace"), py::arg("context"), released(),
             "Its gradients through time, but for those of the weights, which are products over all rows.");
  for (bool backward : {false, true})
    module.def(
        backward ? "recurrence_backward_workspace" : "recurrence_workspace",
        [backward](int dtype, int mode, int64_t batch, int64_t hidden, int64_t state, bool projection) {
          return workspace_of(backward, dtype, mode, batch, hidden, state, projection);
        },
        py::arg("dtype"), py::arg("mode"), py::arg("batch"), py::arg("hidden"), py::arg("state"), py::arg("projection"),
        "Bytes of workspace that it needs; projection: whether there is a weight_hr.");
  module.def("recurrent_cell", &recurrent_cell, py::arg("dtype"), py::arg("mode"), py::arg("input"), py::arg("hx"),
             py::arg("cx"), py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"),
             py::arg("h"), py::arg("c"), py::arg("gates"), py::arg("batch"), py::arg("input_size"), py::arg("hidden"),
             py::arg("context"), released(), "One step: both products, biases and gates; gates are kept unless 0.");
  module.def("recurrent_cell_backward", &recurrent_cell_backward, py::arg("dtype"), py::arg("mode"), py::arg("grad_h"),
             py::arg("grad_c"), py::arg("before"), py::arg("after"), py::arg("gates"), py::arg("grad_gates_input"),
             py::arg("grad_gates_hidden"), py::arg("grad_before"), py::arg("batch"), py::arg("hidden"),
             py::arg("context"), released(),
             "The gradients of the gates' sums. before: lstm's cx, gru's hx; after: lstm's c, rnn's h.");
}

}  // namespace fastdl
