// The three products of contrast: logits, the average of the columns, and the gradient of the columns. Here with the
// tile of tile.h; products_bf16.h has them for bfloat16. Their operands are what each of them likes best.
#pragma once

#include "../cpu/rows.h"
#include "../cpu/transpose.h"
#include "saved.h"

namespace fused_margins {
namespace FM_ISA {

template <class T>
class VectorProducts {
 public:
  using Value = T;
  static constexpr int64_t WIDE = TILE_COLUMNS<T>;  // rows of x that a panel holds
  // Rows of which a task averages the columns, and columns of which a task makes the gradient: they share what lies in
  // the first-level cache.
  static constexpr int64_t ROW_TASK = 8 * TILE_ROWS;
  static int64_t group(int64_t columns, int threads) {
    const bool for_all = columns >= 4 * 8 * TILE_ROWS * threads;  // tasks enough for every thread
    return group_of(for_all ? 8 * TILE_ROWS : 4 * TILE_ROWS, columns, threads);
  }
  static constexpr int64_t TOGETHER = 4;  // panels that a part of the columns' depth serves
  struct Session {};                      // what a thread has to set up

  VectorProducts(const Rows<T>& x, const Rows<T>& y, const Saved<T>& saved)
      : x_(x),
        y_(y),
        saved_(saved),
        rows_(x.count()),
        width_(x.width()),
        y_width_(odd_lines(width_)),
        padded_(round_up(width_, VectorOf<T>::lanes)) {}

  int64_t panels() const { return ceil_div(rows_, WIDE); }
  int64_t parts() const { return ceil_div(padded_, WIDE); }
  // Values of T that hold `count` columns, and that a thread needs for itself.
  int64_t block_size(int64_t count) const { return round_up(count, ROW_QUANTUM) * y_width_; }
  int64_t scratch_size() const { return WIDE * y_width_; }

  // -- Logits --

  void allocate_logits() { logit_panels_ = Buffer<T>(panels() * WIDE * width_); }

  // Panel of x as right operand; `measure`: and the factors of its rows.
  void prepare_panel(int64_t panel, bool measure, T* scratch) {
    const int64_t first = panel * WIDE, count = std::min(WIDE, rows_ - first);
    if (count < WIDE || width_ % VectorOf<T>::lanes) std::fill(scratch, scratch + WIDE * y_width_, T(0));
    for (int64_t i = 0; i < count; ++i)
      x_.prepare(first + i, measure, saved_.x_factor[first + i], scratch + i * y_width_);
    transpose_panel(scratch, y_width_, width_, logit_panels_.get() + panel * WIDE * width_);
  }

  // Columns first + at ... of the `total` columns that `block` holds from its start, as left operand.
  void prepare_columns(int64_t first, int64_t at, int64_t count, int64_t, bool measure, T* block, T*) {
    for (int64_t j = at; j < at + round_up(count, ROW_QUANTUM); ++j) {
      T* row = block + j * y_width_;
      const bool there = j < at + count;
      if (there) y_.prepare(first + j, measure, saved_.y_factor[first + j], row);
      std::fill(row + (there ? width_ : 0), row + y_width_, T(0));
    }
  }

  // Similarities of `count` columns with the rows of `panels` panels from `panel` on; w at the first of these rows. A
  // part of the depth at a time: what the columns have of it stays in the second-level cache for all of the panels.
  void logits(const T* block, int64_t, int64_t count, int64_t panel, int64_t panels, T* w) const {
    for (int64_t d = 0; d < width_ || d == 0; d += DEPTH_BLOCK)
      for (int64_t i = 0; i < panels; ++i)
        panel_product<T, Left::contiguous_depth>(block + d, y_width_, count,
                                                 logit_panels_.get() + ((panel + i) * width_ + d) * WIDE, WIDE,
                                                 std::min(WIDE, rows_ - (panel + i) * WIDE),
                                                 std::min(DEPTH_BLOCK, width_ - d), w + i * WIDE, saved_.stride, d > 0);
  }

  // -- Average --

  void allocate_average(int64_t) {}
  void weights_are_made(int64_t, int64_t, const T*, int64_t, T*) {}

  // Columns weighted, rows row0 ..., width d0 ... d0 + WIDE; w (count, stride) of all rows.
  void average(int64_t, const T* w, const T* block, int64_t count, int64_t row0, int64_t rows, int64_t d0, T* out,
               int64_t out_stride, bool accumulate) const {
    panel_product<T, Left::contiguous_rows>(w + row0, saved_.stride, rows, block + d0, y_width_,
                                            std::min(WIDE, padded_ - d0), count, out, out_stride, accumulate);
  }

  // -- Gradient of the columns --

  void allocate_gradient() { gradient_panels_ = Buffer<T>(parts() * part_size()); }
  int64_t gradient_scratch_size(int64_t) const { return 0; }

  // x as right operand, each row times its factor of dL/du; a piece of its rows.
  int64_t gradient_pieces() const { return ceil_div(rows_, WIDE); }
  void prepare_gradient(int64_t piece, const T* factors, T* values) {
    using V = Vector<T>;
    constexpr int64_t lanes = VectorOf<T>::lanes;
    const bool plain = x_.similarity != Similarity::negative_squared_euclidean;
    const int64_t size = part_size(), whole = width_ / WIDE, rest = width_ % WIDE;
    for (int64_t i = piece * WIDE; i < std::min(rows_, (piece + 1) * WIDE); ++i) {
      if (!plain) x_.prepare(i, values);
      const T* x = plain ? x_.row_of(i, values) : values;
      // One after the other: their product may leave the range of T where x is far from unit length.
      const V to_unit = V{} + (plain ? saved_.x_factor[i] : T(1)), factor = V{} + factors[i];
      T* panel = gradient_panels_.get() + i * WIDE;
      for (int64_t part = 0; part < whole; ++part, panel += size, x += WIDE)
#pragma GCC unroll 2
        for (int64_t d = 0; d < WIDE; d += lanes) save(panel + d, factor * (to_unit * load(x + d)));
      if (!rest) continue;
      for (int64_t d = 0; d < WIDE; ++d) panel[d] = d < rest ? factor[0] * (to_unit[0] * x[d]) : T(0);
    }
  }

  // out (count, out_stride): w^T x of a group of columns.
  void gradient(const T* w, int64_t count, T* out, int64_t out_stride, T*) const {
    for (int64_t part = 0; part < parts(); ++part)
      panel_product<T, Left::contiguous_depth>(w, saved_.stride, count, gradient_panels_.get() + part * part_size(),
                                               WIDE, std::min(WIDE, padded_ - part * WIDE), rows_, out + part * WIDE,
                                               out_stride, false);
  }

 private:
  const Rows<T>&x_, &y_;
  Saved<T> saved_;
  int64_t rows_, width_, y_width_, padded_;
  Buffer<T> logit_panels_;     // (panels, width, WIDE)
  Buffer<T> gradient_panels_;  // (parts, part_size): (rows, WIDE) and a line

  int64_t part_size() const { return rows_ * WIDE + 16; }
};

}  // namespace FM_ISA
}  // namespace fused_margins
