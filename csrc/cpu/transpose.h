// Rows into panels: the transposition that a right operand needs.
#pragma once

#include <utility>

#include "tile.h"

namespace fused_margins {
namespace FM_ISA {

// Exchanges blocks of `step` lanes between vectors that lie `step` apart: after steps 1, 2, 4, ... a square is
// transposed.
template <class T, int step, size_t... lane>
inline void exchange(Vector<T>& low, Vector<T>& high, std::index_sequence<lane...>) {
  constexpr int lanes = int(VectorOf<T>::lanes);
  const Vector<T> a = low, b = high;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (lane & step ? lanes + int(lane) - step : int(lane))...);
  high = __builtin_shufflevector(a, b, (lane & step ? lanes + int(lane) : int(lane) + step)...);
#else
  using I = typename VectorOf<T>::int_type;
  low = __builtin_shuffle(a, b, I{(lane & step ? lanes + int(lane) - step : int(lane))...});
  high = __builtin_shuffle(a, b, I{(lane & step ? lanes + int(lane) : int(lane) + step)...});
#endif
}

template <class T, int step = 1>
inline void transpose_square(Vector<T>* v) {
  constexpr int lanes = int(VectorOf<T>::lanes);
  if constexpr (step < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (!(i & step)) exchange<T, step>(v[i], v[i + step], std::make_index_sequence<size_t(lanes)>());
    transpose_square<T, 2 * step>(v);
  }
}

// Rows (TILE_COLUMNS, stride) of `depth` values, whole vectors of them, into a panel (depth, TILE_COLUMNS).
template <class T>
inline void transpose_panel(const T* rows, int64_t stride, int64_t depth, T* panel) {
  constexpr int64_t lanes = VectorOf<T>::lanes, wide = TILE_COLUMNS<T>;
  for (int64_t d = 0; d < depth; d += lanes)
    for (int64_t half = 0; half < wide; half += lanes) {
      Vector<T> v[lanes];
      for (int64_t i = 0; i < lanes; ++i) v[i] = load(rows + (half + i) * stride + d);
      transpose_square<T>(v);
      const int64_t count = depth - d < lanes ? depth - d : lanes;
      for (int64_t i = 0; i < count; ++i) save(panel + (d + i) * wide + half, v[i]);
    }
}

}  // namespace FM_ISA
}  // namespace fused_margins
