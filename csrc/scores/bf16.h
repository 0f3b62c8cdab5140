// Strips of the similarity matrix and the products of its gradients (../cpu/strips.h, gradient.h) for bfloat16, on
// the matrix unit or the vector unit. Rows are taken as they are, and their factors applied to the results; derivatives
// are rounded to bfloat16 for the two products that they enter.
#pragma once

#include "../cpu/bf16_rows.h"
#include "../cpu/strips.h"

namespace fused_margins {
namespace FM_ISA {

class Bf16Strips {
 public:
  using Value = float;
  using Session = Bf16Session;
  Rows<float> x, y;
  int threads;
  int64_t depth, row_stride;       // of rows, in bfloat16 values
  Buffer<float> x_scale, y_scale;  // what products with a row are multiplied by; of y those of a chunk

  Bf16Strips(const Matrix& x_matrix, const Matrix& y_matrix, Similarity similarity, int products)
      : x(x_matrix, similarity, nullptr),
        y(y_matrix, similarity, nullptr),
        threads(thread_count(double(x.count()) * double(y.count()) * double(x.width()) * products)),
        depth(round_up(x.width(), BF16_DEPTH)),
        row_stride(odd_lines_of_halves(x.width())),
        x_scale(x_capacity()),
        y_scale(y_capacity()),
        x_rows_(x_capacity() * row_stride),
        y_panels_(y_capacity() * depth),
        scratch_(threads, std::max(depth + BF16_COLUMNS * row_stride / 2, ROW_BLOCK * STRIP)) {}

  int64_t chunks() const { return ceil_div(y.count(), CHUNK); }
  Chunk chunk(int64_t c) const { return {c * CHUNK, std::min(CHUNK, y.count() - c * CHUNK)}; }
  // Row i of x; zeros from the last one up to whole blocks.
  const uint16_t* x_row(int64_t i) const { return x_rows_.get() + i * row_stride; }

  // Factors of all rows of x, and the rows as a left operand.
  void prepare_rows(Team& team) {
    team.each(x_capacity(), BF16_DEPTH, [&](int64_t i) {
      uint16_t* out = x_rows_.get() + i * row_stride;
      const bool there = i < x.count();
      x_scale[i] = there ? bf16_row(x, i, true, x.factor[i], scratch_.mine(), out) : 0.0f;
      if (!there) std::fill(out, out + row_stride, uint16_t(0));
    });
  }

  // Factors and panels of the columns of a chunk.
  void prepare_columns(Team& team, const Chunk& chunk) {
    team.each(ceil_div(chunk.count, BF16_COLUMNS), 2, [&](int64_t p) {
      float* values = scratch_.mine();
      uint16_t* rows = reinterpret_cast<uint16_t*>(values + depth);
      for (int64_t r = 0; r < BF16_COLUMNS; ++r) {
        const int64_t j = p * BF16_COLUMNS + r, column = chunk.first + j;
        uint16_t* out = rows + r * row_stride;
        const bool there = j < chunk.count;
        y_scale[j] = there ? bf16_row(y, column, true, y.factor[column], values, out) : 0.0f;
        if (!there) std::fill(out, out + row_stride, uint16_t(0));
      }
      bf16_panel(rows, row_stride, depth, panel(p * BF16_COLUMNS));
    });
  }

  // f(row, first column, count, u) for every row and strip of the chunk; u (count,) may be overwritten.
  template <class F>
  void for_each(Team& team, const Chunk& chunk, F f) const {
    const int64_t blocks = ceil_div(x.count(), ROW_BLOCK);
    float* u = scratch_.mine();
    team.each(blocks * chunk.strips(), 1, [&](int64_t task) {
      const int64_t row0 = task / chunk.strips() * ROW_BLOCK, rows = std::min(ROW_BLOCK, x.count() - row0);
      const int64_t first = task % chunk.strips() * STRIP, count = std::min(STRIP, chunk.count - first);
      for (int64_t c = 0; c < count; c += BF16_COLUMNS)
        for (int64_t r = 0; r < rows; r += BF16_ROWS)
          bf16_product({x_row(row0 + r), row_stride}, {panel(first + c), 2 * BF16_COLUMNS}, depth / BF16_DEPTH,
                       std::min(BF16_ROWS, rows - r), BF16_COLUMNS, u + r * STRIP + c, STRIP, false);
      for (int64_t r = 0; r < rows; ++r) {
        float* of_row = u + r * STRIP;
        const float scale = x_scale[row0 + r];
        for (int64_t j = 0; j < count; ++j) of_row[j] = of_row[j] * scale * y_scale[first + j];
        f(row0 + r, chunk.first + first, count, of_row);
      }
    });
  }

 private:
  Buffer<uint16_t> x_rows_;    // (capacity, row_stride)
  Buffer<uint16_t> y_panels_;  // (CHUNK / BF16_COLUMNS, depth / 2, BF16_COLUMNS, 2)
  Scratch<float> scratch_;

  // Whole blocks of rows and columns, and of depths where they are these.
  int64_t x_capacity() const { return round_up(round_up(x.count(), ROW_BLOCK), BF16_DEPTH); }
  int64_t y_capacity() const { return round_up(std::min(CHUNK, y.count()), BF16_COLUMNS); }
  uint16_t* panel(int64_t column_in_chunk) const { return y_panels_.get() + column_in_chunk * depth; }
};

class Bf16Gradient {
 public:
  Bf16Gradient(Bf16Strips& strips, bool need_x, bool need_y)
      : strips_(strips),
        need_x_(need_x),
        need_y_(need_y),
        rows_(strips.x.count()),
        columns_(std::min(CHUNK, strips.y.count())),
        padded_(round_up(strips.x.width(), BF16_COLUMNS)),
        stride_(odd_lines(round_up(columns_, ROW_BLOCK))),
        pair_stride_(2 * odd_lines(padded_)),
        d_(rows_ * stride_),
        x_pairs_(need_y ? round_up(rows_, BF16_DEPTH) / 2 * pair_stride_ : 0),
        y_pairs_(need_x ? round_up(columns_, BF16_DEPTH) / 2 * pair_stride_ : 0),
        sum_x_(need_x ? round_up(rows_, ROW_BLOCK) * padded_ : 0),
        scratch_(strips.threads, left_size() + ROW_BLOCK * padded_ + padded_ + strips.row_stride) {}

  // (count,): dL/du of one row, to be filled for the columns of the current chunk.
  float* row(int64_t i) const { return d_.get() + i * stride_; }

  // x as a right operand.
  void prepare_rows(Team& team) {
    team.each(need_y_ ? round_up(rows_, BF16_DEPTH) / 2 : 0, BF16_DEPTH, [&](int64_t pair) {
      interleave(strips_.x_row(2 * pair), strips_.x_row(2 * pair + 1), padded_, x_pairs_.get() + pair * pair_stride_);
    });
  }

  // The chunk's columns as a right operand.
  void prepare_columns(Team& team, const Chunk& chunk) {
    float* values = scratch_.mine();
    uint16_t* pair = reinterpret_cast<uint16_t*>(values + padded_);
    team.each(need_x_ ? round_up(chunk.count, BF16_DEPTH) / 2 : 0, BF16_DEPTH, [&](int64_t to) {
      for (int64_t k = 0; k < 2; ++k) {
        const int64_t j = 2 * to, column = chunk.first + j + k;
        if (j + k < chunk.count)
          bf16_row(strips_.y, column, false, strips_.y.factor[column], values, pair + k * strips_.row_stride);
        else
          std::fill_n(pair + k * strips_.row_stride, strips_.row_stride, uint16_t(0));
      }
      interleave(pair, pair + strips_.row_stride, padded_, y_pairs_.get() + to * pair_stride_);
    });
  }

  // Both products; finish(column, weight, sum (width,), scratch (width,)) takes each row of D^T x. The weight is 0:
  // only distances ask for it, and bfloat16 has none here.
  template <class F>
  void products(Team& team, const Chunk& chunk, F finish) {
    const int64_t row_tasks = need_x_ ? ceil_div(rows_, ROW_BLOCK) : 0;
    const int64_t column_tasks = need_y_ ? ceil_div(chunk.count, ROW_BLOCK) : 0;
    float* scratch = scratch_.mine();
    uint16_t* left = reinterpret_cast<uint16_t*>(scratch);
    float *out = scratch + left_size(), *values = out + ROW_BLOCK * padded_;
    team.each(row_tasks + column_tasks, 1, [&](int64_t task) {
      if (task < row_tasks) {
        const int64_t first = task * ROW_BLOCK, count = std::min(ROW_BLOCK, rows_ - first);
        const int64_t stride = odd_lines_of_halves(columns_), steps = ceil_div(chunk.count, BF16_DEPTH);
        for (int64_t r = 0; r < count; ++r) round_rows(row(first + r), chunk.count, left + r * stride);
        multiply({left, stride}, y_pairs_.get(), steps, count, sum_x_.get() + first * padded_, chunk.first > 0);
      } else {
        const int64_t first = (task - row_tasks) * ROW_BLOCK, count = std::min(ROW_BLOCK, chunk.count - first);
        const int64_t stride = odd_lines_of_halves(rows_), steps = ceil_div(rows_, BF16_DEPTH);
        round_transposed(first, left, stride);
        multiply({left, stride}, x_pairs_.get(), steps, count, out, false);
        for (int64_t j = 0; j < count; ++j) finish(chunk.first + first + j, 0.0f, out + j * padded_, values);
      }
    });
  }

  // After the last chunk: finish(row, sum (width,), scratch (width,)) takes each row of D y.
  template <class F>
  void rows(Team& team, F finish) {
    team.each(need_x_ ? rows_ : 0, ROW_QUANTUM, [&](int64_t i) {
      if (!columns_) std::fill_n(sum_x_.get() + i * padded_, padded_, 0.0f);
      finish(i, sum_x_.get() + i * padded_, scratch_.mine());
    });
  }

  // sum_i D_ij w_i of a column of the current chunk, in row order.
  float column_sum(int64_t column_in_chunk, const float* w) const {
    float sum = 0;
    for (int64_t i = 0; i < rows_; ++i) sum += row(i)[column_in_chunk] * w[i];
    return sum;
  }

 private:
  Bf16Strips& strips_;
  bool need_x_, need_y_;
  int64_t rows_, columns_, padded_, stride_, pair_stride_;
  Buffer<float> d_;           // (rows, stride)
  Buffer<uint16_t> x_pairs_;  // (rows / 2, pair_stride)
  Buffer<uint16_t> y_pairs_;  // (CHUNK / 2, pair_stride)
  Buffer<float> sum_x_;       // (rows, padded)
  Scratch<float> scratch_;    // of a task: its left operand, its sums and a row; or two rows

  int64_t left_size() const { return ROW_BLOCK * odd_lines_of_halves(std::max(rows_, columns_)) / 2; }

  void multiply(Bf16Operand left, const uint16_t* pairs, int64_t steps, int64_t count, float* out,
                bool accumulate) const {
    for (int64_t d = 0; d < padded_; d += BF16_COLUMNS)
      for (int64_t r = 0; r < count; r += BF16_ROWS)
        bf16_product({left.data + r * left.stride, left.stride}, {pairs + 2 * d, pair_stride_}, steps,
                     std::min(BF16_ROWS, count - r), BF16_COLUMNS, out + r * padded_ + d, padded_, accumulate);
  }

  // A row of D (count,), each times its column's scale; zeros up to a whole depth.
  void round_rows(const float* d, int64_t count, uint16_t* out) const {
    for (int64_t j = 0; j < round_up(count, BF16_DEPTH); j += 16) {
      const int64_t left = count - j;
      const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? __mmask16((1 << left) - 1) : 0;
      const __m512 scale = _mm512_maskz_loadu_ps(there, strips_.y_scale.get() + j);
      round_vector(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, d + j), scale), out + j);
    }
  }

  // Columns first ... first + ROW_BLOCK of D as rows, each value times its row's scale; zeros up to a whole depth.
  void round_transposed(int64_t first, uint16_t* out, int64_t out_stride) const {
    for (int64_t i0 = 0; i0 < round_up(rows_, BF16_DEPTH); i0 += 16)
      for (int64_t j0 = 0; j0 < ROW_BLOCK; j0 += 16) {
        Vector<float> v[16];
        for (int64_t i = 0; i < 16; ++i)
          v[i] = i0 + i < rows_ ? load(row(i0 + i) + first + j0) * strips_.x_scale[i0 + i] : Vector<float>{};
        transpose_square<float>(v);
        for (int64_t j = 0; j < 16; ++j) round_vector((__m512)v[j], out + (j0 + j) * out_stride + i0);
      }
  }
};

}  // namespace FM_ISA
}  // namespace fused_margins
