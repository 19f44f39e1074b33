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
  std::vector<float> direction(dim), raw(rows), scores(classes), scores_grad(classes), raw_grad(rows);
  const float off_target = smoothing / static_cast<float>(classes);
  const float scale = 1.0f / (static_cast<float>(batch) * temperature);
  double loss_sum = 0.0, correct = 0.0, among_five = 0.0;
  for (int64_t b = 0; b < batch; ++b) {
    const float* z = latents + b * dim;
    float* grad = latents_grad + b * dim;
    const float length = std::sqrt(dot(z, z, dim));
    const float norm = normalize ? std::max(length, 1e-12f) : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) direction[i] = z[i] / norm;
    for (int64_t r = 0; r < rows; ++r) raw[r] = basis ? dot(basis + r * dim, direction.data(), dim) : direction[r];
    for (int64_t k = 0; k < classes; ++k) {
      float score = 0.0f;
      if (kind == 2)
        for (int64_t r = 0; r < rows; ++r) score += raw[r] * modulation[r * stride_row + k * stride_class];
      else
        score = kind == 1 ? raw[k] * modulation[k * stride_class] : raw[k];
      scores[k] = score;
    }
    const int64_t best = std::max_element(scores.begin(), scores.end()) - scores.begin();
    const float top = scores[best] / temperature;
    float total = 0.0f;
    for (int64_t k = 0; k < classes; ++k) total += std::exp(scores[k] / temperature - top);
    const float log_total = std::log(total);
    const int64_t label = labels[b];
    double loss = 0.0;
    for (int64_t k = 0; k < classes; ++k) {
      const float log_prob = scores[k] / temperature - top - log_total;
      const float target = k == label ? 1.0f - smoothing + off_target : off_target;
      if (target != 0.0f) loss -= static_cast<double>(target) * log_prob;
      scores_grad[k] = (std::exp(log_prob) - target) * scale;
    }
    loss_sum += loss;
    correct += best == label;
    if (label >= 0 && label < classes) {
      const float of_label = scores[label];
      int64_t rank = 0;  // classes before the label; of equal scores those with a smaller index
      for (int64_t k = 0; k < classes; ++k) rank += scores[k] > of_label || (scores[k] == of_label && k < label);
      among_five += rank < 5;
    }
    for (int64_t r = 0; r < rows; ++r) {
      float back = 0.0f;
      if (kind == 2)
        for (int64_t k = 0; k < classes; ++k) {
          back += scores_grad[k] * modulation[r * stride_row + k * stride_class];
          modulation_grad[r * classes + k] += raw[r] * scores_grad[k];
        }
      else
        back = kind == 1 ? scores_grad[r] * modulation[r * stride_class] : scores_grad[r];
      if (kind == 1) modulation_grad[r] += scores_grad[r] * raw[r];
      raw_grad[r] = back;
    }
    std::fill(grad, grad + dim, 0.0f);
    if (basis) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = basis + r * dim;
        const float factor = raw_grad[r];
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) grad[i] += factor * row[i];
        if (basis_grad) {
          float* target = basis_grad + r * dim;
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) target[i] += factor * direction[i];
        }
      }
    } else {
      std::copy(raw_grad.begin(), raw_grad.end(), grad);
    }
    if (normalize) {
      const float along = length > 1e-12f ? dot(direction.data(), grad, dim) : 0.0f;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) grad[i] = (grad[i] - direction[i] * along) / norm;
    }
  }
  sums[0] = loss_sum;
  sums[1] = correct;
  sums[2] = among_five;
}

}  // extern "C"
