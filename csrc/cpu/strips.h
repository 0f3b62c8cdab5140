// The similarity matrix, a strip at a time: it is computed tile by tile and handed to a function row by row while it is
// hot.
//
// Columns are taken in chunks of at most CHUNK, whose packed form fits the caches; within a chunk the work is cut into
// blocks of ROW_BLOCK rows x STRIP columns. Where sums are cut depends on the sizes alone, so results do not depend on
// the number of threads. Member functions that take a team are called by all of its threads.
#pragma once

#include "rows.h"
#include "scratch.h"
#include "team.h"
#include "transpose.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t ROW_BLOCK = 4 * TILE_ROWS;
constexpr int64_t STRIP = 256;
constexpr int64_t STRIPS = 8;  // strips a chunk
constexpr int64_t CHUNK = STRIP * STRIPS;

struct Chunk {
  int64_t first, count;
  int64_t strips() const { return ceil_div(count, STRIP); }
};

// Columns of a chunk, whole strips: their panels, and derivatives of `rows` rows, take 2 MiB of float32 each if they
// can, but every thread has four blocks of columns to work on. Sums over columns are cut at strips, too: how many make
// a chunk changes no bit of them.
static_assert(STRIP == DEPTH_BLOCK);
inline int64_t chunk_columns(int64_t rows, int64_t width, int64_t threads) {
  const int64_t fitting = (int64_t(1) << 19) / std::max({rows, width, int64_t(1)}) / STRIP * STRIP;
  return std::min(CHUNK, std::max({fitting, STRIP, round_up(4 * threads * ROW_BLOCK, STRIP)}));
}

template <class T>
class Strips {
 public:
  using Value = T;
  struct Session {};  // what a thread has to set up
  Buffer<T> centre;
  Rows<T> x, y;
  int threads;

  // products: of the call. Only a forward has but one, and keeps no derivatives.
  Strips(const Matrix& x_matrix, const Matrix& y_matrix, Similarity similarity, int products)
      : centre(centre_of<T>(y_matrix, similarity)),
        x(x_matrix, similarity, centre.get()),
        y(y_matrix, similarity, centre.get()),
        threads(thread_count(double(x_matrix.rows) * double(y_matrix.rows) * double(x_matrix.width) * products)),
        chunk_(chunk_columns(products > 1 ? x.count() : 1, x.width(), threads)),
        stride_(odd_lines(x.width())),
        x_rows_(round_up(x.count(), ROW_QUANTUM) * stride_),
        y_panels_(round_up(std::min(chunk_, y.count()), TILE_COLUMNS<T>) * x.width()),
        scratch_(threads, std::max(TILE_COLUMNS<T> * stride_, ROW_BLOCK * STRIP)) {}

  int64_t chunks() const { return ceil_div(y.count(), chunk_); }
  Chunk chunk(int64_t c) const { return {c * chunk_, std::min(chunk_, y.count() - c * chunk_)}; }
  // Columns of the largest chunk.
  int64_t largest_chunk() const { return std::min(chunk_, y.count()); }
  // Row i of x as the products take it.
  const T* x_row(int64_t i) const { return x_rows_.get() + i * stride_; }

  // All rows of x, and their factors.
  void prepare_rows(Team& team) {
    team.each(x.count(), STRIP / 4, [&](int64_t i) { x.factor[i] = x.prepare(i, x_rows_.get() + i * stride_); });
  }

  // Factors and panels of the columns of a chunk.
  void prepare_columns(Team& team, const Chunk& chunk) {
    constexpr int64_t wide = TILE_COLUMNS<T>;
    team.each(ceil_div(chunk.count, wide), 2, [&](int64_t p) {
      T* rows = scratch_.mine();
      for (int64_t r = 0; r < wide; ++r) {
        const int64_t j = p * wide + r;
        if (j < chunk.count)
          y.factor[chunk.first + j] = y.prepare(chunk.first + j, rows + r * stride_);
        else
          std::fill_n(rows + r * stride_, y.width(), T(0));
      }
      transpose_panel(rows, stride_, y.width(), y_panels_.get() + p * wide * y.width());
    });
  }

  // f(row, first column, count, u) for every row and strip of the chunk; u (count,) may be overwritten.
  template <class F>
  void for_each(Team& team, const Chunk& chunk, F f) const {
    const int64_t blocks = ceil_div(x.count(), ROW_BLOCK), depth = x.width();
    T* u = scratch_.mine();
    team.each(blocks * chunk.strips(), 1, [&](int64_t task) {
      const int64_t row0 = task / chunk.strips() * ROW_BLOCK, rows = std::min(ROW_BLOCK, x.count() - row0);
      const int64_t first = task % chunk.strips() * STRIP, count = std::min(STRIP, chunk.count - first);
      for (int64_t c = 0; c < count; c += TILE_COLUMNS<T>)
        panel_product<T, Left::contiguous_depth>(x_row(row0), stride_, rows, y_panels_.get() + (first + c) * depth,
                                                 TILE_COLUMNS<T>, std::min(TILE_COLUMNS<T>, count - c), depth, u + c,
                                                 STRIP, false);
      for (int64_t r = 0; r < rows; ++r) {
        if (x.similarity == Similarity::negative_squared_euclidean)
          distances(x.factor[row0 + r], y.factor.get() + chunk.first + first, count, u + r * STRIP);
        f(row0 + r, chunk.first + first, count, u + r * STRIP);
      }
    });
  }

  // -|x - y|^2 from products of centred rows and their squared lengths.
  static void distances(T x_squared, const T* y_squared, int64_t count, T* u) {
    for (int64_t j = 0; j < count; ++j) {
      const T value = 2 * u[j] - x_squared - y_squared[j];
      u[j] = value > 0 ? T(0) : value;
    }
  }

 private:
  int64_t chunk_, stride_;  // of columns; between rows
  Buffer<T> x_rows_;        // (rows, stride)
  Buffer<T> y_panels_;      // (chunk / TILE_COLUMNS, width, TILE_COLUMNS)
  Scratch<T> scratch_;
};

}  // namespace FM_ISA
}  // namespace fused_margins
