// Attention of fastdl._C.cpu.
#include <array>

#include "bindings.h"

namespace fastdl {
namespace {

using Place = std::array<int64_t, 4>;  // address, then the strides of batch, row and head

template <class Pointer>
Heads<Pointer> heads_of(const char* function, const char* argument, const Place& place, bool needed = true) {
  if (needed) check_address(function, argument, static_cast<uintptr_t>(place[0]));
  return {reinterpret_cast<Pointer>(place[0]), place[1], place[2], place[3]};
}

// offsets: addresses of the first rows of queries and keys, or 0
AttentionShape shape_of(const char* function, int64_t batch, int64_t heads, int64_t group, int64_t queries,
                        int64_t keys, int64_t size, int64_t value_size, uintptr_t query_offsets,
                        uintptr_t key_offsets) {
  check_size(function, "batch", batch);
  check_size(function, "heads", heads);
  check_size(function, "queries", queries);
  check_size(function, "keys", keys);
  if (group < 1 || heads % group) refuse(function, "group", group, "a divisor of heads");
  if (size < 1 || size > 256) refuse(function, "size", size, "1 to 256");
  if (value_size < 1 || value_size > 256) refuse(function, "value_size", value_size, "1 to 256");
  const auto *first_queries = pointer<const int64_t>(query_offsets), *first_keys = pointer<const int64_t>(key_offsets);
  if (first_queries) {
    check_address(function, "key_offsets", key_offsets);
    auto check = [&](const char* name, const int64_t* offsets, int64_t rows) {
      if (offsets[0] != 0) refuse(function, name, offsets[0], "0 at first");
      for (int64_t b = 0; b < batch; b++)
        if (offsets[b + 1] < offsets[b]) refuse(function, name, offsets[b + 1], "numbers that do not fall");
      if (offsets[batch] != rows) refuse(function, name, offsets[batch], "the number of rows at last");
    };
    check("cu_seq_q", first_queries, queries);
    check("cu_seq_k", first_keys, keys);
  }
  return {batch, heads, group, queries, keys, size, value_size, first_queries, first_keys};
}

AttentionScores scores_of(const char* function, double scale, int64_t left, int64_t right, bool bottom_right,
                          int mask_kind, uintptr_t mask, int64_t mask_batch_stride, int64_t mask_head_stride,
                          int64_t mask_row_stride, uintptr_t slopes, int64_t slopes_batch_stride, double dropout,
                          uint64_t seed) {
  if (mask_kind < no_mask || mask_kind >= mask_kind_count)
    refuse(function, "mask_kind", mask_kind, "0 (none), 1 (boolean), 2 (additive) or 3 (additive, as computed in)");
  if (mask_kind != no_mask) check_address(function, "mask", mask);
  if (!(dropout >= 0 && dropout <= 1))
    throw std::invalid_argument(std::string(function) + ": dropout is " + std::to_string(dropout) +
                                ", expected 0 to 1");
  return {scale,
          left,
          right,
          bottom_right,
          mask_kind,
          pointer(mask),
          mask_batch_stride,
          mask_head_stride,
          mask_row_stride,
          pointer(slopes),
          slopes_batch_stride,
          dropout,
          seed};
}

}  // namespace

void bind_attention(py::module_& module) {
  py::class_<AttentionShape>(module, "AttentionShape", "The sizes of a batch of attention heads.")
      .def(py::init([](int64_t batch, int64_t heads, int64_t group, int64_t queries, int64_t keys, int64_t size,
                       int64_t value_size, uintptr_t query_offsets, uintptr_t key_offsets) {
             return shape_of("AttentionShape", batch, heads, group, queries, keys, size, value_size, query_offsets,
                             key_offsets);
           }),
           py::arg("batch"), py::arg("heads"), py::arg("group"), py::arg("queries"), py::arg("keys"), py::arg("size"),
           py::arg("value_size"), py::arg("query_offsets"), py::arg("key_offsets"));
  py::class_<AttentionScores>(module, "AttentionScores", "How scores are made of queries and keys.")
      .def(py::init([](double scale, int64_t left, int64_t right, bool bottom_right, int mask_kind, uintptr_t mask,
                       int64_t mask_batch_stride, int64_t mask_head_stride, int64_t mask_row_stride, uintptr_t slopes,
                       int64_t slopes_batch_stride, double dropout, uint64_t seed) {
             return scores_of("AttentionScores", scale, left, right, bottom_right, mask_kind, mask, mask_batch_stride,
                              mask_head_stride, mask_row_stride, slopes, slopes_batch_stride, dropout, seed);
           }),
           py::arg("scale"), py::arg("left"), py::arg("right"), py::arg("bottom_right"), py::arg("mask_kind"),
           py::arg("mask"), py::arg("mask_batch_stride"), py::arg("mask_head_stride"), py::arg("mask_row_stride"),
           py::arg("slopes"), py::arg("slopes_batch_stride"), py::arg("dropout"), py::arg("seed"));
  module.def(
      "attention",
      [](int dtype, const AttentionShape& shape, const AttentionScores& scores, const Place& query, const Place& key,
         const Place& value, const Place& output, uintptr_t logsumexp, int64_t context) {
        const char* name = "attention";
        check_dtype(name, dtype);
        int threads = threads_of(name, context);
        if (shape.batch * shape.heads * shape.queries == 0) return;
        check_address(name, "logsumexp", logsumexp);
        kernels().attention({dtype, shape, scores, heads_of<const void*>(name, "query", query),
                             heads_of<const void*>(name, "key", key, shape.keys > 0),
                             heads_of<const void*>(name, "value", value, shape.keys > 0),
                             heads_of<void*>(name, "output", output), pointer<void>(logsumexp), threads});
      },
      py::arg("dtype"), py::arg("shape"), py::arg("scores"), py::arg("query"), py::arg("key"), py::arg("value"),
      py::arg("output"), py::arg("logsumexp"), py::arg("context"), released(),
      "output = dropout(softmax(scores)) value; a tensor is its address and the strides of batch, row and head.");
  module.def(
      "attention_backward",
      [](int dtype, const AttentionShape& shape, const AttentionScores& scores, const Place& grad_output,
         const Place& query, const Place& key, const Place& value, const Place& output, uintptr_t logsumexp,
         uintptr_t grad_logsumexp, const Place& grad_query, const Place& grad_key, const Place& grad_value,
         uintptr_t grad_mask, uintptr_t workspace, int64_t context) {
        const char* name = "attention_backward";
        check_dtype(name, dtype);
        int threads = threads_of(name, context);
        if (shape.batch * shape.heads * shape.queries * shape.keys == 0) return;
        check_address(name, "logsumexp", logsumexp);
        check_address(name, "workspace", workspace);
        kernels().attention_backward(
            {dtype, shape, scores, heads_of<const void*>(name, "grad_output", grad_output),
             heads_of<const void*>(name, "query", query), heads_of<const void*>(name, "key", key),
             heads_of<const void*>(name, "value", value), heads_of<const void*>(name, "output", output),
             pointer(logsumexp), pointer(grad_logsumexp), heads_of<void*>(name, "grad_query", grad_query, false),
             heads_of<void*>(name, "grad_key", grad_key, false), heads_of<void*>(name, "grad_value", grad_value, false),
             pointer<void>(grad_mask), pointer<void>(workspace), threads});
      },
      py::arg("dtype"), py::arg("shape"), py::arg("scores"), py::arg("grad_output"), py::arg("query"), py::arg("key"),
      py::arg("value"), py::arg("output"), py::arg("logsumexp"), py::arg("grad_logsumexp"), py::arg("grad_query"),
      py::arg("grad_key"), py::arg("grad_value"), py::arg("grad_mask"), py::arg("workspace"), py::arg("context"),
      released(),
      "The gradients of attention; one whose address is 0 is not made. grad_mask is [batch, heads, queries, keys].");
  module.def(
      "attention_backward_workspace",
      [](int dtype, const AttentionShape& shape, int64_t context) {
        const char* name = "attention_backward_workspace";
        check_dtype(name, dtype);
        return kernels().attention_backward_workspace(dtype, shape, threads_of(name, context));
      },
      py::arg("dtype"), py::arg("shape"), py::arg("context"), "Bytes of workspace that attention_backward needs.");
}

}  // namespace fastdl
