// IEEE 754 binary16 (1 sign bit, 5 of exponent, 10 of fraction), by hand: not every compiler has the type.
#pragma once
#include "cuda_runtime.h"

struct __half { unsigned short bits; };

inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float size = exponent == 31 ? (fraction ? NAN : INFINITY)
               : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return value.bits & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float value) {  // to the nearest, ties to even
  const unsigned short sign = __float_as_uint(value) >> 16 & 0x8000u;
  if (value != value) return {0x7fff};
  const float size = std::fabs(value);
  if (size >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
  // Below its normal numbers, binary16 has steps of 2^-24, the fraction's last bit; nearbyint rounds ties to even.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<unsigned short>(sign | (((exponent + 14) << 10) + steps))};
}
