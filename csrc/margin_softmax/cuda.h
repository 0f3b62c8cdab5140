// margin_softmax on an NVIDIA GPU, for few columns. T, the accumulation type, is double where x is float64, else float.
#pragma once

#include <cstdint>

#include "../common/matrix.h"
#include "angle.h"

namespace fused_margins {
namespace cuda {

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
};

// tickets: margin_softmax_tickets(rows) counters, 0 before and after; one for a backward, where one scale needs its
// gradient.
struct MarginSoftmaxForward {
  MarginSoftmaxInputs in;
  void* loss;   // T, (rows,) or one value
  void* saved;  // T, (margin_softmax_saved_size,)
  int* tickets;
};

struct MarginSoftmaxBackward {
  MarginSoftmaxInputs in;
  const void* grad_loss;  // T, as the loss
  const void* saved;
  void* grad_x;       // dtype of x, (rows, width), or null: not needed; likewise below
  void* grad_y;       // (columns, width)
  void* grad_scale;   // T, as scale
  void* grad_margin;  // T, as margin
  void* scratch;      // T, (margin_softmax_scratch_size,), 16-byte aligned
  int* tickets;
};

// What a forward hands to its backward, T: similarities (rows, columns), the inverse lengths of rows and columns, of
// each row the log of the odds against its class and the log-sum-exp of the other classes, and the divisor of the sum
// of losses.
inline int64_t margin_softmax_saved_size(int64_t rows, int64_t columns) {
  return rows * columns + 3 * rows + columns + 1;
}
int64_t margin_softmax_tickets(int64_t rows);
// Of a backward: weights and their transpose, in padded rows, and their sums.
int64_t margin_softmax_scratch_size(int64_t rows, int64_t columns);
// Blocks of the one launch of the forward, and of the second one of the backward, the products.
int64_t margin_softmax_forward_grid(int64_t rows, int64_t columns);
int64_t margin_softmax_backward_grid(int64_t rows, int64_t columns, int64_t width, bool grad_x, bool grad_y);

void margin_softmax_forward(const MarginSoftmaxForward& args, void* stream);
void margin_softmax_backward(const MarginSoftmaxBackward& args, void* stream);

}  // namespace cuda
}  // namespace fused_margins
