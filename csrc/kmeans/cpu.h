// k-means of each class apart on a CPU. T is double where x is float64 and float elsewhere.
#pragma once

#include "../cpu/isa.h"
#include "../matrix.h"

namespace fused_margins {

struct Kmeans {
  Matrix x;
  int64_t classes;
  const int64_t* members;        // (rows,): rows of x by class, ascending within one
  const int64_t* first_member;   // (classes + 1,)
  const int64_t* first_cluster;  // (classes + 1,): a class has at most as many clusters as members
  const double* waiting;         // (most clusters of a class, rows): standard exponential, draws the seeds
  int64_t iterations;
  void* centroids;       // T, (clusters, width)
  int64_t* assignments;  // (rows,), in [0, clusters)
  void* squared;         // T, (rows,): squared distance from the own centroid
};

FM_KERNEL(kmeans, Kmeans)

}  // namespace fused_margins
