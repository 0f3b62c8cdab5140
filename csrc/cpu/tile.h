// The register tile that every product is made of, and the panels that feed it.
//
// A tile is TILE_ROWS x TILE_COLUMNS sums over `depth`; its right operand is a panel (depth, TILE_COLUMNS), contiguous,
// and its left operand any matrix with a unit stride in one direction. Every sum runs over depth in order, whatever its
// place in the tile: equal columns give equal bits.
#pragma once

#include "buffer.h"
#include "simd.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t TILE_ROWS = FM_TILE_ROWS;
template <class T>
constexpr int64_t TILE_COLUMNS = 2 * VectorOf<T>::lanes;

enum class Left { contiguous_rows, contiguous_depth };

// Depths summed in registers at a time: rounding errors grow with a sum's length, so long ones are sums of sums.
constexpr int64_t DEPTH_BLOCK = 256;

// out(m, n) (+)= sum_k a(m, k) b(k, n) for M rows and W vectors of columns. `a_stride` is the distance between depths
// (contiguous_rows) or rows (contiguous_depth), `b_stride` the one between depths of b.
template <class T, Left layout, int M = TILE_ROWS, int W = 2>
__attribute__((noinline)) void tile_product(const T* a, int64_t a_stride, const T* b, int64_t depth, T* out,
                                            int64_t out_stride, bool accumulate, int64_t b_stride = TILE_COLUMNS<T>) {
  using V = Vector<T>;
  constexpr int64_t lanes = VectorOf<T>::lanes;
  int64_t k = 0;
  do {
    const int64_t end = k + DEPTH_BLOCK < depth ? k + DEPTH_BLOCK : depth;
    V sum[M][W];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int w = 0; w < W; ++w) sum[m][w] = V{};
    for (; k < end; ++k) {
      V right[W];
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) right[w] = load(b + k * b_stride + w * lanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const T value = layout == Left::contiguous_rows ? a[k * a_stride + m] : a[m * a_stride + k];
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) sum[m][w] += value * right[w];
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        T* o = out + m * out_stride + w * lanes;
        save(o, accumulate ? load(o) + sum[m][w] : sum[m][w]);
      }
    accumulate = true;
  } while (k < depth);
}

// Rows of a left operand come in multiples of this: memory for that many must be there, whatever it holds.
constexpr int64_t ROW_QUANTUM = TILE_ROWS / 3;

// The same for any number of rows, and columns <= TILE_COLUMNS whose vectors are there as a whole. The depth is the
// outermost loop: a block of the right operand stays in the first-level cache while all rows pass.
template <class T, Left layout>
void panel_product(const T* a, int64_t a_stride, int64_t rows, const T* b, int64_t b_stride, int64_t columns,
                   int64_t depth, T* out, int64_t out_stride, bool accumulate) {
  static constexpr int64_t Q = ROW_QUANTUM;
  using Tile = void (*)(const T*, int64_t, const T*, int64_t, T*, int64_t, bool, int64_t);
  static constexpr Tile tiles[2][3] = {
      {tile_product<T, layout, Q, 1>, tile_product<T, layout, 2 * Q, 1>, tile_product<T, layout, 3 * Q, 1>},
      {tile_product<T, layout, Q, 2>, tile_product<T, layout, 2 * Q, 2>, tile_product<T, layout, 3 * Q, 2>}};
  const Tile* tile = tiles[columns > VectorOf<T>::lanes];
  for (int64_t k = 0; k < depth || k == 0; k += DEPTH_BLOCK) {
    const int64_t count = depth - k < DEPTH_BLOCK ? depth - k : DEPTH_BLOCK;
    for (int64_t m = 0; m < rows; m += TILE_ROWS) {
      const int64_t thirds = rows - m < TILE_ROWS ? ceil_div(rows - m, Q) : 3;
      const T* left = layout == Left::contiguous_rows ? a + k * a_stride + m : a + m * a_stride + k;
      tile[thirds - 1](left, a_stride, b + k * b_stride, count, out + m * out_stride, out_stride, accumulate || k > 0,
                       b_stride);
    }
  }
}

}  // namespace FM_ISA
}  // namespace fused_margins
