// What both directions of margin_softmax on an NVIDIA GPU read: what the forward saves, scales, margins.
#pragma once

#include "../common/cuda.h"
#include "cuda.h"

namespace fused_margins {
namespace cuda {
namespace {

template <class T>
struct Saved {
  T *similarities, *inverse_x, *inverse_y, *gap, *lse, *divisor;

  __device__ Saved(void* saved, int64_t rows, int64_t columns)
      : similarities(static_cast<T*>(saved)),
        inverse_x(similarities + rows * columns),
        inverse_y(inverse_x + rows),
        gap(inverse_y + columns),
        lse(gap + rows),
        divisor(lse + rows) {}
};

// Not a number where it is not positive.
template <class T>
__device__ T scale_of(const MarginSoftmaxInputs& in, int64_t row) {
  const T scale = static_cast<const T*>(in.scale)[in.scale_per_row ? row : 0];
  return scale > 0 ? scale : not_a_number<T>();
}
template <class T>
__device__ T margin_of(const MarginSoftmaxInputs& in, int64_t row) {
  return static_cast<const T*>(in.margin)[in.margin_per_row ? row : 0];
}

// psi(u), with a margin on the angle of u, and its derivative; that of the sine is 0, not infinite, at the poles.
template <class T>
__device__ T psi_of(const Angle& a, T u, T& derivative) {
  constexpr T least = sizeof(T) == 8 ? T(2.2250738585072014e-308) : T(1.17549435e-38);
  const T squared = (1 - u) * (1 + u), s = sqrt(squared > least ? squared : least);
  const T of_sine = squared > least ? -u / s : T(0);
  const bool beyond = T(a.side) * u > T(a.bound);
  derivative = beyond ? T(a.slope) + T(a.bend) * of_sine : T(a.cosine) - T(a.sine) * of_sine;
  if (a.straight_through) derivative = 1;
  return beyond ? T(a.slope) * u + T(a.bend) * s + T(a.rest) : T(a.cosine) * u - T(a.sine) * s;
}

template <class T>
__device__ T softplus(T gap) {
  return (gap > 0 ? gap : gap < 0 ? T(0) : gap) + log1p(exp(-fabs(gap)));
}
template <class T>
__device__ T sigmoid(T gap) {
  const T odds = exp(-fabs(gap));
  return (gap < 0 ? odds : T(1)) / (1 + odds);
}

}  // namespace
}  // namespace cuda
}  // namespace fused_margins
