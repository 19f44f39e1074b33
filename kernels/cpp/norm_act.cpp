// BatchNorm + LeakyReLU + latents + the next layer's input, and back, for images in channels-last memory, stored in
// float32 or bfloat16 (T below). All arithmetic is float32; what is stored is rounded once.
//
// An image is H x W pixels of C channels that lie together, so every inner loop runs over channels and vectorises.
// Work is split by image, and what is summed over images is summed in their order, so results depend neither on the
// number of threads nor on which thread did what. [Note: window sums] of kernels/reference.py explains the algebra.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "lanes.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Sums of (x - shift) and its square over one image, per channel.
template <typename T>
void image_moments(const T* x, const T* shift, const Shape& s, float* sum, float* square) {
  for_groups(s.channels, [&](int64_t c, auto lanes) {
    const Vector origin = load(shift + c, lanes);
    Vector total = {}, squares = {};
    for (int64_t pixel = 0; pixel < s.pixels(); ++pixel) {
      const Vector value = load(x + pixel * s.channels + c, lanes) - origin;
      total += value;
      squares += value * value;
    }
    store(sum + c, total, lanes);
    store(square + c, squares, lanes);
  });
}

// Batch statistics: mean and 1 / sqrt(biased variance + eps) per channel, and the running statistics in place.
// `scratch` holds 2 * batch * channels floats.
template <typename T>
void batch_statistics(const T* x, int64_t batch, int64_t channels, int64_t height, int64_t width,
                               const float* conv_bias, float* running_mean, float* running_var, float momentum,
                               float eps, float* mean, float* rstd, float* scratch, int threads) {
  const Shape s{batch, channels, height, width};
  float* sums = scratch;
  float* squares = scratch + batch * channels;
  const T* shift = x;  // the first pixel: takes a large common offset out of the squares
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < batch; ++b)
    image_moments(x + b * s.image(), shift, s, sums + b * channels, squares + b * channels);
  const double count = static_cast<double>(s.rows());
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, square = 0.0;
    for (int64_t b = 0; b < batch; ++b) {
      sum += sums[b * channels + c];
      square += squares[b * channels + c];
    }
    const double offset = sum / count;
    const double variance = std::max(square / count - offset * offset, 0.0);
    const double centre = to_float(shift[c]) + offset;
    mean[c] = static_cast<float>(centre);
    rstd[c] = static_cast<float>(1.0 / __builtin_sqrt(variance + eps));
    const double bias = conv_bias ? conv_bias[c] : 0.0;
    const double unbiased = variance * (count / std::max(count - 1.0, 1.0));
    running_mean[c] += momentum * (static_cast<float>(centre + bias) - running_mean[c]);
    running_var[c] += momentum * (static_cast<float>(unbiased) - running_var[c]);
  }
}

// One pass: activations, their pooled copy in `out`, latents and window sums [batch, channels * side * side].
// side 0: no latents. `scratch` holds threads * (image + 3 * side * side * channels) floats.
template <typename T>
void norm_act_forward(const T* x, int64_t batch, int64_t channels, int64_t height, int64_t width,
                               const float* mean, const float* rstd, const float* weight, const float* bias,
                               float slope, int64_t side, int pool, int64_t pool_size, T* latents, float* mask_sums,
                               float* mask_xhat_sums, T* out, int64_t out_b, int64_t out_c, int64_t out_y,
                               int64_t out_x, float* scratch, int threads) {
  const Shape s{batch, channels, height, width};
  const int64_t windows = side * side, cells = windows * channels;
  const int64_t window_h = side ? height / side : height, window_w = side ? width / side : width;
  const float area = static_cast<float>(window_h * window_w);
  const Vector slopes = broadcast(slope);
  const bool has_pairs = !((height | width | window_h | window_w) & 1);
  const bool at_once = out_c == 1 && (pool == kNone || (pool == kMax && has_pairs));  // with no copy in between
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = thread_number();
    float* act = scratch + thread * (s.image() + 3 * cells);
    float* sums = act + s.image();
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
      const T* image = x + b * s.image();
      std::fill(sums, sums + 3 * cells, 0.0f);
      const Windows grid{side ? side : 1, window_h, window_w, cells, sums};
      const Target<T> to{out + b * out_b, out_c, out_y, out_x};
      const auto run = [&](auto with_sums) {
        constexpr bool kSums = decltype(with_sums)::value;
        for_groups(channels, [&](int64_t c, auto lanes) {
          const Affine k(mean, rstd, weight, bias, c, lanes);
          if (!at_once)
            activate<kSums>(image, s, k, slopes, c, lanes, grid, Target<float>{act, 1, width * channels, channels});
          else if (pool == kMax)
            activate_max<kSums>(image, s, k, slopes, c, lanes, grid, to);
          else
            activate<kSums>(image, s, k, slopes, c, lanes, grid, to);
        });
      };
      side ? run(std::true_type{}) : run(std::false_type{});
      if (!at_once) pool_image(act, s, static_cast<Pool>(pool), pool_size, to);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t w = 0; w < windows; ++w) {
          const int64_t from = w * channels + c, to = b * cells + c * windows + w;
          latents[to] = from_float<T>(sums[from] / area);
          mask_sums[to] = sums[cells + from];
          mask_xhat_sums[to] = sums[2 * cells + from];
        }
    }
  }
}

// From the latents' gradient to the convolution's output gradient. `scratch` holds 2 * batch * channels floats plus
// threads * side * side * channels.
template <typename T>
void norm_act_backward(const T* latents_grad, const T* x, int64_t batch, int64_t channels,
                                int64_t height, int64_t width, const float* mean, const float* rstd,
                                const float* weight, const float* bias, const float* mask_sums,
                                const float* mask_xhat_sums, float slope, int64_t side, T* x_grad,
                                float* weight_grad, float* bias_grad, float* scratch, int threads) {
  const Shape s{batch, channels, height, width};
  const int64_t windows = side * side, cells = windows * channels;
  const int64_t window_h = height / side, window_w = width / side;
  const float area = static_cast<float>(window_h * window_w);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, sum_xhat = 0.0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t w = 0; w < windows; ++w) {
        const int64_t at = b * cells + c * windows + w;
        const float grad = to_float(latents_grad[at]) / area;
        sum += static_cast<double>(grad) * mask_sums[at];
        sum_xhat += static_cast<double>(grad) * mask_xhat_sums[at];
      }
    bias_grad[c] = static_cast<float>(sum);
    weight_grad[c] = static_cast<float>(sum_xhat);
  }
  const float inverse = 1.0f / static_cast<float>(s.rows());
  std::vector<float> scale(channels), constant(channels), slant(channels);
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = weight[c] * rstd[c];
    constant[c] = scale[c] * bias_grad[c] * inverse;
    slant[c] = scale[c] * weight_grad[c] * inverse;
  }
  const Vector slopes = broadcast(slope);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = thread_number();
    float* grid = scratch + thread * cells;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t w = 0; w < windows; ++w)
          grid[w * channels + c] = to_float(latents_grad[b * cells + c * windows + w]) / area * scale[c];
      const T* image = x + b * s.image();
      T* target = x_grad + b * s.image();
      for_groups(channels, [&](int64_t c, auto lanes) {
        const Affine k(mean, rstd, weight, bias, c, lanes);
        const Vector constant_c = load(constant.data() + c, lanes), slant_c = load(slant.data() + c, lanes);
        for (int64_t y = 0; y < height; ++y)
          for (int64_t window = 0; window < side; ++window) {
            const Vector grad = load(grid + ((y / window_h) * side + window) * channels + c, lanes);
            const int64_t first = y * width + window * window_w;
            for (int64_t pixel = first; pixel < first + window_w; ++pixel) {
              const Vector xhat = (load(image + pixel * channels + c, lanes) - k.mean) * k.rstd;
              const Vector mask = slope_mask(xhat * k.weight + k.bias, slopes);
              store(target + pixel * channels + c, grad * mask - constant_c - xhat * slant_c, lanes);
            }
          }
      });
    }
  }
}

// The same from a gradient at every activation. `scratch` holds 2 * batch * channels floats.
template <typename T>
void norm_act_backward_full(const T* act_grad, const T* x, int64_t batch, int64_t channels,
                                     int64_t height, int64_t width, const float* mean, const float* rstd,
                                     const float* weight, const float* bias, float slope, T* x_grad,
                                     float* weight_grad, float* bias_grad, float* scratch, int threads) {
  const Shape s{batch, channels, height, width};
  float* sums = scratch;
  float* sums_xhat = scratch + batch * channels;
  const Vector slopes = broadcast(slope);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < batch; ++b)
    for_wide_groups(channels, [&](int64_t c, auto groups, auto lanes) {
      Affine k[groups];
      Vector sum[groups] = {}, sum_xhat[groups] = {};
      for (int64_t g = 0; g < groups; ++g) k[g] = Affine(mean, rstd, weight, bias, c + g * kLanes, lanes);
      for (int64_t at = b * s.image() + c; at < (b + 1) * s.image(); at += channels)
        for (int64_t g = 0; g < groups; ++g) {
          const Vector xhat = (load(x + at + g * kLanes, lanes) - k[g].mean) * k[g].rstd;
          const Vector mask = slope_mask(xhat * k[g].weight + k[g].bias, slopes);
          const Vector masked = load(act_grad + at + g * kLanes, lanes) * mask;
          sum[g] += masked;
          sum_xhat[g] += masked * xhat;
        }
      for (int64_t g = 0; g < groups; ++g) {
        store(sums + b * channels + c + g * kLanes, sum[g], lanes);
        store(sums_xhat + b * channels + c + g * kLanes, sum_xhat[g], lanes);
      }
    });
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, sum_xhat = 0.0;
    for (int64_t b = 0; b < batch; ++b) {
      sum += sums[b * channels + c];
      sum_xhat += sums_xhat[b * channels + c];
    }
    bias_grad[c] = static_cast<float>(sum);
    weight_grad[c] = static_cast<float>(sum_xhat);
  }
  const Vector inverse = broadcast(1.0f / static_cast<float>(s.rows()));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < batch; ++b)
    for_wide_groups(channels, [&](int64_t c, auto groups, auto lanes) {
      Affine k[groups];
      Vector sum[groups], slant[groups];
      for (int64_t g = 0; g < groups; ++g) {
        k[g] = Affine(mean, rstd, weight, bias, c + g * kLanes, lanes);
        sum[g] = load(bias_grad + c + g * kLanes, lanes), slant[g] = load(weight_grad + c + g * kLanes, lanes);
      }
      for (int64_t at = b * s.image() + c; at < (b + 1) * s.image(); at += channels)
        for (int64_t g = 0; g < groups; ++g) {
          const Vector xhat = (load(x + at + g * kLanes, lanes) - k[g].mean) * k[g].rstd;
          const Vector mask = slope_mask(xhat * k[g].weight + k[g].bias, slopes);
          const Vector masked = load(act_grad + at + g * kLanes, lanes) * mask;
          const Vector centred = masked - (sum[g] + xhat * slant[g]) * inverse;
          store(x_grad + at + g * kLanes, k[g].weight * k[g].rstd * centred, lanes);
        }
    });
}

}  // namespace

// `bfloat16`: what the images, the latents and their gradients are stored in (1), or float32 (0).
extern "C" {

void unlocked_batch_statistics(int bfloat16, const void* x, int64_t batch, int64_t channels, int64_t height,
                               int64_t width, const float* conv_bias, float* running_mean, float* running_var,
                               float momentum, float eps, float* mean, float* rstd, float* scratch, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    batch_statistics(static_cast<const T*>(x), batch, channels, height, width, conv_bias, running_mean, running_var, momentum, eps,
                     mean, rstd, scratch, threads);
  };
  bfloat16 ? run(Bfloat16{}) : run(0.0f);
}

void unlocked_norm_act_forward(int bfloat16, const void* x, int64_t batch, int64_t channels, int64_t height,
                               int64_t width, const float* mean, const float* rstd, const float* weight,
                               const float* bias, float slope, int64_t side, int pool, int64_t pool_size, void* latents,
                               float* mask_sums, float* mask_xhat_sums, void* out, int64_t out_b, int64_t out_c,
                               int64_t out_y, int64_t out_x, float* scratch, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    norm_act_forward(static_cast<const T*>(x), batch, channels, height, width, mean, rstd, weight, bias, slope, side,
                     pool, pool_size, static_cast<T*>(latents), mask_sums, mask_xhat_sums, static_cast<T*>(out), out_b,
                     out_c, out_y, out_x, scratch, threads);
  };
  bfloat16 ? run(Bfloat16{}) : run(0.0f);
}

void unlocked_norm_act_backward(int bfloat16, const void* latents_grad, const void* x, int64_t batch, int64_t channels,
                                int64_t height, int64_t width, const float* mean, const float* rstd,
                                const float* weight, const float* bias, const float* mask_sums,
                                const float* mask_xhat_sums, float slope, int64_t side, void* x_grad,
                                float* weight_grad, float* bias_grad, float* scratch, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    norm_act_backward(static_cast<const T*>(latents_grad), static_cast<const T*>(x), batch, channels, height, width,
                      mean, rstd, weight, bias, mask_sums, mask_xhat_sums, slope, side, static_cast<T*>(x_grad),
                      weight_grad, bias_grad, scratch, threads);
  };
  bfloat16 ? run(Bfloat16{}) : run(0.0f);
}

void unlocked_norm_act_backward_full(int bfloat16, const void* act_grad, const void* x, int64_t batch, int64_t channels,
                                     int64_t height, int64_t width, const float* mean, const float* rstd,
                                     const float* weight, const float* bias, float slope, void* x_grad,
                                     float* weight_grad, float* bias_grad, float* scratch, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    norm_act_backward_full(static_cast<const T*>(act_grad), static_cast<const T*>(x), batch, channels, height, width,
                           mean, rstd, weight, bias, slope, static_cast<T*>(x_grad), weight_grad, bias_grad, scratch,
                           threads);
  };
  bfloat16 ? run(Bfloat16{}) : run(0.0f);
}

}  // extern "C"
