// Sums of bf16.h on the vector unit (AVX512_BF16): the register tile of tile.h, two depths an instruction.
#pragma once

#include "bf16.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t BF16_ROWS = 4 * TILE_ROWS;  // of sums made together: they share the right operand in the cache
struct Bf16Session {};                        // nothing to set up

// M rows and W vectors of sums over `depth`. Each sum runs over depth in order, whatever M and W.
template <int M, int W>
__attribute__((noinline)) void bf16_tile(const Bf16Operand& a, const Bf16Operand& b, int64_t depth, float* out,
                                         int64_t out_stride, bool accumulate) {
  const uint16_t* right = b.data;
  __m512 sum[M][W];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) sum[m][w] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2, right += b.stride) {
    __m512bh columns[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) columns[w] = (__m512bh)_mm512_loadu_si512(right + 32 * w);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, a.data + m * a.stride + k, sizeof(pair));
      const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sum[m][w] = _mm512_dpbf16_ps(sum[m][w], row, columns[w]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      float* o = out + m * out_stride + 16 * w;
      _mm512_storeu_ps(o, accumulate ? _mm512_add_ps(_mm512_loadu_ps(o), sum[m][w]) : sum[m][w]);
    }
}

inline void bf16_sums(Bf16Operand a, const Bf16Operand& b, int64_t steps, int64_t rows, int64_t columns, float* out,
                      int64_t out_stride, bool accumulate) {
  constexpr int Q = ROW_QUANTUM;
  using Tile = void (*)(const Bf16Operand&, const Bf16Operand&, int64_t, float*, int64_t, bool);
  static constexpr Tile tiles[2][3] = {{bf16_tile<Q, 1>, bf16_tile<2 * Q, 1>, bf16_tile<3 * Q, 1>},
                                       {bf16_tile<Q, 2>, bf16_tile<2 * Q, 2>, bf16_tile<3 * Q, 2>}};
  for (int64_t m = 0; m < rows; m += TILE_ROWS, a.data += TILE_ROWS * a.stride) {
    const int64_t thirds = rows - m < TILE_ROWS ? ceil_div(rows - m, Q) : 3;
    tiles[columns > 16][thirds - 1](a, b, steps * BF16_DEPTH, out + m * out_stride, out_stride, accumulate);
  }
}

}  // namespace FM_ISA
}  // namespace fused_margins
