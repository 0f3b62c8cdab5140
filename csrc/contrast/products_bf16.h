// The products of contrast for bfloat16, on the matrix unit or the vector unit. x and y are taken as they are, and
// their factors applied to the results; weights are rounded to bfloat16 for the two products that they enter. Against
// the rounding of the gradients themselves that is not seen, and sums of weights are those of the unrounded ones.
#pragma once

#include "../cpu/bf16_rows.h"
#include "saved.h"

namespace fused_margins {
namespace FM_ISA {

class Bf16Products {
 public:
  using Value = float;
  static constexpr int64_t WIDE = BF16_COLUMNS;
  static constexpr int64_t ROW_TASK = 8 * WIDE;
  static constexpr int64_t TOGETHER = 1;
  static int64_t group(int64_t columns, int threads) {
    return group_of(columns < 8 * 96 * threads ? BF16_ROWS : 96, columns, threads);
  }
  using Session = Bf16Session;

  Bf16Products(const Rows<float>& x, const Rows<float>& y, const Saved<float>& saved)
      : x_(x),
        y_(y),
        saved_(saved),
        rows_(x.count()),
        width_(x.width()),
        depth_(round_up(width_, BF16_DEPTH)),
        row_stride_(odd_lines_of_halves(width_)),
        pair_stride_(2 * odd_lines(depth_)) {}

  int64_t panels() const { return ceil_div(rows_, WIDE); }
  int64_t parts() const { return depth_ / WIDE; }
  int64_t block_size(int64_t count) const {
    const int64_t capacity = round_up(count, BF16_DEPTH);
    return capacity / 2 * (row_stride_ + pair_stride_ / 2) + capacity;
  }
  int64_t scratch_size() const { return depth_ + WIDE * row_stride_ / 2; }

  // -- Logits --

  void allocate_logits() {
    logit_panels_ = Buffer<uint16_t>(panels() * depth_ * WIDE);
    x_scale_ = Buffer<float>(panels() * WIDE);
  }

  void prepare_panel(int64_t panel, bool measure, float* scratch) {
    const int64_t first = panel * WIDE, count = std::min(WIDE, rows_ - first);
    uint16_t* rows = reinterpret_cast<uint16_t*>(scratch + depth_);
    if (count < WIDE) std::fill(rows, rows + WIDE * row_stride_, uint16_t(0));
    std::fill(x_scale_.get() + first, x_scale_.get() + first + WIDE, 0.0f);
    for (int64_t i = 0; i < count; ++i)
      x_scale_[first + i] =
          bf16_row(x_, first + i, measure, saved_.x_factor[first + i], scratch, rows + i * row_stride_);
    bf16_panel(rows, row_stride_, depth_, panel_of(panel));
  }

  void prepare_columns(int64_t first, int64_t at, int64_t count, int64_t total, bool measure, float* block,
                       float* scratch) {
    uint16_t *rows = rows_of(block), *pairs = pairs_of(block, total);
    for (int64_t j = at; j < at + count; ++j)
      scale_of(block, total)[j] =
          bf16_row(y_, first + j, measure, saved_.y_factor[first + j], scratch, rows + j * row_stride_);
    const int64_t end = at + count == total ? round_up(total, BF16_DEPTH) : at + count;
    std::fill(rows + (at + count) * row_stride_, rows + end * row_stride_, uint16_t(0));
    for (int64_t j = at; j < end; j += 2)
      interleave(rows + j * row_stride_, rows + (j + 1) * row_stride_, depth_, pairs + j / 2 * pair_stride_);
  }

  void logits(float* block, int64_t total, int64_t count, int64_t panel, int64_t panels, float* w) const {
    for (int64_t i = 0; i < panels; ++i) logits(block, total, count, panel + i, w + i * WIDE);
  }
  void logits(float* block, int64_t total, int64_t count, int64_t panel, float* w) const {
    const int64_t lanes = std::min(WIDE, round_up(rows_ - panel * WIDE, 16));
    const float *y_scale = scale_of(block, total), *x_scale = x_scale_.get() + panel * WIDE;
    // A few steps of the depth at a time: their part of the right operand stays in the first-level cache.
    const int64_t steps = depth_ / BF16_DEPTH, together = 16;
    for (int64_t s = 0; s < steps || s == 0; s += together)
      for (int64_t j = 0; j < count; j += BF16_ROWS)
        bf16_product({rows_of(block) + j * row_stride_ + s * BF16_DEPTH, row_stride_},
                     {panel_of(panel) + s * BF16_DEPTH * WIDE, 2 * WIDE}, std::min(together, steps - s),
                     std::min(BF16_ROWS, count - j), lanes, w + j * saved_.stride, saved_.stride, s > 0);
    for (int64_t v = 0; v < lanes; v += 16) {
      const Vector<float> factor = load(x_scale + v);
      for (int64_t j = 0; j < count; ++j)
        save(w + j * saved_.stride + v, load(w + j * saved_.stride + v) * factor * y_scale[j]);
    }
  }

  // -- Average --

  void allocate_average(int64_t blocks) { weight_rows_ = Buffer<uint16_t>(blocks * panels() * WIDE * WEIGHT_STRIDE); }

  // The weights w (count, stride) of a panel's rows, turned into a left operand (rows, columns).
  void weights_are_made(int64_t slot, int64_t panel, const float* w, int64_t count, float* block) {
    const float* y_scale = scale_of(block, count);
    uint16_t* out = weight_rows(slot, panel);
    const int64_t lanes = std::min(WIDE, round_up(rows_ - panel * WIDE, 16));
    for (int64_t j0 = 0; j0 < round_up(count, BF16_DEPTH); j0 += 16)
      for (int64_t half = 0; half < lanes; half += 16) {
        Vector<float> v[16];
        for (int64_t j = 0; j < 16; ++j)
          v[j] = j0 + j < count ? load(w + (j0 + j) * saved_.stride + half) * y_scale[j0 + j] : Vector<float>{};
        transpose_square<float>(v);
        for (int64_t i = 0; i < 16; ++i) round_vector((__m512)v[i], out + (half + i) * WEIGHT_STRIDE + j0);
      }
  }

  void average(int64_t slot, const float*, float* block, int64_t count, int64_t row0, int64_t rows, int64_t d0,
               float* out, int64_t out_stride, bool accumulate) const {
    const Bf16Operand pairs{pairs_of(block, count) + 2 * d0, pair_stride_};
    const int64_t columns = std::min(WIDE, round_up(width_ - d0, 16));
    for (int64_t i = 0; i < rows; i += WIDE)
      bf16_product({weight_rows(slot, (row0 + i) / WIDE), WEIGHT_STRIDE}, pairs, ceil_div(count, BF16_DEPTH),
                   std::min(WIDE, rows - i), columns, out + i * out_stride, out_stride, accumulate);
  }

  // -- Gradient of the columns --

  void allocate_gradient() {
    gradient_pairs_ = Buffer<uint16_t>(row_pairs() * pair_stride_);
    row_scale_ = Buffer<float>(2 * row_pairs());
  }
  int64_t gradient_scratch_size(int64_t count) const {
    return round_up(count, BF16_ROWS) * odd_lines_of_halves(rows_) / 2;
  }

  int64_t gradient_pieces() const { return ceil_div(row_pairs(), BF16_DEPTH / 2); }
  void prepare_gradient(int64_t piece, const float* factors, float* scratch) {
    uint16_t* rows = reinterpret_cast<uint16_t*>(scratch + depth_);
    for (int64_t pair = piece * (BF16_DEPTH / 2); pair < (piece + 1) * (BF16_DEPTH / 2); ++pair) {
      for (int64_t i = 2 * pair; i < 2 * pair + 2; ++i) {
        uint16_t* row = rows + i % 2 * row_stride_;
        if (i < rows_)
          row_scale_[i] = factors[i] * bf16_row(x_, i, false, saved_.x_factor[i], scratch, row);
        else
          row_scale_[i] = 0, std::fill_n(row, row_stride_, uint16_t(0));
      }
      interleave(rows, rows + row_stride_, depth_, gradient_pairs_.get() + pair * pair_stride_);
    }
  }

  void gradient(const float* w, int64_t count, float* out, int64_t out_stride, float* scratch) const {
    const int64_t stride = odd_lines_of_halves(rows_);
    uint16_t* left = reinterpret_cast<uint16_t*>(scratch);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < 2 * row_pairs(); i += 16) {
        const __mmask16 there = i + 16 <= rows_ ? 0xffff : i < rows_ ? __mmask16((1 << (rows_ - i)) - 1) : 0;
        const __m512 weight = _mm512_maskz_loadu_ps(there, w + j * saved_.stride + i);
        round_vector(_mm512_mul_ps(weight, (__m512)load(row_scale_.get() + i)), left + j * stride + i);
      }
    for (int64_t d0 = 0; d0 < depth_; d0 += WIDE)
      for (int64_t j = 0; j < count; j += BF16_ROWS)
        bf16_product({left + j * stride, stride}, {gradient_pairs_.get() + 2 * d0, pair_stride_},
                     2 * row_pairs() / BF16_DEPTH, std::min(BF16_ROWS, count - j), WIDE, out + j * out_stride + d0,
                     out_stride, false);
  }

 private:
  static constexpr int64_t WEIGHT_STRIDE = 288;  // of at most 264 columns; an odd number of cache lines
  static_assert(FEW <= WEIGHT_STRIDE && WEIGHT_STRIDE % BF16_DEPTH == 0 && BLOCK <= FEW,
                "a block's columns, rounded up to whole depths");
  const Rows<float>&x_, &y_;
  Saved<float> saved_;
  int64_t rows_, width_, depth_, row_stride_, pair_stride_;
  Buffer<uint16_t> logit_panels_;    // (panels, depth / 2, WIDE, 2)
  Buffer<uint16_t> weight_rows_;     // (slots, panels, WIDE, WEIGHT_STRIDE)
  Buffer<uint16_t> gradient_pairs_;  // (rows / 2, pair_stride)
  Buffer<float> x_scale_, row_scale_;

  int64_t row_pairs() const { return round_up(rows_, BF16_DEPTH) / 2; }
  uint16_t* panel_of(int64_t panel) const { return logit_panels_.get() + panel * depth_ * WIDE; }
  uint16_t* weight_rows(int64_t slot, int64_t panel) const {
    return weight_rows_.get() + (slot * panels() + panel) * WIDE * WEIGHT_STRIDE;
  }

  // In the memory of a block of `total` columns: rows, the same as pairs, and what the results are multiplied by.
  uint16_t* rows_of(float* block) const { return reinterpret_cast<uint16_t*>(block); }
  uint16_t* pairs_of(float* block, int64_t total) const {
    return rows_of(block) + round_up(total, BF16_DEPTH) * row_stride_;
  }
  float* scale_of(float* block, int64_t total) const {
    return block + round_up(total, BF16_DEPTH) / 2 * (row_stride_ + pair_stride_ / 2);
  }
};

}  // namespace FM_ISA
}  // namespace fused_margins
