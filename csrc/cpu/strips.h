// The similarity matrix, a strip at a time: it is computed tile by tile and handed to a function row by row while it is
// hot.
//
// Columns are taken in chunks of CHUNK, whose packed form fits the caches; within a chunk the work is cut into blocks
// of ROW_BLOCK rows x STRIP columns. The cut depends on the sizes alone, so results do not depend on the number of
// threads. Member functions that take a team are called by all of its threads.
#pragma once

#include "rows.h"
#include "scratch.h"
#include "team.h"

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

template <class T>
class Strips {
 public:
  using Value = T;
  struct Session {};  // what a thread has to set up
  Buffer<T> centre;
  Rows<T> x, y;
  int threads;

  Strips(const Matrix& x_matrix, const Matrix& y_matrix, Similarity similarity, int products)
      : centre(centre_of<T>(y_matrix, similarity)),
        x(x_matrix, similarity, centre.get()),
        y(y_matrix, similarity, centre.get()),
        threads(thread_count(double(x_matrix.rows) * double(y_matrix.rows) * double(x_matrix.width) * products)),
        x_panels_(round_up(x.count(), TILE_ROWS) * x.width()),
        y_panels_(round_up(std::min(CHUNK, y.count()), TILE_COLUMNS<T>) * x.width()),
        scratch_(threads, std::max(std::max(TILE_ROWS, TILE_COLUMNS<T>) * x.width(), ROW_BLOCK * STRIP)) {}

  int64_t chunks() const { return ceil_div(y.count(), CHUNK); }
  Chunk chunk(int64_t c) const { return {c * CHUNK, std::min(CHUNK, y.count() - c * CHUNK)}; }

  // Factors and panels of all rows of x.
  void prepare_rows(Team& team) {
    team.each(ceil_div(x.count(), TILE_ROWS), 4, [&](int64_t p) {
      pack(x, p * TILE_ROWS, std::min(TILE_ROWS, x.count() - p * TILE_ROWS), scratch_.mine(),
           x_panels_.get() + p * TILE_ROWS * x.width(), TILE_ROWS);
    });
  }

  // Factors and panels of the columns of a chunk.
  void prepare_columns(Team& team, const Chunk& chunk) {
    constexpr int64_t wide = TILE_COLUMNS<T>;
    team.each(ceil_div(chunk.count, wide), 2, [&](int64_t p) {
      pack(y, chunk.first + p * wide, std::min(wide, chunk.count - p * wide), scratch_.mine(),
           y_panels_.get() + p * wide * y.width(), wide);
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
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
          tile_product<T, Left::contiguous_rows>(x_panels_.get() + (row0 + r) * depth, TILE_ROWS,
                                                 y_panels_.get() + (first + c) * depth, depth, u + r * STRIP + c, STRIP,
                                                 false);
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
  Buffer<T> x_panels_;  // (rows / TILE_ROWS, width, TILE_ROWS)
  Buffer<T> y_panels_;  // (CHUNK / TILE_COLUMNS, width, TILE_COLUMNS)
  Scratch<T> scratch_;

  static void pack(Rows<T>& side, int64_t first, int64_t count, T* block, T* panel, int64_t panel_rows) {
    for (int64_t r = 0; r < count; ++r) {
      side.measure(first + r, block + r * side.width());
      side.prepared(first + r, block + r * side.width());
    }
    pack_transposed(block, side.width(), count, side.width(), panel, panel_rows);
  }
};

}  // namespace FM_ISA
}  // namespace fused_margins
