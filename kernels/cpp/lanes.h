// Sixteen channels in a register, whether memory holds them as float32 or as bfloat16.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Sixteen channels at a time: what stays the same from pixel to pixel (statistics, sums) stays in registers, which
// compilers do not manage for an inner loop over a run-time number of channels. A last, narrower group of channels
// takes the same code on a padded copy.
constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(int32_t))));

Vector load(const float* from, int64_t lanes) {
  Vector v = {};
  if (lanes == kLanes)
    std::memcpy(&v, from, sizeof(v));
  else
    std::memcpy(&v, from, lanes * sizeof(float));
  return v;
}

void store(float* to, Vector v, int64_t lanes) {
  if (lanes == kLanes)
    std::memcpy(to, &v, sizeof(v));
  else
    std::memcpy(to, &v, lanes * sizeof(float));
}

// A bfloat16 is the upper half of a float32. All processors agree on every bit of it.
struct Bfloat16 {
  uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

Vector load(const Bfloat16* from, int64_t lanes) {
  Halves halves = {};
  std::memcpy(&halves, from, (lanes == kLanes ? kLanes : lanes) * sizeof(Bfloat16));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector v;
  std::memcpy(&v, &words, sizeof(v));
  return v;
}

// To the nearest, ties to even; a NaN stays one, whatever its payload. The processor's own conversion does the same but
// for subnormal numbers, which it takes for zero.
void store(Bfloat16* to, Vector v, int64_t lanes) {
  Halves halves;
#ifdef __AVX512BF16__
  const bool is_simple = _mm512_fpclass_ps_mask((__m512)v, 0x20) == 0;  // nothing subnormal
#else
  const bool is_simple = false;
#endif
  if (__builtin_expect(is_simple, 1)) {
#ifdef __AVX512BF16__
    const __m256bh converted = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(&halves, &converted, sizeof(halves));
#endif
  } else {
    Words words;
    std::memcpy(&words, &v, sizeof(v));
    const Words rounded = (words + 0x7FFFu + ((words >> 16) & 1u)) >> 16;
    const Words quiet = (words >> 16) | 0x40u;
    const Mask is_nan = v != v;
    halves = __builtin_convertvector(is_nan ? quiet : rounded, Halves);
  }
  std::memcpy(to, &halves, (lanes == kLanes ? kLanes : lanes) * sizeof(Bfloat16));
}

float to_float(float value) { return value; }

float to_float(Bfloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof(result));
  return result;
}

template <typename T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    const uint32_t rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(value != value ? (word >> 16) | 0x40u : rounded)};
  }
}

Vector broadcast(float value) { return value - Vector{}; }

// a b + c, rounded once where the processor does so for sixteen numbers at a time.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#ifdef __AVX512F__
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

inline Vector multiply_add(float a, Vector b, Vector c) { return multiply_add(broadcast(a), b, c); }

// e^x for x <= 0, to about two units in the last place, NaN kept; zero below -87, before float32 runs out. x is taken
// apart as n ln 2 + r with |r| <= ln 2 / 2, and e^r is its Taylor polynomial, whose next term is 5e-9.
Vector exponential(Vector x) {
  const Vector lowest = broadcast(-87.0f);
  const Vector y = x > lowest ? x : lowest;
  const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  const Vector shifted = multiply_add(1.44269504f, y, magic), n = shifted - magic;
  const Vector r = multiply_add(2.12194440e-4f, n, multiply_add(-0.693359375f, n, y));
  Vector p = broadcast(1.0f / 5040.0f);
  for (const float factor : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
    p = multiply_add(p, r, broadcast(factor));
  Mask bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (127 << 23);  // the low bits of `shifted` are n
  Vector power;
  std::memcpy(&power, &bits, sizeof(power));
  const Vector result = x < lowest ? Vector{} : p * power;
  return x == x ? result : x;
}

// Calls body(first channel, lanes) for every group, with a compile-time 16 for the full ones.
template <typename Body>
void for_groups(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, std::integral_constant<int64_t, kLanes>{});
  if (c < channels) body(c, channels - c);
}

}  // namespace
