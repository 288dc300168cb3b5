// Convolution: forward, and the gradients of input, weight and bias.
#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "conv.cuh"
#include "kernels.h"

namespace fastdl::cuda {
namespace {

// What a call runs with. The same code runs twice: to measure the workspace, without a launch, and to use it.
struct Call {
  const char* name;
  bool measuring, allow_tf32;
  char* workspace;
  cudaStream_t stream;
  DeviceLimits device = device_limits();
  size_t used = 0, most = 0;

  template <class T>
  T* take(int64_t count) {
    constexpr size_t alignment = 256;
    char* address = measuring ? nullptr : workspace + used;
    used += ceil_div(size_t(count) * sizeof(T), alignment) * alignment;
    most = std::max(most, used);
    require(measuring || workspace, name, "workspace", "0", "an address");
    return reinterpret_cast<T*>(address);
  }
};

template <class T>
constexpr int kChunk = 16 / sizeof(T);

// Rows, columns and depth of products are less, so that 32 bits hold them, those of the last tile included.
constexpr int64_t kMost = (int64_t(1) << 31) - 1024;

Pixels pixels_of(int64_t height, int64_t width) { return {Divider(height), Divider(width)}; }

// ---- Images ---------------------------------------------------------------------------------------------------------

// [n, height, width, groups, channels], the channels in whole chunks; strides in elements.
template <class T>
struct Image {
  const T* data;
  int64_t batch, height, width, group, channels;
};

// A view of an array by dimensions n, c, h, w.
struct View {
  const void* data;
  std::array<int64_t, 4> size, stride;
};

View view_of(const Strided& array) {
  View view{array.data, array.size, array.stride};
  for (int i = 0; i < 4; ++i) {
    if (view.size[i] == 1) view.stride[i] = 0;  // whatever it says
  }
  return view;
}

// The view as an image, itself or a packed copy. uniform: its pixels must be at equal distances.
template <class T>
Image<T> image_of(View view, int64_t groups, bool uniform, Call& call) {
  constexpr int64_t chunk = kChunk<T>;
  const auto [n, all_channels, h, w] = view.size;
  const auto [sn, sc, sh, sw] = view.stride;
  const int64_t channels = all_channels / groups;
  const bool equal = (h == 1 || sh == w * sw) && (n == 1 || sn == h * w * sw);
  if (sc == 1 && are_multiples(chunk, channels, sn, sh, sw) && aligned(16, static_cast<const char*>(view.data)) &&
      (equal || !uniform)) {
    return {static_cast<const T*>(view.data), sn, sh, sw, channels, channels};
  }
  Unpacked<T> input{};
  input.data = static_cast<const T*>(view.data);
  std::tie(input.batch_stride, input.channel_stride, input.height_stride, input.width_stride) =
      std::tuple_cat(view.stride);
  input.group_stride = channels * sc;
  input.pixels = n * h * w;
  input.split = pixels_of(h, w);
  input.channels = int(channels);
  input.padded = int(ceil_div(channels, chunk) * chunk);
  input.padded_channels = Divider(std::max(input.padded, 1));
  const int64_t columns = groups * input.padded, tiles = ceil_div(input.pixels, int64_t(kPackPixels));
  const int64_t blocks = tiles * ceil_div(columns, int64_t(kPackChannels));
  require(input.pixels < (int64_t(1) << 31), call.name, "the number of pixels", input.pixels, "less than 2^31");
  require(columns < (int64_t(1) << 31) && blocks < (int64_t(1) << 31), call.name, "the number of channels", columns,
          "less than 2^31");
  input.columns = int(columns);
  T* output = call.take<T>(input.pixels * columns);
  if (!call.measuring && blocks > 0) {
    launch(pack_kernel<T>, Shape(dim3(unsigned(blocks)), dim3(kPackThreads), 0, call.stream), input, output, tiles);
  }
  return {output, h * w * columns, w * columns, columns, input.padded, input.padded};
}

template <class T>
Gather<T> gather_of(const Image<T>& image, const View& view, const Axis& h, const Axis& w, int64_t pixels,
                    const Pixels& split, const Call& call) {
  constexpr int64_t chunk = kChunk<T>;
  const auto [n, c, height, width] = view.size;
  const int64_t reach = (n * image.batch + height * image.height + width * image.width) / chunk;
  require(pixels < kMost, call.name, "the number of pixels", pixels, "less than 2^31 - 1024");
  require(reach < (int64_t(1) << 30), call.name, "an image's reach in memory, in bytes", reach * 16,
          "less than 16 GiB");
  return {image.data,
          int(image.batch / chunk),
          int(image.height / chunk),
          int(image.width / chunk),
          int(image.group / chunk),
          int(image.channels / chunk),
          int(pixels),
          split,
          h,
          w};
}

// ---- Products -------------------------------------------------------------------------------------------------------

// Runs a product of which all is set but its split.
template <class T, Convolution result>
void multiply(ConvProduct<T> product, int64_t groups, Call& call) {
  auto& epilogue = product.epilogue;
  const Arithmetic arithmetic = arithmetic_of<T>(call.allow_tf32);
  require(product.depth < kMost, call.name, "the depth", product.depth, "less than 2^31 - 1024");
  require(epilogue.columns < kMost, call.name, "the number of columns", epilogue.columns, "less than 2^31 - 1024");
  require(groups < 65536, call.name, "groups", groups, "less than 65536 if not the number of channels");
  const Plan plan =
      choose_plan(arithmetic, epilogue.rows, epilogue.columns, product.depth, false, false, true, call.device, groups);
  product.split_depth = plan.split_depth;
  const size_t before = call.used;
  if (plan.splits > 1) {
    epilogue.partial = call.take<Compute<T>>(groups * plan.splits * epilogue.rows * epilogue.columns);
    if (product.row_sums) product.partial_row_sums = call.take<Compute<T>>(groups * plan.splits * epilogue.rows);
  }
  call.used = before;  // the next product may have it
  if (call.measuring) return;
  epilogue.use_vectors();
  dispatch_tile<T>(arithmetic, plan.tile, [&]<bool tensor_cores, TileName name>() {
    constexpr Tile tile = kTiles[int(name)];
    const int64_t tiles = ceil_div(epilogue.rows, int64_t(tile.rows)) *
                          std::max<int64_t>(1, ceil_div(epilogue.columns, int64_t(tile.columns)));
    require(tiles < (int64_t(1) << 31), call.name, "the number of tiles", tiles, "less than 2^31");
    const Shape shape(dim3(unsigned(tiles), unsigned(plan.splits), unsigned(groups)), dim3(tile.threads()),
                      kSharedBytes<T, name>, call.stream);
    launch(conv_kernel<T, tensor_cores, name, result>, shape, product);
  });
  if (plan.splits == 1) return;
  launch_finish(epilogue, static_cast<const Compute<T>*>(epilogue.partial),
                static_cast<const Compute<T>*>(product.partial_row_sums), product.row_sums, plan.splits,
                unsigned(groups), call.stream);
}

// The weight of a product that makes an image. output: of strides in elements; from its address on, every step_h-th
// line and step_w-th pixel.
template <class T>
void make_image(const Gather<T>& gather, const Image<T>& weight, int64_t columns, int64_t groups, int64_t weight_group,
                Epilogue<T> epilogue, const View& output, int64_t step_h, int64_t step_w, Call& call) {
  ConvProduct<T> product{};
  product.gather = gather;
  product.operand = {weight.data, columns, weight.batch, 1, true};
  product.operand_group = weight_group;
  product.operand_height = gather.h.tap_step * weight.height;
  product.operand_width = gather.w.tap_step * weight.width;
  product.operand_first = gather.h.first_tap * weight.height + gather.w.first_tap * weight.width;
  product.depth = int64_t(gather.h.taps) * gather.w.taps * weight.channels;
  static_cast<Epilogue<T>&>(product.epilogue) = epilogue;
  product.epilogue.rows = gather.pixels;
  product.epilogue.columns = columns;
  product.epilogue.split = gather.split;
  product.epilogue.batch_stride = output.stride[0];
  product.epilogue.height_stride = step_h * output.stride[2];
  product.epilogue.width_stride = step_w * output.stride[3];
  product.epilogue.channel_stride = output.size[1] == 1 ? 1 : output.stride[1];
  product.epilogue.group_stride = columns * output.stride[1];
  product.epilogue.tap_columns = Divider(std::max<int64_t>(columns, 1));
  product.epilogue.channels = int(columns);
  multiply<T, Convolution::image>(product, groups, call);
}

// ---- Axes -----------------------------------------------------------------------------------------------------------

// Of the forward, and of the weight's gradient.
Axis forward_axis(int64_t image, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  return {int(image), int(stride), int(-padding), int(dilation), int(taps), 0, 1};
}

// Of the input's gradient, for its rows first, first + stride, ..: the output's row that a tap brings to row
// first + i * stride is i + (first + padding - tap * dilation) / stride, for those taps where that divides. So each
// class of rows is a dense convolution with taps of its own, and no work is lost on others.
Axis gradient_axis(int64_t output, int64_t taps, int64_t stride, int64_t padding, int64_t dilation, int64_t first) {
  int64_t tap = 0, step = 1;
  while (step * dilation % stride) ++step;
  while (tap < step && (first + padding - tap * dilation) % stride) ++tap;
  const int64_t hits = tap < step && tap < taps ? ceil_div(taps - tap, step) : 0;
  return {int(output),
          1,
          int((first + padding - tap * dilation) / stride),
          int(-step * dilation / stride),
          int(hits),
          int(tap),
          int(step)};
}

void require_conv(const char* name, const Strided& input, const Strided& weight, const Strided& output,
                  const Geometry& geometry) {
  constexpr int64_t most = int64_t(1) << 30;
  const int64_t groups = geometry.groups;
  require(groups >= 1 && groups <= most, name, "groups", groups, "1 or more");
  for (const auto* array : {&input, &weight, &output}) {
    for (const int64_t size : array->size) require(size >= 0, name, "a size", size, "at least 0");
  }
  for (int i = 0; i < 2; ++i) {
    require(geometry.stride[i] >= 1 && geometry.stride[i] < most, name, "stride", geometry.stride[i], "1 or more");
    require(geometry.padding[i] >= 0 && geometry.padding[i] < most, name, "padding", geometry.padding[i], "0 or more");
    require(geometry.dilation[i] >= 1 && geometry.dilation[i] < most, name, "dilation", geometry.dilation[i],
            "1 or more");
    require(weight.size[2 + i] >= 1, name, "the kernel's size", weight.size[2 + i], "1 or more");
    const int64_t image = input.size[2 + i], extent = geometry.dilation[i] * (weight.size[2 + i] - 1) + 1;
    require(image < most && extent < most, name, "an extent", std::max(image, extent), "less than 2^30");
    const int64_t room = image + 2 * geometry.padding[i] - extent, expected = room / geometry.stride[i] + 1;
    require(room < most, name, "padding", geometry.padding[i], "less than 2^29");
    require(room >= 0 && output.size[2 + i] == expected, name, "the output's extent", output.size[2 + i],
            "what input, weight, stride, padding and dilation make");
  }
  require(output.size[0] == input.size[0], name, "the output's batch", output.size[0], "the input's");
  require(output.size[1] == weight.size[0] && weight.size[0] % groups == 0, name, "the output's channels",
          output.size[1], "the weight's first size, a multiple of groups");
  require(input.size[1] == weight.size[1] * groups, name, "the input's channels", input.size[1],
          "groups times the weight's second size");
}

// ---- Depthwise ------------------------------------------------------------------------------------------------------

bool is_depthwise(const Strided& input, const Geometry& geometry) {
  return geometry.groups > 1 && geometry.groups == input.size[1];
}

template <class T>
void set_input(Depthwise<T>& args, const View& view) {
  args.input = static_cast<const T*>(view.data);
  std::tie(args.input_batch, args.input_channel, args.input_height, args.input_width) = std::tuple_cat(view.stride);
}

template <class T>
void set_output(Depthwise<T>& args, const View& view) {
  std::tie(args.output_batch, args.output_channel, args.output_height, args.output_width) = std::tuple_cat(view.stride);
  args.channels = int(view.size[1]);
  args.height = int(view.size[2]);
  args.width = int(view.size[3]);
}

// Whether channels can be taken by vectors.
template <class T, class... Pointers>
bool channel_vectors(const Depthwise<T>& args, const Pointers*... pointers) {
  constexpr int64_t vector = kFullVector<T>;
  return vector > 1 && args.multiple == 1 && args.reads == 1 && args.input_channel == 1 && args.output_channel == 1 &&
         aligned(16, pointers...) &&
         are_multiples(vector, args.channels, args.input_batch, args.input_height, args.input_width, args.output_batch,
                       args.output_height, args.output_width);
}

// The output, or the input's gradient. weight: of the layer, [channels, 1, taps, taps].
template <class T>
void run_depthwise(Depthwise<T> args, const View& weight, int64_t batch, Call& call) {
  constexpr int64_t pixels = kDepthwisePixels<T>;
  auto& epilogue = args.epilogue;
  epilogue.columns = args.channels;
  const bool vectors = channel_vectors(args, args.input, epilogue.output, epilogue.preactivation);
  args.weight = static_cast<const T*>(weight.data);
  args.weight_channel = weight.stride[0];
  args.weight_height = weight.stride[2];
  args.weight_width = weight.stride[3];
  if (vectors) {  // the weight's too
    const Image<T> image = image_of<T>({weight.data,
                                        {1, weight.size[0], weight.size[2], weight.size[3]},
                                        {0, weight.stride[0], weight.stride[2], weight.stride[3]}},
                                       1, false, call);
    args.weight = image.data;
    args.weight_channel = 1;
    args.weight_height = image.height;
    args.weight_width = image.width;
  }
  epilogue.vectors = vectors && aligned(16, epilogue.bias);
  args.along_lines = !vectors && args.output_channel != 1;
  args.line_vectors = args.output_width == 1 &&
                      are_multiples(pixels, args.width, args.output_batch, args.output_channel, args.output_height) &&
                      aligned(sizeof(T) * pixels, epilogue.output, epilogue.preactivation);
  const int64_t width = vectors ? kFullVector<T> : 1;
  const int64_t spans = ceil_div(int64_t(args.width), pixels), channels = args.channels / width;
  const int64_t work = batch * args.height * spans * channels;
  require(work < (int64_t(1) << 31), call.name, "the number of output vectors", work, "less than 2^31");
  if (call.measuring || work == 0) return;
  const Divider by_spans(spans), by_channels(channels), by_lines(args.height);
  const int64_t blocks = std::min(ceil_div(work, int64_t(kDepthwiseThreads)), kMaximumBlocks);
  const Shape shape(dim3(unsigned(blocks)), dim3(kDepthwiseThreads), 0, call.stream);
  const Divider& fast = args.along_lines ? by_spans : by_channels;
  const Divider& middle = args.along_lines ? by_lines : by_spans;
  const Divider& slow = args.along_lines ? by_channels : by_lines;
  if (vectors) {
    launch(depthwise_kernel<T, kFullVector<T>>, shape, args, fast, middle, slow, work);
  } else {
    launch(depthwise_kernel<T, 1>, shape, args, fast, middle, slow, work);
  }
}

template <class T>
void run_depthwise_weight(Depthwise<T> args, const Strided& grad_weight, void* grad_bias, int64_t batch, Call& call) {
  const bool vectors = channel_vectors(args, args.input, args.epilogue.output);
  const int64_t width = vectors ? kFullVector<T> : 1, pixels = batch * args.height * args.width;
  const int64_t columns = args.channels / width;
  unsigned x = 1;
  while (x < 32 && x < columns && args.output_channel == 1) x *= 2;
  const dim3 block(x, kDepthwiseThreads / x);
  if (!grad_weight.data) args.h.taps = args.w.taps = 0;
  std::tie(args.weight_channel, std::ignore, args.weight_height, args.weight_width) =
      std::tuple_cat(grad_weight.stride);
  const int64_t taps = int64_t(args.h.taps) * args.w.taps;
  const int64_t column_blocks = ceil_div(columns, int64_t(x));
  const int64_t tap_blocks = std::max<int64_t>(ceil_div(taps, int64_t(kDepthwiseTaps)), 1);
  require(pixels < (int64_t(1) << 31), call.name, "the number of pixels", pixels, "less than 2^31");
  require(tap_blocks < 65536, call.name, "the kernel's size", taps, "less than 589824");
  // It depends on nothing but the shape, so neither does the result.
  constexpr int64_t most_blocks = std::min<int64_t>(kMaximumBlocks, 1024), rows_per_part = 16;
  const int64_t parts = std::clamp<int64_t>(most_blocks / (column_blocks * tap_blocks), 1,
                                            std::max<int64_t>(ceil_div(pixels, int64_t(block.y) * rows_per_part), 1));
  const int64_t size = (taps + 1) * args.channels;
  auto* partial = call.take<Compute<T>>(parts * size);
  if (call.measuring) return;
  const dim3 grid{unsigned(column_blocks), unsigned(parts), unsigned(tap_blocks)};
  const Pixels split = pixels_of(std::max(args.height, 1), std::max(args.width, 1));
  if (vectors) {
    launch(depthwise_weight_kernel<T, kFullVector<T>>, Shape(grid, block, 0, call.stream), args, split, pixels,
           partial);
  } else {
    launch(depthwise_weight_kernel<T, 1>, Shape(grid, block, 0, call.stream), args, split, pixels, partial);
  }
  const int64_t blocks = std::min(ceil_div(size, int64_t(kDepthwiseThreads)), kMaximumBlocks);
  launch(depthwise_finish_kernel<T>, Shape(dim3(unsigned(blocks)), dim3(kDepthwiseThreads), 0, call.stream), args,
         static_cast<const Compute<T>*>(partial), int(parts), static_cast<T*>(grad_weight.data),
         static_cast<T*>(grad_bias));
}

// ---- Forward --------------------------------------------------------------------------------------------------------

template <class T>
void forward(const Strided& input, const Strided& weight, const void* bias, const Strided& output, void* preactivation,
             const Geometry& geometry, int kind, double parameter, Call& call) {
  const auto [n, c, height, width] = input.size;
  const auto [k, group_channels, r, s] = weight.size;
  const auto [p, q] = std::array{output.size[2], output.size[3]};
  if (n * k == 0) return;
  const auto& [stride, padding, dilation, groups] = geometry;
  const Axis h = forward_axis(height, r, stride[0], padding[0], dilation[0]);
  const Axis w = forward_axis(width, s, stride[1], padding[1], dilation[1]);
  Epilogue<T> epilogue{static_cast<const T*>(bias),
                       static_cast<T*>(output.data),
                       static_cast<T*>(preactivation),
                       nullptr,
                       0,
                       0,
                       static_cast<Compute<T>>(parameter),
                       Activation(kind),
                       false};
  if (is_depthwise(input, geometry)) {
    Depthwise<T> args{};
    set_input(args, view_of(input));
    set_output(args, view_of(output));
    args.h = h;
    args.w = w;
    args.divide_h = args.divide_w = args.reads = 1;
    args.multiple = int(k / groups);
    args.epilogue = epilogue;
    return run_depthwise(args, view_of(weight), n, call);
  }
  const View view = view_of(input);
  const Image<T> image = image_of<T>(view, groups, false, call);
  const Image<T> weights = image_of<T>(view_of(weight), 1, false, call);
  const Gather<T> gather = gather_of(image, view, h, w, n * p * q, pixels_of(p, q), call);
  make_image(gather, weights, k / groups, groups, k / groups * weights.batch, epilogue, view_of(output), 1, 1, call);
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// The input's gradient, by classes of its rows and columns.
template <class T>
void input_gradient(const Image<T>& gradient, const View& grad_output, const Strided& weight, const Strided& grad_input,
                    const Geometry& geometry, Call& call) {
  const auto [n, c, height, width] = grad_input.size;
  const auto [k, group_channels, r, s] = weight.size;
  const auto& [stride, padding, dilation, groups] = geometry;
  View transposed = view_of(weight);  // the output's channels innermost
  std::swap(transposed.size[0], transposed.size[1]);
  std::swap(transposed.stride[0], transposed.stride[1]);
  const Image<T> weights = image_of<T>(transposed, groups, false, call);
  for (int64_t a = 0; a < std::min(stride[0], height); ++a) {
    const Axis h = gradient_axis(grad_output.size[2], r, stride[0], padding[0], dilation[0], a);
    for (int64_t b = 0; b < std::min(stride[1], width); ++b) {
      const Axis w = gradient_axis(grad_output.size[3], s, stride[1], padding[1], dilation[1], b);
      const int64_t lines = ceil_div(height - a, stride[0]), columns = ceil_div(width - b, stride[1]);
      const Gather<T> gather =
          gather_of(gradient, grad_output, h, w, n * lines * columns, pixels_of(lines, columns), call);
      const View output = view_of(grad_input);
      Epilogue<T> epilogue{};
      epilogue.output = static_cast<T*>(grad_input.data) + a * output.stride[2] + b * output.stride[3];
      make_image(gather, weights, group_channels, groups, weights.group, epilogue, output, stride[0], stride[1], call);
    }
  }
}

template <class T>
void weight_gradient(const Image<T>& gradient, const View& grad_output, const Strided& input,
                     const Strided& grad_weight, void* grad_bias, const Geometry& geometry, Call& call) {
  const auto [k, group_channels, r, s] = grad_weight.size;
  const auto& [stride, padding, dilation, groups] = geometry;
  const auto [n, all, p, q] = grad_output.size;
  ConvProduct<T> product{};
  product.depth = n * p * q;
  auto& epilogue = product.epilogue;
  if (grad_weight.data) {
    const View view = view_of(input);
    const Image<T> image = image_of<T>(view, groups, false, call);
    const Axis h = forward_axis(input.size[2], r, stride[0], padding[0], dilation[0]);
    const Axis w = forward_axis(input.size[3], s, stride[1], padding[1], dilation[1]);
    product.gather = gather_of(image, view, h, w, product.depth, pixels_of(p, q), call);
    epilogue.columns = r * s * image.channels;
    epilogue.tap_columns = Divider(image.channels);
  }
  product.operand = {gradient.data, k / groups, 1, gradient.width, true};
  product.operand_group = gradient.group;
  product.row_sums = static_cast<T*>(grad_bias);
  const View output = view_of(grad_weight);
  epilogue.output = static_cast<T*>(grad_weight.data);
  epilogue.rows = k / groups;
  epilogue.batch_stride = output.stride[0];
  epilogue.group_stride = epilogue.rows * output.stride[0];
  epilogue.tap_stride = s > 1 ? output.stride[3] : output.stride[2];
  epilogue.channel_stride = group_channels == 1 ? 1 : output.stride[1];
  epilogue.channels = int(group_channels);
  require(r == 1 || s == 1 || output.stride[2] == s * output.stride[3], call.name, "grad_weight's stride of rows",
          output.stride[2], "its stride of columns times their number");
  multiply<T, Convolution::weight>(product, groups, call);
}

template <class T>
void backward(const Strided& grad_output, const Strided& input, const Strided& weight, const Strided& grad_input,
              const Strided& grad_weight, void* grad_bias, const Geometry& geometry, Call& call) {
  const auto [n, c, height, width] = input.size;
  const auto [k, group_channels, r, s] = weight.size;
  const auto& [stride, padding, dilation, groups] = geometry;
  const View gradient = view_of(grad_output);
  const bool weights = grad_weight.data || grad_bias;
  if (n * k * c == 0) return;
  if (is_depthwise(input, geometry)) {
    Depthwise<T> args{};
    args.divide_h = args.divide_w = args.reads = args.multiple = 1;
    if (grad_input.data) {
      set_input(args, gradient);
      set_output(args, view_of(grad_input));
      args.epilogue.output = static_cast<T*>(grad_input.data);
      args.h = {int(gradient.size[2]), 1, int(padding[0]), int(-dilation[0]), int(r), 0, 1};
      args.w = {int(gradient.size[3]), 1, int(padding[1]), int(-dilation[1]), int(s), 0, 1};
      args.divide_h = int(stride[0]);
      args.divide_w = int(stride[1]);
      args.reads = int(k / groups);
      run_depthwise(args, view_of(weight), n, call);
    }
    if (weights) {
      args.h = forward_axis(height, r, stride[0], padding[0], dilation[0]);
      args.w = forward_axis(width, s, stride[1], padding[1], dilation[1]);
      set_input(args, view_of(input));
      set_output(args, gradient);
      args.epilogue.output = static_cast<T*>(const_cast<void*>(gradient.data));
      args.reads = 1;
      args.multiple = int(k / groups);
      run_depthwise_weight(args, grad_weight, grad_bias, n, call);
    }
    return;
  }
  const Image<T> image = image_of<T>(gradient, groups, weights, call);
  if (grad_input.data) input_gradient(image, gradient, weight, grad_input, geometry, call);
  if (weights) weight_gradient(image, gradient, input, grad_weight, grad_bias, geometry, call);
}

size_t run_forward(int dtype, const Strided& input, const Strided& weight, const void* bias, const Strided& output,
                   void* preactivation, const Geometry& geometry, int kind, double parameter, Call call) {
  require_conv(call.name, input, weight, output, geometry);
  require(kind >= 0 && kind <= int(Activation::silu), call.name, "kind", kind, "0 to 8");
  dispatch_dtype(call.name, dtype, [&]<class T>() {
    forward<T>(input, weight, bias, output, preactivation, geometry, kind, parameter, call);
  });
  return call.most;
}

size_t run_backward(int dtype, const Strided& grad_output, const Strided& input, const Strided& weight,
                    const Strided& grad_input, const Strided& grad_weight, void* grad_bias, const Geometry& geometry,
                    Call call) {
  require_conv(call.name, input, weight, grad_output, geometry);
  require(grad_input.size == input.size, call.name, "grad_input's batch", grad_input.size[0], "of the input's shape");
  require(grad_weight.size == weight.size, call.name, "grad_weight's first size", grad_weight.size[0],
          "of the weight's shape");
  dispatch_dtype(call.name, dtype, [&]<class T>() {
    backward<T>(grad_output, input, weight, grad_input, grad_weight, grad_bias, geometry, call);
  });
  return call.most;
}

}  // namespace

void conv(int dtype, const Strided& input, const Strided& weight, const void* bias, const Strided& output,
          void* preactivation, const Geometry& geometry, int kind, double parameter, bool allow_tf32, void* workspace,
          cudaStream_t stream) {
  run_forward(dtype, input, weight, bias, output, preactivation, geometry, kind, parameter,
              {"conv", false, allow_tf32, static_cast<char*>(workspace), stream});
}

size_t conv_workspace(int dtype, const Strided& input, const Strided& weight, const Strided& output,
                      const Geometry& geometry, bool allow_tf32) {
  return run_forward(dtype, input, weight, nullptr, output, nullptr, geometry, 0, 0,
                     {"conv_workspace", true, allow_tf32, nullptr, nullptr});
}

void conv_backward(int dtype, const Strided& grad_output, const Strided& input, const Strided& weight,
                   const Strided& grad_input, const Strided& grad_weight, void* grad_bias, const Geometry& geometry,
                   bool allow_tf32, void* workspace, cudaStream_t stream) {
  run_backward(dtype, grad_output, input, weight, grad_input, grad_weight, grad_bias, geometry,
               {"conv_backward", false, allow_tf32, static_cast<char*>(workspace), stream});
}

size_t conv_backward_workspace(int dtype, const Strided& grad_output, const Strided& input, const Strided& weight,
                               const Strided& grad_input, const Strided& grad_weight, void* grad_bias,
                               const Geometry& geometry, bool allow_tf32) {
  return run_backward(dtype, grad_output, input, weight, grad_input, grad_weight, grad_bias, geometry,
                      {"conv_backward_workspace", true, allow_tf32, nullptr, nullptr});
}

}  // namespace fastdl::cuda
