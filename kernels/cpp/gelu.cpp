// GELU by the exact normal distribution, SiLU, and back, stored in float32 or bfloat16; all arithmetic is float32.
//
// The forward pass has all of the derivative in its hands, so it keeps that, and the way back is one multiplication.

#include <algorithm>
#include <cstdint>

#include "curves.h"
#include "lanes.h"

namespace {

constexpr int64_t kBlock = 4096;  // elements that a thread takes at a time
constexpr int64_t kRows = 64;     // rows whose sums are made in one go, whatever the number of threads

template <typename Function, typename T>
void forward(const T* x, int64_t count, T* y, T* slope, int threads) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kBlock;
    for_groups(std::min(kBlock, count - first), [&](int64_t i, auto lanes) {
      const Point point = Function{}(load(x + first + i, lanes));
      store(y + first + i, point.value, lanes);
      store(slope + first + i, point.slope, lanes);
    });
  }
}

template <typename T>
void backward(const T* grad, const T* slope, int64_t rows, int64_t columns, int64_t repeats, T* out, float* sums,
              float* scratch, int threads) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    float* part = scratch + block * columns;
    std::fill(part, part + columns, 0.0f);
    for (int64_t row = block * kRows; row < std::min(rows, (block + 1) * kRows); ++row) {
      const int64_t at = row * columns, from = row / repeats * columns;
      for_groups(columns, [&](int64_t c, auto lanes) {
        const Vector value = load(grad + from + c, lanes) * load(slope + at + c, lanes);
        store(out + at + c, value, lanes);
        store(part + c, load(part + c, lanes) + value, lanes);
      });
    }
  }
  std::fill(sums, sums + columns, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t c = 0; c < columns; ++c) sums[c] += scratch[block * columns + c];
}

}  // namespace

// x, y, slope: `count` elements; slope may be x.
extern "C" void unlocked_gelu_forward(int half, const void* x, int64_t count, void* y, void* slope, int threads) {
  if (half)
    forward<Gelu>(static_cast<const Bfloat16*>(x), count, static_cast<Bfloat16*>(y), static_cast<Bfloat16*>(slope),
                  threads);
  else
    forward<Gelu>(static_cast<const float*>(x), count, static_cast<float*>(y), static_cast<float*>(slope), threads);
}

// As the GELU's, and so is its way back.
extern "C" void unlocked_silu_forward(int half, const void* x, int64_t count, void* y, void* slope, int threads) {
  if (half)
    forward<Silu>(static_cast<const Bfloat16*>(x), count, static_cast<Bfloat16*>(y), static_cast<Bfloat16*>(slope),
                  threads);
  else
    forward<Silu>(static_cast<const float*>(x), count, static_cast<float*>(y), static_cast<float*>(slope), threads);
}

// slope, out: [rows, columns]; out may be slope. grad: [rows / repeats, columns], each row of which stands for as many.
// sums: [columns], of out's values before they are rounded; scratch: a row of `columns` for every 64 rows.
extern "C" void unlocked_gelu_backward(int half, const void* grad, const void* slope, int64_t rows, int64_t columns,
                                       int64_t repeats, void* out, float* sums, float* scratch, int threads) {
  if (half)
    backward(static_cast<const Bfloat16*>(grad), static_cast<const Bfloat16*>(slope), rows, columns,
             repeats, static_cast<Bfloat16*>(out), sums, scratch, threads);
  else
    backward(static_cast<const float*>(grad), static_cast<const float*>(slope), rows, columns,
             repeats, static_cast<float*>(out), sums, scratch, threads);
}
