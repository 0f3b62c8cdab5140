// What both directions of contrast on an NVIDIA GPU read: what the forward saves, scales, margins.
#pragma once

#include "../cuda/device.h"
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
__device__ T scale_of(const ContrastInputs& in, int64_t row) {
  const T scale = static_cast<const T*>(in.scale)[in.scale_per_row ? row : 0];
  return scale > 0 ? scale : not_a_number<T>();
}
template <class T>
__device__ T margin_of(const ContrastInputs& in, int64_t row) {
  return static_cast<const T*>(in.margin)[in.margin_per_row ? row : 0];
}

// Whether a row with this target has a positive: it is neither ignored nor without one.
__device__ inline bool has_positive(const ContrastInputs& in, int64_t target) {
  return target != in.ignore_index && target != ABSENT;
}

}  // namespace
}  // namespace cuda
}  // namespace fused_margins
