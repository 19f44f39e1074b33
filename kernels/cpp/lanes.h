// As many channels as a register holds, whether memory has them as float32 or as bfloat16.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// A register of channels at a time: what stays the same from pixel to pixel (statistics, sums) stays in registers, which
// compilers do not manage for an inner loop over a run-time number of channels. A last, narrower group of channels
// takes the same code, with zeros beside it: by a mask where the processor has one, else on a padded copy, whose
// write in pieces and read as a whole the processor waits for.
// No more than the processor's own registers hold: compilers take wider vectors apart through memory.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kWide = 4;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kWide = 2;
#else
constexpr int64_t kLanes = 4, kWide = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(int32_t))));

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define UNLOCKED_MASKS
inline __mmask16 first_lanes(int64_t lanes) { return static_cast<__mmask16>((1u << lanes) - 1u); }
#endif

// So many numbers from here to there: a call of the library's for a few bytes would take longer than all else.
template <typename T>
inline void copy_lanes(void* to, const void* from, int64_t lanes) {
  if (lanes == kLanes) {
    std::memcpy(to, from, kLanes * sizeof(T));
    return;
  }
  T* target = static_cast<T*>(to);
  const T* source = static_cast<const T*>(from);
  for (int64_t part = kLanes / 2; part > 0; part /= 2)
    if (lanes & part) std::memcpy(target, source, part * sizeof(T)), target += part, source += part;
}

inline Vector load(const float* from, int64_t lanes) {
#ifdef UNLOCKED_MASKS
  if (lanes < kLanes) return (Vector)_mm512_maskz_loadu_ps(first_lanes(lanes), from);
#endif
  Vector v = {};
  copy_lanes<float>(&v, from, lanes);
  return v;
}

inline void store(float* to, Vector v, int64_t lanes) {
#ifdef UNLOCKED_MASKS
  if (lanes < kLanes) return _mm512_mask_storeu_ps(to, first_lanes(lanes), (__m512)v);
#endif
  copy_lanes<float>(to, &v, lanes);
}

// A bfloat16 is the upper half of a float32. All processors agree on every bit of it.
struct Bfloat16 {
  uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Halves load_halves(const Bfloat16* from, int64_t lanes) {
#ifdef UNLOCKED_MASKS
  if (lanes < kLanes) return (Halves)_mm256_maskz_loadu_epi16(first_lanes(lanes), from);
#endif
  Halves halves = {};
  copy_lanes<Bfloat16>(&halves, from, lanes);
  return halves;
}

inline void store_halves(Bfloat16* to, Halves halves, int64_t lanes) {
#ifdef UNLOCKED_MASKS
  if (lanes < kLanes) return _mm256_mask_storeu_epi16(to, first_lanes(lanes), (__m256i)halves);
#endif
  copy_lanes<Bfloat16>(to, &halves, lanes);
}

inline Vector load(const Bfloat16* from, int64_t lanes) {
  const Halves halves = load_halves(from, lanes);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector v;
  std::memcpy(&v, &words, sizeof(v));
  return v;
}

// To the nearest, ties to even; a NaN stays one, whatever its payload. The processor's own conversion does the same but
// for subnormal numbers, which it takes for zero.
inline void store(Bfloat16* to, Vector v, int64_t lanes) {
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
  store_halves(to, halves, lanes);
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

// a b + c, rounded once where a processor with vectors of eight or sixteen numbers does so.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
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

// Calls body(first channel, lanes) for every group, with a compile-time kLanes for the full ones.
template <typename Body>
void for_groups(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, std::integral_constant<int64_t, kLanes>{});
  if (c < channels) body(c, channels - c);
}

// The same with up to kWide full groups at once: body(first channel, groups, lanes). What reads an image more often than
// once reads longer pieces of memory so.
template <int64_t kGroups = kWide, typename Body>
void for_wide_groups(int64_t channels, const Body& body, int64_t c = 0) {
  const std::integral_constant<int64_t, kGroups> groups;
  for (; c + kGroups * kLanes <= channels; c += kGroups * kLanes)
    body(c, groups, std::integral_constant<int64_t, kLanes>{});
  if constexpr (kGroups > 1)
    for_wide_groups<kGroups / 2>(channels, body, c);
  else if (c < channels)
    body(c, groups, channels - c);
}

}  // namespace
