// Smooth activations and their derivatives at the same point. A compiler drops the one that nobody asks for.

#pragma once

#include "lanes.h"

namespace {

struct Point {
  Vector value, slope;
};

// Phi(-a) e^(a^2/2) for a >= 0, to 2e-8 of itself: a polynomial in t = 1 / (1 + 0.37 a / sqrt(2)), fitted to
// erfc(z) e^(z^2) / 2 at z = a / sqrt(2) up to 9 by least squares weighted towards the largest relative error (Lawson).
inline Vector scaled_tail(Vector a) {
  const Vector t = 1.0f / multiply_add(0.261629509f, a, broadcast(1.0f));
  Vector p = broadcast(0.0626142666f);
  for (const float factor : {-0.306649009f, 0.493864971f, -0.293423311f, 0.316479552f, 0.104058820f, 0.206898483f,
                             0.207336807f, 0.208819409f})
    p = multiply_add(p, t, broadcast(factor));
  return p * t * 0.5f;
}

// GELU, x Phi(x) with Phi the normal distribution function and phi its density; the derivative is Phi(x) + x phi(x).
struct Gelu {
  Point operator()(Vector x) const {
    const Mask negative = x < Vector{};
    const Vector size = negative ? -x : x;
    const Vector bell = exponential(size * size * -0.5f);
    const Vector tail = bell * scaled_tail(size);
    const Vector phi = negative ? tail : 1.0f - tail;
    return {x * phi, multiply_add(bell * 0.398942280f, x, phi)};
  }
};

// SiLU, x s(x) with s(x) = 1 / (1 + e^-x); the derivative is s (1 + x (1 - s)). Both s and 1 - s come from e^-|x|, so
// that neither is a difference of numbers that are nearly equal.
struct Silu {
  Point operator()(Vector x) const {
    const Mask negative = x < Vector{};
    const Vector power = exponential(negative ? x : -x);
    const Vector larger_share = 1.0f / (1.0f + power), smaller_share = power * larger_share;
    const Vector s = negative ? smaller_share : larger_share, rest = negative ? larger_share : smaller_share;
    return {x * s, s * multiply_add(x, rest, broadcast(1.0f))};
  }
};

}  // namespace
