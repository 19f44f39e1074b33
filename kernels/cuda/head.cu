// The local head from latents to their gradient in one kernel: one block has one or four rows and all of the basis.

#include "head.cuh"

namespace unlocked {
namespace {

constexpr float kNormEps = 1e-12f; // the clamp of torch.nn.functional.normalize

struct Best {
  float score;
  int index;
};

// The larger score; of equals the first; NaN above all, as torch.argmax has it.
__device__ __forceinline__ Best better(Best a, Best b) {
  const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
  if (a_nan != b_nan) return a_nan ? a : b;
  if (a_nan || a.score == b.score) return a.index < b.index ? a : b;
  return a.score > b.score ? a : b;
}

// One warp: scores / temperature -> softmax cross entropy and its gradient, in place in `scores`. Without a matrix,
// the scores come from `raw`, and the gradient at `raw` is written too. Only lane n % 32 touches class n.
__device__ void softmax_row(const HeadArgs& a, int64_t image, const float* raw, float* scores, float* raw_grad) {
  const int lane = threadIdx.x % kWarp;
  const int64_t label = a.labels[image];
  Best best = {-INFINITY, a.classes};
  float label_score = 0.0f;
  for (int n = lane; n < a.classes; n += kWarp) {
    float score = a.modulation_dims == kMatrix ? scores[n] : raw[n];
    if (a.modulation_dims == kVector) score *= a.modulation[n * a.stride_n];
    score *= a.inverse_temperature;
    scores[n] = score;
    best = better(best, Best{score, n});
    if (n == label) label_score = score;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step >>= 1) {
    const Best other = {__shfl_xor_sync(kAllLanes, best.score, step), __shfl_xor_sync(kAllLanes, best.index, step)};
    best = better(best, other);
  }
  label_score = warp_sum(label_score);
  float sum = 0.0f, shifted_sum = 0.0f;
  int rank = 0; // classes before the label, of equal ones those with a smaller index
  for (int n = lane; n < a.classes; n += kWarp) {
    const float shifted = scores[n] - best.score;
    sum += expf(shifted);
    shifted_sum += shifted;
    rank += scores[n] > label_score || (scores[n] == label_score && n < label) ? 1 : 0;
  }
  if (a.count_five) rank = warp_sum(rank);
  sum = warp_sum(sum);
  shifted_sum = warp_sum(shifted_sum);
  const float rest = a.smoothing / static_cast<float>(a.classes), scale = 1.0f / sum;
  for (int n = lane; n < a.classes; n += kWarp) {
    const float target = n == label ? 1.0f - a.smoothing + rest : rest;
    const float grad = (expf(scores[n] - best.score) * scale - target) * a.grad_scale;
    scores[n] = grad;
    if (a.score_grad != nullptr) a.score_grad[image * a.classes + n] = grad;
    if (a.modulation_dims == kVector) {
      raw_grad[n] = grad * a.modulation[n * a.stride_n];
    } else if (a.modulation_dims == kNoModulation) {
      raw_grad[n] = grad;
    }
  }
  if (lane == 0) {
    float loss = logf(sum) - (1.0f - a.smoothing) * (label_score - best.score);
    if (rest != 0.0f) loss -= rest * shifted_sum; // a class may be out of question, at -inf
    if (label < 0 || label >= a.classes) loss = NAN; // a wrong label must not pass unseen
    a.losses[image] = loss;
    // What is not a number is never a hit.
    a.hits[image] = !isfinite(loss) ? 0 : (best.index == label ? 1 : 0) + (a.count_five && rank < 5 ? 2 : 0);
  }
}

// raw = direction @ basisT: one warp per row of the basis.
template <int ROWS>
__device__ void project(const HeadArgs& a, const float* z, int pitch, const float (&inverse)[ROWS], float* raw) {
  const int lane = threadIdx.x % kWarp;
  if (a.basis == nullptr) {
    for (int d = threadIdx.x; d < a.dim; d += kHeadThreads) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) raw[row * a.rows + d] = z[row * pitch + d] * inverse[row];
    }
    return;
  }
  for (int r = threadIdx.x / kWarp; r < a.rows; r += kHeadWarps) {
    const float* p = a.basis + static_cast<int64_t>(r) * a.dim;
    float dot[ROWS] = {};
    if (a.wide) {
      const float4* p4 = reinterpret_cast<const float4*>(p);
#pragma unroll 4
      for (int d = lane; d < a.dim / 4; d += kWarp) {
        const float4 wave = __ldg(p4 + d);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          const float4 value = *reinterpret_cast<const float4*>(z + row * pitch + 4 * d);
          dot[row] = fmaf(wave.x, value.x, dot[row]);
          dot[row] = fmaf(wave.y, value.y, dot[row]);
          dot[row] = fmaf(wave.z, value.z, dot[row]);
          dot[row] = fmaf(wave.w, value.w, dot[row]);
        }
      }
    } else {
#pragma unroll 4
      for (int d = lane; d < a.dim; d += kWarp) {
        const float wave = __ldg(p + d);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) dot[row] = fmaf(wave, z[row * pitch + d], dot[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const float total = warp_sum(dot[row]);
      if (lane == 0) raw[row * a.rows + r] = total * inverse[row];
    }
  }
}

// scores = raw @ modulation. The threads split the sum over r where there are more threads than classes; `partial`
// holds ROWS * kHeadThreads values.
template <int ROWS>
__device__ void mix(const HeadArgs& a, const float* raw, float* scores, float* partial) {
  const int width = (a.classes + kWarp - 1) / kWarp * kWarp;
  const int teams = width < kHeadThreads ? kHeadThreads / width : 1;
  const int team = width < kHeadThreads ? threadIdx.x / width : 0;
  const int first = width < kHeadThreads ? threadIdx.x % width : threadIdx.x;
  for (int n = first; n < a.classes; n += kHeadThreads) {
    float sum[ROWS] = {};
    if (team < teams) {
#pragma unroll 4
      for (int r = team; r < a.rows; r += teams) {
        const float m = __ldg(a.modulation + r * a.stride_r + n * a.stride_n);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) sum[row] = fmaf(raw[row * a.rows + r], m, sum[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      if (teams == 1) {
        if (team == 0) scores[row * a.classes + n] = sum[row];
      } else if (team < teams) {
        partial[row * kHeadThreads + team * width + n] = sum[row];
      }
    }
  }
  if (teams == 1) return;
  __syncthreads();
  for (int n = threadIdx.x; n < a.classes; n += kHeadThreads) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float sum = partial[row * kHeadThreads + n];
      for (int t = 1; t < teams; ++t) sum += partial[row * kHeadThreads + t * width + n];
      scores[row * a.classes + n] = sum;
    }
  }
}

// The way back of `mix`: raw_grad = scores @ modulationT, one warp per row of the matrix.
template <int ROWS>
__device__ __forceinline__ void mix_back(const HeadArgs& a, const float* scores, float* raw_grad) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int r = warp; r < a.rows; r += kHeadWarps) {
    float sum[ROWS] = {};
    for (int n = lane; n < a.classes; n += kWarp) {
      const float m = __ldg(a.modulation + r * a.stride_r + n * a.stride_n);
#pragma unroll
      for (int row = 0; row < ROWS; ++row) sum[row] = fmaf(scores[row * a.classes + n], m, sum[row]);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const float total = warp_sum(sum[row]);
      if (lane == 0) raw_grad[row * a.rows + r] = total;
    }
  }
}

// Back to the latents. The gradient's part along the direction is sum(raw_grad * raw), because raw is the direction in
// the basis; below the clamp the norm is a constant, and only the division is left.
template <typename T, int ROWS>
__device__ __forceinline__ void back_to_latents(const HeadArgs& a, int64_t first_image, const float* z, int pitch,
                                                const float* raw, const float* raw_grad, const float (&inverse)[ROWS],
                                                const bool (&clamped)[ROWS]) {
  const int tid = threadIdx.x, lane = tid % kWarp;
  float along[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    float sum = 0.0f;
    if (a.normalize && !clamped[row]) {
      for (int r = lane; r < a.rows; r += kWarp) sum = fmaf(raw_grad[row * a.rows + r], raw[row * a.rows + r], sum);
      sum = warp_sum(sum);
    }
    along[row] = sum;
  }
  for (int d = tid; d < a.dim; d += kHeadThreads) {
    float sum[ROWS] = {};
    if (a.basis == nullptr) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) sum[row] = raw_grad[row * a.rows + d];
    } else {
#pragma unroll 8
      for (int r = 0; r < a.rows; ++r) {
        const float wave = __ldg(a.basis + static_cast<int64_t>(r) * a.dim + d);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) sum[row] = fmaf(raw_grad[row * a.rows + r], wave, sum[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      if (first_image + row < a.batch) {
        float grad = sum[row];
        if (a.normalize) grad = (grad - z[row * pitch + d] * inverse[row] * along[row]) * inverse[row];
        static_cast<T*>(a.grad)[(first_image + row) * a.dim + d] = from_float<T>(grad);
      }
    }
  }
}

template <typename T, int ROWS>
__global__ void __launch_bounds__(kHeadThreads, ROWS == 1 ? 2 : 1) head_kernel(const HeadArgs a) {
  extern __shared__ float4 shared_f4[];
  __shared__ double squares_s[ROWS][kHeadWarps];
  const int tid = threadIdx.x, lane = tid % kWarp, warp = tid / kWarp;
  const int pitch = (a.dim + 3) / 4 * 4;
  float* z = reinterpret_cast<float*>(shared_f4); // [ROWS, pitch]
  float* raw = z + ROWS * pitch;                  // [ROWS, rows]
  float* raw_grad = raw + ROWS * a.rows;          // [ROWS, rows]
  float* scores = raw_grad + ROWS * a.rows;       // [ROWS, classes], later their gradient
  float* partial = scores + ROWS * a.classes;     // [ROWS, kHeadThreads], for a matrix only
  const int64_t first_image = static_cast<int64_t>(blockIdx.x) * ROWS;

  // 1. Latents to shared memory, and their norms (in float64: the squares of bfloat16 latents can overflow float32).
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int64_t image = first_image + row;
    const T* latents = static_cast<const T*>(a.latents) + image * a.dim;
    double square = 0.0;
    for (int d = tid; d < a.dim; d += kHeadThreads) {
      const float value = image < a.batch ? to_float(latents[d]) : 0.0f;
      z[row * pitch + d] = value;
      square += static_cast<double>(value) * static_cast<double>(value);
    }
    square = warp_sum(square);
    if (lane == 0) squares_s[row][warp] = square;
  }
  __syncthreads();
  float inverse[ROWS];
  bool clamped[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    double square = 0.0;
#pragma unroll
    for (int w = 0; w < kHeadWarps; ++w) square += squares_s[row][w];
    const float norm = static_cast<float>(sqrt(square));
    clamped[row] = norm <= kNormEps;
    inverse[row] = a.normalize ? 1.0f / (clamped[row] ? kNormEps : norm) : 1.0f;
  }

  // 2. Scores, loss and the gradient at the raw scores.
  project<ROWS>(a, z, pitch, inverse, raw);
  __syncthreads();
  if (a.modulation_dims == kMatrix) {
    mix<ROWS>(a, raw, scores, partial);
    __syncthreads();
  }
  if (warp < ROWS && first_image + warp < a.batch)
    softmax_row(a, first_image + warp, raw + warp * a.rows, scores + warp * a.classes, raw_grad + warp * a.rows);
  __syncthreads();
  if (a.modulation_dims == kMatrix) {
    mix_back<ROWS>(a, scores, raw_grad);
    __syncthreads();
  }

  // 3. What the sums over the batch need.
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int64_t image = first_image + row;
    if (image >= a.batch) break;
    for (int r = tid; r < a.rows; r += kHeadThreads) {
      if (a.raw != nullptr) a.raw[image * a.rows + r] = raw[row * a.rows + r];
      if (a.raw_grad != nullptr) a.raw_grad[image * a.rows + r] = raw_grad[row * a.rows + r];
    }
    if (tid == 0 && a.inverse != nullptr) a.inverse[image] = inverse[row];
  }

  back_to_latents<T, ROWS>(a, first_image, z, pitch, raw, raw_grad, inverse, clamped);
}

template <typename T, int ROWS>
cudaError_t launch_head(const HeadArgs& a, int shared_bytes, cudaStream_t stream) {
  if (shared_bytes > 32 * 1024) { // above the default limit once the static part is added
    const cudaError_t error =
        cudaFuncSetAttribute(head_kernel<T, ROWS>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error) return error;
  }
  const unsigned blocks = static_cast<unsigned>((a.batch + ROWS - 1) / ROWS);
  head_kernel<T, ROWS><<<blocks, kHeadThreads, shared_bytes, stream>>>(a);
  return cudaSuccess;
}

}  // namespace
}  // namespace unlocked

using namespace unlocked;

extern "C" int unlocked_head(int device, cudaStream_t stream, int type, int rows_per_block, int shared_bytes,
                             int64_t batch, int dim, int rows, int classes, int modulation_dims, int64_t stride_r,
                             int64_t stride_n, int normalize, int wide, int count_five, const void* latents,
                             const void* labels, const void* basis, const void* modulation, void* grad, void* losses, void* hits, void* raw,
                             void* score_grad, void* raw_grad, void* inverse, void* loss_sum, void* correct,
                             void* totals, void* modulation_grad, void* basis_grad, float inverse_temperature,
                             float smoothing, float grad_scale) {
  if (cudaError_t error = cudaSetDevice(device)) return error;
  HeadArgs a;
  a.latents = latents;
  a.labels = static_cast<const int64_t*>(labels);
  a.basis = static_cast<const float*>(basis);
  a.modulation = static_cast<const float*>(modulation);
  a.stride_r = stride_r;
  a.stride_n = stride_n;
  a.grad = grad;
  a.losses = static_cast<float*>(losses);
  a.hits = static_cast<int*>(hits);
  a.raw = static_cast<float*>(raw);
  a.score_grad = static_cast<float*>(score_grad);
  a.raw_grad = static_cast<float*>(raw_grad);
  a.inverse = static_cast<float*>(inverse);
  a.batch = batch;
  a.dim = dim;
  a.rows = rows;
  a.classes = classes;
  a.modulation_dims = modulation_dims;
  a.normalize = normalize;
  a.wide = wide;
  a.count_five = count_five;
  a.inverse_temperature = inverse_temperature;
  a.smoothing = smoothing;
  a.grad_scale = grad_scale;

  cudaError_t error = cudaSuccess;
  const cudaError_t launched = with_type(type, [&](auto zero) {
    using T = decltype(zero);
    error = rows_per_block == 1 ? launch_head<T, 1>(a, shared_bytes, stream)
                                : launch_head<T, 4>(a, shared_bytes, stream);
  });
  if (error) return error;
  if (launched) return launched;

  return launch_head_sums(a, type, static_cast<float*>(loss_sum), static_cast<int64_t*>(correct),
                          static_cast<double*>(totals), static_cast<float*>(modulation_grad),
                          static_cast<float*>(basis_grad), stream);
}
