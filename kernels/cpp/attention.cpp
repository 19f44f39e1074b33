// Scaled dot-product attention and its way back, softmax(s q k^T) v of every head, stored in float32 or bfloat16; all
// arithmetic is float32.
//
// With S = s Q K^T, P = softmax(S), O = P V and G the gradient at O (T. Dao, "FlashAttention-2", arXiv 2307.08691,
// section 3):
//
//   V' = P^T G,   D = (G V^T - sum(G * O)) * P,   Q' = s D K,   K' = s D^T Q.
//
// P is not kept but made again from its rows' log-sum-exp. A head is a thread's; its queries pass in blocks, whose
// products run on copies in the thread's scratch: the head's width padded to kLanes, rows to kTall.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "products.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kBlock = 64;  // queries that pass together

// All lanes by `join`: halves, quarters, pairs, and the last two.
template <typename Join>
inline float joined(Vector v, const Join& join) {
#ifdef __AVX512F__
  const __m512 a = (__m512)join(v, (Vector)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4E));
  const __m512 b = (__m512)join((Vector)a, (Vector)_mm512_shuffle_f32x4(a, a, 0xB1));
  const __m512 c = (__m512)join((Vector)b, (Vector)_mm512_shuffle_ps(b, b, 0x4E));
  return join((Vector)c, (Vector)_mm512_shuffle_ps(c, c, 0xB1))[0];
#else
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    Vector other = {};
    for (int64_t i = 0; i < half; ++i) other[i] = v[i + half];
    v = join(v, other);
  }
  return v[0];
#endif
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float sum_of(Vector v) {
  return joined(v, [](Vector a, Vector b) { return a + b; });
}

// One head of a tensor [B, heads, T, d] of any strides but the last, which is 1.
template <typename T>
struct Head {
  T* data;
  int64_t stride;
  T* row(int64_t i) const { return data + i * stride; }
};

template <typename T>
Head<T> head_of(T* data, const int64_t* strides, int64_t batch, int64_t head) {
  return {data + batch * strides[0] + head * strides[1], strides[2]};
}

// to [padded rows, wide] = the factor times rows [first, first + count); what is beyond is zero.
template <typename T>
void copy_rows(const Head<const T>& from, int64_t first, int64_t count, int64_t d, float factor, const Rows& to) {
  for (int64_t i = 0; i < padded(count, kTall); ++i)
    for_groups(d, [&](int64_t c, auto lanes) {
      store(to.data + i * to.stride + c, i < count ? load(from.row(first + i) + c, lanes) * factor : Vector{}, kLanes);
    });
}

// kLanes rows of as many numbers, turned round.
inline void transpose(Vector* v) {
#ifdef __AVX512F__
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {  // b[i + c]: column c of every four, of rows i to i + 3
      b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
      b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + 2 + j], 0xEE);
    }
  for (int c = 0; c < 4; ++c) {
    const __m512 first = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), second = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xDD);
    const __m512 third = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 fourth = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xDD);
    v[c] = (Vector)_mm512_shuffle_f32x4(first, third, 0x88);
    v[4 + c] = (Vector)_mm512_shuffle_f32x4(second, fourth, 0x88);
    v[8 + c] = (Vector)_mm512_shuffle_f32x4(first, third, 0xDD);
    v[12 + c] = (Vector)_mm512_shuffle_f32x4(second, fourth, 0xDD);
  }
#else
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < i; ++j) std::swap(((float*)(v + i))[j], ((float*)(v + j))[i]);
#endif
}

// to [padded d, padded count] = the transpose of all `count` rows; what is beyond is zero.
template <typename T>
void copy_transposed(const Head<const T>& from, int64_t count, int64_t d, const Rows& to) {
  for (int64_t i = 0; i < count; i += kLanes)
    for_groups(d, [&](int64_t c, auto lanes) {
      Vector v[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) v[r] = i + r < count ? load(from.row(i + r) + c, lanes) : Vector{};
      transpose(v);
      for (int64_t r = 0; r < kLanes; ++r) store(to.data + (c + r) * to.stride + i, v[r], kLanes);
    });
}

template <typename T>
void write_rows(const Rows& from, int64_t count, int64_t d, float factor, const Head<T>& to, int64_t first) {
  for (int64_t i = 0; i < count; ++i)
    for_groups(d, [&](int64_t c, auto lanes) {
      store(to.row(first + i) + c, load(from.data + i * from.stride + c, kLanes) * factor, lanes);
    });
}

struct Sizes {
  int64_t batch, heads, queries, keys, d;
  int causal;  // a query sees the keys up to its own place
  float factor;
  int64_t wide() const { return padded(d, kLanes); }
  int64_t long_keys() const { return padded(keys, kLanes); }
  // Keys that the queries up to `last` see, of a block's products; and query `i` alone.
  int64_t seen(int64_t i) const { return causal ? std::min(i + 1, keys) : keys; }
};

// A thread's copies. Those of a block: queries, gradients and results [64, wide], scores and their gradients
// [64, long_keys]; of a head: the rest.
struct Scratch {
  Rows q, o, g, scores, slopes, k_turned, v_turned, k, v, k_grad, v_grad;
  Scratch(float* at, const Sizes& s) {
    const int64_t wide = s.wide(), keys = s.long_keys();
    const auto take = [&](int64_t rows, int64_t stride) {
      const Rows made{at, stride};
      at += rows * stride;
      return made;
    };
    q = take(kBlock, wide), o = take(kBlock, wide), g = take(kBlock, wide);
    scores = take(kBlock, keys), slopes = take(kBlock, keys);
    k_turned = take(wide, keys), v_turned = take(wide, keys);
    k = take(keys, wide), v = take(keys, wide), k_grad = take(keys, wide), v_grad = take(keys, wide);
  }
  static int64_t size(const Sizes& s) {
    return 3 * kBlock * s.wide() + 2 * kBlock * s.long_keys() + 6 * s.wide() * s.long_keys();
  }
};

// One row of scores -> its exponentials, zero beyond `seen` up to `columns`; their largest score and their sum.
void exponentials(float* row, int64_t seen, int64_t columns, float& largest, float& sum) {
  const float lowest = -INFINITY;
  Vector most = broadcast(lowest), total = {};
  for_groups(seen, [&](int64_t c, auto lanes) {
    Vector v = load(row + c, lanes);
    for (int64_t i = lanes; i < kLanes; ++i) v[i] = lowest;
    most = larger(v, most);
  });
  largest = joined(most, larger);
  for_groups(seen, [&](int64_t c, auto lanes) {
    Vector v = exponential(load(row + c, lanes) - largest);
    for (int64_t i = lanes; i < kLanes; ++i) v[i] = 0.0f;
    total += v;
    store(row + c, v, kLanes);
  });
  for (int64_t c = padded(seen, kLanes); c < columns; c += kLanes) store(row + c, Vector{}, kLanes);
  sum = sum_of(total);
}

template <typename T>
void forward_head(const Sizes& s, const Head<const T>& q, const Head<const T>& k, const Head<const T>& v,
                  const Head<T>& y, float* sums, const Scratch& at) {
  copy_transposed(k, s.keys, s.d, at.k_turned);
  copy_rows(v, 0, s.keys, s.d, 1.0f, at.v);
  for (int64_t first = 0; first < s.queries; first += kBlock) {
    const int64_t count = std::min(kBlock, s.queries - first), rows = padded(count, kTall);
    const int64_t seen = s.seen(first + count - 1), columns = padded(seen, kLanes);
    copy_rows(q, first, count, s.d, s.factor, at.q);
    multiply<false>({at.q.data, at.q.stride, 1}, at.k_turned, at.scores, rows, columns, s.wide());
    float totals[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      float largest;
      exponentials(at.scores.data + i * at.scores.stride, s.seen(first + i), columns, largest, totals[i]);
      sums[first + i] = largest + std::log(totals[i]);
    }
    multiply<false>({at.scores.data, at.scores.stride, 1}, at.v, at.o, rows, s.wide(), seen);
    for (int64_t i = 0; i < count; ++i)
      write_rows({at.o.data + i * at.o.stride, 0}, 1, s.d, 1.0f / totals[i], y, first + i);
  }
}

template <typename T>
void backward_head(const Sizes& s, const Head<const T>& g, const Head<const T>& q, const Head<const T>& k,
                   const Head<const T>& v, const Head<const T>& y, const float* sums, const Head<T>& q_grad,
                   const Head<T>& k_grad, const Head<T>& v_grad, const Scratch& at) {
  copy_transposed(k, s.keys, s.d, at.k_turned);
  copy_transposed(v, s.keys, s.d, at.v_turned);
  copy_rows(k, 0, s.keys, s.d, 1.0f, at.k);
  std::fill(at.k_grad.data, at.k_grad.data + s.long_keys() * s.wide(), 0.0f);
  std::fill(at.v_grad.data, at.v_grad.data + s.long_keys() * s.wide(), 0.0f);
  for (int64_t first = 0; first < s.queries; first += kBlock) {
    const int64_t count = std::min(kBlock, s.queries - first), rows = padded(count, kTall);
    const int64_t seen = s.seen(first + count - 1), columns = padded(seen, kLanes);
    copy_rows(q, first, count, s.d, s.factor, at.q);
    copy_rows(g, first, count, s.d, 1.0f, at.g);
    multiply<false>({at.q.data, at.q.stride, 1}, at.k_turned, at.scores, rows, columns, s.wide());
    multiply<false>({at.g.data, at.g.stride, 1}, at.v_turned, at.slopes, rows, columns, s.wide());
    for (int64_t i = 0; i < count; ++i) {
      Vector product = {};
      for_groups(s.d, [&](int64_t c, auto lanes) {
        product += load(g.row(first + i) + c, lanes) * load(y.row(first + i) + c, lanes);
      });
      const float mean = sum_of(product), total = sums[first + i];
      const int64_t own = s.seen(first + i);
      float* p = at.scores.data + i * at.scores.stride;
      float* slope = at.slopes.data + i * at.slopes.stride;
      for_groups(own, [&](int64_t c, auto lanes) {
        Vector share = exponential(load(p + c, kLanes) - total), given = share * (load(slope + c, kLanes) - mean);
        for (int64_t j = lanes; j < kLanes; ++j) share[j] = given[j] = 0.0f;
        store(p + c, share, kLanes);
        store(slope + c, given, kLanes);
      });
      for (int64_t c = padded(own, kLanes); c < columns; c += kLanes) {
        store(p + c, Vector{}, kLanes);
        store(slope + c, Vector{}, kLanes);
      }
    }
    const int64_t places = padded(seen, kTall);
    multiply<true>({at.scores.data, 1, at.scores.stride}, at.g, at.v_grad, places, s.wide(), count);
    multiply<true>({at.slopes.data, 1, at.slopes.stride}, at.q, at.k_grad, places, s.wide(), count);
    multiply<false>({at.slopes.data, at.slopes.stride, 1}, at.k, at.o, rows, s.wide(), seen);
    write_rows(at.o, count, s.d, s.factor, q_grad, first);
  }
  write_rows(at.k_grad, s.keys, s.d, 1.0f, k_grad, 0);
  write_rows(at.v_grad, s.keys, s.d, 1.0f, v_grad, 0);
}

// Calls body(batch, head, scratch) for every head.
template <typename Body>
void for_heads(const Sizes& s, float* scratch, int threads, const Body& body) {
  const int64_t size = Scratch::size(s);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t at = 0; at < s.batch * s.heads; ++at) {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    body(at / s.heads, at % s.heads, Scratch(scratch + thread * size, s));
  }
}

template <typename T>
void forward(const Sizes& s, const T* q, const T* k, const T* v, T* y, const int64_t* strides, float* sums,
             float* scratch, int threads) {
  for_heads(s, scratch, threads, [&](int64_t batch, int64_t head, const Scratch& at) {
    forward_head<T>(s, head_of(q, strides, batch, head), head_of(k, strides + 3, batch, head),
                    head_of(v, strides + 6, batch, head), head_of(y, strides + 9, batch, head),
                    sums + (batch * s.heads + head) * s.queries, at);
  });
}

template <typename T>
void backward(const Sizes& s, const T* g, const T* q, const T* k, const T* v, const T* y, const float* sums, T* q_grad,
              T* k_grad, T* v_grad, const int64_t* strides, float* scratch, int threads) {
  for_heads(s, scratch, threads, [&](int64_t batch, int64_t head, const Scratch& at) {
    const auto read = [&](const T* data, int place) { return head_of(data, strides + 3 * place, batch, head); };
    const auto write = [&](T* data, int place) { return head_of(data, strides + 3 * place, batch, head); };
    backward_head<T>(s, read(g, 0), read(q, 1), read(k, 2), read(v, 3), read(y, 4),
                     sums + (batch * s.heads + head) * s.queries, write(q_grad, 5), write(k_grad, 6), write(v_grad, 7),
                     at);
  });
}

}  // namespace

extern "C" {

// 1 if this build multiplies and adds sixteen numbers at once.
void unlocked_attention_pays(int* pays) {
#ifdef __AVX512F__
  *pays = 1;
#else
  *pays = 0;
#endif
}

// Floats of a thread's scratch.
void unlocked_attention_scratch(int64_t keys, int64_t d, int64_t* size) {
  *size = Scratch::size({1, 1, 1, keys, d, 0, 1.0f});
}

// q, y [B, heads, T, d]; k, v [B, heads, S, d]; strides: three of each, in this order. sums [B, heads, T]: log-sum-exp.
void unlocked_attention_forward(int half, const void* q, const void* k, const void* v, int64_t batch, int64_t heads,
                                int64_t queries, int64_t keys, int64_t d, int causal, float factor, void* y,
                                const int64_t* strides, float* sums, float* scratch, int threads) {
  const Sizes s{batch, heads, queries, keys, d, causal, factor};
  if (half)
    forward(s, (const Bfloat16*)q, (const Bfloat16*)k, (const Bfloat16*)v, (Bfloat16*)y, strides, sums, scratch,
            threads);
  else
    forward(s, (const float*)q, (const float*)k, (const float*)v, (float*)y, strides, sums, scratch, threads);
}

// strides: three each of grad, q, k, v, y and of the gradients at q, k and v.
void unlocked_attention_backward(int half, const void* grad, const void* q, const void* k, const void* v, const void* y,
                                 const float* sums, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                                 int64_t d, int causal, float factor, void* q_grad, void* k_grad, void* v_grad,
                                 const int64_t* strides, float* scratch, int threads) {
  const Sizes s{batch, heads, queries, keys, d, causal, factor};
  if (half)
    backward(s, (const Bfloat16*)grad, (const Bfloat16*)q, (const Bfloat16*)k, (const Bfloat16*)v, (const Bfloat16*)y,
             sums, (Bfloat16*)q_grad, (Bfloat16*)k_grad, (Bfloat16*)v_grad, strides, scratch, threads);
  else
    backward(s, (const float*)grad, (const float*)q, (const float*)k, (const float*)v, (const float*)y, sums,
             (float*)q_grad, (float*)k_grad, (float*)v_grad, strides, scratch, threads);
}

}  // extern "C"
