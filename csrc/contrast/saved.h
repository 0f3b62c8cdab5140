// Where things lie in what a forward saves, and the sizes of the pieces that problems are cut into.
#pragma once

#include <algorithm>

#include "../cpu/tile.h"
#include "cpu.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t BLOCK = CONTRAST_BLOCK;       // columns whose weights are made together, of many
constexpr int64_t FEW = CONTRAST_FEW;           // and of few
constexpr int64_t SPARE = CONTRAST_SPARE_ROWS;  // rows after the weights of a block, for the last tile
static_assert(BLOCK % (8 * TILE_ROWS) == 0 && FEW % TILE_ROWS == 0 && SPARE >= ROW_QUANTUM, "blocks are whole tiles");

// So many columns in turn at most, which are whole groups, and of which a block has no part.
inline int64_t whole_groups(int64_t most, int64_t group_size) {
  if (group_size == 1) return most;
  int64_t groups = std::max<int64_t>(1, most / group_size);
  while (BLOCK / group_size % groups) --groups;
  return groups * group_size;
}

// Columns of a task of the backward: `most`, a divisor of BLOCK, for a task stays within a block; fewer where there is
// one block and every thread shall have its share.
inline int64_t group_of(int64_t most, int64_t columns, int threads) {
  const int64_t share = round_up(std::max<int64_t>(1, ceil_div(columns, threads)), TILE_ROWS);
  return columns > FEW ? most : std::min(most, share);
}

template <class T>
struct Saved {
  T *x_factor, *y_factor, *all_shifts, *all_weights;
  T *mean, *inverse_sum, *mean_similarity;  // null without a mean
  T *positive, *negative_lse;
  int64_t stride;  // of the weights
  int64_t block;   // columns of a block

  Saved(const ContrastInputs& in, void* saved)
      : x_factor(static_cast<T*>(saved)),
        stride(contrast_weight_stride(in.x.rows)),
        block(contrast_block(in.y.rows, in.group_size)) {
    const int64_t rows = in.x.rows, columns = in.y.rows, width = in.x.width;
    y_factor = x_factor + stride;
    all_shifts = y_factor + round_up(columns, 16);
    all_weights = all_shifts + contrast_num_blocks(columns, in.group_size) * stride;
    T* end = x_factor + contrast_weights_size(rows, columns, in.group_size, in.saved_blocks);
    mean = in.with_mean ? end : nullptr;
    inverse_sum = in.with_mean ? mean + round_up(rows, 4) * round_up(width, 16) : nullptr;
    mean_similarity = in.with_mean ? inverse_sum + rows : nullptr;
    positive = in.with_mean ? mean_similarity + rows : end;
    negative_lse = positive + rows;
  }

  T* shifts(int64_t b) const { return all_shifts + b * stride; }  // (rows,)
  T* weights(int64_t b) const { return all_weights + b * (block + SPARE) * stride; }
};

}  // namespace FM_ISA
}  // namespace fused_margins
