// What the two halves of the local head share: head.cu from latents to their gradient, head_sums.cu what is summed over
// the batch.
#pragma once

#include "common.cuh"

namespace unlocked {

constexpr int kHeadWarps = kHeadThreads / kWarp;
enum Modulation { kNoModulation = 0, kVector = 1, kMatrix = 2 };

struct HeadArgs {
  const void* latents;     // [batch, dim]
  const int64_t* labels;   // [batch]
  const float* basis;      // [rows, dim], or null: the direction is the raw score
  const float* modulation; // [classes] or [rows, classes] with strides
  int64_t stride_r, stride_n;
  void* grad;        // [batch, dim]
  float* losses;     // [batch]
  int* hits;         // [batch]: 1 for a label with the largest score, and 2 more for one among the first five
  float* raw;        // [batch, rows], null: nothing needs it
  float* score_grad; // [batch, classes], null: nothing needs it
  float* raw_grad;   // [batch, rows], null: nothing needs it
  float* inverse;    // [batch], 1 / norm, null: nothing needs it
  int64_t batch;
  int dim, rows, classes, modulation_dims, normalize, wide, count_five;
  float inverse_temperature, smoothing, grad_scale;
};

// Launches the sums over the batch: loss and hits, added to `totals` ([2], or [3] with count_five) where it is not null,
// the modulation's gradient
// and, where `basis_grad` is not null, the basis's.
cudaError_t launch_head_sums(const HeadArgs& a, int type, float* loss_sum, int64_t* correct, double* totals,
                             float* modulation_grad, float* basis_grad, cudaStream_t stream);

}  // namespace unlocked
