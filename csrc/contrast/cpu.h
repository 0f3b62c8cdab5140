// contrast on a CPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "../common/isa.h"
#include "../common/matrix.h"

namespace fused_margins {

struct ContrastInputs {
  Matrix x, y;
  const void* scale;  // T, (rows,) or one value
  bool scale_per_row;
  const void* bias;              // T, (columns,) or null
  const int64_t* target;         // (rows,)
  const int64_t* row_labels;     // (rows,) or null: the targets
  const int64_t* column_labels;  // (columns,) or null: 0, 1, 2, ...
  const int64_t* self_index;     // (rows,) or null; -1: none
  Similarity similarity;
  Relation relation;
  int64_t ignore_index;
};

struct ContrastForward {
  ContrastInputs in;
  bool force_running_maximum;
  void* positive;      // T, (rows,)
  void* negative_lse;  // T, (rows,)
  void* similarities;  // T, (rows, columns), or null: not kept
};

struct ContrastBackward {
  ContrastInputs in;
  const void* grad_positive;      // T, (rows,)
  const void* grad_negative_lse;  // T, (rows,)
  const void* negative_lse;       // T, (rows,)
  const void* similarities;       // T, (rows, columns), or null: computed again
  void* grad_x;                   // dtype of x, (rows, width), or null: not needed; likewise below
  void* grad_y;                   // (columns, width)
  void* grad_scale;               // T, as scale
  void* grad_bias;                // T, (columns,)
};

FM_KERNEL(contrast_forward, ContrastForward)
FM_KERNEL(contrast_backward, ContrastBackward)

}  // namespace fused_margins
