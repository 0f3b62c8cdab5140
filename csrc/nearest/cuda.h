// nearest on an NVIDIA GPU, among the columns of a row's own label. T, the accumulation type, is double where x is
// float64 and float elsewhere.
#pragma once

#include "../matrix.h"

namespace fused_margins {
namespace cuda {

struct Nearest {
  Matrix x, y;
  const int64_t* row_labels;     // (rows,)
  const int64_t* column_labels;  // (columns,)
  const int64_t* self_index;     // (rows,) or null; -1: none
  const void* below;             // T, (rows,) or null
  Similarity similarity;
  int64_t k;
  bool largest;    // the most similar columns, else the least similar ones
  void* best;      // T, (rows, k)
  int64_t* index;  // (rows, k)
  void* stream;
};

int64_t nearest_grid(int64_t rows);  // blocks of the one launch
void nearest(const Nearest& args);

}  // namespace cuda
}  // namespace fused_margins
