// The table of functions that every instruction set's build fills; bindings.cpp chooses one table at import.
#pragma once
#include <cstdint>

namespace fastdl {

enum Dtype { float32, bfloat16, float16, float64, dtype_count };
enum Mode { rnn_tanh, rnn_relu, lstm, gru, mode_count };
enum Kind { none, relu, leaky_relu, elu, sigmoid, tanh, gelu, gelu_tanh, silu, kind_count };

// parameter: negative_slope of leaky_relu, alpha of elu, else ignored
struct Activation {
  int kind;
  double parameter;
};

// output[m, n] = activation(input[m, k] @ weight[n, k]^T + bias[n]), output and preactivation contiguous
struct LinearArguments {
  int dtype;
  const void* input;
  int64_t input_row_stride, input_column_stride;  // one of them is 1
  const void* weight;
  int64_t weight_row_stride, weight_column_stride;  // one of them is 1
  const void* bias;                                 // [n] or null
  void* output;                                     // [m, n]
  void* preactivation;                              // [m, n] or null
  int64_t m, n, k;
  Activation activation;
  int threads;
};

// output = activation(input + bias), element by element
struct ForwardArguments {
  int dtype;
  const void* input;    // [rows, columns]
  const void* bias;     // [columns] or null
  void* output;         // [rows, columns]
  void* preactivation;  // [rows, columns] or null
  int64_t rows, columns;
  Activation activation;
  int threads;
};

// grad_input = grad_output * activation'(saved); grad_bias = its column sums before rounding
struct BackwardArguments {
  int dtype;
  const void* grad_output;  // [rows, columns]
  const void* saved;        // [rows, columns]: the output, or for gelu and silu the preactivation; null for none
  void* grad_input;         // [rows, columns] or null
  void* grad_bias;          // [columns] or null
  int64_t rows, columns;
  Activation activation;
  int threads;
};

// output[n, k, i] = activation(sum over c of weight[k, c] input[n, c, i] + bias[k]) for image n and pixel i
struct Conv1x1Arguments {
  int dtype;
  const void* input;                                // [images, channels, pixels]
  const void* weight;                               // [out_channels, channels]
  int64_t weight_row_stride, weight_column_stride;  // one of them is 1
  const void* bias;                                 // [out_channels] or null
  void* output;                                     // [images, out_channels, pixels]
  void* preactivation;                              // like output, or null
  int64_t images, channels, out_channels, pixels;
  Activation activation;
  int threads;
};

// grad_weight[k, c] = sum over n and i of grad_output[n, k, i] input[n, c, i]
struct Conv1x1GradientArguments {
  int dtype;
  const void* grad_output;  // [images, out_channels, pixels]
  const void* input;        // [images, channels, pixels]
  void* grad_weight;        // [out_channels, channels]
  int64_t images, channels, out_channels, pixels;
  int threads;
};

// A convolution of each channel with a kernel of its own. The input is read with upsample - 1 zeros between neighbours,
// which with stride 1 and the flipped kernel makes the gradient of the input. For the weight's gradient, `weight` is
// the output's gradient [images, channels, out_height, out_width] and `output` is the weight's [channels, kernel].
struct DepthwiseArguments {
  int dtype;
  const void* input;    // [images, channels, height, width]
  const void* weight;   // [channels, kernel_height, kernel_width]
  const void* bias;     // [channels] or null
  void* output;         // [images, channels, out_height, out_width]
  void* preactivation;  // like output, or null
  int64_t images, channels, height, width, out_height, out_width, kernel_height, kernel_width;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, upsample_h, upsample_w;
  bool flip;
  Activation activation;
  int threads;
};

// grad_input = grad_output * activation'(saved); grad_bias = its sums over images and pixels before rounding
struct ChannelGradientArguments {
  int dtype;
  const void* grad_output;  // [images, channels, pixels]
  const void* saved;        // like grad_output; null for none
  void* grad_input;         // like grad_output, or null
  void* grad_bias;          // [channels] or null
  int64_t images, channels, pixels;
  Activation activation;
  int threads;
};

// element (o, c, i) of a tensor [outer, channels, inner] lies at (o * channels + c) * inner + i; none is empty
struct BatchNormShape {
  int64_t outer, channels, inner;
};

// output = activation((input - mean) * rstd * weight + bias + residual), rstd = 1 / sqrt(variance + eps). What is
// [channels] is in the dtype of computation: float32 for 16-bit types.
struct BatchNormArguments {
  int dtype;
  const void* input;
  const void *weight, *bias;                // [channels] or null
  const void* residual;                     // of input's shape, or null
  const void *given_mean, *given_variance;  // [channels], or null: then they are taken from input
  void* output;
  void *mean, *rstd, *variance;  // [channels]: receive the statistics taken, variance the unbiased one
  BatchNormShape shape;
  double eps;
  Activation activation;
  int threads;
};

// mean and sum of squared differences from it, by channel
struct BatchNormStatisticsArguments {
  int dtype;
  const void* input;
  void *mean, *squares;  // [channels]
  BatchNormShape shape;
  int threads;
};

// With dz the gradient of the activation's argument: grad_residual = dz, grad_bias = its sum, grad_weight = the sum of
// dz (input - mean) rstd, grad_input = rstd weight (dz - mean_gradient - (input - mean) rstd mean_product).
struct BatchNormBackwardArguments {
  int dtype;
  const void *grad_output, *input;
  const void *weight, *bias;                 // [channels] or null
  const void *residual, *output;             // what the activation's gradient is made of besides input, or null
  const void *mean, *rstd;                   // [channels]
  const void *mean_gradient, *mean_product;  // [channels], or null: then of these sums in training, else 0
  void *grad_input, *grad_weight, *grad_bias, *grad_residual;  // or null
  BatchNormShape shape;
  bool training;  // whether mean and rstd are those of input
  Activation activation;
  int threads;
};

enum PoolingMode { max_forward, max_backward, average_forward, average_backward };

// One axis of pooling: window o has input positions o * stride - padding + k * dilation, k < kernel. Kernel 0:
// adaptive, the positions from o * input / output, rounded down, to (o + 1) * input / output, rounded up.
struct PoolingAxis {
  int64_t input, output, kernel, stride, padding, dilation;
};

// Images of [batch, channels, rows, columns], or with the channels last. A forward's source has the axes' input sizes,
// a backward's target.
struct PoolingArguments {
  PoolingMode mode;
  int dtype;
  const void* source;        // input, or the output's gradient
  const void* source_codes;  // of max_backward
  void* target;              // output, or the input's gradient
  void* target_codes;        // of max_forward, or null
  int64_t code_bytes;        // 1: the maximum's place in its window, row by row; 8: in its plane; 0: no codes
  int64_t batch, channels;
  PoolingAxis rows, columns;
  bool channels_last;
  bool count_include_pad;
  double divisor;  // of every window's sum, or 0: its size
  int threads;
};

// Maxima of windows that start where the caller says, and the gradient; contiguous.
struct FractionalArguments {
  int dtype;
  const void* input;             // [planes, height, width]; backward: the output's gradient
  const int32_t* row_starts;     // [planes, output_height]
  const int32_t* column_starts;  // [planes, output_width]
  void* output;                  // [planes, output_height, output_width]; backward: the input's gradient
  int64_t* indices;              // of the output's shape: the maximum's place in its plane
  int64_t planes, height, width, output_height, output_width, kernel_height, kernel_width;
  int threads;
};

// Sequences whose rows lie step after step, the longest sequence first
struct Sequence {
  const int64_t* batch_sizes;  // [steps], decreasing: sequences that have the step; null: all
  int64_t rows, batch, steps;
  int64_t hidden, state;  // sizes of c and h
  bool reverse;           // from the last step of each sequence to its first
};

// One layer in one direction; G gates: 1 of rnn, 4 of lstm (i f g o), 3 of gru (r z n)
struct RecurrenceArguments {
  int dtype, mode;
  Sequence sequence;
  const void* projected;  // [rows, G * hidden]: the input's part of the gates, with biases
  const void* hx;         // [batch, state]
  const void* cx;         // [batch, hidden], lstm
  const void* weight_hh;  // [G * hidden, state]
  const void* bias_hn;    // [hidden] or null, gru
  const void* weight_hr;  // [state, hidden] or null, lstm
  void* output;           // [rows, state]
  void* h_n;              // [batch, state]
  void* c_n;              // [batch, hidden], lstm
  void* gates;            // [rows, 4 * hidden] or null: lstm's i f g o, gru's r z n and the product inside n
  void* cells;            // [rows, hidden] or null: lstm's c
  void* workspace;        // as recurrence_workspace asks
  int threads;
};

struct RecurrenceBackwardArguments {
  int dtype, mode;
  Sequence sequence;
  const void* grad_output;                                               // [rows, state] or null
  const void* grad_h_n;                                                  // [batch, state] or null
  const void* grad_c_n;                                                  // [batch, hidden] or null
  const void *output, *hx, *cx, *weight_hh, *weight_hr, *gates, *cells;  // as above
  void* grad_projected;                                                  // [rows, G * hidden]
  void* grad_hidden_n;                                                   // [rows, hidden], gru: of the product inside n
  void* grad_hx;                                                         // [batch, state]
  void* grad_cx;                                                         // [batch, hidden], lstm
  void* grad_projection;  // [rows, state], with weight_hr: the whole gradient of h
  void* workspace;
  int threads;
};

// h, c = one step from hx, cx
struct CellArguments {
  int dtype, mode;
  const void* input;              // [batch, input_size]
  const void* hx;                 // [batch, hidden]
  const void* cx;                 // [batch, hidden], lstm
  const void* weight_ih;          // [G * hidden, input_size]
  const void* weight_hh;          // [G * hidden, hidden]
  const void *bias_ih, *bias_hh;  // [G * hidden] or null
  void* h;                        // [batch, hidden]
  void* c;                        // [batch, hidden], lstm
  void* gates;                    // [batch, 4 * hidden] or null
  int64_t batch, input_size, hidden;
  int threads;
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
  int threads;
};

// Rows of one size for each batch, position and head: element (b, i, h, d) at data[b * batch_stride + i * row_stride +
// h * head_stride + d]
template <class Pointer>
struct Heads {
  Pointer data;
  int64_t batch_stride, row_stride, head_stride;
};

// Sequence b has queries [query_offsets[b], query_offsets[b + 1]) of `queries` rows, and keys likewise; without offsets
// all of them. `group` heads of queries, one after the other, share one of keys and values.
struct AttentionShape {
  int64_t batch, heads, group, queries, keys, size, value_size;
  const int64_t *query_offsets, *key_offsets;  // [batch + 1] or null
};

enum MaskKind { no_mask, boolean_mask, additive_mask, wide_additive_mask, mask_kind_count };  // wide: as computed in

// The score of query i for key j: scale * q . k + mask[i, j] - slope * |p - j|, where p - left <= j <= p + right and
// the boolean mask is not 0, else -infinity. p = i, or with bottom_right i + keys - queries. An additive mask is in the
// dtype of query, a wide one and the slopes in that of computation.
struct AttentionScores {
  double scale;
  int64_t left, right;  // less than 0: no limit
  bool bottom_right;
  int mask_kind;
  const void* mask;  // element (b, h, i, j) at the strides' sum and j
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride;
  const void* slopes;  // [batch, heads] or null
  int64_t slopes_batch_stride;
  double dropout;
  uint64_t seed;
};

// output = dropout(softmax(scores)) value; logsumexp that of the scores, -infinity where all are
struct AttentionArguments {
  int dtype;
  AttentionShape shape;
  AttentionScores scores;
  Heads<const void*> query, key, value;
  Heads<void*> output;
  void* logsumexp;  // [batch, or 1 with offsets, heads, queries] in the dtype of computation
  int threads;
};

struct AttentionBackwardArguments {
  int dtype;
  AttentionShape shape;
  AttentionScores scores;
  Heads<const void*> grad_output, query, key, value, output;
  const void *logsumexp, *grad_logsumexp;         // as above; grad_logsumexp may be null
  Heads<void*> grad_query, grad_key, grad_value;  // data may be null
  void* grad_mask;                                // [batch, heads, queries, keys] or null, in the dtype of computation
  void* workspace;                                // as attention_backward_workspace asks
  int threads;
};

// Every kernel of one instruction set: its result, name and arguments
#define FASTDL_CPU_KERNELS(KERNEL)                                                                        \
  KERNEL(void, attention, (const AttentionArguments&))                                                    \
  KERNEL(void, attention_backward, (const AttentionBackwardArguments&))                                   \
  KERNEL(int64_t, attention_backward_workspace, (int dtype, const AttentionShape&, int threads))          \
  KERNEL(void, linear, (const LinearArguments&))                                                          \
  KERNEL(void, activation_forward, (const ForwardArguments&))                                             \
  KERNEL(void, activation_backward, (const BackwardArguments&))                                           \
  KERNEL(void, conv_1x1, (const Conv1x1Arguments&))                                                       \
  KERNEL(void, conv_1x1_weight_gradient, (const Conv1x1GradientArguments&))                               \
  KERNEL(void, depthwise, (const DepthwiseArguments&))                                                    \
  KERNEL(void, depthwise_weight_gradient, (const DepthwiseArguments&))                                    \
  KERNEL(void, channel_gradient, (const ChannelGradientArguments&))                                       \
  KERNEL(void, batch_norm, (const BatchNormArguments&))                                                   \
  KERNEL(void, batch_norm_statistics, (const BatchNormStatisticsArguments&))                              \
  KERNEL(void, batch_norm_backward, (const BatchNormBackwardArguments&))                                  \
  KERNEL(void, pooling, (const PoolingArguments&))                                                        \
  KERNEL(void, fractional_pooling, (const FractionalArguments&))                                          \
  KERNEL(void, fractional_pooling_backward, (const FractionalArguments&))                                 \
  KERNEL(void, recurrence, (const RecurrenceArguments&))                                                  \
  KERNEL(int64_t, recurrence_workspace, (int dtype, int mode, const Sequence&, bool projection))          \
  KERNEL(void, recurrence_backward, (const RecurrenceBackwardArguments&))                                 \
  KERNEL(int64_t, recurrence_backward_workspace, (int dtype, int mode, const Sequence&, bool projection)) \
  KERNEL(void, recurrent_cell, (const CellArguments&))                                                    \
  KERNEL(void, recurrent_cell_backward, (const CellBackwardArguments&))

struct Kernels {
  const char* name;
#define MEMBER(result, name, arguments) result(*name) arguments;
  FASTDL_CPU_KERNELS(MEMBER)
#undef MEMBER
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

}  // namespace fastdl
