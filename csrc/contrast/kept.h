// What a forward keeps for its backward, and the sizes of the pieces that problems are cut into.
#pragma once

#include <algorithm>

#include "../common/tile.h"
#include "cpu.h"

namespace fused_margins {
namespace FM_ISA {

template <class T>
constexpr T none = -std::numeric_limits<T>::infinity();

constexpr int64_t BLOCK = CONTRAST_BLOCK;       // columns whose weights are made together
constexpr int64_t SPARE = CONTRAST_SPARE_ROWS;  // rows after the weights of a block, for the last tile
static_assert(BLOCK % TILE_ROWS == 0 && SPARE >= ROW_QUANTUM, "blocks are whole tiles");

inline int64_t weight_stride(int64_t rows) {
  return contrast_weight_stride(rows);
}

// Columns of a task of the backward: `most`, a divisor of BLOCK, for a task stays within a block; fewer where there is
// one block and every thread shall have its share.
inline int64_t group_of(int64_t most, int64_t columns, int threads) {
  const int64_t share = round_up(std::max<int64_t>(1, ceil_div(columns, threads)), TILE_ROWS);
  return columns > BLOCK ? most : std::min(most, share);
}

// Where things lie in what a forward keeps.
template <class T>
struct Kept {
  T *x_factor, *y_factor, *all_shifts, *all_weights;
  int64_t stride;

  Kept(T* kept, int64_t rows, int64_t columns)
      : x_factor(kept),
        y_factor(kept + weight_stride(rows)),
        all_shifts(y_factor + round_up(columns, 16)),
        all_weights(all_shifts + ceil_div(columns, BLOCK) * weight_stride(rows)),
        stride(weight_stride(rows)) {}

  T* shifts(int64_t block) const { return all_shifts + block * stride; }  // (rows,)
  T* weights(int64_t block) const { return all_weights + block * (BLOCK + SPARE) * stride; }
};
}  // namespace FM_ISA
}  // namespace fused_margins
