// The inputs of magnet and what a forward saves, on a CPU and on an NVIDIA GPU. T, the accumulation type, is double
// where x is float64 and float elsewhere.
#pragma once

#include "../matrix.h"

namespace fused_margins {

struct MagnetInputs {
  Matrix x;
  int64_t num_clusters;
  const int64_t* clusters;        // (rows,)
  const int64_t* cluster_labels;  // (num_clusters,)
  double alpha, variance_floor;
  Reduction reduction;
};

// What a forward saves, T: the clusters' means (num_clusters, width rounded up to 16), the squared distances of all
// rows from them (rows, num_clusters), of each row the log of the other classes' part, and two numbers: the variance,
// and whether it is above its floor.
inline int64_t magnet_saved_size(int64_t rows, int64_t num_clusters, int64_t width) {
  return num_clusters * ((width + 15) / 16 * 16) + rows * (num_clusters + 1) + 2;
}

}  // namespace fused_margins
