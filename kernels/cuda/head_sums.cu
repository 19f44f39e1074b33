// What the local head sums over the batch, always in the same order: loss, hits, the gradients of modulation and basis.

#include "head.cuh"

namespace unlocked {
namespace {

// Block 0: loss and hits, and their totals. The others: 32 entries of the modulation's gradient each, which is
// sum over images of raw[r] * score_grad[n] (a vector has r = n).
__global__ void __launch_bounds__(kHeadThreads)
    head_sums_kernel(const HeadArgs a, float* loss_sum, int64_t* correct, double* totals, float* modulation_grad) {
  __shared__ double loss_s[kHeadWarps];
  __shared__ int hits_s[kHeadWarps], fives_s[kHeadWarps];
  __shared__ float sums_s[kHeadWarps][kWarp];
  const int tid = threadIdx.x, lane = tid % kWarp, warp = tid / kWarp;
  if (blockIdx.x == 0) {
    double loss = 0.0;
    int hits = 0, fives = 0;
    for (int64_t image = tid; image < a.batch; image += kHeadThreads) {
      loss += static_cast<double>(a.losses[image]);
      hits += a.hits[image] & 1;
      fives += a.hits[image] >> 1;
    }
    loss = warp_sum(loss);
    hits = warp_sum(hits);
    fives = warp_sum(fives);
    if (lane == 0) {
      loss_s[warp] = loss;
      hits_s[warp] = hits;
      fives_s[warp] = fives;
    }
    __syncthreads();
    if (tid == 0) {
      for (int w = 1; w < kHeadWarps; ++w) {
        loss += loss_s[w];
        hits += hits_s[w];
        fives += fives_s[w];
      }
      *loss_sum = static_cast<float>(loss);
      *correct = hits;
      if (totals != nullptr) {
        totals[0] += static_cast<double>(static_cast<float>(loss)); // what `loss_sum` says
        totals[1] += hits;
        if (a.count_five) totals[2] += fives;
      }
    }
    return;
  }
  const int64_t entries = a.modulation_dims == kMatrix ? static_cast<int64_t>(a.rows) * a.classes : a.classes;
  const int64_t entry = (static_cast<int64_t>(blockIdx.x) - 1) * kWarp + lane;
  float sum = 0.0f;
  if (entry < entries) {
    const int64_t r = a.modulation_dims == kMatrix ? entry / a.classes : entry, n = entry % a.classes;
#pragma unroll 8
    for (int64_t image = warp; image < a.batch; image += kHeadWarps)
      sum = fmaf(a.raw[image * a.rows + r], a.score_grad[image * a.classes + n], sum);
  }
  sums_s[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && entry < entries) {
    for (int w = 1; w < kHeadWarps; ++w) sum += sums_s[w][lane];
    modulation_grad[entry] = sum;
  }
}

constexpr int kBasisRows = 4; // of the basis, per block

// basis_grad[r, d] = sum over images of raw_grad[r] * direction[d].
template <typename T>
__global__ void __launch_bounds__(kHeadThreads) basis_grad_kernel(const HeadArgs a, float* basis_grad) {
  __shared__ float sums_s[kHeadWarps][kBasisRows][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int d = blockIdx.x * kWarp + lane, first_row = blockIdx.y * kBasisRows;
  float sum[kBasisRows] = {};
  if (d < a.dim) {
#pragma unroll 4
    for (int64_t image = warp; image < a.batch; image += kHeadWarps) {
      const float value = to_float(static_cast<const T*>(a.latents)[image * a.dim + d]) * a.inverse[image];
#pragma unroll
      for (int k = 0; k < kBasisRows; ++k) {
        const int r = first_row + k < a.rows ? first_row + k : a.rows - 1;
        sum[k] = fmaf(a.raw_grad[image * a.rows + r], value, sum[k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kBasisRows; ++k) sums_s[warp][k][lane] = sum[k];
  __syncthreads();
  if (warp < kBasisRows && d < a.dim && first_row + warp < a.rows) {
    float total = sums_s[0][warp][lane];
    for (int w = 1; w < kHeadWarps; ++w) total += sums_s[w][warp][lane];
    basis_grad[static_cast<int64_t>(first_row + warp) * a.dim + d] = total;
  }
}

}  // namespace

cudaError_t launch_head_sums(const HeadArgs& a, int type, float* loss_sum, int64_t* correct, double* totals,
                             float* modulation_grad, float* basis_grad, cudaStream_t stream) {
  const int64_t entries = a.modulation_dims == kMatrix   ? static_cast<int64_t>(a.rows) * a.classes
                          : a.modulation_dims == kVector ? a.classes
                                                         : 0;
  const unsigned blocks = 1 + static_cast<unsigned>((entries + kWarp - 1) / kWarp);
  head_sums_kernel<<<blocks, kHeadThreads, 0, stream>>>(a, loss_sum, correct, totals, modulation_grad);
  const cudaError_t error = cudaGetLastError();
  if (error || basis_grad == nullptr) return error;
  const dim3 grid(static_cast<unsigned>((a.dim + kWarp - 1) / kWarp),
                  static_cast<unsigned>((a.rows + kBasisRows - 1) / kBasisRows));
  return with_type(type, [&](auto zero) {
    basis_grad_kernel<decltype(zero)><<<grid, kHeadThreads, 0, stream>>>(a, basis_grad);
  });
}

}  // namespace unlocked
