// One optimizer step for all parameters of a layer: torch.optim's Adam, AdamW and SGD, and kernels/schedule_free.py's
// AdamWSF.
//
// Each element is updated on its own, so results do not depend on the number of threads.

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t kChunk = 1 << 14;  // elements of a piece of work: below it a second thread costs more than it saves

// Calls body(tensor, first, last) for pieces of all tensors.
template <typename Body>
void for_pieces(int count, const int64_t* sizes, int threads, const Body& body) {
  int64_t pieces = 0;
  for (int i = 0; i < count; ++i) pieces += (sizes[i] + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > count)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    int tensor = 0;
    int64_t before = 0;
    while (piece >= before + (sizes[tensor] + kChunk - 1) / kChunk) before += (sizes[tensor++] + kChunk - 1) / kChunk;
    const int64_t first = (piece - before) * kChunk;
    const int64_t last = first + kChunk < sizes[tensor] ? first + kChunk : sizes[tensor];
    body(tensor, first, last);
  }
}

}  // namespace

extern "C" {

// Kingma, Ba 2015 (decoupled: Loshchilov, Hutter 2019). steps: each tensor's count of steps, advanced here.
void unlocked_adam(int count, const int64_t* sizes, float* const* params, const float* const* grads,
                   float* const* means, float* const* squares, float* const* steps, double lr, double beta1,
                   double beta2, double eps, double weight_decay, int decoupled, int threads) {
  for (int i = 0; i < count; ++i) *steps[i] += 1.0f;
  for_pieces(count, sizes, threads, [&](int i, int64_t first, int64_t last) {
    const double step = static_cast<double>(*steps[i]);
    const float rate = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
    const float root = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, step)));
    const float shrink = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
    const float decay = decoupled ? 0.0f : static_cast<float>(weight_decay);
    const float fresh1 = static_cast<float>(1.0 - beta1), kept2 = static_cast<float>(beta2);
    const float fresh2 = static_cast<float>(1.0 - beta2), epsilon = static_cast<float>(eps);
    float* p = params[i];
    float* m = means[i];
    float* v = squares[i];
    const float* g = grads[i];
#pragma omp simd
    for (int64_t k = first; k < last; ++k) {
      const float weight = p[k] * shrink;
      const float grad = g[k] + decay * weight;
      m[k] += fresh1 * (grad - m[k]);
      v[k] = kept2 * v[k] + fresh2 * grad * grad;
      p[k] = weight - rate * m[k] / (std::sqrt(v[k]) / root + epsilon);
    }
  });
}

// buffers null: no momentum. first: the buffers hold nothing yet and take the gradient as it is.
void unlocked_sgd(int count, const int64_t* sizes, float* const* params, const float* const* grads,
                  float* const* buffers, double lr, double momentum, double weight_decay, int nesterov, int first_step,
                  int threads) {
  const float rate = static_cast<float>(lr), kept = static_cast<float>(momentum);
  const float decay = static_cast<float>(weight_decay);
  for_pieces(count, sizes, threads, [&](int i, int64_t first, int64_t last) {
    float* p = params[i];
    float* b = buffers ? buffers[i] : nullptr;
    const float* g = grads[i];
    if (!b) {
#pragma omp simd
      for (int64_t k = first; k < last; ++k) p[k] -= rate * (g[k] + decay * p[k]);
      return;
    }
    const float old = first_step ? 0.0f : kept;
#pragma omp simd
    for (int64_t k = first; k < last; ++k) {
      const float grad = g[k] + decay * p[k];
      const float velocity = old * b[k] + grad;
      b[k] = velocity;
      p[k] -= rate * (nesterov ? grad + kept * velocity : velocity);
    }
  });
}

// rate, share: of kernels/schedule_free.py's StepSize; points: its z.
void unlocked_adamw_sf(int count, const int64_t* sizes, float* const* params, const float* const* grads,
                       float* const* points, float* const* squares, double rate, double share, double beta1,
                       double beta2, double eps, double weight_decay, int threads) {
  const float kept2 = static_cast<float>(beta2), fresh2 = static_cast<float>(1.0 - beta2);
  const float epsilon = static_cast<float>(eps), decay = static_cast<float>(weight_decay);
  const float to_z = static_cast<float>(share), to_y = static_cast<float>(1.0 - share);
  const float ahead = static_cast<float>(rate * (beta1 * (1.0 - share) - 1.0)), step = static_cast<float>(rate);
  const bool near = share < 0.5;  // torch.lerp's two forms: the second is exact at 1, which the first step has
  for_pieces(count, sizes, threads, [&](int i, int64_t first, int64_t last) {
    float* y = params[i];
    float* z = points[i];
    float* v = squares[i];
    const float* g = grads[i];
#pragma omp simd
    for (int64_t k = first; k < last; ++k) {
      v[k] = kept2 * v[k] + fresh2 * g[k] * g[k];
      const float direction = g[k] / (std::sqrt(v[k]) + epsilon) + decay * y[k];
      const float gap = z[k] - y[k];
      const float mixed = near ? y[k] + to_z * gap : z[k] - to_y * gap;
      y[k] = mixed + ahead * direction;
      z[k] -= step * direction;
    }
  });
}

}  // extern "C"
