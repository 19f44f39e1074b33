// Winograd's minimal filtering F(2x2, 3x3) (A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks",
// arXiv 1509.09308): a tile of 2 x 2 outputs from 4 x 4 inputs by 16 multiplications where the direct sum takes 36.
// In each dimension, with d the input, g the kernel and y the output:
//
//   y = A^T [(G g) * (B^T d)],   B^T = 1  0 -1  0    G = 1    0    0     A^T = 1  1  1  0
//                                      0  1  1  0        1/2  1/2  1/2         0  1 -1 -1
//                                      0 -1  1  0        1/2 -1/2  1/2
//                                      0  1  0 -1        0    0    1
//
// The gradient of the kernel is the adjoint: of the same transformed input, of A y' and of G^T.
//
// For each of the 16 points the sum over channels is a product of matrices, in panels that a register tile reads in a
// row:
//   inputs   [16][C / 16][rows][16]       kernels  [16][K / 32][C][32]       outputs  [16][rows][32]
// where a row is a tile of the image.

#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kPoints = 16;
constexpr int64_t kColumns = 2 * kLanes;  // outputs that a register tile holds

// B^T, A^T, A and G along one dimension; `step` is the distance of neighbours.
inline void transform_input(Vector* d, int64_t step) {
  const Vector a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
  d[0] = a - c;
  d[step] = b + c;
  d[2 * step] = c - b;
  d[3 * step] = b - e;
}

inline void transform_output(const Vector* m, int64_t step, Vector* y, int64_t y_step) {
  const Vector sum = m[step] + m[2 * step], difference = m[step] - m[2 * step];
  y[0] = m[0] + sum;
  y[y_step] = difference - m[3 * step];
}

inline void spread_output(Vector first, Vector second, Vector* m, int64_t step) {
  m[0] = first;
  m[step] = first + second;
  m[2 * step] = first - second;
  m[3 * step] = -second;
}

inline void transform_kernel(Vector a, Vector b, Vector c, Vector* u, int64_t step) {
  const Vector outer = (a + c) * 0.5f, inner = b * 0.5f;
  u[0] = a;
  u[step] = outer + inner;
  u[2 * step] = outer - inner;
  u[3 * step] = c;
}

inline void gather_kernel(const Vector* u, int64_t step, Vector* g, int64_t g_step) {
  const Vector outer = (u[step] + u[2 * step]) * 0.5f;
  g[0] = u[0] + outer;
  g[g_step] = (u[step] - u[2 * step]) * 0.5f;
  g[2 * g_step] = outer + u[3 * step];
}

// The images in memory, channels last, and the tiles that cover the output.
struct Images {
  int64_t batch, channels, height, width, padding, outputs;
  int64_t out_height() const { return height + 2 * padding - 2; }
  int64_t out_width() const { return width + 2 * padding - 2; }
  int64_t tiles_down() const { return (out_height() + 1) / 2; }
  int64_t tiles_across() const { return (out_width() + 1) / 2; }
  int64_t tiles() const { return batch * tiles_down() * tiles_across(); }
};

struct Place {
  int64_t image, y, x;  // of a tile's first output
};

inline Place place_of(const Images& s, int64_t tile) {
  const int64_t across = s.tiles_across(), down = s.tiles_down();
  return {tile / (across * down), tile / across % down * 2, tile % across * 2};
}

}  // namespace
