// The end of a residual block: a sum, a leaky ReLU, and the latents, averages over p x p windows of each channel, in one
// pass, or of a block that ends in the activation of one image; and back from the latents' gradient. Stored in float32 or bfloat16; all arithmetic is float32.
//
// Images are [B, H, W, C] in memory, latents [B, C, p, p]; p divides H and W.

#include <cstdint>

#include "lanes.h"

namespace {

struct Windows {
  int64_t batch, height, width, channels, side;
  int64_t down() const { return height / side; }
  int64_t across() const { return width / side; }

  // Calls body(pixel's offset) for every pixel of a window.
  template <typename Body>
  void for_pixels(int64_t image, int64_t i, int64_t j, const Body& body) const {
    for (int64_t y = i * down(); y < (i + 1) * down(); ++y)
      for (int64_t x = j * across(); x < (j + 1) * across(); ++x) body(((image * height + y) * width + x) * channels);
  }

  // Calls body(image, i, j, latent of channel 0) for every window; an image is one thread's.
  template <typename Body>
  void for_windows(int threads, const Body& body) const {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < batch; ++image)
      for (int64_t i = 0; i < side; ++i)
        for (int64_t j = 0; j < side; ++j) body(image, i, j, (image * channels * side + i) * side + j);
  }
};

template <bool kPair, typename T>
void forward(const T* a, const T* b, const Windows& w, float slope, T* out, float* latents, int threads) {
  const int64_t step = w.side * w.side;
  const float share = 1.0f / static_cast<float>(w.down() * w.across());
  w.for_windows(threads, [&](int64_t image, int64_t i, int64_t j, int64_t latent) {
    for_groups(w.channels, [&](int64_t c, auto lanes) {
      Vector total = {};
      w.for_pixels(image, i, j, [&](int64_t at) {
        Vector sum = load(a + at + c, lanes);
        if constexpr (kPair) sum += load(b + at + c, lanes);
        const Vector low = slope == 0.0f ? Vector{} : sum * slope;  // a ReLU of minus infinity is zero
        const Vector value = sum <= Vector{} ? low : sum;
        store(out + at + c, value, lanes);
        total += value;
      });
      for (int64_t lane = 0; lane < lanes; ++lane) latents[latent + (c + lane) * step] = total[lane] * share;
    });
  });
}

template <typename T>
void backward(const float* grad, const T* y, const Windows& w, float slope, T* out, int threads) {
  const int64_t step = w.side * w.side;
  const float share = 1.0f / static_cast<float>(w.down() * w.across());
  w.for_windows(threads, [&](int64_t image, int64_t i, int64_t j, int64_t latent) {
    for_groups(w.channels, [&](int64_t c, auto lanes) {
      Vector above = {};
      for (int64_t lane = 0; lane < lanes; ++lane) above[lane] = grad[latent + (c + lane) * step] * share;
      const Vector below = above * slope;
      w.for_pixels(image, i, j, [&](int64_t at) {
        store(out + at + c, load(y + at + c, lanes) <= Vector{} ? below : above, lanes);
      });
    });
  });
}

}  // namespace

// a, b, out: [B, H, W, C], b may be null, out may be a; latents: [B, C, p, p] float32.
extern "C" void unlocked_sum_act_forward(int half, const void* a, const void* b, int64_t batch, int64_t height,
                                         int64_t width, int64_t channels, int64_t side, float slope, void* out,
                                         float* latents, int threads) {
  const Windows w{batch, height, width, channels, side};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto of = b ? forward<true, T> : forward<false, T>;
    of(static_cast<const T*>(a), static_cast<const T*>(b), w, slope, static_cast<T*>(out), latents, threads);
  };
  half ? run(Bfloat16{}) : run(0.0f);
}

// grad: [B, C, p, p], at the latents; y: what the forward pass gave; out: [B, H, W, C], the gradient at either summand.
extern "C" void unlocked_sum_act_backward(int half, const float* grad, const void* y, int64_t batch, int64_t height,
                                          int64_t width, int64_t channels, int64_t side, float slope, void* out,
                                          int threads) {
  const Windows w{batch, height, width, channels, side};
  if (half)
    backward(grad, static_cast<const Bfloat16*>(y), w, slope, static_cast<Bfloat16*>(out), threads);
  else
    backward(grad, static_cast<const float*>(y), w, slope, static_cast<float*>(out), threads);
}
