// The products that a search goes through: a task's rows with panels of columns. VectorTiles has them for any numbers;
// Bf16Tiles, with the same members, for bfloat16, where distances are not asked for.
#pragma once

#include "rows.h"
#include "transpose.h"
#ifdef __AVX512BF16__
#include "bf16_rows.h"
#endif

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t ROWS = 8 * TILE_ROWS;  // of a task: they share a panel of columns in the first-level cache

template <class T>
class VectorTiles {
 public:
  using Value = T;
  static constexpr int64_t WIDE = TILE_COLUMNS<T>;  // columns of a panel
  struct Session {};                                // what a thread has to set up

  // `columns`: that panels are made for at a time, a multiple of WIDE.
  VectorTiles(const Rows<T>& x, const Rows<T>& y, int64_t columns)
      : x_(x), y_(y), stride_(odd_lines(x.width())), panels_(columns * x.width()) {}

  // Values of T that a thread needs for rows.
  int64_t scratch_size() const { return std::max(ROWS, WIDE) * stride_; }

  // The columns that `names` lists, at most WIDE, and their factors.
  void prepare_columns(int64_t panel, const int64_t* names, int64_t count, T* factors, T* scratch) {
    std::fill(scratch, scratch + WIDE * stride_, T(0));
    for (int64_t j = 0; j < count; ++j) factors[j] = y_.prepare(names[j], scratch + j * stride_);
    transpose_panel(scratch, stride_, y_.width(), panels_.get() + panel * WIDE * y_.width());
  }

  // Row `name`, as the r-th of the thread's; returns its factor.
  T prepare_row(int64_t name, int64_t r, T* scratch) const { return x_.prepare(name, scratch + r * stride_); }

  // u (rows, WIDE): of the thread's rows with `count` columns of a panel.
  void products(const T* scratch, int64_t rows, int64_t panel, int64_t count, T* u) const {
    panel_product<T, Left::contiguous_depth>(scratch, stride_, rows, panels_.get() + panel * WIDE * y_.width(), WIDE,
                                             count, y_.width(), u, WIDE, false);
  }

 private:
  const Rows<T>&x_, &y_;
  int64_t stride_;
  Buffer<T> panels_;  // (panels, width, WIDE)
};

#ifdef __AVX512BF16__
class Bf16Tiles {
 public:
  using Value = float;
  static constexpr int64_t WIDE = BF16_COLUMNS;
  using Session = Bf16Session;

  Bf16Tiles(const Rows<float>& x, const Rows<float>& y, int64_t columns)
      : x_(x),
        y_(y),
        depth_(round_up(x.width(), BF16_DEPTH)),
        stride_(odd_lines_of_halves(depth_)),
        panels_(columns * depth_),
        column_scale_(columns) {}

  int64_t scratch_size() const { return ROWS + depth_ + ROWS * stride_ / 2; }

  void prepare_columns(int64_t panel, const int64_t* names, int64_t count, float* factors, float* scratch) {
    uint16_t* rows = rows_of(scratch);
    float* scale = column_scale_.get() + panel * WIDE;
    std::fill(rows + count * stride_, rows + WIDE * stride_, uint16_t(0));
    std::fill(scale + count, scale + WIDE, 0.0f);
    for (int64_t j = 0; j < count; ++j)
      scale[j] = bf16_row(y_, names[j], true, factors[j], scratch + ROWS, rows + j * stride_);
    bf16_panel(rows, stride_, depth_, panels_.get() + panel * WIDE * depth_);
  }

  float prepare_row(int64_t name, int64_t r, float* scratch) const {
    float factor;
    scratch[r] = bf16_row(x_, name, true, factor, scratch + ROWS, rows_of(scratch) + r * stride_);
    return factor;
  }

  void products(const float* scratch, int64_t rows, int64_t panel, int64_t, float* u) const {
    const Bf16Operand columns{panels_.get() + panel * WIDE * depth_, 2 * WIDE};
    for (int64_t r = 0; r < rows; r += BF16_ROWS)
      bf16_product({rows_of(scratch) + r * stride_, stride_}, columns, depth_ / BF16_DEPTH,
                   std::min(BF16_ROWS, rows - r), WIDE, u + r * WIDE, WIDE, false);
    // The larger one first: their product may leave float's range, and rows against themselves must be symmetric.
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < WIDE; ++j) {
        const float a = scratch[r], b = column_scale_[panel * WIDE + j];
        u[r * WIDE + j] = u[r * WIDE + j] * std::max(a, b) * std::min(a, b);
      }
  }

 private:
  static_assert(ROWS % BF16_ROWS == 0, "tasks are whole blocks of rows");
  const Rows<float>&x_, &y_;
  int64_t depth_, stride_;
  Buffer<uint16_t> panels_;     // (panels, depth / 2, WIDE, 2)
  Buffer<float> column_scale_;  // of products; a thread's rows have theirs at the start of its scratch

  // Behind the scales of the rows and one row of float32.
  uint16_t* rows_of(float* scratch) const { return reinterpret_cast<uint16_t*>(scratch + ROWS + depth_); }
  const uint16_t* rows_of(const float* scratch) const {
    return reinterpret_cast<const uint16_t*>(scratch + ROWS + depth_);
  }
};
#endif

}  // namespace FM_ISA
}  // namespace fused_margins
