// The two products of every gradient, from D = dL/du (B, CHUNK) of one chunk of columns: D y, added up over the chunks,
// and D^T x, complete for the chunk. Both sum in a fixed order.
#pragma once

#include "strips.h"

namespace fused_margins {
namespace FM_ISA {

template <class T>
class Gradient {
 public:
  Gradient(Strips<T>& strips, bool need_x, bool need_y)
      : strips_(strips),
        need_x_(need_x),
        need_y_(need_y),
        rows_(strips.x.count()),
        width_(strips.x.width()),
        padded_(round_up(width_, TILE_COLUMNS<T>)),
        // An odd multiple of the cache line between rows: a power of two would map them onto few cache sets.
        stride_(round_up(std::min(CHUNK, strips.y.count()), TILE_ROWS) + 16 + TILE_ROWS),
        d_(round_up(rows_, TILE_ROWS) * stride_),
        x_panels_(need_y ? padded_ * rows_ : 0),
        y_panels_(need_x ? padded_ * std::min(CHUNK, strips.y.count()) : 0),
        sum_x_(need_x ? round_up(rows_, TILE_ROWS) * padded_ : 0),
        scratch_(strips.threads, ROW_BLOCK * padded_ + width_) {}

  // (count,): dL/du of one row, to be filled for the columns of the current chunk.
  T* row(int64_t i) const { return d_.get() + i * stride_; }

  // x as a right operand.
  void prepare_rows(Team& team) {
    if (need_y_) pack(team, strips_.x, 0, rows_, x_panels_.get());
  }

  // The chunk's columns as a right operand.
  void prepare_columns(Team& team, const Chunk& chunk) {
    if (need_x_) pack(team, strips_.y, chunk.first, chunk.count, y_panels_.get());
  }

  // Both products; finish(column, sum (width,), scratch (width,)) takes each row of D^T x.
  template <class F>
  void products(Team& team, const Chunk& chunk, F finish) {
    const int64_t row_tasks = need_x_ ? ceil_div(rows_, ROW_BLOCK) : 0;
    const int64_t column_tasks = need_y_ ? ceil_div(chunk.count, ROW_BLOCK) : 0;
    T *out = scratch_.mine(), *scratch = out + ROW_BLOCK * padded_;
    team.each(row_tasks + column_tasks, 1, [&](int64_t task) {
      if (task < row_tasks) {
        const int64_t first = task * ROW_BLOCK, last = std::min(first + ROW_BLOCK, rows_);
        for (int64_t p = 0; p < padded_; p += TILE_COLUMNS<T>)
          for (int64_t i = first; i < last; i += TILE_ROWS)
            tile_product<T, Left::contiguous_depth>(row(i), stride_, y_panels_.get() + p * chunk.count, chunk.count,
                                                    sum_x_.get() + i * padded_ + p, padded_, chunk.first > 0);
      } else {
        const int64_t first = (task - row_tasks) * ROW_BLOCK, last = std::min(first + ROW_BLOCK, chunk.count);
        for (int64_t p = 0; p < padded_; p += TILE_COLUMNS<T>)
          for (int64_t j = first; j < last; j += TILE_ROWS)
            tile_product<T, Left::contiguous_rows>(d_.get() + j, stride_, x_panels_.get() + p * rows_, rows_,
                                                   out + (j - first) * padded_ + p, padded_, false);
        for (int64_t j = first; j < last; ++j) finish(chunk.first + j, out + (j - first) * padded_, scratch);
      }
    });
  }

  // After the last chunk: finish(row, sum (width,), scratch (width,)) takes each row of D y.
  template <class F>
  void rows(Team& team, F finish) {
    team.each(need_x_ ? rows_ : 0, TILE_ROWS, [&](int64_t i) {
      if (!strips_.y.count()) std::fill_n(sum_x_.get() + i * padded_, padded_, T(0));
      finish(i, sum_x_.get() + i * padded_, scratch_.mine());
    });
  }

  // sum_i D_ij w_i of a column of the current chunk, in row order; w = 1 where it is null.
  T column_sum(int64_t column_in_chunk, const T* w) const {
    T sum = 0;
    for (int64_t i = 0; i < rows_; ++i) sum += row(i)[column_in_chunk] * (w ? w[i] : T(1));
    return sum;
  }

 private:
  Strips<T>& strips_;
  bool need_x_, need_y_;
  int64_t rows_, width_, padded_, stride_;
  Buffer<T> d_;         // (rows, stride)
  Buffer<T> x_panels_;  // (padded / TILE_COLUMNS, rows, TILE_COLUMNS)
  Buffer<T> y_panels_;  // (padded / TILE_COLUMNS, chunk, TILE_COLUMNS)
  Buffer<T> sum_x_;     // (rows, padded)
  Scratch<T> scratch_;

  void pack(Team& team, const Rows<T>& side, int64_t first, int64_t count, T* panels) const {
    constexpr int64_t wide = TILE_COLUMNS<T>;
    T* values = scratch_.mine();
    std::fill(values, values + padded_, T(0));
    team.each(count, 2 * wide, [&](int64_t r) {
      side.prepared(first + r, values);
      for (int64_t p = 0; p < padded_; p += wide)
        std::copy(values + p, values + p + wide, panels + p * count + r * wide);
    });
  }
};

}  // namespace FM_ISA
}  // namespace fused_margins
