// The library's convolution, as plant.py has prepared it, against float64.
#include "zoo.h"
// BUG comes first
#include <vector>

#include "planted_conv.cuh"
#include "reference.h"

namespace zoo {
namespace {

using namespace fastdl::cuda;

struct Window {
  int taps_h, taps_w, stride, padding, dilation_h, dilation_w;

  int extent(int image, int taps, int dilation) const {
    return (image + 2 * padding - dilation * (taps - 1) - 1) / stride + 1;
  }
};

// An image [N, H, W, C], C in whole chunks of which `used` channels are not padding, and one group of K channels.
template <Convolution result, int N, int H, int W, int C, int used, int K>
double conv_case(const Window& window) {
  using T = bfloat16;
  constexpr TileName name = TileName::small;
  constexpr Tile tile = kTiles[int(name)];
  const auto [R, S, stride, padding, dilation_h, dilation_w] = window;
  const int P = window.extent(H, R, dilation_h), Q = window.extent(W, S, dilation_w), pixels = N * P * Q;
  const bool makes_image = result == Convolution::image;
  const size_t image_size = size_t(N) * H * W * C, weight_size = size_t(K) * R * S * C;
  const size_t sums_size = makes_image ? size_t(pixels) * K : size_t(K) * R * S * used;
  Array<T> image{image_size}, weight{weight_size}, gradient{size_t(pixels) * K}, output{sums_size}, row_sums{K};
  for (int i = 0; i < N * H * W * C; ++i) image[i] = T(i % C < used ? uniform() : 0);
  for (int i = 0; i < K * R * S * C; ++i) weight[i] = T(i % C < used ? uniform() : 0);
  for (int i = 0; i < pixels * K; ++i) gradient[i] = T(uniform());

  ConvProduct<T> product{};
  product.gather = {image.data,
                    H * W * C / 8,
                    W * C / 8,
                    C / 8,
                    0,
                    C / 8,
                    pixels,
                    {Divider(P), Divider(Q)},
                    {H, stride, -padding, dilation_h, R, 0, 1},
                    {W, stride, -padding, dilation_w, S, 0, 1}};
  auto& epilogue = product.epilogue;
  epilogue.output = output.data;
  if (makes_image) {
    product.operand = {weight.data, K, R * S * C, 1, true};
    product.operand_height = S * C;
    product.operand_width = C;
    product.depth = R * S * C;
    epilogue.rows = pixels;
    epilogue.columns = epilogue.channels = K;
    epilogue.tap_columns = Divider(K);
    epilogue.split = product.gather.split;
    epilogue.batch_stride = P * Q * K;
    epilogue.height_stride = Q * K;
    epilogue.width_stride = K;
  } else {
    product.operand = {gradient.data, K, 1, K, true};
    product.row_sums = row_sums.data;
    product.depth = pixels;
    epilogue.rows = K;
    epilogue.columns = R * S * C;
    epilogue.tap_columns = Divider(C);
    epilogue.channels = used;
    epilogue.batch_stride = R * S * used;
    epilogue.tap_stride = used;
  }
  epilogue.channel_stride = 1;
  product.split_depth = product.depth + 64;
  epilogue.use_vectors();
  auto tiles = [&](int64_t count, int size) { return unsigned((count + size - 1) / size); };
  const dim3 grid(tiles(epilogue.rows, tile.rows) * tiles(epilogue.columns, tile.columns));
  launch(conv_kernel<T, true, name, result>, Shape(grid, dim3(tile.threads()), kSharedBytes<T, name>, nullptr),
         product);

  auto pixel = [&](int n, int p, int q, int r, int s) -> const T* {
    const int h = p * stride - padding + r * dilation_h, w = q * stride - padding + s * dilation_w;
    return h < 0 || h >= H || w < 0 || w >= W ? nullptr : &image[((size_t(n) * H + h) * W + w) * C];
  };
  double worst = 0;
  std::vector<Sum> sums(sums_size, Sum{0, 0});
  for (int i = 0; i < pixels; ++i) {
    for (int tap = 0; tap < R * S; ++tap) {
      const T* source = pixel(i / (P * Q), i / Q % P, i % Q, tap / S, tap % S);
      for (int k = 0; source && k < K; ++k) {
        for (int c = 0; c < used; ++c) {
          const float factor = float(makes_image ? weight[(size_t(k) * R * S + tap) * C + c] : gradient[i * K + k]);
          const double term = double(float(source[c])) * factor;
          Sum& sum = sums[makes_image ? i * K + k : (k * R * S + tap) * used + c];
          sum.value += term;
          sum.magnitude += std::fabs(term);
        }
      }
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) worst = worse(worst, sums[i].error<T>(float(output[i]), sums[i].value));
  for (int k = 0; !makes_image && k < K; ++k) {
    Sum sum{0, 0};
    for (int i = 0; i < pixels; ++i) {
      sum.value += float(gradient[i * K + k]);
      sum.magnitude += std::fabs(float(gradient[i * K + k]));
    }
    worst = worse(worst, sum.error<T>(float(row_sums[k]), sum.value));
  }
  return worst;
}

constexpr Convolution to_image = Convolution::image, to_weight = Convolution::weight;

}  // namespace

extern const std::vector<Case> conv_cases = {
    {"conv image", [] { return conv_case<to_image, 2, 6, 7, 16, 16, 24>({3, 3, 1, 1, 1, 1}); }},
    {"conv image, wide window", [] { return conv_case<to_image, 1, 9, 13, 24, 24, 70>({3, 4, 2, 3, 1, 2}); }},
    {"conv weight", [] { return conv_case<to_weight, 2, 14, 13, 8, 8, 40>({3, 3, 1, 1, 1, 1}); }},
    {"conv weight, odd channels", [] { return conv_case<to_weight, 1, 9, 8, 8, 3, 16>({2, 3, 2, 1, 1, 1}); }},
};

}  // namespace zoo
