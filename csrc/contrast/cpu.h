// contrast on a CPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include <algorithm>

#include "../cpu/isa.h"
#include "../margin.h"
#include "../matrix.h"

namespace fused_margins {

struct ContrastInputs {
  Matrix x, y;
  const int64_t* target;         // (rows,)
  const int64_t* row_labels;     // (rows,) or null: the targets
  const int64_t* column_labels;  // (columns,) or null: 0, 1, 2, ...
  const int64_t* self_index;     // (rows,) or null; -1: none
  const void* scale;             // T, (rows,) or one value
  bool scale_per_row;
  const void* bias;    // T, (columns,) or null
  const void* margin;  // T, (rows,) or one value; or null where the epilogue has none
  bool margin_per_row;
  Similarity similarity;
  Relation relation;
  int64_t ignore_index;
  int64_t group_size;  // of each so many columns in turn a row sees the most similar one that it admits
  Epilogue epilogue;   // what makes the loss of the two vectors; none: they are the outputs
  Psi psi;
  double smoothing;  // share of the mean loss over all classes in the loss, with an epilogue, of cosines
  Reduction reduction;
  bool force_running_maximum;
  bool with_mean;        // whether the columns' means are saved, which the gradients of x and scale need
  int64_t saved_blocks;  // blocks of columns whose weights are saved
};

// Weights exp(logit - shift) are made in blocks of columns with a shift for each block and row (0 where none is
// needed). A forward saves, one after another: the factors of the rows (16 n), 16 n being their number rounded up to an
// odd n; the factors of the columns (a multiple of 16); all shifts (blocks, 16 n); the weights of the first blocks,
// each (contrast_block + CONTRAST_SPARE_ROWS, 16 n); with_mean: the columns summed under the weights of each row, as
// the products take them (unit length, relative to the centre), (rows, width) rounded up to 4 and to 16, then (rows,)
// what makes the sum a mean, and (rows,) the mean similarity; and (rows,) positive, (rows,) negative_lse.
constexpr int64_t CONTRAST_BLOCK = 192;  // columns of a block
constexpr int64_t CONTRAST_FEW = 264;    // so many at most are one block
constexpr int64_t CONTRAST_SPARE_ROWS = 4;

// Columns of a block: whole groups.
inline int64_t contrast_block(int64_t columns, int64_t group_size) {
  return (columns > CONTRAST_FEW ? CONTRAST_BLOCK : CONTRAST_FEW) / group_size * group_size;
}
inline int64_t contrast_num_blocks(int64_t columns, int64_t group_size) {
  const int64_t block = contrast_block(columns, group_size);
  return (columns + block - 1) / block;
}
inline int64_t contrast_weight_stride(int64_t rows) {
  return ((rows + 15) / 16 | 1) * 16;
}
inline int64_t contrast_weights_size(int64_t rows, int64_t columns, int64_t group_size, int64_t saved_blocks) {
  const int64_t block = contrast_block(columns, group_size);
  const int64_t weights = std::min(columns, saved_blocks * block) + saved_blocks * CONTRAST_SPARE_ROWS;
  return (1 + contrast_num_blocks(columns, group_size) + weights) * contrast_weight_stride(rows) +
         (columns + 15) / 16 * 16;
}
inline int64_t contrast_mean_size(int64_t rows, int64_t width) {
  return (rows + 3) / 4 * 4 * ((width + 15) / 16 * 16) + 2 * rows;
}

// Values of T that a forward saves.
inline int64_t contrast_saved_size(int64_t rows, int64_t columns, int64_t width, int64_t group_size, bool with_mean,
                                   int64_t saved_blocks) {
  const int64_t mean = with_mean ? contrast_mean_size(rows, width) : 0;
  return contrast_weights_size(rows, columns, group_size, saved_blocks) + mean + 2 * rows;
}
// The blocks whose weights fit into a budget.
inline int64_t contrast_saved_blocks(int64_t rows, int64_t columns, int64_t group_size, int64_t value_bytes,
                                     int64_t budget_bytes) {
  const int64_t block = std::min(contrast_block(columns, group_size), columns) + CONTRAST_SPARE_ROWS;
  return std::min(contrast_num_blocks(columns, group_size),
                  budget_bytes / (block * contrast_weight_stride(rows) * value_bytes));
}

struct ContrastForward {
  ContrastInputs in;
  void* positive;      // T, (rows,), without an epilogue; else null
  void* negative_lse;  // T, (rows,), likewise
  void* loss;          // T, (rows,) or one value, with an epilogue
  void* saved;         // T, (contrast_saved_size,)
};

struct ContrastBackward {
  const void* grad_positive;      // T, (rows,), without an epilogue
  const void* grad_negative_lse;  // T, (rows,), likewise
  const void* grad_loss;          // T, as the loss, with an epilogue
  ContrastInputs in;
  const void* saved;
  void* grad_x;       // dtype of x, (rows, width), or null: not needed; likewise below
  void* grad_y;       // (columns, width)
  void* grad_scale;   // T, as scale
  void* grad_bias;    // T, (columns,)
  void* grad_margin;  // T, as margin
};

template <class Args>
inline bool contrast_suits_bf16(const Args& args) {
  return has_bf16_products(args.in.x.dtype, args.in.similarity);
}

FM_BF16_KERNEL(contrast_forward, ContrastForward, contrast_suits_bf16)
FM_BF16_KERNEL(contrast_backward, ContrastBackward, contrast_suits_bf16)

}  // namespace fused_margins
