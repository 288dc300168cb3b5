// Maxima over windows of images, and the gradient. Planes of NCHW are images of one channel, so one kernel serves both
// memory formats: a thread takes a vector of channels at one position of the result. Each element of a gradient gathers
// from the windows that hold it: no atomics, the same bits in every run.
#include <algorithm>
#include <limits>

#include "common.cuh"
#include "kernels.h"

namespace fastdl::cuda {
namespace {

constexpr int kThreads = 256;
template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Images of [height, width, channels]; the pooled ones of [output_height, output_width, channels].
struct Images {
  int height, width, output_height, output_width;
  int64_t channels;
  MaxWindows windows;
};

// A place as the caller keeps it: in the window, row by row, or in the plane.
template <class Place>
constexpr bool kInPlane = std::is_same_v<Place, int64_t>;

template <class T, int count>
__device__ __forceinline__ void store_places(T* address, const int (&places)[count]) {
  constexpr int part = count * sizeof(T) <= 16 ? count : 16 / sizeof(T);
#pragma unroll
  for (int first = 0; first < count; first += part) {
    Vector<T, part> vector;
#pragma unroll
    for (int i = 0; i < part; ++i) vector.element[i] = T(places[first + i]);
    *reinterpret_cast<Vector<T, part>*>(address + first) = vector;
  }
}
template <int count, class T>
__device__ __forceinline__ void load_places(const T* address, int (&places)[count]) {
  constexpr int part = count * sizeof(T) <= 16 ? count : 16 / sizeof(T);
#pragma unroll
  for (int first = 0; first < count; first += part) {
    const auto vector = load<part>(address + first);
#pragma unroll
    for (int i = 0; i < part; ++i) places[first + i] = int(vector.element[i]);
  }
}

// The vector of the result that a thread works on, at row h and column w of an image.
template <class Index>
struct Position {
  Index image, channel;
  int h, w;
  __device__ __forceinline__ Position(Index vector, Index vectors, int width_of_vector, int height, int width) {
    Index position = vector;
    channel = 0;
    if (vectors > 1) {
      position = vector / vectors;
      channel = (vector - position * vectors) * width_of_vector;
    }
    const Index row = position / Index(width);
    w = int(position - row * Index(width));
    image = row / Index(height);
    h = int(row - image * Index(height));
  }
};

// A maximum is replaced by what is larger and by NaN: the first of equals stays, and of NaNs the last.
template <class T, class Place, bool with_places, class Index, int width>
__global__ void __launch_bounds__(kThreads) max_kernel(const T* input,  // [images, height, width, channels]
                                                       T* output,  // [images, output_height, output_width, channels]
                                                       Place* places,  // of the output's shape
                                                       Index count,    // vectors of the output
                                                       Images g) {
  const Index vectors = Index(g.channels / width);
  const MaxWindows& win = g.windows;
  for (Index v = Index(blockIdx.x) * kThreads + threadIdx.x; v < count; v += Index(gridDim.x) * kThreads) {
    const Position<Index> to(v, vectors, width, g.output_height, g.output_width);
    const int top = to.h * win.stride[0] - win.padding[0], left = to.w * win.stride[1] - win.padding[1];
    // the first element of the window that is in the image
    const int first_h = top < 0 ? (-top + win.dilation[0] - 1) / win.dilation[0] : 0;
    const int first_w = left < 0 ? (-left + win.dilation[1] - 1) / win.dilation[1] : 0;
    const T* image = input + int64_t(to.image) * g.height * g.width * g.channels + to.channel;
    auto place_of = [&](int i, int j) {
      return kInPlane<Place> ? (top + i * win.dilation[0]) * g.width + left + j * win.dilation[1]
                             : i * win.kernel[1] + j;
    };
    Compute<T> best[width];
    int place[width];
#pragma unroll
    for (int e = 0; e < width; ++e) {
      best[e] = -kInfinity<Compute<T>>;
      place[e] = place_of(first_h, first_w);
    }
    for (int i = first_h; i < win.kernel[0]; ++i) {
      const int h = top + i * win.dilation[0];
      if (h >= g.height) break;
      for (int j = first_w; j < win.kernel[1]; ++j) {
        const int w = left + j * win.dilation[1];
        if (w >= g.width) break;
        const auto values = load<width>(image + (int64_t(h) * g.width + w) * g.channels);
        const int here = place_of(i, j);
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const Compute<T> value = widen(values.element[e]);
          const bool better = value > best[e] || value != value;
          best[e] = better ? value : best[e];
          place[e] = better ? here : place[e];
        }
      }
    }
    store(output + int64_t(v) * width, best);
    if constexpr (with_places) store_places(places + int64_t(v) * width, place);
  }
}

template <class T, class Place, class Index, int width>
__global__ void __launch_bounds__(kThreads)
    max_backward_kernel(const T* grad_output,  // [images, output_height, output_width, channels]
                        const Place* places,   // of the same shape
                        T* grad_input,         // [images, height, width, channels]
                        Index count,           // vectors of grad_input
                        Images g) {
  const Index vectors = Index(g.channels / width);
  const MaxWindows& win = g.windows;
  for (Index v = Index(blockIdx.x) * kThreads + threadIdx.x; v < count; v += Index(gridDim.x) * kThreads) {
    const Position<Index> to(v, vectors, width, g.height, g.width);
    const int at_h = to.h + win.padding[0], at_w = to.w + win.padding[1];
    const int behind_h = at_h - (win.kernel[0] - 1) * win.dilation[0];
    const int behind_w = at_w - (win.kernel[1] - 1) * win.dilation[1];
    const int first_h = behind_h > 0 ? (behind_h + win.stride[0] - 1) / win.stride[0] : 0;
    const int first_w = behind_w > 0 ? (behind_w + win.stride[1] - 1) / win.stride[1] : 0;
    const int last_h = min(at_h / win.stride[0], g.output_height - 1);
    const int last_w = min(at_w / win.stride[1], g.output_width - 1);
    const int64_t image = int64_t(to.image) * g.output_height * g.output_width * g.channels + to.channel;
    Compute<T> sum[width] = {};
    for (int oh = first_h; oh <= last_h; ++oh) {
      const int offset_h = at_h - oh * win.stride[0], i = offset_h / win.dilation[0];
      if (i * win.dilation[0] != offset_h) continue;  // it lies between the window's dilated rows
      for (int ow = first_w; ow <= last_w; ++ow) {
        const int offset_w = at_w - ow * win.stride[1], j = offset_w / win.dilation[1];
        if (j * win.dilation[1] != offset_w) continue;
        const int64_t from = image + (int64_t(oh) * g.output_width + ow) * g.channels;
        const int wanted = kInPlane<Place> ? to.h * g.width + to.w : i * win.kernel[1] + j;
        const auto values = load<width>(grad_output + from);
        int place[width];
        load_places(places + from, place);
#pragma unroll
        for (int e = 0; e < width; ++e) {
          if (place[e] == wanted) sum[e] += widen(values.element[e]);
        }
      }
    }
    store(grad_input + int64_t(v) * width, sum);
  }
}

// Checked and with the planes of NCHW as images of one channel.
Images images_of(const char* name, int64_t& batch, int64_t& channels, int64_t height, int64_t width,
                 int64_t output_height, int64_t output_width, const MaxWindows& windows, bool channels_last) {
  constexpr int64_t most = std::numeric_limits<int>::max();
  require(batch >= 0, name, "batch", batch, "at least 0");
  require(channels >= 0, name, "channels", channels, "at least 0");
  require(height > 0 && width > 0 && height <= most / width, name, "height", height,
          "at least 1, and less than 2^31 with the width");
  require(output_height > 0 && output_width > 0 && output_height <= most / output_width, name, "output_height",
          output_height, "at least 1, and less than 2^31 with the width");
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t size = axis == 0 ? height : width;
    require(windows.kernel[axis] > 0, name, "kernel_size", windows.kernel[axis], "at least 1");
    require(windows.stride[axis] > 0, name, "stride", windows.stride[axis], "at least 1");
    require(windows.dilation[axis] > 0, name, "dilation", windows.dilation[axis], "at least 1");
    require(windows.padding[axis] >= 0 && windows.padding[axis] <= windows.kernel[axis] / 2, name, "padding",
            windows.padding[axis], "0 to half of the kernel's size");
    // positions are ints
    require(size + (int64_t(windows.kernel[axis]) + 1) * windows.dilation[axis] + windows.stride[axis] <= most, name,
            "dilation", windows.dilation[axis], "so small that a window ends before 2^31");
  }
  if (!channels_last) {
    batch *= channels;
    channels = 1;
  }
  return {int(height), int(width), int(output_height), int(output_width), channels, windows};
}

// Calls run<T, Index, vector's width>(blocks, count) for a result of so many elements.
template <class... Pointers, class Run>
void with_vectors(const char* name, int dtype, int64_t elements, int64_t channels, const Run& run,
                  const Pointers*... pointers) {
  dispatch_dtype(name, dtype, [&]<class T>() {
    auto with_width = [&]<int width>() {
      const int64_t count = elements / width;
      const dim3 blocks(unsigned(std::min(ceil_div(count, int64_t(kThreads)), kMaximumBlocks)));
      // 32-bit division is several times as fast
      if (count < int64_t(1) << 31) {
        run.template operator()<T, uint32_t, width>(blocks, count);
      } else {
        run.template operator()<T, uint64_t, width>(blocks, count);
      }
    };
    constexpr int full = kFullVector<T>;
    if (full > 1 && channels % full == 0 && aligned(16, pointers...)) {
      with_width.template operator()<full>();
    } else {
      with_width.template operator()<1>();
    }
  });
}

}  // namespace

void max_pool2d(int dtype, const void* input, void* output, void* places, int place_bytes, int64_t batch,
                int64_t channels, int64_t height, int64_t width, int64_t output_height, int64_t output_width,
                const MaxWindows& windows, bool channels_last, cudaStream_t stream) {
  constexpr const char* name = "max_pool2d";
  const Images g = images_of(name, batch, channels, height, width, output_height, output_width, windows, channels_last);
  require(place_bytes == 0 || place_bytes == 1 || place_bytes == 8, name, "index_bytes", place_bytes, "0, 1 or 8");
  require(place_bytes != 1 || windows.kernel[0] * windows.kernel[1] <= 256, name, "index_bytes", place_bytes,
          "8 for a window of more than 256 elements");
  const int64_t elements = batch * output_height * output_width * channels;
  require(elements == 0 || input, name, "input", "0", "an address");
  require(elements == 0 || output, name, "output", "0", "an address");
  require(elements == 0 || place_bytes == 0 || places, name, "indices", "0", "an address");
  auto run = [&]<class T, class Index, int vector>(dim3 blocks, int64_t count) {
    const Shape shape(blocks, dim3(kThreads), 0, stream);
    const T* from = static_cast<const T*>(input);
    T* to = static_cast<T*>(output);
    if (place_bytes == 0) {
      launch(max_kernel<T, uint8_t, false, Index, vector>, shape, from, to, nullptr, Index(count), g);
    } else if (place_bytes == 1) {
      launch(max_kernel<T, uint8_t, true, Index, vector>, shape, from, to, static_cast<uint8_t*>(places), Index(count),
             g);
    } else {
      launch(max_kernel<T, int64_t, true, Index, vector>, shape, from, to, static_cast<int64_t*>(places), Index(count),
             g);
    }
  };
  if (elements > 0) with_vectors(name, dtype, elements, channels, run, input, output, places);
}

void max_pool2d_backward(int dtype, const void* grad_output, const void* places, int place_bytes, void* grad_input,
                         int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t output_height,
                         int64_t output_width, const MaxWindows& windows, bool channels_last, cudaStream_t stream) {
  constexpr const char* name = "max_pool2d_backward";
  const Images g = images_of(name, batch, channels, height, width, output_height, output_width, windows, channels_last);
  require(place_bytes == 1 || place_bytes == 8, name, "index_bytes", place_bytes, "1 or 8");
  const int64_t elements = batch * height * width * channels;
  require(elements == 0 || grad_output, name, "grad_output", "0", "an address");
  require(elements == 0 || places, name, "indices", "0", "an address");
  require(elements == 0 || grad_input, name, "grad_input", "0", "an address");
  auto run = [&]<class T, class Index, int vector>(dim3 blocks, int64_t count) {
    const Shape shape(blocks, dim3(kThreads), 0, stream);
    const T* from = static_cast<const T*>(grad_output);
    T* to = static_cast<T*>(grad_input);
    if (place_bytes == 1) {
      launch(max_backward_kernel<T, uint8_t, Index, vector>, shape, from, static_cast<const uint8_t*>(places), to,
             Index(count), g);
    } else {
      launch(max_backward_kernel<T, int64_t, Index, vector>, shape, from, static_cast<const int64_t*>(places), to,
             Index(count), g);
    }
  };
  if (elements > 0) with_vectors(name, dtype, elements, channels, run, grad_output, places, grad_input);
}

}  // namespace fastdl::cuda
