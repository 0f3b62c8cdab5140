// The formulas of a row's loss, once for C++ and CUDA: a margin on the angle of a row and its class, psi(u) =
// cos(theta + angle) with u = cos(theta), in two pieces; the log odds, softplus and its derivative.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FM_HOST_DEVICE __host__ __device__
#else
#define FM_HOST_DEVICE
#endif

namespace fused_margins {

// With s = sin(theta): psi(u) = cosine u - sine s, or, where side u > bound, slope u + bend s + rest.
struct Psi {
  double cosine, sine, side, bound, slope, bend, rest;
  bool straight_through;  // the derivative is taken as 1

  template <class T>
  FM_HOST_DEVICE T value(T u) const {
    const T s = sine_of(u);
    return beyond(u) ? T(slope) * u + T(bend) * s + T(rest) : T(cosine) * u - T(sine) * s;
  }
  // That of the sine is 0, not infinite, at the poles.
  template <class T>
  FM_HOST_DEVICE T derivative(T u) const {
    const T s = sine_of(u), of_sine = s > sine_of(T(1)) ? -u / s : T(0);
    if (straight_through) return 1;
    return beyond(u) ? T(slope) + T(bend) * of_sine : T(cosine) - T(sine) * of_sine;
  }

 private:
  template <class T>
  FM_HOST_DEVICE bool beyond(T u) const {
    return T(side) * u > T(bound);
  }
  template <class T>
  FM_HOST_DEVICE static T sine_of(T u) {
    constexpr T least = sizeof(T) == 8 ? T(2.2250738585072014e-308) : T(1.17549435e-38f);  // the smallest normal number
    const T squared = (1 - u) * (1 + u);
    return std::sqrt(squared > least ? squared : least);
  }
};

// Of the negatives against a positive of logit z. Not a number where z is infinite, as is their log-sum-exp less z.
template <class T>
FM_HOST_DEVICE T log_odds(T negative_lse, T z) {
  return negative_lse - z + 0 * (z > 0 ? z : T(0));
}

template <class T>
FM_HOST_DEVICE T softplus(T x) {
  return (x > 0 ? x : x < 0 ? T(0) : x) + std::log1p(std::exp(-std::fabs(x)));
}

// Its derivative.
template <class T>
FM_HOST_DEVICE T sigmoid(T x) {
  const T odds = std::exp(-std::fabs(x));
  return (x < 0 ? odds : T(1)) / (1 + odds);
}

}  // namespace fused_margins
