// margin_softmax on a CPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "../common/isa.h"
#include "../common/matrix.h"
#include "angle.h"

namespace fused_margins {

struct MarginSoftmaxInputs {
  Matrix x, y;
  const void* scale;  // T, (rows,) or one value
  bool scale_per_row;
  const void* margin;  // T, (rows,) or one value
  bool margin_per_row;
  Angle angle;
  const int64_t* target;  // (rows,)
  Similarity similarity;
  int64_t ignore_index;
  Reduction reduction;
  bool with_mean;       // whether `saved` holds the columns' average, which the gradients of x and scale need
  int64_t kept_blocks;  // whose weights `saved` holds
};

// saved, T: what contrast keeps, its mean, positive and negative_lse, one after another.
struct MarginSoftmaxForward {
  MarginSoftmaxInputs in;
  void* loss;  // T, (rows,) or one value
  void* saved;
};

struct MarginSoftmaxBackward {
  MarginSoftmaxInputs in;
  const void* grad_loss;  // T, as the loss
  const void* saved;
  void* grad_x;       // dtype of x, (rows, width), or null: not needed; likewise below
  void* grad_y;       // (columns, width)
  void* grad_scale;   // T, as scale
  void* grad_margin;  // T, as margin
};

FM_KERNEL(margin_softmax_forward, MarginSoftmaxForward)
FM_KERNEL(margin_softmax_backward, MarginSoftmaxBackward)

}  // namespace fused_margins
