// magnet on a CPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "../cpu/isa.h"
#include "inputs.h"

namespace fused_margins {

struct MagnetForward {
  MagnetInputs in;
  void* loss;  // T, (rows,) or one value
  void* saved;
};

struct MagnetBackward {
  const void* grad_loss;  // T, as the loss
  MagnetInputs in;
  const void* saved;
  void* grad_x;  // dtype of x, (rows, width)
};

// What a forward saves, T: the clusters' means (num_clusters, width rounded up to 16), the squared distances of all
// rows from them (rows, num_clusters), of each row the log of the other classes' part, and two numbers: the variance,
// and whether it is above its floor.
inline int64_t magnet_saved_size(int64_t rows, int64_t num_clusters, int64_t width) {
  return num_clusters * ((width + 15) / 16 * 16) + rows * (num_clusters + 1) + 2;
}

FM_KERNEL(magnet_forward, MagnetForward)
FM_KERNEL(magnet_backward, MagnetBackward)

}  // namespace fused_margins
