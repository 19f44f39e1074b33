// The local head, forward and backward, in closed form: kernels/reference.py's local_head for float32.
//
// Meant for the sizes at which calling a dozen small tensor operations costs more than the arithmetic. Rows are done in
// order by one thread, so sums over the batch have one order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Sizes and pieces of one head; each function below does one stage of one row.
struct Head {
  const float *basis, *modulation;
  int kind;  // of the modulation: 0 none, 1 a vector [classes], 2 a matrix [rows, classes]
  int64_t stride_row, stride_class, dim, rows, classes;
  float temperature, smoothing, scale;  // scale: of the loss's gradient, 1 / (batch * temperature)
};

struct Sums {
  double loss = 0.0, correct = 0.0, among_five = 0.0;
};

// scores [classes] of the raw ones [rows].
void modulate(const Head& h, const float* raw, float* scores) {
  for (int64_t k = 0; k < h.classes; ++k) {
    float score = 0.0f;
    if (h.kind == 2)
      for (int64_t r = 0; r < h.rows; ++r) score += raw[r] * h.modulation[r * h.stride_row + k * h.stride_class];
    else
      score = h.kind == 1 ? raw[k] * h.modulation[k * h.stride_class] : raw[k];
    scores[k] = score;
  }
}

// Softmax cross entropy: adds the row's loss and hits to `sums`, and writes the gradient at the scores [classes].
void cross_entropy(const Head& h, const std::vector<float>& scores, int64_t label, float* scores_grad, Sums& sums) {
  const float off_target = h.smoothing / static_cast<float>(h.classes);
  const int64_t best = std::max_element(scores.begin(), scores.end()) - scores.begin();
  const float top = scores[best] / h.temperature;
  float total = 0.0f;
  for (int64_t k = 0; k < h.classes; ++k) total += std::exp(scores[k] / h.temperature - top);
  const float log_total = std::log(total);
  double loss = 0.0;
  for (int64_t k = 0; k < h.classes; ++k) {
    const float log_prob = scores[k] / h.temperature - top - log_total;
    const float target = k == label ? 1.0f - h.smoothing + off_target : off_target;
    if (target != 0.0f) loss -= static_cast<double>(target) * log_prob;
    scores_grad[k] = (std::exp(log_prob) - target) * h.scale;
  }
  sums.loss += loss;
  if (!std::isfinite(loss)) return;  // what is not a number is never a hit
  sums.correct += best == label;
  if (label >= 0 && label < h.classes) {
    const float of_label = scores[label];
    int64_t rank = 0;  // classes before the label; of equal scores those with a smaller index
    for (int64_t k = 0; k < h.classes; ++k) rank += scores[k] > of_label || (scores[k] == of_label && k < label);
    sums.among_five += rank < 5;
  }
}

// The way back of `modulate`: raw_grad [rows], and the row's share added to modulation_grad.
void modulate_back(const Head& h, const float* scores_grad, const float* raw, float* raw_grad,
                   float* modulation_grad) {
  for (int64_t r = 0; r < h.rows; ++r) {
    float back = 0.0f;
    if (h.kind == 2)
      for (int64_t k = 0; k < h.classes; ++k) {
        back += scores_grad[k] * h.modulation[r * h.stride_row + k * h.stride_class];
        modulation_grad[r * h.classes + k] += raw[r] * scores_grad[k];
      }
    else
      back = h.kind == 1 ? scores_grad[r] * h.modulation[r * h.stride_class] : scores_grad[r];
    if (h.kind == 1) modulation_grad[r] += scores_grad[r] * raw[r];
    raw_grad[r] = back;
  }
}

// The way back of the projection: grad [dim], and the row's share added to basis_grad [rows, dim] (null: not wanted).
void project_back(const Head& h, const std::vector<float>& raw_grad, const float* direction, float* grad,
                  float* basis_grad) {
  if (!h.basis) {
    std::copy(raw_grad.begin(), raw_grad.end(), grad);
    return;
  }
  std::fill(grad, grad + h.dim, 0.0f);
  for (int64_t r = 0; r < h.rows; ++r) {
    const float* row = h.basis + r * h.dim;
    const float factor = raw_grad[r];
#pragma omp simd
    for (int64_t i = 0; i < h.dim; ++i) grad[i] += factor * row[i];
    if (basis_grad) {
      float* target = basis_grad + r * h.dim;
#pragma omp simd
      for (int64_t i = 0; i < h.dim; ++i) target[i] += factor * direction[i];
    }
  }
}

}  // namespace

extern "C" {

// Sizes: batch rows of `dim` latents, `rows` of the basis, `classes` scores. basis null: the latents are the scores.
// modulation: kind 0 none, 1 a vector [classes], 2 a matrix [rows, classes] with the given strides in elements.
// modulation_grad and basis_grad (null: not wanted) are contiguous and start at zero. sums: loss, rows whose label has
// the largest score, rows whose label is among the first five.
void unlocked_local_head(const float* latents, const int64_t* labels, const float* basis, const float* modulation,
                         int kind, int64_t stride_row, int64_t stride_class, int64_t batch, int64_t dim, int64_t rows,
                         int64_t classes, int normalize, float temperature, float smoothing, float* latents_grad,
                         float* modulation_grad, float* basis_grad, double* sums) {
  const float scale = 1.0f / (static_cast<float>(batch) * temperature);
  const Head h = {basis, modulation, kind, stride_row, stride_class, dim, rows, classes, temperature, smoothing, scale};
  std::vector<float> direction(dim), raw(rows), scores(classes), scores_grad(classes), raw_grad(rows);
  Sums total;
  for (int64_t b = 0; b < batch; ++b) {
    const float* z = latents + b * dim;
    float* grad = latents_grad + b * dim;
    const float length = std::sqrt(dot(z, z, dim));
    const float norm = normalize ? std::max(length, 1e-12f) : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) direction[i] = z[i] / norm;
    for (int64_t r = 0; r < rows; ++r) raw[r] = basis ? dot(basis + r * dim, direction.data(), dim) : direction[r];
    modulate(h, raw.data(), scores.data());
    cross_entropy(h, scores, labels[b], scores_grad.data(), total);
    modulate_back(h, scores_grad.data(), raw.data(), raw_grad.data(), modulation_grad);
    project_back(h, raw_grad, direction.data(), grad, basis_grad);
    if (normalize) {
      const float along = length > 1e-12f ? dot(direction.data(), grad, dim) : 0.0f;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) grad[i] = (grad[i] - direction[i] * along) / norm;
    }
  }
  sums[0] = total.loss;
  sums[1] = total.correct;
  sums[2] = total.among_five;
}

}  // extern "C"
