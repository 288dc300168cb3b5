// The recurrent layers and cells of fastdl._C.cuda.
#include "bindings.h"
#include "rnn.h"

namespace fastdl {
namespace {

cuda::Sequence sequence_of(Address batch_sizes, Address device_batch_sizes, int64_t rows, int64_t batch, int64_t steps,
                           int64_t hidden, int64_t state, bool reverse) {
  return {static_cast<const int64_t*>(pointer(batch_sizes)),
          static_cast<const int64_t*>(pointer(device_batch_sizes)),
          rows,
          batch,
          steps,
          hidden,
          state,
          reverse};
}

using RowsOf = std::pair<Address, int64_t>;  // address, elements from row to row
cuda::Rows rows_of(const RowsOf& rows) { return {pointer(rows.first), rows.second}; }

}  // namespace

void bind_cuda_rnn(py::module_& module) {
  module.def(
      "recurrence",
      [](int dtype, int mode, Address projected, Address hx, Address cx, RowsOf weight_hh, Address bias_hn,
         RowsOf weight_hr, Address batch_sizes, Address device_batch_sizes, Address output, Address h_n, Address c_n,
         Address gates, Address cells, int64_t rows, int64_t batch, int64_t steps, int64_t hidden, int64_t state,
         bool reverse, bool allow_tf32, int path, Address workspace, Address context) {
        const auto sequence = sequence_of(batch_sizes, device_batch_sizes, rows, batch, steps, hidden, state, reverse);
        cuda::recurrence({dtype, mode, sequence, pointer(projected), pointer(hx), pointer(cx), rows_of(weight_hh),
                          pointer(bias_hn), rows_of(weight_hr), pointer(output), pointer(h_n), pointer(c_n),
                          pointer(gates), pointer(cells), allow_tf32, cuda::RecurrentPath(path), pointer(workspace),
                          stream(context)});
      },
      released(), py::arg("dtype"), py::arg("mode"), py::arg("projected"), py::arg("hx"), py::arg("cx"),
      py::arg("weight_hh"), py::arg("bias_hn"), py::arg("weight_hr"), py::arg("batch_sizes"),
      py::arg("device_batch_sizes"), py::arg("output"), py::arg("h_n"), py::arg("c_n"), py::arg("gates"),
      py::arg("cells"), py::arg("rows"), py::arg("batch"), py::arg("steps"), py::arg("hidden"), py::arg("state"),
      py::arg("reverse"), py::arg("allow_tf32"), py::arg("path"), py::arg("workspace"), py::arg("context"),
      "One layer in one direction. weight_hh, weight_hr: (address, stride of rows), rows 16-byte aligned and ending\n"
      "with zeros. path: 0 the plan's choice, 1 a launch for each product, 2 one persistent launch.");

  module.def(
      "recurrence_backward",
      [](int dtype, int mode, Address grad_output, Address grad_h_n, Address grad_c_n, Address output, Address hx,
         Address cx, RowsOf weight_hh_transposed, RowsOf weight_hr_transposed, Address gates, Address cells,
         Address batch_sizes, Address device_batch_sizes, Address grad_projected, Address grad_hidden_n,
         Address grad_hx, Address grad_cx, Address grad_projection, int64_t rows, int64_t batch, int64_t steps,
         int64_t hidden, int64_t state, bool reverse, bool allow_tf32, int path, Address workspace, Address context) {
        const auto sequence = sequence_of(batch_sizes, device_batch_sizes, rows, batch, steps, hidden, state, reverse);
        cuda::recurrence_backward({dtype,
                                   mode,
                                   sequence,
                                   pointer(grad_output),
                                   pointer(grad_h_n),
                                   pointer(grad_c_n),
                                   pointer(output),
                                   pointer(hx),
                                   pointer(cx),
                                   rows_of(weight_hh_transposed),
                                   rows_of(weight_hr_transposed),
                                   pointer(gates),
                                   pointer(cells),
                                   pointer(grad_projected),
                                   pointer(grad_hidden_n),
                                   pointer(grad_hx),
                                   pointer(grad_cx),
                                   pointer(grad_projection),
                                   allow_tf32,
                                   cuda::RecurrentPath(path),
                                   pointer(workspace),
                                   stream(context)});
      },
      released(), py::arg("dtype"), py::arg("mode"), py::arg("grad_output"), py::arg("grad_h_n"), py::arg("grad_c_n"),
      py::arg("output"), py::arg("hx"), py::arg("cx"), py::arg("weight_hh_transposed"), py::arg("weight_hr_transposed"),
      py::arg("gates"), py::arg("cells"), py::arg("batch_sizes"), py::arg("device_batch_sizes"),
      py::arg("grad_projected"), py::arg("grad_hidden_n"), py::arg("grad_hx"), py::arg("grad_cx"),
      py::arg("grad_projection"), py::arg("rows"), py::arg("batch"), py::arg("steps"), py::arg("hidden"),
      py::arg("state"), py::arg("reverse"), py::arg("allow_tf32"), py::arg("path"), py::arg("workspace"),
      py::arg("context"),
      "The gradients of recurrence, by backpropagation through time; weights as there, transposed.");

  module.def(
      "recurrent_cell",
      [](int dtype, int mode, RowsOf input, RowsOf hx, Address cx, RowsOf weight_ih, RowsOf weight_hh, Address bias_ih,
         Address bias_hh, Address h, Address c, Address gates, int64_t batch, int64_t input_size, int64_t hidden,
         bool allow_tf32, Address context) {
        cuda::recurrent_cell({dtype, mode, rows_of(input), rows_of(hx), pointer(cx), rows_of(weight_ih),
                              rows_of(weight_hh), pointer(bias_ih), pointer(bias_hh), pointer(h), pointer(c),
                              pointer(gates), batch, input_size, hidden, allow_tf32, stream(context)});
      },
      released(), py::arg("dtype"), py::arg("mode"), py::arg("input"), py::arg("hx"), py::arg("cx"),
      py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"), py::arg("h"), py::arg("c"),
      py::arg("gates"), py::arg("batch"), py::arg("input_size"), py::arg("hidden"), py::arg("allow_tf32"),
      py::arg("context"), "One step of one layer; input, hx and the weights as recurrence has its own.");

  module.def(
      "recurrent_cell_backward",
      [](int dtype, int mode, Address grad_h, Address grad_c, Address before, Address after, Address gates,
         Address grad_gates_input, Address grad_gates_hidden, Address grad_before, int64_t batch, int64_t hidden,
         Address context) {
        cuda::recurrent_cell_backward({dtype, mode, pointer(grad_h), pointer(grad_c), pointer(before), pointer(after),
                                       pointer(gates), pointer(grad_gates_input), pointer(grad_gates_hidden),
                                       pointer(grad_before), batch, hidden, stream(context)});
      },
      released(), py::arg("dtype"), py::arg("mode"), py::arg("grad_h"), py::arg("grad_c"), py::arg("before"),
      py::arg("after"), py::arg("gates"), py::arg("grad_gates_input"), py::arg("grad_gates_hidden"),
      py::arg("grad_before"), py::arg("batch"), py::arg("hidden"), py::arg("context"),
      "The gradients of a cell's pre-activations, and of c (lstm) or h (gru) before the step, products aside.");

  auto workspace_of = [](size_t (*size)(int, int, const cuda::Sequence&, bool)) {
    return [size](int dtype, int mode, int64_t batch, int64_t hidden, int64_t state, bool projection) {
      return size(dtype, mode, {nullptr, nullptr, batch, batch, 1, hidden, state, false}, projection);
    };
  };
  module.def("recurrence_workspace", workspace_of(&cuda::recurrence_workspace), py::arg("dtype"), py::arg("mode"),
             py::arg("batch"), py::arg("hidden"), py::arg("state"), py::arg("projection"),
             "bytes of workspace for recurrence");
  module.def("recurrence_backward_workspace", workspace_of(&cuda::recurrence_backward_workspace), py::arg("dtype"),
             py::arg("mode"), py::arg("batch"), py::arg("hidden"), py::arg("state"), py::arg("projection"),
             "bytes of workspace for recurrence_backward");

  module.def(
      "recurrent_plan",
      [](int arithmetic, const std::vector<std::tuple<int, int64_t, int64_t>>& products, int64_t batch, bool persistent,
         int multiprocessors, int shared_bytes) {
        std::vector<cuda::RecurrentProduct> list;
        for (const auto& [slots, units, depth] : products) list.push_back({slots, units, depth});
        const auto plan = cuda::recurrent_plan(cuda::Arithmetic(arithmetic), list.data(), int(list.size()), batch,
                                               persistent, {multiprocessors, shared_bytes});
        py::dict result;
        result["unit_blocks"] = plan.unit_blocks;
        result["row_blocks"] = plan.row_blocks;
        result["groups"] = std::vector<int>(plan.groups, plan.groups + list.size());
        result["rows"] = plan.rows;
        result["depth_warps"] = plan.depth_warps;
        result["shared_bytes"] = plan.shared_bytes;
        return result;
      },
      py::arg("arithmetic"), py::arg("products"), py::arg("batch"), py::arg("persistent"), py::arg("multiprocessors"),
      py::arg("shared_bytes"),
      "how a step is laid over a device: products (gates, units, depth); unit_blocks 0: the weights don't fit");
}

}  // namespace fastdl
