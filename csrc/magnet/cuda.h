// magnet on an NVIDIA GPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "inputs.h"

namespace fused_margins {
namespace cuda {

// tickets: one counter, 0 before and after.
struct MagnetForward {
  MagnetInputs in;
  void* loss;   // T, (rows,) or one value
  void* saved;  // T, (magnet_saved_size,)
  int* tickets;
  void* stream;
};

struct MagnetBackward {
  const void* grad_loss;  // T, as the loss
  MagnetInputs in;
  const void* saved;
  void* grad_x;   // dtype of x, (rows, width)
  void* scratch;  // T, (magnet_scratch_size,)
  int* tickets;
  void* stream;
};

inline int64_t magnet_stride(int64_t width) {
  return (width + 15) / 16 * 16;
}
// Of a backward: weights (rows, num_clusters), what pulls the means (num_clusters, stride), a term of each row, and
// what every row's own distance counts for all.
inline int64_t magnet_scratch_size(int64_t rows, int64_t num_clusters, int64_t width) {
  return rows * num_clusters + num_clusters * magnet_stride(width) + rows + 1;
}

void magnet_forward(const MagnetForward& args);    // three launches
void magnet_backward(const MagnetBackward& args);  // three launches

}  // namespace cuda
}  // namespace fused_margins
