// magnet on an NVIDIA GPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include <cstdint>

#include "../common/matrix.h"

namespace fused_margins {
namespace cuda {

struct MagnetInputs {
  Matrix x;
  int64_t num_clusters;
  const int64_t* clusters;        // (rows,)
  const int64_t* cluster_labels;  // (num_clusters,)
  double alpha, variance_floor;
  Reduction reduction;
};

// saved, T: as in cpu.h. tickets: one counter, 0 before and after.
struct MagnetForward {
  MagnetInputs in;
  void* loss;  // T, (rows,) or one value
  void* saved;
  int* tickets;
};

struct MagnetBackward {
  MagnetInputs in;
  const void* grad_loss;  // T, as the loss
  const void* saved;
  void* grad_x;   // dtype of x, (rows, width)
  void* scratch;  // T, (magnet_scratch_size,)
  int* tickets;
};

inline int64_t magnet_stride(int64_t width) {
  return (width + 15) / 16 * 16;
}
// Of a backward: weights (rows, num_clusters), what pulls the means (num_clusters, stride), a term of each row, and
// what every row's own distance counts for all.
inline int64_t magnet_scratch_size(int64_t rows, int64_t num_clusters, int64_t width) {
  return rows * num_clusters + num_clusters * magnet_stride(width) + rows + 1;
}

void magnet_forward(const MagnetForward& args, void* stream);    // three launches
void magnet_backward(const MagnetBackward& args, void* stream);  // three launches

}  // namespace cuda
}  // namespace fused_margins
