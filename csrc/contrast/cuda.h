// contrast with the epilogue of margin softmax on an NVIDIA GPU, for few columns: no labels, no bias, no self index. T,
// the accumulation type, is double where x is float64, else float.
#pragma once

#include "../margin.h"
#include "../matrix.h"

namespace fused_margins {
namespace cuda {

struct ContrastInputs {
  Matrix x, y;
  const int64_t* target;  // (rows,)
  const void* scale;      // T, (rows,) or one value
  bool scale_per_row;
  const void* margin;  // T, (rows,) or one value
  bool margin_per_row;
  Similarity similarity;
  int64_t ignore_index;
  Psi psi;
  Reduction reduction;
};

// tickets: contrast_tickets(rows) counters, 0 before and after; one for a backward, where one scale needs its gradient.
struct ContrastForward {
  ContrastInputs in;
  void* loss;   // T, (rows,) or one value
  void* saved;  // T, (contrast_saved_size,)
  int* tickets;
  void* stream;
};

struct ContrastBackward {
  const void* grad_loss;  // T, as the loss
  ContrastInputs in;
  const void* saved;
  void* grad_x;       // dtype of x, (rows, width), or null: not needed; likewise below
  void* grad_y;       // (columns, width)
  void* grad_scale;   // T, as scale
  void* grad_margin;  // T, as margin
  void* scratch;      // T, (contrast_scratch_size,), 16-byte aligned
  int* tickets;
  void* stream;
};

// What a forward saves, T: similarities (rows, columns), the inverse lengths of rows and columns, of each row the log
// of the odds against its class and the log-sum-exp of the other classes, and the divisor of the sum of losses.
inline int64_t contrast_saved_size(int64_t rows, int64_t columns) {
  return rows * columns + 3 * rows + columns + 1;
}
int64_t contrast_tickets(int64_t rows);
// Of a backward: weights and their transpose, in padded rows, and their sums.
int64_t contrast_scratch_size(int64_t rows, int64_t columns);
// Blocks of the one launch of the forward, and of the second one of the backward, the products.
int64_t contrast_forward_grid(int64_t rows, int64_t columns);
int64_t contrast_backward_grid(int64_t rows, int64_t columns, int64_t width, bool grad_x, bool grad_y);

void contrast_forward(const ContrastForward& args);
void contrast_backward(const ContrastBackward& args);

}  // namespace cuda
}  // namespace fused_margins
