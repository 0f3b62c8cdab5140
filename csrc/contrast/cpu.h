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

// Weights exp(logit - shift) are made in blocks of columns with a shift for each block and row (0 where none is
// needed). From forward to backward go the factors of the rows (16 n), 16 n being their number rounded up to an odd n,
// and of the columns (a multiple of 16), all shifts (blocks, 16 n), and the weights of the first blocks: for each
// (CONTRAST_BLOCK + CONTRAST_SPARE_ROWS, 16 n) values.
constexpr int64_t CONTRAST_BLOCK = 192;
constexpr int64_t CONTRAST_SPARE_ROWS = 4;

inline int64_t contrast_weight_stride(int64_t rows) {
  return ((rows + 15) / 16 | 1) * 16;
}
inline int64_t contrast_kept_size(int64_t rows, int64_t columns, int64_t kept_blocks) {
  const int64_t whole = kept_blocks * CONTRAST_BLOCK, weights = columns < whole ? columns : whole;
  const int64_t shifts = (columns + CONTRAST_BLOCK - 1) / CONTRAST_BLOCK;
  const int64_t column_factors = (columns + 15) / 16 * 16;
  return (1 + shifts + weights + kept_blocks * CONTRAST_SPARE_ROWS) * contrast_weight_stride(rows) + column_factors;
}

inline int64_t contrast_mean_size(int64_t rows, int64_t width) {
  return (rows + 3) / 4 * 4 * ((width + 15) / 16 * 16) + 2 * rows;
}

struct ContrastForward {
  ContrastInputs in;
  bool force_running_maximum;
  void* positive;      // T, (rows,)
  void* negative_lse;  // T, (rows,)
  // T: columns summed under the weights of each row, as the products take them (unit length, relative to the centre),
  // (rows, width) rounded up to 4 and to 16; then (rows,) what makes the sum an average, and (rows,) the average
  // similarity. Null: not needed.
  void* mean;
  void* kept;  // T: factors, shifts, and weights of the first kept_blocks blocks
  int64_t kept_blocks;
};

struct ContrastBackward {
  ContrastInputs in;
  bool force_running_maximum;     // as in the forward
  const void* grad_positive;      // T, (rows,)
  const void* grad_negative_lse;  // T, (rows,)
  const void* negative_lse;       // T, (rows,)
  const void* mean;               // of the forward
  const void* kept;               // of the forward
  int64_t kept_blocks;
  void* grad_x;      // dtype of x, (rows, width), or null: not needed; likewise below
  void* grad_y;      // (columns, width)
  void* grad_scale;  // T, as scale
  void* grad_bias;   // T, (columns,)
};

template <class Args>
inline bool suits_bf16(const Args& args) {
  return has_bf16_products(args.in.x.dtype, args.in.similarity);
}

FM_BF16_KERNEL(contrast_forward, ContrastForward, suits_bf16)
FM_BF16_KERNEL(contrast_backward, ContrastBackward, suits_bf16)

}  // namespace fused_margins
