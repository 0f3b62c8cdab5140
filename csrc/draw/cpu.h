// draw on a CPU.
#pragma once

#include "../common/isa.h"
#include "../common/matrix.h"

namespace fused_margins {

struct Draw {
  Matrix x, y;
  const int64_t* row_labels;     // (rows,)
  const int64_t* column_labels;  // (columns,)
  const int64_t* self_index;     // (rows,) or null; -1: none
  uint32_t seed;
  Relation relation;
  int64_t* index;  // (rows,); -1: nothing to draw
};

inline bool suits_bf16(const Draw& args) {
  return has_bf16_products(args.x.dtype, Similarity::cosine);
}

FM_BF16_KERNEL(draw, Draw, suits_bf16)

}  // namespace fused_margins
