// All pairs between a few rows and a few columns, straight from where they lie: nothing is packed.
#pragma once

#include "transpose.h"

namespace fused_margins {
namespace FM_ISA {

// Sums over the lanes of as many vectors as a vector has lanes: sum i in lane i.
template <class T, int step = 1>
__attribute__((always_inline)) inline Vector<T> sum_lanes(Vector<T>* v) {
  constexpr int lanes = int(VectorOf<T>::lanes);
  if constexpr (step == lanes) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i += 2 * step) {
      exchange<T, step>(v[i], v[i + step], std::make_index_sequence<size_t(lanes)>());
      v[i] += v[i + step];
    }
    return sum_lanes<T, 2 * step>(v);
  }
}

// One block: 4 rows against as many columns as fill a vector of sums. Every sum runs in one order, whatever its place.
// As many rows of `soon` come into the cache meanwhile.
template <class T, bool distances>
__attribute__((noinline)) void pair_block(const T* const* rows, const T* const* columns, int64_t width, T* out,
                                          const T* const* soon) {
  using V = Vector<T>;
  constexpr int lanes = int(VectorOf<T>::lanes), M = lanes >= 4 ? 4 : lanes, N = lanes / M;
  V sums[M * N] = {};
  int64_t d = 0;
  for (; d + lanes <= width; d += lanes) {
    V right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      right[n] = load(columns[n] + d);
      __builtin_prefetch(soon[n] + d, 0, 2);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V left = load(rows[m] + d);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const V difference = left - right[n];
        sums[m * N + n] += distances ? difference * difference : left * right[n];
      }
    }
  }
  save(out, sum_lanes<T>(sums));
  if (d == width) return;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      T sum = 0;
      for (int64_t e = d; e < width; ++e) {
        const T difference = rows[m][e] - columns[n][e];
        sum += distances ? difference * difference : rows[m][e] * columns[n][e];
      }
      out[m * N + n] += sum;
    }
}

// u (rows, stride): products or squared distances of `rows` with `columns`; `mirror`: they are the same, and u is made
// in one half alone. `padded`: u has room for whole blocks, and what is between is anything. `soon` (soon_count,), a
// multiple of 4: rows that will be wanted next.
template <class T>
void all_pairs(const T* const* rows, int64_t row_count, const T* const* columns, int64_t column_count, int64_t width,
               bool distances, bool mirror, T* u, int64_t stride, bool padded = false, const T* const* soon = nullptr,
               int64_t soon_count = 0) {
  constexpr int64_t lanes = VectorOf<T>::lanes, M = lanes >= 4 ? 4 : lanes, N = lanes / M;
  const auto block = distances ? pair_block<T, true> : pair_block<T, false>;
  const T* const* const soon_end = soon + soon_count;
  T out[lanes];
  for (int64_t i = 0; i < row_count; i += M)
    for (int64_t j = mirror ? i / N * N : 0; j < column_count; j += N) {
      const T *last_rows[M], *last_columns[N];  // the last one again where there are no more
      const T *const *left = rows + i, *const *right = columns + j;
      if (i + M > row_count) {
        for (int64_t m = 0; m < M; ++m) last_rows[m] = rows[i + m < row_count ? i + m : row_count - 1];
        left = last_rows;
      }
      if (j + N > column_count) {
        for (int64_t n = 0; n < N; ++n) last_columns[n] = columns[j + n < column_count ? j + n : column_count - 1];
        right = last_columns;
      }
      block(left, right, width, out, soon < soon_end ? soon : right);  // right: what is being read comes for nothing
      if (soon < soon_end) soon += N;
      T *here = u + i * stride + j, *there = u + j * stride + i;
      const bool turned = mirror && j >= i + M;  // blocks on the diagonal hold both halves
      if (padded || (i + M <= row_count && j + N <= column_count)) {
        for (int64_t m = 0; m < M; ++m) std::memcpy(here + m * stride, out + m * N, N * sizeof(T));
        for (int64_t n = 0; turned && n < N; ++n)
          for (int64_t m = 0; m < M; ++m) there[n * stride + m] = out[m * N + n];
      } else {
        for (int64_t m = 0; m < M && i + m < row_count; ++m)
          for (int64_t n = 0; n < N && j + n < column_count; ++n) {
            here[m * stride + n] = out[m * N + n];
            if (turned) there[n * stride + m] = out[m * N + n];
          }
      }
    }
}

}  // namespace FM_ISA
}  // namespace fused_margins
