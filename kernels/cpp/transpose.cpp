// Matrices turned round: for rows of samples [B, C, L] whose channels are to lie together, and back.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kBlock = 32;  // of both sides: the lines of memory that are read and written stay in the first cache

template <typename T>
void transpose(const T* x, int64_t batch, int64_t rows, int64_t columns, T* y, int threads) {
  const int64_t down = (rows + kBlock - 1) / kBlock, across = (columns + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < batch * down * across; ++block) {
    const int64_t at = block / (down * across) * rows * columns;
    const int64_t first = block / across % down * kBlock, left = block % across * kBlock;
    const int64_t last = std::min(first + kBlock, rows), right = std::min(left + kBlock, columns);
    for (int64_t column = left; column < right; ++column)
      for (int64_t row = first; row < last; ++row) y[at + column * rows + row] = x[at + row * columns + column];
  }
}

}  // namespace

// x: [batch, rows, columns] of two (half) or four bytes each; y: [batch, columns, rows].
extern "C" void unlocked_transpose(int half, const void* x, int64_t batch, int64_t rows, int64_t columns, void* y,
                                   int threads) {
  if (half)
    transpose(static_cast<const uint16_t*>(x), batch, rows, columns, static_cast<uint16_t*>(y), threads);
  else
    transpose(static_cast<const uint32_t*>(x), batch, rows, columns, static_cast<uint32_t*>(y), threads);
}
