// The inputs of magnet, on a CPU and on an NVIDIA GPU.
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

}  // namespace fused_margins
