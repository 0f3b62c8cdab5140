// nearest on a CPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "../cpu/isa.h"
#include "../matrix.h"

namespace fused_margins {

struct Nearest {
  Matrix x, y;
  const int64_t* row_labels;     // (rows,)
  const int64_t* column_labels;  // (columns,)
  const int64_t* self_index;     // (rows,) or null; -1: none
  const void* below;             // T, (rows,) or null
  Similarity similarity;
  Relation relation;
  int64_t k;
  bool largest;    // the most similar columns, else the least similar ones
  void* best;      // T, (rows, k)
  int64_t* index;  // (rows, k)
};

inline bool nearest_suits_bf16(const Nearest& args) {
  return has_bf16_products(args.x.dtype, args.similarity);
}

FM_BF16_KERNEL(nearest, Nearest, nearest_suits_bf16)

}  // namespace fused_margins
