// A convolution's weight gradient straight from the latents' gradient: the gradient at the convolution's output is made
// in shared memory, a tile at a time, as backward_kernel makes it, and never written. Three kernels: BatchNorm's two
// sums, the product over all pixels in plain float32, and the sum over the product's splits. Every sum has its order.

#include "common.cuh"

#include <cstring>

namespace unlocked {
namespace {

constexpr int kStepPixels = 32, kTileColumns = 64;
constexpr int kOwnColumns = 4, kOwnChannels = 2; // of a thread
constexpr int kTeams = kTileColumns / kOwnColumns;
static_assert(kThreads == kTeams * (kChunk / kOwnChannels), "every thread has its part of a tile");

// weight_grad.py fills it, field by field. Strides in values.
struct Convolution {
  int64_t batch, channels, height, width;                       // the output
  int64_t source_channels, source_height, source_width;         // the input
  int64_t kernel_h, kernel_w, step_h, step_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t side;                                                 // windows of the latents along each side
  int64_t splits, split_pixels;                                 // of the product, and pixels in each
  int64_t conv_stride[4], source_stride[4], kernel_stride[4];
};

struct WeightGradArgs {
  const void *grad, *conv, *source;
  const float *mean, *rstd, *weight, *bias, *mask_sums, *mask_xhat_sums;
  float *weight_grad, *bias_grad, *partials;
  void* kernel_grad;
  int grad_is_float;
  float slope;
};

template <typename T>
__device__ __forceinline__ float load_latent(const WeightGradArgs& a, int64_t at) {
  return a.grad_is_float ? static_cast<const float*>(a.grad)[at] : to_float(static_cast<const T*>(a.grad)[at]);
}

// BatchNorm's gradients: a block per channel, whose threads take its windows in turns.
template <typename T>
__global__ void __launch_bounds__(kThreads) norm_grads_kernel(const Convolution c, const WeightGradArgs a) {
  __shared__ float2 scratch[kThreads];
  const int64_t channel = blockIdx.x, cells = c.side * c.side;
  float2 sums = make_float2(0.0f, 0.0f);
  for (int64_t window = threadIdx.x; window < c.batch * cells; window += kThreads) {
    const int64_t at = (window / cells * c.channels + channel) * cells + window % cells;
    const float grad = load_latent<T>(a, at);
    sums.x = fmaf(grad, a.mask_sums[at], sums.x);
    sums.y = fmaf(grad, a.mask_xhat_sums[at], sums.y);
  }
  sums = sum_by_channel<kThreads, 1>(sums, scratch);
  if (threadIdx.x == 0) {
    const float per_activation = 1.0f / static_cast<float>(c.height / c.side * (c.width / c.side));
    a.bias_grad[channel] = sums.x * per_activation;
    a.weight_grad[channel] = sums.y * per_activation;
  }
}

// The gradient at one place of the convolution's output, rounded as if it were stored.
template <typename T>
__device__ __forceinline__ float conv_grad_at(const Convolution& c, const WeightGradArgs& a, int64_t pixel, int64_t channel) {
  const int64_t plane = c.height * c.width, image = pixel / plane, row = pixel % plane / c.width, column = pixel % c.width;
  const int64_t window_h = c.height / c.side, window_w = c.width / c.side;
  const int64_t latent = ((image * c.channels + channel) * c.side + row / window_h) * c.side + column / window_w;
  const int64_t* s = c.conv_stride;
  const T* conv = static_cast<const T*>(a.conv);
  const float x = to_float(conv[image * s[0] + channel * s[1] + row * s[2] + column * s[3]]);
  const float rows = static_cast<float>(c.batch * plane), grad = load_latent<T>(a, latent);
  const Activation y = activate(x, a.mean[channel], a.rstd[channel], a.weight[channel], a.bias[channel], a.slope);
  const float dy = __fmul_rn(grad * (1.0f / static_cast<float>(window_h * window_w)), y.slope);
  const float means = fmaf(y.xhat, a.weight_grad[channel] / rows, a.bias_grad[channel] / rows);
  return to_float(from_float<T>(a.weight[channel] * a.rstd[channel] * __fsub_rn(dy, means)));
}

// What one place of the output sees of the input through one element of the kernel; 0 in the padding.
template <typename T>
__device__ __forceinline__ float source_at(const Convolution& c, const WeightGradArgs& a, int64_t pixel, int64_t column) {
  const int64_t tap = column / c.source_channels, channel = column % c.source_channels;
  const int64_t plane = c.height * c.width, place = pixel % plane;
  const int64_t row = place / c.width * c.step_h - c.pad_h + tap / c.kernel_w * c.dilation_h;
  const int64_t line = place % c.width * c.step_w - c.pad_w + tap % c.kernel_w * c.dilation_w;
  if (row < 0 || row >= c.source_height || line < 0 || line >= c.source_width) return 0.0f;
  const int64_t* s = c.source_stride;
  return to_float(static_cast<const T*>(a.source)[pixel / plane * s[0] + channel * s[1] + row * s[2] + line * s[3]]);
}

// partials [splits, columns, channels]: block (column tile, channel chunk, split) adds up the pixels of its split.
template <typename T>
__global__ void __launch_bounds__(kThreads) weight_grad_kernel(const Convolution c, const WeightGradArgs a) {
  __shared__ float grad_s[kStepPixels][kChunk];
  __shared__ float patch_s[kStepPixels][kTileColumns];
  const int64_t columns = c.kernel_h * c.kernel_w * c.source_channels, pixels = c.batch * c.height * c.width;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * kChunk;
  const int64_t begin = blockIdx.z * c.split_pixels;
  const int64_t end = begin + c.split_pixels < pixels ? begin + c.split_pixels : pixels;
  const int own_column = threadIdx.x % kTeams * kOwnColumns, own_channel = threadIdx.x / kTeams * kOwnChannels;
  float sums[kOwnColumns][kOwnChannels] = {};

  for (int64_t first = begin; first < end; first += kStepPixels) {
    for (int k = threadIdx.x; k < kStepPixels * kChunk; k += kThreads) {
      const int64_t pixel = first + k / kChunk, channel = first_channel + k % kChunk;
      const bool inside = pixel < end && channel < c.channels;
      grad_s[k / kChunk][k % kChunk] = inside ? conv_grad_at<T>(c, a, pixel, channel) : 0.0f;
    }
    for (int k = threadIdx.x; k < kStepPixels * kTileColumns; k += kThreads) {
      const int64_t pixel = first + k / kTileColumns, column = first_column + k % kTileColumns;
      const bool inside = pixel < end && column < columns;
      patch_s[k / kTileColumns][k % kTileColumns] = inside ? source_at<T>(c, a, pixel, column) : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int pixel = 0; pixel < kStepPixels; ++pixel) {
#pragma unroll
      for (int m = 0; m < kOwnColumns; ++m) {
#pragma unroll
        for (int n = 0; n < kOwnChannels; ++n)
          sums[m][n] = fmaf(patch_s[pixel][own_column + m], grad_s[pixel][own_channel + n], sums[m][n]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < kOwnColumns; ++m) {
#pragma unroll
    for (int n = 0; n < kOwnChannels; ++n) {
      const int64_t column = first_column + own_column + m, channel = first_channel + own_channel + n;
      if (column < columns && channel < c.channels)
        a.partials[(blockIdx.z * columns + column) * c.channels + channel] = sums[m][n];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) weight_grad_sum_kernel(const Convolution c, const WeightGradArgs a) {
  const int64_t columns = c.kernel_h * c.kernel_w * c.source_channels, count = columns * c.channels;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= count) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t split = 0; split < c.splits; ++split) sum += a.partials[split * count + element];
  const int64_t column = element / c.channels, tap = column / c.source_channels;
  const int64_t* s = c.kernel_stride;
  const int64_t at = element % c.channels * s[0] + column % c.source_channels * s[1] + tap / c.kernel_w * s[2] +
                     tap % c.kernel_w * s[3];
  static_cast<T*>(a.kernel_grad)[at] = from_float<T>(sum);
}

unsigned blocks_of(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

}  // namespace
}  // namespace unlocked

using namespace unlocked;

extern "C" int unlocked_weight_grad(int device, cudaStream_t stream, int type, int grad_is_float, const void* convolution,
                                    const void* grad, const void* conv, const void* mean, const void* rstd,
                                    const void* weight, const void* bias, const void* mask_sums,
                                    const void* mask_xhat_sums, const void* source, void* partials, void* kernel_grad,
                                    void* weight_grad, void* bias_grad, float slope) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  Convolution c;
  std::memcpy(&c, convolution, sizeof c);
  WeightGradArgs a;
  a.grad = grad;
  a.conv = conv;
  a.source = source;
  a.mean = static_cast<const float*>(mean);
  a.rstd = static_cast<const float*>(rstd);
  a.weight = static_cast<const float*>(weight);
  a.bias = static_cast<const float*>(bias);
  a.mask_sums = static_cast<const float*>(mask_sums);
  a.mask_xhat_sums = static_cast<const float*>(mask_xhat_sums);
  a.weight_grad = static_cast<float*>(weight_grad);
  a.bias_grad = static_cast<float*>(bias_grad);
  a.partials = static_cast<float*>(partials);
  a.kernel_grad = kernel_grad;
  a.grad_is_float = grad_is_float;
  a.slope = slope;
  const int64_t columns = c.kernel_h * c.kernel_w * c.source_channels;
  const dim3 tiles(blocks_of(columns, kTileColumns), blocks_of(c.channels, kChunk), static_cast<unsigned>(c.splits));
  cudaError_t error = with_type(type, [&](auto zero) {
    norm_grads_kernel<decltype(zero)><<<static_cast<unsigned>(c.channels), kThreads, 0, stream>>>(c, a);
  });
  if (error) return error;
  error = with_type(type, [&](auto zero) { weight_grad_kernel<decltype(zero)><<<tiles, kThreads, 0, stream>>>(c, a); });
  if (error) return error;
  return with_type(type, [&](auto zero) {
    weight_grad_sum_kernel<decltype(zero)><<<blocks_of(columns * c.channels, kThreads), kThreads, 0, stream>>>(c, a);
  });
}

// For a test: `Convolution` is laid out twice.
extern "C" int unlocked_convolution_bytes(int) { return static_cast<int>(sizeof(Convolution)); }
