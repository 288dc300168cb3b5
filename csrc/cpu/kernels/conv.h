#pragma once
#include "common.h"

namespace fastdl {

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

#define FASTDL_CPU_CONV(KERNEL)                                             \
  KERNEL(void, conv_1x1, (const Conv1x1Arguments&))                         \
  KERNEL(void, conv_1x1_weight_gradient, (const Conv1x1GradientArguments&)) \
  KERNEL(void, depthwise, (const DepthwiseArguments&))                      \
  KERNEL(void, depthwise_weight_gradient, (const DepthwiseArguments&))      \
  KERNEL(void, channel_gradient, (const ChannelGradientArguments&))

}  // namespace fastdl
