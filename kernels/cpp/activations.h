// What is made of a convolution's output while it is in a register: normalised, activated, summed up over a window and
// pooled, for one image in channels-last memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

struct Shape {
  int64_t batch, channels, height, width;
  int64_t pixels() const { return height * width; }
  int64_t image() const { return pixels() * channels; }
  int64_t rows() const { return batch * pixels(); }
};

enum Pool { kNone = 0, kMax = 1, kAverage = 2 };

// 1 where value > 0, else the LeakyReLU's slope.
Vector slope_mask(Vector value, Vector slope) {
  const Mask positive = value > Vector{};
  return positive ? broadcast(1.0f) : slope;
}

// What normalises and activates a group of channels.
struct Affine {
  Vector mean, rstd, weight, bias;
  Affine() = default;
  Affine(const float* m, const float* r, const float* w, const float* b, int64_t c, int64_t lanes)
      : mean(load(m + c, lanes)), rstd(load(r + c, lanes)), weight(load(w + c, lanes)), bias(load(b + c, lanes)) {}
};

// Of the activations of a window, the slopes that were taken and those times the normalised value.
struct Sums {
  Vector act = {}, mask = {}, xhat = {};

  void add_to(float* cell, int64_t cells, int64_t lanes) const {
    store(cell, load(cell, lanes) + act, lanes);
    store(cell + cells, load(cell + cells, lanes) + mask, lanes);
    store(cell + 2 * cells, load(cell + 2 * cells, lanes) + xhat, lanes);
  }
};

template <bool kSums, typename T, typename Lanes>
Vector activation(const T* x, const Affine& k, Vector slope, Lanes lanes, Sums& sums) {
  const Vector xhat = (load(x, lanes) - k.mean) * k.rstd;
  const Vector value = xhat * k.weight + k.bias;
  const Vector mask = slope_mask(value, slope);
  const Vector result = value * mask;
  if (kSums) {
    sums.act += result;
    sums.mask += mask;
    sums.xhat += mask * xhat;
  }
  return result;
}

// As std::max has it, so that a NaN goes where it goes there.
Vector larger(Vector a, Vector b) {
  const Mask less = a < b;
  return less ? b : a;
}

// Where an image's activations go: element strides of its channels, rows and columns.
template <typename T>
struct Target {
  T* data;
  int64_t stride_c, stride_y, stride_x;
};

// The windows of latents: `columns` of `height` x `width` pixels in a row of them, sums [3, cells].
struct Windows {
  int64_t columns, height, width, cells;
  float* sums;
  float* at(int64_t y, int64_t column, int64_t channels) const {
    return sums + ((y / height) * columns + column) * channels;
  }
};

// Every activation to its place.
template <bool kSums, typename T, typename Lanes, typename Out>
void activate(const T* x, const Shape& s, const Affine& k, Vector slope, int64_t c, Lanes lanes, const Windows& w,
              const Target<Out>& to) {
  for (int64_t y = 0; y < s.height; ++y)
    for (int64_t column = 0; column < w.columns; ++column) {
      Sums sums;
      for (int64_t at = column * w.width; at < (column + 1) * w.width; ++at) {
        const Vector result = activation<kSums>(x + (y * s.width + at) * s.channels + c, k, slope, lanes, sums);
        store(to.data + y * to.stride_y + at * to.stride_x + c, result, lanes);
      }
      if (kSums) sums.add_to(w.at(y, column, s.channels) + c, w.cells, lanes);
    }
}

// The largest of every 2 x 2 activations to its place; windows of an even number of rows and columns. The sums are added
// up in the order of `activate`.
template <bool kSums, typename T, typename Lanes>
void activate_max(const T* x, const Shape& s, const Affine& k, Vector slope, int64_t c, Lanes lanes, const Windows& w,
                  const Target<T>& to) {
  const int64_t row = s.width * s.channels;
  for (int64_t y = 0; y < s.height; y += 2)
    for (int64_t column = 0; column < w.columns; ++column) {
      Sums upper, lower;
      for (int64_t at = column * w.width; at < (column + 1) * w.width; at += 2) {
        const T* from = x + y * row + at * s.channels + c;
        const Vector first = activation<kSums>(from, k, slope, lanes, upper);
        const Vector right = activation<kSums>(from + s.channels, k, slope, lanes, upper);
        const Vector below = activation<kSums>(from + row, k, slope, lanes, lower);
        const Vector corner = activation<kSums>(from + row + s.channels, k, slope, lanes, lower);
        store(to.data + (y / 2) * to.stride_y + (at / 2) * to.stride_x + c,
              larger(larger(first, right), larger(below, corner)), lanes);
      }
      if (kSums) {
        float* cell = w.at(y, column, s.channels) + c;
        upper.add_to(cell, w.cells, lanes);
        lower.add_to(cell, w.cells, lanes);
      }
    }
}

// Writes the pooled activations of one image. `out` has strides in elements for channel, row and column.
template <typename T>
void pool_image(const float* act, const Shape& s, Pool pool, int64_t size, const Target<T>& to) {
  const int64_t channels = s.channels;
  const int64_t out_h = pool == kMax ? s.height / 2 : pool == kAverage ? size : s.height;
  const int64_t out_w = pool == kMax ? s.width / 2 : pool == kAverage ? size : s.width;
  const int64_t step_y = s.height / out_h, step_x = s.width / out_w;
  std::vector<float> line(channels);
  for (int64_t y = 0; y < out_h; ++y) {
    for (int64_t x = 0; x < out_w; ++x) {
      T* target = to.data + y * to.stride_y + x * to.stride_x;
      float* value = line.data();
      bool in_place = false;
      if constexpr (std::is_same_v<T, float>) {
        in_place = to.stride_c == 1;
        if (in_place) value = target;
      }
      const float* first = act + ((y * step_y) * s.width + x * step_x) * channels;
      if (pool == kMax) {
        const float* right = first + channels;
        const float* below = first + s.width * channels;
        const float* corner = below + channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c)
          value[c] = std::max(std::max(first[c], right[c]), std::max(below[c], corner[c]));
      } else if (pool == kAverage) {
        std::fill(value, value + channels, 0.0f);
        for (int64_t dy = 0; dy < step_y; ++dy)
          for (int64_t dx = 0; dx < step_x; ++dx) {
            const float* pixel = first + (dy * s.width + dx) * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) value[c] += pixel[c];
          }
        const float scale = 1.0f / static_cast<float>(step_y * step_x);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) value[c] *= scale;
      } else {
        std::memcpy(value, first, channels * sizeof(float));
      }
      if (to.stride_c == 1 && !in_place)
        for_groups(channels, [&](int64_t c, auto lanes) { store(target + c, load(value + c, lanes), lanes); });
      else if (!in_place)
        for (int64_t c = 0; c < channels; ++c) target[c * to.stride_c] = from_float<T>(value[c]);
    }
  }
}

}  // namespace
