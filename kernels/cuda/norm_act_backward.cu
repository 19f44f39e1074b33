// The way back through LeakyReLU and BatchNorm: sums per channel, then one pass from the convolution's output to its
// gradient. For a gradient that is constant over the latents' windows the sums need the small window sums only (see
// [Note: window sums] in reference.py); for a full gradient they need one more pass over the tensor.

#include "common.cuh"

namespace unlocked {
namespace {

constexpr int kColumnRows = kReduceThreads / kWarp; // images a block of window_sums_kernel reads at a time
constexpr int kSumLoads = 4;
constexpr int kBackwardLoads = 4;

// The latents' gradient has the latents' type or float32.
template <typename T>
__device__ __forceinline__ float load_grad(const void* grad, int64_t at, bool is_float) {
  return is_float ? static_cast<const float*>(grad)[at] : to_float(static_cast<const T*>(grad)[at]);
}

// Sums over images of grad * mask_sums and grad * mask_xhat_sums [batch, columns], columns = channels * windows.
// `fold` (a power of two up to 32, divides the windows of a channel) neighbouring columns become one partial sum.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    window_sums_kernel(const void* __restrict__ grad, const float* __restrict__ mask_sums,
                       const float* __restrict__ mask_xhat_sums, float2* __restrict__ partials, int64_t batch,
                       int64_t columns, int64_t group_rows, int fold, int grad_is_float) {
  __shared__ float2 sums_s[kColumnRows][kWarp];
  const int lane = threadIdx.x % kWarp, slot = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t begin = blockIdx.y * group_rows;
  const int64_t end = begin + group_rows < batch ? begin + group_rows : batch;
  float2 sums = make_float2(0.0f, 0.0f);
  if (column < columns) {
#pragma unroll 4
    for (int64_t image = begin + slot; image < end; image += kColumnRows) {
      const int64_t at = image * columns + column;
      const float g = load_grad<T>(grad, at, grad_is_float != 0);
      sums.x = fmaf(g, mask_sums[at], sums.x);
      sums.y = fmaf(g, mask_xhat_sums[at], sums.y);
    }
  }
  sums_s[slot][lane] = sums;
  __syncthreads();
  if (slot != 0) return;
#pragma unroll
  for (int row = 1; row < kColumnRows; ++row) {
    sums.x += sums_s[row][lane].x;
    sums.y += sums_s[row][lane].y;
  }
  for (int step = fold / 2; step > 0; step >>= 1) {
    sums.x += __shfl_xor_sync(kAllLanes, sums.x, step);
    sums.y += __shfl_xor_sync(kAllLanes, sums.y, step);
  }
  if (column < columns && lane % fold == 0) partials[blockIdx.y * (columns / fold) + column / fold] = sums;
}

// A sum in float32 whose roundings are carried along and given back (Kahan, "Further remarks on reducing truncation
// errors", 1965). A thread adds up to some thousand terms in a row; plainly, each would cost half a unit of the sum.
template <int VEC>
struct CompensatedSum {
  float sum[VEC] = {}, excess[VEC] = {}; // excess: what rounding has put into the sum

  __device__ __forceinline__ void add(int e, float term) {
    const float wanted = term - excess[e], next = sum[e] + wanted;
    excess[e] = (next - sum[e]) - wanted;
    sum[e] = next;
  }
};

// Sums over rows (pixels) of grad * slope and grad * slope * xhat, for a gradient at every activation.
template <typename T, int VEC, bool CL>
__global__ void __launch_bounds__(kReduceThreads)
    full_sums_kernel(const T* __restrict__ grad, const T* __restrict__ conv, const float* __restrict__ mean,
                     const float* __restrict__ rstd, const float* __restrict__ weight, const float* __restrict__ bias,
                     float2* __restrict__ partials, float slope, const Geometry g) {
  using L = Lanes<VEC, CL, kReduceThreads>;
  constexpr int kWarps = kReduceThreads / kWarp;
  __shared__ float2 sums_s[kWarps][L::channels];
  const int tid = threadIdx.x, team_lane = tid % L::across, slot = tid / L::across;
  const int channels = static_cast<int>(g.channels);
  const int first_channel = blockIdx.y * L::channels, channel = first_channel + team_lane * VEC;
  const int64_t plane = g.height * g.width, rows = g.batch * plane;
  const int64_t begin = blockIdx.x * g.group_rows;
  const int64_t end = begin + g.group_rows < rows ? begin + g.group_rows : rows;

  CompensatedSum<VEC> dy_total, dy_xhat_total;
  if (channel < channels) {
    float mean_r[VEC], rstd_r[VEC], weight_r[VEC], bias_r[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      mean_r[e] = mean[channel + e];
      rstd_r[e] = rstd[channel + e];
      weight_r[e] = weight[channel + e];
      bias_r[e] = bias[channel + e];
    }
    for (int64_t row = begin + slot; row < end; row += kSumLoads * L::slots) {
      Pack<T, VEC> x[kSumLoads], dy[kSumLoads];
#pragma unroll
      for (int u = 0; u < kSumLoads; ++u) {
        const int64_t at = row + u * L::slots;
        if (at < end) {
          const int64_t offset = row_offset<CL>(at, channel, channels, plane);
          x[u] = load<T, VEC>(conv + offset);
          dy[u] = load<T, VEC>(grad + offset);
        }
      }
#pragma unroll
      for (int u = 0; u < kSumLoads; ++u) {
        if (row + u * L::slots < end) {
#pragma unroll
          for (int e = 0; e < VEC; ++e) {
            const Activation y = activate(x[u].get(e), mean_r[e], rstd_r[e], weight_r[e], bias_r[e], slope);
            const float masked = dy[u].get(e) * y.slope;
            dy_total.add(e, masked);
            dy_xhat_total.add(e, masked * y.xhat);
          }
        }
      }
    }
  }
  float(&dy_sum)[VEC] = dy_total.sum, (&dy_xhat_sum)[VEC] = dy_xhat_total.sum;
#pragma unroll
  for (int step = L::across; step < kWarp; step <<= 1) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      dy_sum[e] += __shfl_xor_sync(kAllLanes, dy_sum[e], step);
      dy_xhat_sum[e] += __shfl_xor_sync(kAllLanes, dy_xhat_sum[e], step);
    }
  }
  if (tid % kWarp < L::across) {
#pragma unroll
    for (int e = 0; e < VEC; ++e)
      sums_s[tid / kWarp][team_lane * VEC + e] = make_float2(dy_sum[e], dy_xhat_sum[e]);
  }
  __syncthreads();
  if (tid < L::channels && first_channel + tid < channels) {
    float2 sums = sums_s[0][tid];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      sums.x += sums_s[w][tid].x;
      sums.y += sums_s[w][tid].y;
    }
    partials[static_cast<int64_t>(blockIdx.x) * channels + first_channel + tid] = sums;
  }
}

struct BackwardArgs {
  const void *grad, *conv;
  const float *mean, *rstd, *weight, *bias;
  const float2* partials; // [groups, channels, parts]
  void* conv_grad;
  float *weight_grad, *bias_grad;
  int parts, grad_is_float;
  float slope;
};

// What a block of backward_kernel keeps of its channels in shared memory.
template <int CHANNELS>
struct ChannelTable {
  float mean[CHANNELS], rstd[CHANNELS], weight[CHANNELS], bias[CHANNELS];
  float scale[CHANNELS], shift[CHANNELS], slant[CHANNELS]; // scale * (dy - (shift + xhat * slant))
};

// Both sums of this block's channels, from the partial ones; `scratch` holds kThreads values. Every thread must call.
template <typename L>
__device__ __forceinline__ void fill_table(const Geometry& g, const BackwardArgs& a, float per_activation,
                                           float2* scratch, ChannelTable<L::channels>& table) {
  const int tid = threadIdx.x, channels = static_cast<int>(g.channels), first_channel = blockIdx.y * L::channels;
  const int channel = first_channel + tid % L::channels;
  float2 sums = make_float2(0.0f, 0.0f);
  if (channel < channels) {
    const int total = static_cast<int>(g.groups) * a.parts;
#pragma unroll 8
    for (int k = tid / L::channels; k < total; k += kThreads / L::channels) {
      const int64_t group = k / a.parts, part = k % a.parts;
      const float2 partial = a.partials[(group * channels + channel) * a.parts + part];
      sums.x += partial.x;
      sums.y += partial.y;
    }
  }
  sums = sum_by_channel<kThreads, L::channels>(sums, scratch);
  if (tid < L::channels && channel < channels) {
    const float bias_grad = sums.x * per_activation, weight_grad = sums.y * per_activation;
    const float rows = static_cast<float>(g.batch * g.height * g.width);
    table.mean[tid] = a.mean[channel];
    table.rstd[tid] = a.rstd[channel];
    table.weight[tid] = a.weight[channel];
    table.bias[tid] = a.bias[channel];
    table.scale[tid] = a.weight[channel] * a.rstd[channel];
    table.shift[tid] = bias_grad / rows;
    table.slant[tid] = weight_grad / rows;
    if (blockIdx.x == 0) {
      a.bias_grad[channel] = bias_grad;
      a.weight_grad[channel] = weight_grad;
    }
  }
  __syncthreads();
}

// conv_grad = weight * rstd * (dy - (sum(dy) + xhat * sum(dy * xhat)) / rows). FULL: `grad` is like `conv`; else it is
// the latents' gradient, and every activation of a window has grad / window area.
template <typename T, int VEC, bool CL, bool FULL>
__global__ void __launch_bounds__(kThreads, VEC > 4 || FULL ? 2 : 3) backward_kernel(const Geometry g, const BackwardArgs a) {
  using L = Lanes<VEC, CL, kThreads>;
  __shared__ float2 scratch[kThreads];
  __shared__ ChannelTable<L::channels> table;

  const int tid = threadIdx.x, team_lane = tid % L::across, slot = tid / L::across;
  const int channels = static_cast<int>(g.channels), width = static_cast<int>(g.width);
  const int first_channel = blockIdx.y * L::channels;
  const int64_t plane = g.height * g.width;
  const float per_activation = FULL ? 1.0f : 1.0f / static_cast<float>(g.window_h * g.window_w);

  fill_table<L>(g, a, per_activation, scratch, table);

  const int channel = first_channel + team_lane * VEC;
  if (channel >= channels) return; // no barrier follows
  float mean[VEC], rstd[VEC], weight[VEC], bias[VEC], scale[VEC], shift[VEC], slant[VEC];
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    mean[e] = table.mean[team_lane * VEC + e];
    rstd[e] = table.rstd[team_lane * VEC + e];
    weight[e] = table.weight[team_lane * VEC + e];
    bias[e] = table.bias[team_lane * VEC + e];
    scale[e] = table.scale[team_lane * VEC + e];
    shift[e] = table.shift[team_lane * VEC + e];
    slant[e] = table.slant[team_lane * VEC + e];
  }
  const int splits = static_cast<int>(g.splits), window_w = static_cast<int>(g.window_w);
  const int pixels = static_cast<int>(g.window_h) * window_w;
  const int grid_w = static_cast<int>(g.grid_w), grid_area = static_cast<int>(g.grid_h) * grid_w;
  const int windows = static_cast<int>(g.batch) * grid_area, per_tile = L::slots / splits;
  const int pixel_step = CL ? channels : 1;
  const int sub = slot % splits;

  for (int first_window = blockIdx.x * per_tile; first_window < windows; first_window += gridDim.x * per_tile) {
    const int window = first_window + slot / splits;
    if (window >= windows) break; // later tiles lie further out
    const int image = window / grid_area, place = window % grid_area;
    const int top = place / grid_w * static_cast<int>(g.window_h), left = place % grid_w * window_w;
    const int64_t base = image_offset<CL>(image, channel, channels, plane);
    const T* x = static_cast<const T*>(a.conv) + base;
    const T* dy = static_cast<const T*>(a.grad) + base; // FULL only
    T* out = static_cast<T*>(a.conv_grad) + base;
    float window_grad[VEC];
    if constexpr (!FULL) {
      const int64_t first = (static_cast<int64_t>(image) * channels + channel) * grid_area + place;
#pragma unroll
      for (int e = 0; e < VEC; ++e)
        window_grad[e] = per_activation * load_grad<T>(a.grad, first + e * grid_area, a.grad_is_float != 0);
    }
    for (int pixel = sub; pixel < pixels; pixel += kBackwardLoads * splits) {
      Pack<T, VEC> x_pack[kBackwardLoads], dy_pack[kBackwardLoads];
      int at[kBackwardLoads];
#pragma unroll
      for (int u = 0; u < kBackwardLoads; ++u) {
        const int k = pixel + u * splits;
        if (k < pixels) {
          at[u] = ((top + k / window_w) * width + left + k % window_w) * pixel_step;
          x_pack[u] = load<T, VEC>(x + at[u]);
          if constexpr (FULL) dy_pack[u] = load<T, VEC>(dy + at[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kBackwardLoads; ++u) {
        if (pixel + u * splits < pixels) {
          float result[VEC];
#pragma unroll
          for (int e = 0; e < VEC; ++e) {
            const Activation y = activate(x_pack[u].get(e), mean[e], rstd[e], weight[e], bias[e], a.slope);
            const float grad = FULL ? dy_pack[u].get(e) : window_grad[e];
            // Separate roundings: a batch of one row has a gradient of exactly zero.
            result[e] = scale[e] * __fsub_rn(__fmul_rn(grad, y.slope), fmaf(y.xhat, slant[e], shift[e]));
          }
          store<T, VEC>(out + at[u], result);
        }
      }
    }
  }
}

BackwardArgs backward_args(const void* grad, int grad_is_float, const void* conv, const void* mean, const void* rstd,
                           const void* weight, const void* bias, const void* partials, int parts, void* conv_grad,
                           void* weight_grad, void* bias_grad, float slope) {
  BackwardArgs a;
  a.grad = grad;
  a.conv = conv;
  a.mean = static_cast<const float*>(mean);
  a.rstd = static_cast<const float*>(rstd);
  a.weight = static_cast<const float*>(weight);
  a.bias = static_cast<const float*>(bias);
  a.partials = static_cast<const float2*>(partials);
  a.conv_grad = conv_grad;
  a.weight_grad = static_cast<float*>(weight_grad);
  a.bias_grad = static_cast<float*>(bias_grad);
  a.parts = parts;
  a.grad_is_float = grad_is_float;
  a.slope = slope;
  return a;
}

}  // namespace
}  // namespace unlocked

using namespace unlocked;

extern "C" int unlocked_backward(int device, cudaStream_t stream, int type, int grad_is_float, int fold,
                                 const Geometry* geometry, const void* grad, const void* conv, const void* mean,
                                 const void* rstd, const void* weight, const void* bias, const void* mask_sums,
                                 const void* mask_xhat_sums, void* partials, void* conv_grad, void* weight_grad,
                                 void* bias_grad, float slope) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const Geometry g = *geometry;
  const int64_t windows = g.grid_h * g.grid_w, columns = g.channels * windows;
  const dim3 sum_grid(static_cast<unsigned>((columns + kWarp - 1) / kWarp), static_cast<unsigned>(g.groups));
  const cudaError_t error = with_type(type, [&](auto zero) {
    window_sums_kernel<decltype(zero)><<<sum_grid, kReduceThreads, 0, stream>>>(
        grad, static_cast<const float*>(mask_sums), static_cast<const float*>(mask_xhat_sums),
        static_cast<float2*>(partials), g.batch, columns, g.group_rows, fold, grad_is_float);
  });
  if (error) return error;
  const BackwardArgs a =
      backward_args(grad, grad_is_float, conv, mean, rstd, weight, bias, partials, static_cast<int>(windows / fold),
                    conv_grad, weight_grad, bias_grad, slope);
  const dim3 grid(static_cast<unsigned>(g.blocks), channel_chunks(g));
  return with_layout(type, g, [&](auto zero, auto vec, auto last) {
    backward_kernel<decltype(zero), decltype(vec)::value, decltype(last)::value != 0, false>
        <<<grid, kThreads, 0, stream>>>(g, a);
  });
}

extern "C" int unlocked_backward_full(int device, cudaStream_t stream, int type, const Geometry* geometry,
                                      const void* grad, const void* conv, const void* mean, const void* rstd,
                                      const void* weight, const void* bias, void* partials, void* conv_grad,
                                      void* weight_grad, void* bias_grad, float slope) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const Geometry g = *geometry;
  const dim3 sum_grid(static_cast<unsigned>(g.groups), channel_chunks(g));
  const cudaError_t error = with_layout(type, g, [&](auto zero, auto vec, auto last) {
    using T = decltype(zero);
    full_sums_kernel<T, decltype(vec)::value, decltype(last)::value != 0><<<sum_grid, kReduceThreads, 0, stream>>>(
        static_cast<const T*>(grad), static_cast<const T*>(conv), static_cast<const float*>(mean),
        static_cast<const float*>(rstd), static_cast<const float*>(weight), static_cast<const float*>(bias),
        static_cast<float2*>(partials), slope, g);
  });
  if (error) return error;
  const BackwardArgs a = backward_args(grad, 0, conv, mean, rstd, weight, bias, partials, 1, conv_grad, weight_grad,
                                       bias_grad, slope);
  const dim3 grid(static_cast<unsigned>(g.blocks), channel_chunks(g));
  return with_layout(type, g, [&](auto zero, auto vec, auto last) {
    backward_kernel<decltype(zero), decltype(vec)::value, decltype(last)::value != 0, true>
        <<<grid, kThreads, 0, stream>>>(g, a);
  });
}
