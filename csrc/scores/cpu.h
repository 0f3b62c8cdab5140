// scores on a CPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "../common/isa.h"
#include "../common/matrix.h"

namespace fused_margins {

struct ScoresInputs {
  Matrix x, y;
  const void* scale;  // T, (rows,) or one value
  bool scale_per_row;
  const void* bias;    // T, (columns,) or null
  const void* margin;  // T, (rows,) or one value
  bool margin_per_row;
  const int64_t* target;  // (rows,) or null: no margin
  Similarity similarity;
  int64_t ignore_index;
};

struct ScoresForward {
  ScoresInputs in;
  void* scores;  // dtype of x, (rows, columns)
};

struct ScoresBackward {
  ScoresInputs in;
  const void* grad_scores;  // dtype of x, (rows, columns)
  void* grad_x;             // dtype of x, (rows, width), or null: not needed; likewise below
  void* grad_y;             // (columns, width)
  void* grad_scale;         // T, as scale
  void* grad_bias;          // T, (columns,)
  void* grad_margin;        // T, as margin
};

template <class Args>
inline bool scores_suit_bf16(const Args& args) {
  return has_bf16_products(args.in.x.dtype, args.in.similarity);
}

FM_BF16_KERNEL(scores_forward, ScoresForward, scores_suit_bf16)
FM_BF16_KERNEL(scores_backward, ScoresBackward, scores_suit_bf16)

}  // namespace fused_margins
