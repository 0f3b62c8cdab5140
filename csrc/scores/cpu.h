// scores on a CPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "../cpu/isa.h"
#include "../matrix.h"

namespace fused_margins {

struct ScoresInputs {
  Matrix x, y;
  const int64_t* target;  // (rows,) or null: no margin
  const void* scale;      // T, (rows,) or one value
  bool scale_per_row;
  const void* bias;    // T, (columns,) or null
  const void* margin;  // T, (rows,) or one value
  bool margin_per_row;
  Similarity similarity;
  int64_t ignore_index;
  int64_t sign;  // 1 or -1, of all scores
};

struct ScoresForward {
  ScoresInputs in;
  void* scores;  // dtype of x, (rows, columns)
};

struct ScoresBackward {
  const void* grad_scores;  // dtype of x, (rows, columns)
  ScoresInputs in;
  void* grad_x;       // dtype of x, (rows, width), or null: not needed; likewise below
  void* grad_y;       // (columns, width)
  void* grad_scale;   // T, as scale
  void* grad_bias;    // T, (columns,)
  void* grad_margin;  // T, as margin
};

template <class Args>
inline bool scores_suit_bf16(const Args& args) {
  return has_bf16_products(args.in.x.dtype, args.in.similarity);
}

FM_BF16_KERNEL(scores_forward, ScoresForward, scores_suit_bf16)
FM_BF16_KERNEL(scores_backward, ScoresBackward, scores_suit_bf16)

}  // namespace fused_margins
