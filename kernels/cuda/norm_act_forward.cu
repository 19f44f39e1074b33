// BatchNorm (training mode) + LeakyReLU + latents + the next layer's input: two kernels.
//
// moments_kernel writes, for every group of rows and every channel, the mean and the sum of squared deviations.
// apply_kernel combines them in every block (a few kilobytes from L2, cheaper than one more launch), then reads the
// convolution's output once and writes the pooled output, the latents and the window sums.

#include "common.cuh"

namespace unlocked {
namespace {

enum Pool { kNone = 0, kMax = 1, kAverage = 2 };

constexpr int kMomentLoads = 8; // 16-byte loads in flight per thread
constexpr int kApplyLoads = 4;

// (mean, sum of squared deviations) of a channel from those of the block's warps.
template <int WARPS, int CHANNELS>
__device__ __forceinline__ float2 merged(const float (&count)[WARPS][CHANNELS], const float (&mean)[WARPS][CHANNELS],
                                         const float (&deviations)[WARPS][CHANNELS], int channel) {
  // Warp 0 holds the group's first row, so its mean is a good origin.
  const float start = mean[0][channel];
  float total = 0.0f, first = 0.0f, second = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float distance = count[w][channel] > 0.0f ? mean[w][channel] - start : 0.0f;
    total += count[w][channel];
    first += count[w][channel] * distance;
    second += deviations[w][channel] + count[w][channel] * distance * distance;
  }
  const float shift = first / total;
  return make_float2(start + shift, second - shift * first);
}

// Sums around a thread's own first value: as exact as Welford's update, without a division per value. See Chan,
// Golub, LeVeque, "Algorithms for computing the sample variance", 1983, for the shift and for the merging.
template <typename T, int VEC, bool CL>
__global__ void __launch_bounds__(kReduceThreads)
    moments_kernel(const T* __restrict__ conv, float2* __restrict__ partials, const Geometry g) {
  using L = Lanes<VEC, CL, kReduceThreads>;
  constexpr int kWarps = kReduceThreads / kWarp;
  __shared__ float count_s[kWarps][L::channels], mean_s[kWarps][L::channels], square_s[kWarps][L::channels];

  const int tid = threadIdx.x, team_lane = tid % L::across, slot = tid / L::across;
  const int channels = static_cast<int>(g.channels);
  const int first_channel = blockIdx.y * L::channels, channel = first_channel + team_lane * VEC;
  const int64_t plane = g.height * g.width, rows = g.batch * plane;
  const int64_t begin = blockIdx.x * g.group_rows;
  const int64_t end = begin + g.group_rows < rows ? begin + g.group_rows : rows;

  float count = 0.0f, origin[VEC] = {}, sum[VEC] = {}, square[VEC] = {};
  if (channel < channels) {
    for (int64_t row = begin + slot; row < end; row += kMomentLoads * L::slots) {
      Pack<T, VEC> x[kMomentLoads];
#pragma unroll
      for (int u = 0; u < kMomentLoads; ++u) {
        const int64_t at = row + u * L::slots;
        if (at < end) x[u] = load<T, VEC>(conv + row_offset<CL>(at, channel, channels, plane));
      }
      if (count == 0.0f) {
#pragma unroll
        for (int e = 0; e < VEC; ++e) origin[e] = x[0].get(e);
      }
#pragma unroll
      for (int u = 0; u < kMomentLoads; ++u) {
        if (row + u * L::slots < end) {
          count += 1.0f;
#pragma unroll
          for (int e = 0; e < VEC; ++e) {
            const float distance = x[u].get(e) - origin[e];
            sum[e] += distance;
            square[e] = fmaf(distance, distance, square[e]);
          }
        }
      }
    }
  }
  // From here `sum` is the mean and `square` the sum of squared deviations of this thread's values.
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    const float shift = count > 0.0f ? sum[e] / count : 0.0f;
    square[e] -= shift * sum[e];
    sum[e] = origin[e] + shift;
  }
#pragma unroll
  for (int step = L::across; step < kWarp; step <<= 1) {
    const float other_count = __shfl_xor_sync(kAllLanes, count, step);
    const float total = count + other_count;
    const float fraction = total > 0.0f ? other_count / total : 0.0f;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const float distance = __shfl_xor_sync(kAllLanes, sum[e], step) - sum[e];
      square[e] += __shfl_xor_sync(kAllLanes, square[e], step) + distance * distance * count * fraction;
      sum[e] += distance * fraction;
    }
    count = total;
  }
  if (tid % kWarp < L::across) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      count_s[tid / kWarp][team_lane * VEC + e] = count;
      mean_s[tid / kWarp][team_lane * VEC + e] = sum[e];
      square_s[tid / kWarp][team_lane * VEC + e] = square[e];
    }
  }
  __syncthreads();
  if (tid < L::channels && first_channel + tid < channels) {
    partials[static_cast<int64_t>(blockIdx.x) * channels + first_channel + tid] =
        merged<kWarps, L::channels>(count_s, mean_s, square_s, tid);
  }
}

struct ApplyArgs {
  const void* conv;
  const float2* partials;
  const float *weight, *bias, *conv_bias; // conv_bias may be null
  float *running_mean, *running_var;
  float *mean, *rstd; // null: this launch doesn't own the statistics
  void* output;       // null: only the latents are wanted
  void* latents;      // null: only the output is wanted
  float *mask_sums, *mask_xhat_sums;
  float momentum, eps, slope;
};

// torch.lerp's formula, so that a momentum of 0 or 1 is exact.
__device__ __forceinline__ float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

template <int VEC>
struct ChannelValues {
  float mean[VEC], rstd[VEC], weight[VEC], bias[VEC];
};

template <typename T, int VEC, bool CL, int POOL>
__global__ void __launch_bounds__(kThreads, VEC > 4 ? 2 : 3) apply_kernel(const Geometry g, const ApplyArgs a) {
  using L = Lanes<VEC, CL, kThreads>;
  __shared__ float2 scratch[kThreads];
  __shared__ float mean_s[L::channels], rstd_s[L::channels], weight_s[L::channels], bias_s[L::channels];
  __shared__ __align__(16) float mask_s[L::slots][L::channels];
  __shared__ __align__(16) float mask_xhat_s[L::slots][L::channels];

  const int tid = threadIdx.x, team_lane = tid % L::across, slot = tid / L::across;
  const int channels = static_cast<int>(g.channels), width = static_cast<int>(g.width);
  const int first_channel = blockIdx.y * L::channels;
  const int64_t plane = g.height * g.width;

  { // The statistics of this block's channels, from the partial ones.
    const int channel = first_channel + tid % L::channels;
    const float rows = static_cast<float>(g.batch * plane);
    float origin = 0.0f;
    float2 sums = make_float2(0.0f, 0.0f);
    if (channel < channels) {
      origin = a.partials[channel].x;
#pragma unroll 8
      for (int group = tid / L::channels; group < static_cast<int>(g.groups); group += kThreads / L::channels) {
        const float2 moment = a.partials[static_cast<int64_t>(group) * channels + channel];
        const int64_t left = g.batch * plane - group * g.group_rows;
        const float count = static_cast<float>(left < g.group_rows ? left : g.group_rows);
        const float distance = moment.x - origin;
        sums.x += count * distance;
        sums.y += moment.y + count * distance * distance;
      }
    }
    sums = sum_by_channel<kThreads, L::channels>(sums, scratch);
    if (tid < L::channels && channel < channels) {
      const float shift = sums.x / rows, mean = origin + shift;
      const float deviation = (sums.y - shift * sums.x) / rows;
      const float variance = deviation < 0.0f ? 0.0f : deviation; // keeps NaN
      const float rstd = 1.0f / sqrtf(variance + a.eps);
      mean_s[tid] = mean;
      rstd_s[tid] = rstd;
      weight_s[tid] = a.weight[channel];
      bias_s[tid] = a.bias[channel];
      if (blockIdx.x == 0 && a.mean != nullptr) {
        a.mean[channel] = mean;
        a.rstd[channel] = rstd;
        const float shifted = a.conv_bias == nullptr ? mean : mean + a.conv_bias[channel];
        const float unbiased = variance * (rows / (rows > 1.0f ? rows - 1.0f : 1.0f));
        a.running_mean[channel] = lerp(a.running_mean[channel], shifted, a.momentum);
        a.running_var[channel] = lerp(a.running_var[channel], unbiased, a.momentum);
      }
    }
    __syncthreads();
  }

  const int channel = first_channel + team_lane * VEC;
  ChannelValues<VEC> per;
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    per.mean[e] = mean_s[team_lane * VEC + e];
    per.rstd[e] = rstd_s[team_lane * VEC + e];
    per.weight[e] = weight_s[team_lane * VEC + e];
    per.bias[e] = bias_s[team_lane * VEC + e];
  }
  const int splits = static_cast<int>(g.splits), window_w = static_cast<int>(g.window_w);
  const int grid_w = static_cast<int>(g.grid_w), grid_area = static_cast<int>(g.grid_h) * grid_w;
  const int windows = static_cast<int>(g.batch) * grid_area, per_tile = L::slots / splits;
  const int cell_h = POOL == kNone ? 1 : POOL == kMax ? 2 : static_cast<int>(g.cell_h);
  const int cell_w = POOL == kNone ? 1 : POOL == kMax ? 2 : static_cast<int>(g.cell_w);
  const int cells_w = window_w / cell_w, cells = static_cast<int>(g.window_h) / cell_h * cells_w;
  const int pixel_step = CL ? channels : 1;
  const int sub = slot % splits;

  for (int first_window = blockIdx.x * per_tile; first_window < windows; first_window += gridDim.x * per_tile) {
    const int window = first_window + slot / splits;
    float mask_sum[VEC] = {}, mask_xhat_sum[VEC] = {};
    if (window < windows && channel < channels) {
      const int image = window / grid_area, place = window % grid_area;
      const int top = place / grid_w * static_cast<int>(g.window_h), left = place % grid_w * window_w;
      const T* x = static_cast<const T*>(a.conv) + image_offset<CL>(image, channel, channels, plane);
      const int64_t out_plane = g.out_h * g.out_w;
      T* out = static_cast<T*>(a.output);
      if (out != nullptr) out += image_offset<CL>(image, channel, channels, out_plane);

      const auto step = [&](const Pack<T, VEC>& pack, float(&act)[VEC]) {
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          const Activation y =
              activate(pack.get(e), per.mean[e], per.rstd[e], per.weight[e], per.bias[e], a.slope);
          mask_sum[e] += y.slope;
          mask_xhat_sum[e] = fmaf(y.slope, y.xhat, mask_xhat_sum[e]);
          act[e] = y.value;
        }
      };

      if constexpr (POOL == kNone) {
        for (int cell = sub; cell < cells; cell += kApplyLoads * splits) {
          Pack<T, VEC> pack[kApplyLoads];
          int at[kApplyLoads];
#pragma unroll
          for (int u = 0; u < kApplyLoads; ++u) {
            const int k = cell + u * splits;
            if (k < cells) {
              at[u] = ((top + k / cells_w) * width + left + k % cells_w) * pixel_step;
              pack[u] = load<T, VEC>(x + at[u]);
            }
          }
#pragma unroll
          for (int u = 0; u < kApplyLoads; ++u) {
            if (cell + u * splits < cells) {
              float act[VEC];
              step(pack[u], act);
              if (out != nullptr) store<T, VEC>(out + at[u], act);
            }
          }
        }
      } else if constexpr (POOL == kMax) {
        for (int cell = sub; cell < cells; cell += splits) {
          const int row = top + cell / cells_w * 2, column = left + cell % cells_w * 2;
          Pack<T, VEC> pack[4];
#pragma unroll
          for (int u = 0; u < 4; ++u)
            pack[u] = load<T, VEC>(x + ((row + u / 2) * width + column + u % 2) * pixel_step);
          float best[VEC], act[VEC];
          step(pack[0], best);
#pragma unroll
          for (int u = 1; u < 4; ++u) {
            step(pack[u], act);
#pragma unroll
            for (int e = 0; e < VEC; ++e) best[e] = fmaxf(act[e], best[e]); // one NaN makes the channel NaN
          }
          store<T, VEC>(out + (row / 2 * static_cast<int>(g.out_w) + column / 2) * pixel_step, best);
        }
      } else {
        const float scale = 1.0f / static_cast<float>(cell_h * cell_w);
        for (int cell = sub; cell < cells; cell += splits) {
          const int row = top + cell / cells_w * cell_h, column = left + cell % cells_w * cell_w;
          float sum[VEC] = {}, act[VEC];
          for (int h = 0; h < cell_h; ++h) {
#pragma unroll 4
            for (int w = 0; w < cell_w; ++w) {
              step(load<T, VEC>(x + ((row + h) * width + column + w) * pixel_step), act);
#pragma unroll
              for (int e = 0; e < VEC; ++e) sum[e] += act[e];
            }
          }
#pragma unroll
          for (int e = 0; e < VEC; ++e) sum[e] *= scale;
          store<T, VEC>(out + (row / cell_h * static_cast<int>(g.out_w) + column / cell_w) * pixel_step, sum);
        }
      }
    }
    if (a.latents == nullptr) continue; // the same for all threads

#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      mask_s[slot][team_lane * VEC + e] = mask_sum[e];
      mask_xhat_s[slot][team_lane * VEC + e] = mask_xhat_sum[e];
    }
    __syncthreads();
    for (int item = tid; item < per_tile * L::channels; item += kThreads) {
      const int local = item % L::channels, place = item / L::channels;
      const int done = first_window + place;
      if (done < windows && first_channel + local < channels) {
        float mask = 0.0f, mask_xhat = 0.0f;
#pragma unroll 4
        for (int s = place * splits; s < (place + 1) * splits; ++s) {
          mask += mask_s[s][local];
          mask_xhat += mask_xhat_s[s][local];
        }
        const int64_t at = (static_cast<int64_t>(done / grid_area) * channels + first_channel + local) * grid_area +
                           done % grid_area;
        a.mask_sums[at] = mask;
        a.mask_xhat_sums[at] = mask_xhat;
        // The sum of activations slope * (xhat * weight + bias), from the two sums.
        const float total = fmaf(weight_s[local], mask_xhat, bias_s[local] * mask);
        static_cast<T*>(a.latents)[at] = from_float<T>(total / static_cast<float>(g.window_h * g.window_w));
      }
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace unlocked

using namespace unlocked;

extern "C" int unlocked_moments(int device, cudaStream_t stream, int type, const Geometry* geometry, const void* conv,
                                void* partials) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const Geometry g = *geometry;
  const dim3 grid(static_cast<unsigned>(g.groups), channel_chunks(g));
  return with_layout(type, g, [&](auto zero, auto vec, auto last) {
    using T = decltype(zero);
    moments_kernel<T, decltype(vec)::value, decltype(last)::value != 0>
        <<<grid, kReduceThreads, 0, stream>>>(static_cast<const T*>(conv), static_cast<float2*>(partials), g);
  });
}

extern "C" int unlocked_apply(int device, cudaStream_t stream, int type, int pool, const Geometry* geometry,
                              const void* conv, const void* partials, const void* weight, const void* bias,
                              const void* conv_bias, void* running_mean, void* running_var, void* mean, void* rstd,
                              void* output, void* latents, void* mask_sums, void* mask_xhat_sums, float momentum,
                              float eps, float slope) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const Geometry g = *geometry;
  ApplyArgs a;
  a.conv = conv;
  a.partials = static_cast<const float2*>(partials);
  a.weight = static_cast<const float*>(weight);
  a.bias = static_cast<const float*>(bias);
  a.conv_bias = static_cast<const float*>(conv_bias);
  a.running_mean = static_cast<float*>(running_mean);
  a.running_var = static_cast<float*>(running_var);
  a.mean = static_cast<float*>(mean);
  a.rstd = static_cast<float*>(rstd);
  a.output = output;
  a.latents = latents;
  a.mask_sums = static_cast<float*>(mask_sums);
  a.mask_xhat_sums = static_cast<float*>(mask_xhat_sums);
  a.momentum = momentum;
  a.eps = eps;
  a.slope = slope;
  const dim3 grid(static_cast<unsigned>(g.blocks), channel_chunks(g));
  return with_layout(type, g, [&](auto zero, auto vec, auto last) {
    using T = decltype(zero);
    constexpr int kVec = decltype(vec)::value;
    constexpr bool kLast = decltype(last)::value != 0;
    if (pool == kNone) {
      apply_kernel<T, kVec, kLast, kNone><<<grid, kThreads, 0, stream>>>(g, a);
    } else if (pool == kMax) {
      apply_kernel<T, kVec, kLast, kMax><<<grid, kThreads, 0, stream>>>(g, a);
    } else {
      apply_kernel<T, kVec, kLast, kAverage><<<grid, kThreads, 0, stream>>>(g, a);
    }
  });
}
