// From a piece of scores to the gradient at them: kernels/vocabulary.py's score_gradients for float32.
//
// A row of scores, and one of the layer before, is read three times while it lies in the cache, and written once. Rows
// are shared out among threads, and each row's sums have one order, so results don't depend on how many there are.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"

namespace {

double sum_of(Vector v) {
  double sum = 0.0;
  for (int64_t i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// In float32 over so many scores at a time, then in double.
constexpr int64_t kBlock = 64 * kLanes;

// What the loss is made of; see `unlocked_score_gradients`.
struct Loss {
  int64_t classes;
  float alpha, smoothing;
};

struct RowResult {
  double loss = 0.0;
  bool hit = false;
};

float largest_of(const float* row, int64_t classes) {
  Vector top = broadcast(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) {
    const Vector v = load(row + i, kLanes);
    top = v > top ? v : top;
  }
  float largest = top[0];
  for (int64_t k = 1; k < kLanes; ++k) largest = top[k] > largest ? top[k] : largest;
  for (; i < classes; ++i) largest = row[i] > largest ? row[i] : largest;
  return largest;
}

bool first_of_the_largest(const float* row, int64_t target, float largest) {
  if (!(row[target] == largest) || !std::isfinite(largest)) return false;
  for (int64_t i = 0; i < target; ++i)
    if (row[i] == largest) return false;
  return true;
}

struct Exponentials {
  double own = 0.0, before = 0.0, apart = 0.0, scores = 0.0;  // sums of exp(s), exp(b), exp(s) (s - b), s
};

template <bool kAgrees, bool kSmooths>
Exponentials exponentiate(const float* row, const float* before, int64_t classes, float top, float top_before) {
  Exponentials sums;
  const Vector top_own = broadcast(top), top_other = broadcast(top_before);
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t count = classes - begin < kBlock ? classes - begin : kBlock;
    Vector own = {}, other = {}, apart = {}, scores = {};
    for_groups(count, [&](int64_t i, auto lanes) {
      Vector s = load(row + begin + i, lanes);
      Vector e = exponential(s - top_own);
      if (lanes < kLanes)
        for (int64_t k = lanes; k < kLanes; ++k) e[k] = 0.0f;
      own += e;
      if constexpr (kSmooths) scores += s;
      if constexpr (kAgrees) {
        const Vector b = load(before + begin + i, lanes);
        Vector f = exponential(b - top_other);
        if (lanes < kLanes)
          for (int64_t k = lanes; k < kLanes; ++k) f[k] = 0.0f;
        other += f;
        apart += e * (s - b);
      }
    });
    sums.own += sum_of(own);
    if constexpr (kAgrees) {
      sums.before += sum_of(other);
      sums.apart += sum_of(apart);
    }
    if constexpr (kSmooths) sums.scores += sum_of(scores);
  }
  return sums;
}

// One row that counts. `scale` is its share in the mean; its gradient goes to `out`, unless that is null.
template <bool kAgrees, bool kSmooths>
RowResult row_of(const Loss& l, const float* row, const float* before, int64_t target, float scale, float* out) {
  RowResult found;
  const float top = largest_of(row, l.classes), of_target = row[target];
  const float top_before = kAgrees ? largest_of(before, l.classes) : 0.0f;
  found.hit = first_of_the_largest(row, target, top);
  const Exponentials sums = exponentiate<kAgrees, kSmooths>(row, before, l.classes, top, top_before);
  const double log_sum = static_cast<double>(top) + std::log(sums.own);
  double loss = log_sum - of_target;
  if constexpr (kSmooths)
    loss = (1.0 - l.smoothing) * loss + l.smoothing * (log_sum - sums.scores / static_cast<double>(l.classes));
  const double mean_apart = kAgrees ? sums.apart / sums.own : 0.0;
  if constexpr (kAgrees) {
    const double distance = mean_apart + (static_cast<double>(top_before) + std::log(sums.before)) - log_sum;
    loss = l.alpha * loss + (1.0 - static_cast<double>(l.alpha)) * distance;
  }
  found.loss = loss;
  found.hit = found.hit && std::isfinite(sums.own);
  if (!out) return found;
  // p (alpha + (1 - alpha) (log p - log q - KL)); without a layer before alpha is 1.
  const Vector inverse = broadcast(static_cast<float>(scale / sums.own)), alpha = broadcast(l.alpha);
  const Vector largest = broadcast(top), rest = broadcast(1.0f - l.alpha), mean = broadcast(static_cast<float>(mean_apart));
  const Vector spread = broadcast(scale * l.alpha * l.smoothing / static_cast<float>(l.classes));
  for_groups(l.classes, [&](int64_t i, auto lanes) {
    const Vector s = load(row + i, lanes);
    Vector g = exponential(s - largest) * inverse;
    if constexpr (kAgrees) g = g * (rest * (s - load(before + i, lanes) - mean) + alpha);
    if constexpr (kSmooths) g = g - spread;
    store(out + i, g, lanes);
  });
  out[target] -= scale * l.alpha * (1.0f - l.smoothing);
  return found;
}

}  // namespace

extern "C" {

// out [rows, classes] gets the gradient at the scores of the sum over rows of share times loss; it may be the scores
// themselves, or null. before [rows, classes]: null where there are none. A row's loss is alpha CE(p, target) + (1 - alpha) KL(p || q), of
// the softmax p of scores and q of before, its target smoothed; no loss where the target is `ignored`, and
// NaN where it is beyond the classes. sums: to the
// first the losses are added, to the second how many rows have their target first.
void unlocked_score_gradients(int threads, const float* scores, const float* before, int64_t rows, int64_t classes,
                              const int64_t* targets, int64_t ignored, const float* shares, float alpha,
                              float smoothing, float* out, double* sums) {
  const Loss l = {classes, alpha, smoothing};
  const auto of = before ? (smoothing != 0.0f ? row_of<true, true> : row_of<true, false>)
                         : (smoothing != 0.0f ? row_of<false, true> : row_of<false, false>);
  std::vector<RowResult> found(rows);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const float *row = scores + r * classes, *other = before ? before + r * classes : nullptr;
    float* to = out ? out + r * classes : nullptr;
    const bool counts = targets[r] != ignored, known = targets[r] >= 0 && targets[r] < classes;
    if (counts && known) {
      found[r] = of(l, row, other, targets[r], shares[r], to);
    } else {
      if (counts) found[r].loss = std::numeric_limits<double>::quiet_NaN();
      for (int64_t i = 0; to && i < classes; ++i) to[i] = 0.0f;
    }
  }
  for (const RowResult& one : found) {
    sums[0] += one.loss;
    sums[1] += one.hit;
  }
}

}  // extern "C"
