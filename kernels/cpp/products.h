// Products of small matrices in a core's caches, as sums of tiles that stay in registers.

#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kTall = kLanes < 8 ? kLanes : 8;  // rows of a register tile; two vectors wide: 16 sums

inline int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// A matrix that products read or write; an element's neighbours in a row lie together in `rights` and results.
struct Rows {
  float* data;
  int64_t stride;
};

// The left side of a product: element (row, k) at row * row_step + k * step, so that it may be a transpose.
struct Left {
  const float* data;
  int64_t row_step, step;
};

template <int kVectors, bool kAdds>
inline void tile(const Left& a, const Rows& b, const Rows& c, int64_t row, int64_t column, int64_t depth) {
  Vector sum[kTall][kVectors] = {};
  const float* left = a.data + row * a.row_step;
  const float* right = b.data + column;
  for (int64_t k = 0; k < depth; ++k, left += a.step, right += b.stride) {
    Vector values[kVectors];
    for (int i = 0; i < kVectors; ++i) values[i] = load(right + i * kLanes, kLanes);
    for (int64_t r = 0; r < kTall; ++r)
      for (int i = 0; i < kVectors; ++i) sum[r][i] = multiply_add(left[r * a.row_step], values[i], sum[r][i]);
  }
  for (int64_t r = 0; r < kTall; ++r)
    for (int i = 0; i < kVectors; ++i) {
      float* to = c.data + (row + r) * c.stride + column + i * kLanes;
      store(to, kAdds ? load(to, kLanes) + sum[r][i] : sum[r][i], kLanes);
    }
}

// c [rows, columns] = (or +=) a [rows, depth] b [depth, columns]; rows are multiples of kTall, columns of kLanes.
template <bool kAdds>
void multiply(const Left& a, const Rows& b, const Rows& c, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t row = 0; row < rows; row += kTall) {
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) tile<2, kAdds>(a, b, c, row, column, depth);
    if (column < columns) tile<1, kAdds>(a, b, c, row, column, depth);
  }
}

}  // namespace
