// Host functions of the CUDA kernels. They launch on the caller's stream and return at once.
//
// dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64. kind: the activation, 0 none, 1 relu, 2 leaky_relu, 3 elu, 4
// sigmoid, 5 tanh, 6 gelu, 7 gelu by tanh, 8 silu; parameter: leaky_relu's slope, elu's alpha. Arithmetic is in float32
// (float64 for float64). saved: what the gradient needs, the output y, or the preactivation z for gelu and silu; null
// for none. Bad codes, sizes and pointers throw std::invalid_argument, failed launches std::runtime_error.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

typedef struct CUstream_st* cudaStream_t;

namespace fastdl::cuda {

// output = activation(input). output may be input.
void activation(int dtype,
                const void* input,  // [count]
                void* output,       // [count]
                int64_t count, int kind, double parameter, cudaStream_t stream);

// grad_input = grad_output * activation'(saved). grad_input may be grad_output.
void activation_backward(int dtype,
                         const void* grad_output,  // [count]
                         const void* saved,        // [count]
                         void* grad_input,         // [count]
                         int64_t count, int kind, double parameter, cudaStream_t stream);

// z = input + bias; output = activation(z). Each of output and preactivation may be input.
void bias_activation(int dtype,
                     const void* input,    // [rows, columns]
                     const void* bias,     // [columns] or null: 0
                     void* output,         // [rows, columns]
                     void* preactivation,  // [rows, columns], z, or null
                     int64_t rows, int64_t columns, int kind, double parameter, cudaStream_t stream);

// dz = grad_output * activation'(saved); grad_bias = column sums of the unrounded dz, the same in every run.
void bias_activation_backward(int dtype,
                              const void* grad_output,   // [rows, columns]
                              const void* saved,         // [rows, columns]
                              void* grad_preactivation,  // [rows, columns], dz, or null; may be grad_output
                              void* grad_bias,           // [columns] or null
                              int64_t rows, int64_t columns, int kind, double parameter,
                              void* workspace,  // as many bytes as the next function says, 16-byte aligned
                              cudaStream_t stream);
size_t bias_activation_backward_workspace(int64_t rows, int64_t columns);

// output = activation(z), z = input @ weight^T + bias.
void linear(int dtype,
            const void* input,  // [M, K], any strides in elements, as all operands of matmuls
            int64_t input_row_stride, int64_t input_column_stride,
            const void* weight,  // [N, K]
            int64_t weight_row_stride, int64_t weight_column_stride,
            const void* bias,     // [N] or null: 0
            void* output,         // [M, N]
            void* preactivation,  // [M, N], z, or null
            int64_t M, int64_t N, int64_t K, int kind, double parameter,
            bool allow_tf32,  // for float32: round the operands to tf32 and use tensor cores
            int path,         // 0 portable, 1 Hopper's, where hopper::supports()
            cudaStream_t stream);

// grad_input = dz @ weight, dz = grad_output * activation'(saved) rounded to dtype. Taking the activation's gradient
// here saves a launch, but each tile takes it again: for more than fused_gradient_elements it is faster to call
// bias_activation_backward first, once for both gradients, and to pass its dz with kind none.
void linear_input_gradient(int dtype,
                           const void* grad_output,  // [M, N]
                           int64_t grad_row_stride, int64_t grad_column_stride,
                           const void* saved,   // [M, N], contiguous
                           const void* weight,  // [N, K]
                           int64_t weight_row_stride, int64_t weight_column_stride,
                           void* grad_input,  // [M, K]
                           int64_t M, int64_t N, int64_t K, int kind, double parameter, bool allow_tf32,
                           void* workspace,  // as linear_workspace says, 16-byte aligned; null: the depth is not split
                           cudaStream_t stream);

// grad_weight = dz^T @ input, grad_bias = the sums of dz's columns; dz as above. The same in every run.
void linear_weight_gradient(int dtype,
                            const void* grad_output,  // [M, N]
                            int64_t grad_row_stride, int64_t grad_column_stride,
                            const void* saved,  // [M, N], contiguous
                            const void* input,  // [M, K]
                            int64_t input_row_stride, int64_t input_column_stride,
                            void* grad_weight,  // [N, K] or null
                            void* grad_bias,    // [N] or null
                            int64_t M, int64_t N, int64_t K, int kind, double parameter, bool allow_tf32,
                            bool deterministic,  // it always is
                            void* workspace,     // as above
                            cudaStream_t stream);

constexpr int64_t fused_gradient_elements = 1 << 18;

// Bytes of workspace with which a product's depth can be split as is fastest. product: 0 linear, 1 its input's
// gradient, 2 its weight's. multiprocessors: of the device that it will run on, 0: the current one.
size_t linear_workspace(int product, int dtype, int64_t M, int64_t N, int64_t K, int multiprocessors,
                        bool deterministic);

// Batch normalisation: output = activation(z), z = (input - mean) * rstd * weight + bias + residual by channel, with
// mean and rstd = 1 / sqrt(variance + eps) of the input. Arrays are [outer, channels, inner], of no extent 0: element
// (o, c, i) at (o * channels + c) * inner + i. weight, bias and all else by channel are float32, float64 for float64.
void batch_norm(int dtype, int64_t outer, int64_t channels, int64_t inner,
                const void* input,     // [outer, channels, inner]
                const void* weight,    // [channels] or null: 1
                const void* bias,      // [channels] or null: 0
                const void* residual,  // [outer, channels, inner] or null: 0
                void* output,          // [outer, channels, inner]
                void* mean,            // [channels]
                void* rstd,            // [channels]
                void* variance,        // [channels], unbiased
                double eps, int kind, double parameter,
                void* workspace,  // as batch_norm_workspace says, 16-byte aligned
                cudaStream_t stream);

// The same with given mean and variance.
void batch_norm_inference(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* input,
                          const void* weight, const void* bias, const void* residual,
                          const void* mean,      // [channels]
                          const void* variance,  // [channels]
                          void* output, double eps, int kind, double parameter, cudaStream_t stream);

// Each gradient is null where it is not needed. training: mean and rstd are those of the input, else constants.
void batch_norm_backward(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* grad_output,
                         const void* input, const void* weight, const void* bias,
                         const void* residual,  // of the forward, read if output is null
                         const void* output,    // where the activation's gradient is made of it, or null
                         const void* mean, const void* rstd,
                         void* grad_input,     // [outer, channels, inner]
                         void* grad_weight,    // [channels]
                         void* grad_bias,      // [channels]
                         void* grad_residual,  // [outer, channels, inner]
                         bool training, int kind, double parameter, void* workspace, cudaStream_t stream);

// For statistics over many devices: what each has to add, the mean and the sum of squared differences from it.
void batch_norm_statistics(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* input, void* mean,
                           void* squares, void* workspace, cudaStream_t stream);

// And the gradient of the input, from dz and its means over all devices: by itself, and times (input - mean) * rstd.
void batch_norm_apply(int dtype, int64_t outer, int64_t channels, int64_t inner, const void* grad_preactivation,
                      const void* input, const void* weight, const void* mean, const void* rstd,
                      const void* mean_gradient, const void* mean_product, void* grad_input, cudaStream_t stream);

size_t batch_norm_workspace(int dtype, int64_t outer, int64_t channels, int64_t inner);

// A 4-dimensional array of any strides, in elements.
struct Strided {
  void* data;
  std::array<int64_t, 4> size, stride;
};

struct Geometry {  // of a convolution; pairs are of height and width
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
};

// output = activation(z), z = conv2d(input, weight) + bias. What does not lie with whole chunks of 16 bytes of channels
// innermost is packed into the workspace first; outputs are written as they are.
void conv(int dtype,
          const Strided& input,   // [N, C, H, W]
          const Strided& weight,  // [K, C / groups, R, S]
          const void* bias,       // [K] or null: 0
          const Strided& output,  // [N, K, P, Q]
          void* preactivation,    // z, with the output's strides, or null
          const Geometry& geometry, int kind, double parameter, bool allow_tf32,
          void* workspace,  // as many bytes as conv_workspace says, 16-byte aligned
          cudaStream_t stream);
size_t conv_workspace(int dtype, const Strided& input, const Strided& weight, const Strided& output,
                      const Geometry& geometry, bool allow_tf32);

// The gradients of conv with kind none; the same in every run. Those whose address is null are left out.
void conv_backward(int dtype,
                   const Strided& grad_output,  // [N, K, P, Q]
                   const Strided& input,        // [N, C, H, W]; read for grad_weight only
                   const Strided& weight,       // [K, C / groups, R, S]; read for grad_input only
                   const Strided& grad_input,   // [N, C, H, W]
                   const Strided& grad_weight,  // [K, C / groups, R, S]; its strides allow R and S to be one dimension
                   void* grad_bias,             // [K]
                   const Geometry& geometry, bool allow_tf32,
                   void* workspace,  // as many bytes as conv_backward_workspace says, 16-byte aligned
                   cudaStream_t stream);
size_t conv_backward_workspace(int dtype, const Strided& grad_output, const Strided& input, const Strided& weight,
                               const Strided& grad_input, const Strided& grad_weight, void* grad_bias,
                               const Geometry& geometry, bool allow_tf32);

// Windows over rows (0) and columns (1): o has positions o * stride - padding + k * dilation, k < kernel.
struct MaxWindows {
  int kernel[2], stride[2], padding[2], dilation[2];
};

// The maxima of windows of images [batch, channels, height, width], or [batch, height, width, channels] if
// channels_last, as all arrays here.
void max_pool2d(int dtype, const void* input,
                void* output,     // of [output_height, output_width]
                void* places,     // of the output's shape, or null
                int place_bytes,  // 1: uint8, a maximum's place in its window, row by row; 8: in its plane; 0: none
                int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t output_height,
                int64_t output_width, const MaxWindows& windows, bool channels_last, cudaStream_t stream);

// grad_input = the sums of the gradients of the windows whose maximum an element is, the same in every run.
void max_pool2d_backward(int dtype,
                         const void* grad_output,  // of [output_height, output_width]
                         const void* places,       // of the same shape
                         int place_bytes,          // 1 or 8
                         void* grad_input,         // of [height, width]
                         int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t output_height,
                         int64_t output_width, const MaxWindows& windows, bool channels_last, cudaStream_t stream);

std::vector<std::string> targets();  // architectures with machine code in this build
std::string version();               // of the CUDA toolkit that built it
int device_count();                  // 0 where there is no driver

}  // namespace fastdl::cuda
