// The register tile that every product is made of, and the panels that feed it.
//
// A tile is TILE_ROWS x TILE_COLUMNS sums over `depth`; its right operand is a panel (depth, TILE_COLUMNS), contiguous,
// and its left operand any matrix with a unit stride in one direction. Every sum runs over depth in order, whatever its
// place in the tile: equal columns give equal bits.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t TILE_ROWS = FM_TILE_ROWS;
template <class T>
constexpr int64_t TILE_COLUMNS = 2 * VectorOf<T>::lanes;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Uninitialised memory on a cache-line boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : data_(nullptr, &std::free) {
    if (count <= 0) return;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, size_t(round_up(count * int64_t(sizeof(T)), 64)))));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  std::unique_ptr<T, void (*)(void*)> data_;
};

enum class Left { contiguous_rows, contiguous_depth };

// Depths summed in registers at a time: rounding errors grow with a sum's length, so long ones are sums of sums.
constexpr int64_t DEPTH_BLOCK = 256;

// out(m, n) (+)= sum_k a(m, k) b(k, n). `a_stride` is the distance between depths (contiguous_rows) or rows
// (contiguous_depth).
template <class T, Left layout>
inline void tile_product(const T* a, int64_t a_stride, const T* b, int64_t depth, T* out, int64_t out_stride,
                         bool accumulate) {
  using V = typename VectorOf<T>::type;
  constexpr int64_t lanes = VectorOf<T>::lanes;
  int64_t k = 0;
  do {
    const int64_t end = k + DEPTH_BLOCK < depth ? k + DEPTH_BLOCK : depth;
    V sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int m = 0; m < TILE_ROWS; ++m) sum[m][0] = sum[m][1] = V{};
    for (; k < end; ++k) {
      const V b0 = *reinterpret_cast<const V*>(b + k * 2 * lanes);
      const V b1 = *reinterpret_cast<const V*>(b + k * 2 * lanes + lanes);
#pragma GCC unroll 16
      for (int m = 0; m < TILE_ROWS; ++m) {
        const T value = layout == Left::contiguous_rows ? a[k * a_stride + m] : a[m * a_stride + k];
        sum[m][0] += value * b0;
        sum[m][1] += value * b1;
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < TILE_ROWS; ++m) {
      V* o = reinterpret_cast<V*>(out + m * out_stride);
      V* o1 = reinterpret_cast<V*>(out + m * out_stride + lanes);
      *o = accumulate ? *o + sum[m][0] : sum[m][0];
      *o1 = accumulate ? *o1 + sum[m][1] : sum[m][1];
    }
    accumulate = true;
  } while (k < depth);
}

// Rows (count <= panel_rows, depth), `stride` apart, into a panel (depth, panel_rows); missing rows are zero.
template <class T>
inline void pack_transposed(const T* rows, int64_t stride, int64_t count, int64_t depth, T* panel, int64_t panel_rows) {
  constexpr int64_t step = 16;  // depths at a time: the part of the panel being written stays in the first-level cache
  for (int64_t k0 = 0; k0 < depth; k0 += step) {
    const int64_t k1 = k0 + step < depth ? k0 + step : depth;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = k0; k < k1; ++k) panel[k * panel_rows + r] = rows[r * stride + k];
    for (int64_t r = count; r < panel_rows; ++r)
      for (int64_t k = k0; k < k1; ++k) panel[k * panel_rows + r] = 0;
  }
}

}  // namespace FM_ISA
}  // namespace fused_margins
