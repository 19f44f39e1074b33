// GroupNorm, the activation after it and, at a block's end, the latents, averages over p x p windows of each channel;
// and back from the latents' gradient or from one at every activation. Stored in float32 or bfloat16; all arithmetic is
// float32, but for the sums over a group's channels and over images, which are double.
//
// Images are [B, H, W, C] in memory, latents [B, C, p, p]; p divides H and W. With xhat = (x - mean) rstd of the group,
// v = xhat w + b and y = f(v), the way back computes f' anew from x. A register holds channels of several groups, or
// not all of one, so what is summed is summed per channel first. An image is one thread's, and images are summed in
// their order: results depend neither on the number of threads nor on which thread did what.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "curves.h"
#include "lanes.h"

namespace {

enum Kind { kLeaky = 0, kSilu = 1, kGelu = 2 };

// A leaky ReLU, by its slope below zero; 1: no activation. A ReLU of minus infinity is zero, and so is its gradient.
struct Leaky {
  float slope;
  Vector low(Vector v) const { return slope == 0.0f ? Vector{} : v * slope; }
  Vector value(Vector v) const { return v <= Vector{} ? low(v) : v; }
  Vector back(Vector grad, Vector v) const { return v <= Vector{} ? low(grad) : grad; }
};

template <typename Function>
struct Curve {
  Vector value(Vector v) const { return Function{}(v).value; }
  Vector back(Vector grad, Vector v) const { return grad * Function{}(v).slope; }
};

struct Images {
  int64_t batch, channels, height, width, groups, side;
  int64_t pixels() const { return height * width; }
  int64_t image() const { return pixels() * channels; }
  int64_t of_group() const { return channels / groups; }
  double count() const { return static_cast<double>(of_group() * pixels()); }  // numbers of a group
  int64_t across() const { return width / side; }
  int64_t down() const { return height / side; }
  int64_t step() const { return side * side; }  // from a channel's latents to the next one's
  float share() const { return 1.0f / static_cast<float>(across() * down()); }

  // Calls body(group, its first channel, the next one's) for every group.
  template <typename Body>
  void for_channels(const Body& body) const {
    const int64_t size = of_group();
    for (int64_t g = 0; g < groups; ++g) body(g, g * size, (g + 1) * size);
  }

  // Calls body(offset of a window's first pixel in a row) for every row of it; a window's row is `across` pixels.
  template <typename Body>
  void for_rows(int64_t i, int64_t j, const Body& body) const {
    for (int64_t y = i * down(); y < (i + 1) * down(); ++y) body((y * width + j * across()) * channels);
  }
};

// What every channel of an image is computed with, [C] each: v = (x - centre) scale + shift.
struct Lines {
  explicit Lines(int64_t channels)
      : centre(channels), scale(channels), shift(channels), first(channels), second(channels) {}
  std::vector<float> centre, scale, shift;
  std::vector<float> first, second;  // sums over the image

  void set(const Images& s, const float* mean, const float* rstd, const float* weight, const float* bias) {
    s.for_channels([&](int64_t g, int64_t begin, int64_t end) {
      const float mean_g = mean[g], rstd_g = rstd[g];
      for (int64_t c = begin; c < end; ++c) centre[c] = mean_g, scale[c] = rstd_g * weight[c], shift[c] = bias[c];
    });
  }
};

// A register's share of them.
struct Line {
  Vector centre, scale, shift;
  Line() = default;
  Line(const Lines& lines, int64_t c, int64_t lanes)
      : centre(load(lines.centre.data() + c, lanes)),
        scale(load(lines.scale.data() + c, lanes)),
        shift(load(lines.shift.data() + c, lanes)) {}
};

// Mean and 1 / sqrt(biased variance + eps) of one image's groups. Per channel the sums are of differences from a pixel
// in the middle, which takes a large common offset out of the squares; rows are summed by themselves first.
template <typename T>
void statistics(const T* x, const Images& s, float eps, Lines& lines, float* mean, float* rstd) {
  const T* origin = x + ((s.height / 2) * s.width + s.width / 2) * s.channels;
  for_wide_groups(s.channels, [&](int64_t c, auto vectors, auto lanes) {
    Vector start[vectors], total[vectors] = {}, squares[vectors] = {};
    for (int64_t k = 0; k < vectors; ++k) start[k] = load(origin + c + k * kLanes, lanes);
    for (int64_t y = 0; y < s.height; ++y) {
      Vector row[vectors] = {}, row_squares[vectors] = {};
      const T* from = x + y * s.width * s.channels + c;
      for (int64_t pixel = 0; pixel < s.width; ++pixel, from += s.channels)
        for (int64_t k = 0; k < vectors; ++k) {
          const Vector value = load(from + k * kLanes, lanes) - start[k];
          row[k] += value;
          row_squares[k] += value * value;
        }
      for (int64_t k = 0; k < vectors; ++k) total[k] += row[k], squares[k] += row_squares[k];
    }
    for (int64_t k = 0; k < vectors; ++k) {
      store(lines.first.data() + c + k * kLanes, total[k], lanes);
      store(lines.second.data() + c + k * kLanes, squares[k], lanes);
    }
  });
  const double share = 1.0 / static_cast<double>(s.pixels());
  s.for_channels([&](int64_t g, int64_t begin, int64_t end) {
    double sum = 0.0, spread = 0.0;
    for (int64_t c = begin; c < end; ++c) sum += to_float(origin[c]) + lines.first[c] * share;
    const double centre = sum / static_cast<double>(s.of_group());
    for (int64_t c = begin; c < end; ++c) {  // inside the channel, and of its mean from the group's
      const double offset = lines.first[c] * share, away = to_float(origin[c]) + offset - centre;
      spread += lines.second[c] * share - offset * offset + away * away;
    }
    const double variance = std::max(spread / static_cast<double>(s.of_group()), 0.0);
    mean[g] = static_cast<float>(centre);
    rstd[g] = static_cast<float>(1.0 / __builtin_sqrt(variance + eps));
  });
}

// One image's activations and, unless `latents` is null, latents.
template <typename T, typename Act>
void apply(const T* x, const Images& s, const Lines& lines, const Act& act, T* out, float* latents) {
  for_wide_groups(s.channels, [&](int64_t c, auto vectors, auto lanes) {
    Line line[vectors];
    for (int64_t k = 0; k < vectors; ++k) line[k] = Line(lines, c + k * kLanes, lanes);
    for (int64_t i = 0; i < s.side; ++i)
      for (int64_t j = 0; j < s.side; ++j) {
        Vector total[vectors] = {};
        s.for_rows(i, j, [&](int64_t first) {
          Vector row[vectors] = {};
          for (int64_t at = first + c; at < first + s.across() * s.channels; at += s.channels)
            for (int64_t k = 0; k < vectors; ++k) {
              const Vector distance = load(x + at + k * kLanes, lanes) - line[k].centre;
              const Vector value = act.value(distance * line[k].scale + line[k].shift);
              store(out + at + k * kLanes, value, lanes);
              row[k] += value;
            }
          for (int64_t k = 0; k < vectors; ++k) total[k] += row[k];
        });
        if (latents == nullptr) continue;
        float* cell = latents + c * s.step() + i * s.side + j;
        for (int64_t k = 0; k < vectors; ++k)
          for (int64_t lane = 0; lane < lanes; ++lane)
            cell[(k * kLanes + lane) * s.step()] = total[k][lane] * s.share();
      }
  });
}

// One image's gradients at v in `held`, and per channel their sum and that of them times x - centre. kFull: `grad` is
// one at every activation, like x; else the latents'.
template <bool kFull, typename Grad, typename T, typename Act>
void through_activation(const Grad* grad, const T* x, const Images& s, Lines& lines, const Act& act, float* held) {
  for_wide_groups(s.channels, [&](int64_t c, auto vectors, auto lanes) {
    Line line[vectors];
    for (int64_t k = 0; k < vectors; ++k) line[k] = Line(lines, c + k * kLanes, lanes);
    Vector sum[vectors] = {}, slant[vectors] = {};
    for (int64_t i = 0; i < s.side; ++i)
      for (int64_t j = 0; j < s.side; ++j) {
        Vector given[vectors] = {};
        if constexpr (!kFull)
          for (int64_t k = 0; k < vectors; ++k)
            for (int64_t lane = 0; lane < lanes; ++lane)
              given[k][lane] = grad[(c + k * kLanes + lane) * s.step() + i * s.side + j] * s.share();
        s.for_rows(i, j, [&](int64_t first) {
          Vector row[vectors] = {}, row_slant[vectors] = {};
          for (int64_t at = first + c; at < first + s.across() * s.channels; at += s.channels)
            for (int64_t k = 0; k < vectors; ++k) {
              const Vector distance = load(x + at + k * kLanes, lanes) - line[k].centre;
              if constexpr (kFull) given[k] = load(grad + at + k * kLanes, lanes);
              const Vector value = act.back(given[k], distance * line[k].scale + line[k].shift);
              store(held + at + k * kLanes, value, lanes);
              row[k] += value;
              row_slant[k] += value * distance;
            }
          for (int64_t k = 0; k < vectors; ++k) sum[k] += row[k], slant[k] += row_slant[k];
        });
      }
    for (int64_t k = 0; k < vectors; ++k) {
      store(lines.first.data() + c + k * kLanes, sum[k], lanes);
      store(lines.second.data() + c + k * kLanes, slant[k], lanes);
    }
  });
}

// One image's gradient at x, from that at v: `held` scale, less what keeps the group's mean and variance as they are.
// `shift` of the lines becomes the part of it that is the same for all of a group, `second` that which goes with x.
template <typename T>
void through_norm(const float* held, const T* x, const Images& s, const float* rstd, const float* weight, Lines& lines,
                  T* out) {
  s.for_channels([&](int64_t g, int64_t begin, int64_t end) {
    double sum = 0.0, slant = 0.0;
    for (int64_t c = begin; c < end; ++c) {
      sum += static_cast<double>(weight[c]) * lines.first[c];
      slant += static_cast<double>(weight[c]) * lines.second[c];
    }
    const double steepness = rstd[g];
    const float constant = static_cast<float>(steepness * sum / s.count());
    const float per_distance = static_cast<float>(steepness * steepness * steepness * slant / s.count());
    std::fill(lines.shift.begin() + begin, lines.shift.begin() + end, constant);
    std::fill(lines.second.begin() + begin, lines.second.begin() + end, per_distance);
  });
  for_wide_groups(s.channels, [&](int64_t c, auto vectors, auto lanes) {
    Line line[vectors];
    Vector slope[vectors];
    for (int64_t k = 0; k < vectors; ++k) {
      line[k] = Line(lines, c + k * kLanes, lanes);
      slope[k] = load(lines.second.data() + c + k * kLanes, lanes);
    }
    for (int64_t at = c; at < s.image(); at += s.channels)
      for (int64_t k = 0; k < vectors; ++k) {
        const Vector distance = load(x + at + k * kLanes, lanes) - line[k].centre;
        const Vector value = load(held + at + k * kLanes, lanes) * line[k].scale;
        store(out + at + k * kLanes, value - line[k].shift - distance * slope[k], lanes);
      }
  });
}

template <typename T, typename Act>
void forward(const T* x, const Images& s, const float* weight, const float* bias, float eps, const Act& act, T* out,
             float* latents, float* mean, float* rstd, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Lines lines(s.channels);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.batch; ++b) {
      float *mean_b = mean + b * s.groups, *rstd_b = rstd + b * s.groups;
      statistics(x + b * s.image(), s, eps, lines, mean_b, rstd_b);
      lines.set(s, mean_b, rstd_b, weight, bias);
      apply(x + b * s.image(), s, lines, act, out + b * s.image(),
            latents == nullptr ? nullptr : latents + b * s.channels * s.step());
    }
  }
}

template <bool kFull, typename Grad, typename T, typename Act>
void backward(const Grad* grad, const T* x, const Images& s, const float* weight, const float* bias, const float* mean,
              const float* rstd, const Act& act, T* out, float* weight_grad, float* bias_grad, int threads) {
  const int64_t of_grad = kFull ? s.image() : s.channels * s.step();
  std::vector<float> sums(s.batch * s.channels), slants(s.batch * s.channels);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Lines lines(s.channels);
    const std::unique_ptr<float[]> held(new float[s.image()]);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.batch; ++b) {
      const float *mean_b = mean + b * s.groups, *rstd_b = rstd + b * s.groups;
      lines.set(s, mean_b, rstd_b, weight, bias);
      through_activation<kFull>(grad + b * of_grad, x + b * s.image(), s, lines, act, held.get());
      float *sums_b = sums.data() + b * s.channels, *slants_b = slants.data() + b * s.channels;
      s.for_channels([&](int64_t g, int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) sums_b[c] = lines.first[c], slants_b[c] = lines.second[c] * rstd_b[g];
      });
      through_norm(held.get(), x + b * s.image(), s, rstd_b, weight, lines, out + b * s.image());
    }
  }
  std::vector<double> sum(s.channels), slant(s.channels);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < s.channels; ++c)
      sum[c] += sums[b * s.channels + c], slant[c] += slants[b * s.channels + c];
  for (int64_t c = 0; c < s.channels; ++c)
    bias_grad[c] = static_cast<float>(sum[c]), weight_grad[c] = static_cast<float>(slant[c]);
}

// Calls body(zero of the type that images are stored in, the activation).
template <typename Body>
void by_kind(int half, int kind, float slope, const Body& body) {
  const auto run = [&](auto zero) {
    if (kind == kSilu)
      body(zero, Curve<Silu>{});
    else if (kind == kGelu)
      body(zero, Curve<Gelu>{});
    else
      body(zero, Leaky{slope});
  };
  half ? run(Bfloat16{}) : run(0.0f);
}

}  // namespace

// x, out: [B, H, W, C]; mean, rstd: [B, groups]; side: p, latents: [B, C, p, p] float32; side 0: none are made.
extern "C" void unlocked_group_act_forward(int half, const void* x, int64_t batch, int64_t channels, int64_t height,
                                           int64_t width, int64_t groups, const float* weight, const float* bias,
                                           float eps, int kind, float slope, int64_t side, void* out, float* latents,
                                           float* mean, float* rstd, int threads) {
  const Images s{batch, channels, height, width, groups, side ? side : 1};
  by_kind(half, kind, slope, [&](auto zero, const auto& act) {
    using T = decltype(zero);
    forward(static_cast<const T*>(x), s, weight, bias, eps, act, static_cast<T*>(out), side ? latents : nullptr, mean,
            rstd, threads);
  });
}

// grad: [B, C, p, p] float32, at the latents; side 0: like x, at every activation. out: the gradient at x, may be x.
extern "C" void unlocked_group_act_backward(int half, const void* grad, const void* x, int64_t batch, int64_t channels,
                                            int64_t height, int64_t width, int64_t groups, const float* weight,
                                            const float* bias, const float* mean, const float* rstd, int kind,
                                            float slope, int64_t side, void* out, float* weight_grad, float* bias_grad,
                                            int threads) {
  const Images s{batch, channels, height, width, groups, side ? side : 1};
  by_kind(half, kind, slope, [&](auto zero, const auto& act) {
    using T = decltype(zero);
    const T* image = static_cast<const T*>(x);
    T* target = static_cast<T*>(out);
    if (side)
      backward<false>(static_cast<const float*>(grad), image, s, weight, bias, mean, rstd, act, target, weight_grad,
                      bias_grad, threads);
    else
      backward<true>(static_cast<const T*>(grad), image, s, weight, bias, mean, rstd, act, target, weight_grad,
                     bias_grad, threads);
  });
}
