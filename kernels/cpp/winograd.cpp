// Convolutions of 3 x 3 and the gradients of their kernels with 16 multiplications in the place of 36, see winograd.h.
//
// Each output is added up in the same order whatever the number of threads: tiles are independent going forward, and
// the kernels' gradients add blocks of a fixed number of tiles one after the other.

#include <algorithm>

#include "winograd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kTall = 14;        // rows of a register tile going forward: 28 sums, of 32 registers
constexpr int64_t kBlockBytes = 600 << 10;  // of transformed inputs: they stay in a core's second cache
constexpr int64_t kSummedTiles = 128;  // tiles that the way back transforms at once

// sums[rows][32] = inputs [groups][rows][16] x kernel [16 groups][32], for kTall rows
void multiply(const float* inputs, const float* kernel, int64_t groups, int64_t rows, float* sums) {
  Vector sum[kTall][2] = {};
  for (int64_t group = 0; group < groups; ++group, inputs += rows * kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane, kernel += kColumns) {
      const Vector left = load(kernel, kLanes), right = load(kernel + kLanes, kLanes);
      for (int64_t row = 0; row < kTall; ++row) {
        sum[row][0] = multiply_add(inputs[row * kLanes + lane], left, sum[row][0]);
        sum[row][1] = multiply_add(inputs[row * kLanes + lane], right, sum[row][1]);
      }
    }
  for (int64_t row = 0; row < kTall; ++row)
    for (int64_t half = 0; half < 2; ++half) store(sums + row * kColumns + half * kLanes, sum[row][half], kLanes);
}

// sums[8][32] += inputs [rows][16]^T x grads [rows][32], for 8 of the 16 channels
void add_products(const float* inputs, const float* grads, int64_t rows, float* sums) {
  constexpr int64_t kHalf = kLanes / 2;
  Vector sum[kHalf][2] = {};
  for (int64_t row = 0; row < rows; ++row, inputs += kLanes, grads += kColumns) {
    const Vector left = load(grads, kLanes), right = load(grads + kLanes, kLanes);
    for (int64_t channel = 0; channel < kHalf; ++channel) {
      sum[channel][0] = multiply_add(inputs[channel], left, sum[channel][0]);
      sum[channel][1] = multiply_add(inputs[channel], right, sum[channel][1]);
    }
  }
  for (int64_t channel = 0; channel < kHalf; ++channel)
    for (int64_t half = 0; half < 2; ++half) {
      float* to = sums + channel * kColumns + half * kLanes;
      store(to, load(to, kLanes) + sum[channel][half], kLanes);
    }
}

// Row `row` of `rows` in the panels of the inputs, from a tile of x [B, H, W, C]; beyond the image there are zeros.
void put_input(const float* x, const Images& s, int64_t tile, float* panels, int64_t row, int64_t rows) {
  const Place at = place_of(s, tile);
  const float* image = x + at.image * s.height * s.width * s.channels;
  const int64_t groups = s.channels / kLanes;
  for (int64_t group = 0; group < groups; ++group) {
    Vector d[kPoints];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t y = at.y - s.padding + i, z = at.x - s.padding + j;
        const bool inside = y >= 0 && y < s.height && z >= 0 && z < s.width;
        d[4 * i + j] = inside ? load(image + (y * s.width + z) * s.channels + group * kLanes, kLanes) : Vector{};
      }
    for (int64_t j = 0; j < 4; ++j) transform_input(d + j, 4);
    for (int64_t i = 0; i < 4; ++i) transform_input(d + 4 * i, 1);
    for (int64_t p = 0; p < kPoints; ++p) store(panels + ((p * groups + group) * rows + row) * kLanes, d[p], kLanes);
  }
}

// A tile of y [B, H', W', K], 32 of its channels from `first`, from row `row` of sums [16][rows][32].
void take_output(const float* sums, const Images& s, int64_t tile, int64_t row, int64_t rows, int64_t first,
                 const float* bias, float* y) {
  const Place at = place_of(s, tile);
  const int64_t height = s.out_height(), width = s.out_width();
  for (int64_t half = 0; half < kColumns; half += kLanes) {
    Vector m[kPoints], columns[8], result[4];
    for (int64_t p = 0; p < kPoints; ++p) m[p] = load(sums + (p * rows + row) * kColumns + half, kLanes);
    for (int64_t j = 0; j < 4; ++j) transform_output(m + j, 4, columns + j, 4);
    for (int64_t i = 0; i < 2; ++i) transform_output(columns + 4 * i, 1, result + 2 * i, 1);
    const Vector added = bias == nullptr ? Vector{} : load(bias + first + half, kLanes);
    for (int64_t i = 0; i < 2 && at.y + i < height; ++i)
      for (int64_t j = 0; j < 2 && at.x + j < width; ++j) {
        const int64_t pixel = (at.image * height + at.y + i) * width + at.x + j;
        store(y + pixel * s.outputs + first + half, result[2 * i + j] + added, kLanes);
      }
  }
}

// Row `row` in the panels [16][K / 32][rows][32] of the outputs' gradients, from a tile of grad [B, H', W', K].
void put_grad(const float* grad, const Images& s, int64_t tile, float* panels, int64_t row, int64_t rows) {
  const Place at = place_of(s, tile);
  const int64_t height = s.out_height(), width = s.out_width(), groups = s.outputs / kColumns;
  for (int64_t first = 0; first < s.outputs; first += kLanes) {
    Vector given[4], columns[8], m[kPoints];
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t j = 0; j < 2; ++j) {
        const bool inside = at.y + i < height && at.x + j < width;
        const int64_t pixel = (at.image * height + at.y + i) * width + at.x + j;
        given[2 * i + j] = inside ? load(grad + pixel * s.outputs + first, kLanes) : Vector{};
      }
    for (int64_t j = 0; j < 2; ++j) spread_output(given[j], given[2 + j], columns + j, 2);
    for (int64_t i = 0; i < 4; ++i) spread_output(columns[2 * i], columns[2 * i + 1], m + 4 * i, 1);
    float* to = panels + (first / kColumns * rows + row) * kColumns + first % kColumns;
    for (int64_t p = 0; p < kPoints; ++p) store(to + p * groups * rows * kColumns, m[p], kLanes);
  }
}

}  // namespace

extern "C" {

// 1 if this build multiplies and adds sixteen numbers at once.
void unlocked_winograd_pays(int* pays) {
#ifdef __AVX512F__
  *pays = 1;
#else
  *pays = 0;
#endif
}

// panels [16][K / 32][C][32] of a kernel [K][C][3][3] that lies in memory by these strides. The gradient at the input is
// a convolution with the kernel mirrored, and with K for C.
void unlocked_winograd_kernel(const float* kernel, int64_t outputs, int64_t channels, int64_t output_stride,
                              int64_t channel_stride, int64_t y_stride, int64_t x_stride, int mirrored, float* panels,
                              int threads) {
  const int64_t groups = outputs / kColumns;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (int64_t first = 0; first < outputs; first += kLanes)
    for (int64_t channel = 0; channel < channels; ++channel) {
      Vector g[9], columns[12], u[kPoints];
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t from = mirrored ? 8 - tap : tap;
        const float* at = kernel + channel * channel_stride + from / 3 * y_stride + from % 3 * x_stride;
        for (int64_t lane = 0; lane < kLanes; ++lane) g[tap][lane] = at[(first + lane) * output_stride];
      }
      for (int64_t j = 0; j < 3; ++j) transform_kernel(g[j], g[3 + j], g[6 + j], columns + j, 3);
      for (int64_t i = 0; i < 4; ++i)
        transform_kernel(columns[3 * i], columns[3 * i + 1], columns[3 * i + 2], u + 4 * i, 1);
      float* to = panels + (first / kColumns * channels + channel) * kColumns + first % kColumns;
      for (int64_t p = 0; p < kPoints; ++p) store(to + p * groups * channels * kColumns, u[p], kLanes);
    }
}

// How many tiles a thread transforms at once; its scratch holds 16 (C + 32) floats for each.
void unlocked_winograd_rows(int64_t channels, int64_t tiles, int threads, int64_t* rows) {
  const int64_t cached = kBlockBytes / (kPoints * channels * static_cast<int64_t>(sizeof(float)));
  const int64_t shared = (tiles + 2 * threads - 1) / (2 * threads);
  *rows = std::clamp<int64_t>(std::min(cached, shared) / kTall, 1, 5) * kTall;
}

// y [B, H', W', K] of x [B, H, W, C], with or without a bias [K].
void unlocked_winograd_forward(const float* x, int64_t batch, int64_t channels, int64_t height, int64_t width,
                               int64_t padding, int64_t outputs, const float* panels, const float* bias, float* y,
                               float* scratch, int64_t rows, int threads) {
  const Images s{batch, channels, height, width, padding, outputs};
  const int64_t tiles = s.tiles(), groups = channels / kLanes, blocks = (tiles + rows - 1) / rows;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t block = 0; block < blocks; ++block) {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    float* inputs = scratch + thread * kPoints * rows * (channels + kColumns);
    float* sums = inputs + kPoints * rows * channels;
    const int64_t first = block * rows, count = std::min(rows, tiles - first);
    for (int64_t row = 0; row < count; ++row) put_input(x, s, first + row, inputs, row, rows);
    for (int64_t output = 0; output < outputs; output += kColumns) {
      for (int64_t p = 0; p < kPoints; ++p) {
        const float* kernel = panels + (p * outputs + output) * channels;
        for (int64_t row = 0; row < count; row += kTall)
          multiply(inputs + (p * groups * rows + row) * kLanes, kernel, groups, rows,
                   sums + (p * rows + row) * kColumns);
      }
      for (int64_t row = 0; row < count; ++row) take_output(sums, s, first + row, row, rows, output, bias, y);
    }
  }
}

// The kernel's gradient, by its strides, from grad [B, H', W', K]. scratch: 16 * 128 (C + K) floats, then 16 C K.
void unlocked_winograd_kernel_grad(const float* grad, const float* x, int64_t batch, int64_t channels, int64_t height,
                                   int64_t width, int64_t padding, int64_t outputs, float* kernel_grad,
                                   int64_t output_stride, int64_t channel_stride, int64_t y_stride, int64_t x_stride,
                                   float* scratch, int threads) {
  const Images s{batch, channels, height, width, padding, outputs};
  const int64_t tiles = s.tiles(), groups = channels / kLanes, columns = outputs / kColumns, rows = kSummedTiles;
  float* inputs = scratch;
  float* grads = inputs + kPoints * rows * channels;
  float* sums = grads + kPoints * rows * outputs;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < kPoints * channels * outputs; ++i) sums[i] = 0.0f;
    for (int64_t first = 0; first < tiles; first += rows) {
      const int64_t count = std::min(rows, tiles - first);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < count; ++row) {
        put_input(x, s, first + row, inputs, row, rows);
        put_grad(grad, s, first + row, grads, row, rows);
      }
#pragma omp for schedule(static)
      for (int64_t job = 0; job < kPoints * columns; ++job)
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t half = 0; half < kLanes; half += kLanes / 2) {
            const float* from = inputs + (job / columns * groups + group) * rows * kLanes + half;
            const int64_t channel = group * kLanes + half;
            add_products(from, grads + job * rows * kColumns, count, sums + (job * channels + channel) * kColumns);
          }
    }
#pragma omp for schedule(static)
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t first = 0; first < outputs; first += kLanes) {
        Vector u[kPoints], rows_of[12], g[9];
        for (int64_t p = 0; p < kPoints; ++p) {
          const int64_t panel = (p * columns + first / kColumns) * channels + channel;
          u[p] = load(sums + panel * kColumns + first % kColumns, kLanes);
        }
        for (int64_t j = 0; j < 4; ++j) gather_kernel(u + j, 4, rows_of + j, 4);
        for (int64_t i = 0; i < 3; ++i) gather_kernel(rows_of + 4 * i, 1, g + 3 * i, 1);
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t lane = 0; lane < kLanes; ++lane)
            kernel_grad[(first + lane) * output_stride + channel * channel_stride + tap / 3 * y_stride +
                        tap % 3 * x_stride] = g[tap][lane];
      }
  }
}

}  // extern "C"
