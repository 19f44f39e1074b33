// 2 x 2 max pooling at stride 2, and back from where each window's largest lies, one byte each. Float32 or bfloat16.
//
// Images are [B, H, W, C] in memory. A last odd row or column belongs to no window. Of equals the first counts, and a NaN
// is larger than all, as the library has it.

#include <cstdint>

#include "lanes.h"

namespace {

typedef uint8_t Places __attribute__((vector_size(kLanes)));

struct Images {
  int64_t batch, height, width, channels;

  // Calls body(offset of a window's first pixel, window's own offset) for every window; a row of them is a thread's.
  template <typename Body>
  void for_windows(int threads, const Body& body) const {
    const int64_t down = height / 2, across = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < batch * down; ++row)
      for (int64_t x = 0; x < across; ++x) {
        const int64_t pixel = (row / down * height + row % down * 2) * width + 2 * x;
        body(pixel * channels, (row * across + x) * channels);
      }
  }

  int64_t step(int64_t place) const { return (place / 2 * width + place % 2) * channels; }
};

void keep(uint8_t* to, Mask place, int64_t lanes) {
  const Places bytes = __builtin_convertvector(place, Places);
  std::memcpy(to, &bytes, lanes);
}

Mask kept(const uint8_t* from, int64_t lanes) {
  Places bytes = {};
  std::memcpy(&bytes, from, lanes);
  return __builtin_convertvector(bytes, Mask);
}

template <typename T>
void forward(const T* x, const Images& s, T* y, uint8_t* places, int threads) {
  s.for_windows(threads, [&](int64_t from, int64_t to) {
    for_groups(s.channels, [&](int64_t c, auto lanes) {
      Vector most = load(x + from + c, lanes);
      Mask place = {};
      for (int64_t k = 1; k < 4; ++k) {
        const Vector value = load(x + from + s.step(k) + c, lanes);
        const Mask larger = (value > most) | (value != value);
        most = larger ? value : most;
        place = larger ? Mask{} + static_cast<int32_t>(k) : place;
      }
      store(y + to + c, most, lanes);
      keep(places + to + c, place, lanes);
    });
  });
}

template <typename T>
void backward(const T* grad, const uint8_t* places, const Images& s, T* out, int threads) {
  s.for_windows(threads, [&](int64_t to, int64_t from) {
    for_groups(s.channels, [&](int64_t c, auto lanes) {
      const Vector value = load(grad + from + c, lanes);
      const Mask place = kept(places + from + c, lanes);
      for (int64_t k = 0; k < 4; ++k)
        store(out + to + s.step(k) + c, place == static_cast<int32_t>(k) ? value : Vector{}, lanes);
    });
  });
}

}  // namespace

// x: [B, H, W, C]; y, places: [B, H / 2, W / 2, C].
extern "C" void unlocked_max_pool_forward(int half, const void* x, int64_t batch, int64_t height, int64_t width,
                                          int64_t channels, void* y, uint8_t* places, int threads) {
  const Images s{batch, height, width, channels};
  if (half)
    forward(static_cast<const Bfloat16*>(x), s, static_cast<Bfloat16*>(y), places, threads);
  else
    forward(static_cast<const float*>(x), s, static_cast<float*>(y), places, threads);
}

// grad: like y; out: like x, zero where no window is.
extern "C" void unlocked_max_pool_backward(int half, const void* grad, const uint8_t* places, int64_t batch,
                                           int64_t height, int64_t width, int64_t channels, void* out, int threads) {
  const Images s{batch, height, width, channels};
  if (half)
    backward(static_cast<const Bfloat16*>(grad), places, s, static_cast<Bfloat16*>(out), threads);
  else
    backward(static_cast<const float*>(grad), places, s, static_cast<float*>(out), threads);
}
