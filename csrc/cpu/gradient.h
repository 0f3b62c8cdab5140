// The two products of every gradient, from D = dL/du (B, columns) of one chunk of columns: D y, added up over the
// chunks, and D^T x, complete for the chunk. Both sum in a fixed order.
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
        stride_(odd_lines(strips.largest_chunk())),
        d_(round_up(rows_, ROW_QUANTUM) * stride_),
        x_panels_(need_y ? padded_ * rows_ : 0),
        y_panels_(need_x ? padded_ * strips.largest_chunk() : 0),
        sum_x_(need_x ? round_up(rows_, ROW_QUANTUM) * padded_ : 0),
        scratch_(strips.threads, ROW_BLOCK * padded_ + padded_ + (1 + DEPTH_BLOCK) * ROW_BLOCK) {}

  // (count,): dL/du of one row, to be filled for the columns of the current chunk.
  T* row(int64_t i) const { return d_.get() + i * stride_; }

  // x as a right operand.
  void prepare_rows(Team& team) {
    if (need_y_) pack(team, rows_, x_panels_.get(), [&](int64_t i, T*) { return strips_.x_row(i); });
  }

  // The chunk's columns as a right operand.
  void prepare_columns(Team& team, const Chunk& chunk) {
    if (need_x_)
      pack(team, chunk.count, y_panels_.get(), [&](int64_t j, T* scratch) {
        strips_.y.prepared(chunk.first + j, scratch);
        return scratch;
      });
  }

  // Both products; finish(column, weight, sum (width,), scratch (width,)) takes each row of D^T x, and sum_i D_ij.
  template <class F>
  void products(Team& team, const Chunk& chunk, F finish) {
    constexpr int64_t wide = TILE_COLUMNS<T>;
    const int64_t row_tasks = need_x_ ? ceil_div(rows_, ROW_BLOCK) : 0;
    const int64_t column_tasks = need_y_ ? ceil_div(chunk.count, ROW_BLOCK) : 0;
    T *out = scratch_.mine(), *scratch = out + ROW_BLOCK * padded_, *weight = scratch + padded_;
    T* block = weight + ROW_BLOCK;  // (DEPTH_BLOCK, ROW_BLOCK): columns of D side by side, which lie far apart in it
    team.each(column_tasks + row_tasks, 1, [&](int64_t task) {  // columns, which take longer, are begun first
      if (task >= column_tasks) {
        const int64_t first = (task - column_tasks) * ROW_BLOCK, count = std::min(ROW_BLOCK, rows_ - first);
        for (int64_t p = 0; p < width_; p += wide)
          panel_product<T, Left::contiguous_depth>(row(first), stride_, count, y_panels_.get() + p * chunk.count, wide,
                                                   std::min(wide, width_ - p), chunk.count,
                                                   sum_x_.get() + first * padded_ + p, padded_, chunk.first > 0);
        return;
      }
      const int64_t first = task * ROW_BLOCK, count = std::min(ROW_BLOCK, chunk.count - first);
      std::fill_n(weight, ROW_BLOCK, T(0));
      for (int64_t i0 = 0; i0 < rows_ || i0 == 0; i0 += DEPTH_BLOCK) {
        const int64_t depth = std::min(DEPTH_BLOCK, rows_ - i0);
        for (int64_t i = 0; i < depth; ++i) {
          T* to = block + i * ROW_BLOCK;
          std::copy_n(row(i0 + i) + first, count, to);
          std::fill_n(to + count, ROW_BLOCK - count, T(0));
          for (int64_t j = 0; j < ROW_BLOCK; ++j) weight[j] += to[j];
        }
        for (int64_t p = 0; p < width_; p += wide)
          panel_product<T, Left::contiguous_rows>(block, ROW_BLOCK, count, x_panels_.get() + p * rows_ + i0 * wide,
                                                  wide, std::min(wide, width_ - p), depth, out + p, padded_, i0 > 0);
      }
      for (int64_t j = 0; j < count; ++j) finish(chunk.first + first + j, weight[j], out + j * padded_, scratch);
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

  // sum_i D_ij w_i of a column of the current chunk, in row order.
  T column_sum(int64_t column_in_chunk, const T* w) const {
    T sum = 0;
    for (int64_t i = 0; i < rows_; ++i) sum += row(i)[column_in_chunk] * w[i];
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

  // Rows `values(r, scratch)` of width numbers as a right operand.
  template <class F>
  void pack(Team& team, int64_t count, T* panels, F values) const {
    constexpr int64_t wide = TILE_COLUMNS<T>;
    team.each(count, 2 * wide, [&](int64_t r) {
      const T* from = values(r, scratch_.mine());
      for (int64_t p = 0; p < width_; p += wide) {
        T* to = panels + p * count + r * wide;
        const int64_t there = std::min(wide, width_ - p);
        std::copy_n(from + p, there, to);
        std::fill_n(to + there, wide - there, T(0));
      }
    });
  }
};

}  // namespace FM_ISA
}  // namespace fused_margins
