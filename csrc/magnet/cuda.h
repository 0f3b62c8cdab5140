// magnet on an NVIDIA GPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "inputs.h"

namespace fused_margins {
namespace cuda {

// tickets: one counter, 0 before and after.
struct MagnetForward {
  MagnetInputs in;
  void* loss;   // T, (rows,) or one value
  void* saved;  // T, (cuda::magnet_saved_size,)
  int* tickets;
  void* stream;
};

struct MagnetBackward {
  const void* grad_loss;  // T, as the loss
  MagnetInputs in;
  const void* saved;
  void* grad_x;   // dtype of x, (rows, width)
  void* scratch;  // T, (magnet_scratch_size,)
  void* stream;
};

inline int64_t magnet_stride(int64_t width) {
  return (width + 15) / 16 * 16;
}
// Of a forward: means (num_clusters, stride); of each row its own squared distance and, in the place of the others, the
// derivatives of the loss by them (rows, num_clusters); its loss, the derivative by its own distance while the variance
// stays, and its term of what the variance changes; the variance, whether it is above its floor, and of a loss that is
// reduced the sum of the terms.
inline int64_t magnet_saved_size(int64_t rows, int64_t num_clusters, int64_t width) {
  return num_clusters * magnet_stride(width) + rows * (num_clusters + 3) + 3;
}
// Of a backward: what pulls the means (num_clusters, stride).
inline int64_t magnet_scratch_size(int64_t num_clusters, int64_t width) {
  return num_clusters * magnet_stride(width);
}

void magnet_forward(const MagnetForward& args);    // three launches
void magnet_backward(const MagnetBackward& args);  // two launches

}  // namespace cuda
}  // namespace fused_margins
