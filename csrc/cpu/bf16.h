// Operands of products of bfloat16 numbers with sums in float32: the matrix unit (AMX, bf16_amx.h) and the vector unit
// (AVX512_BF16, bf16_vector.h) take the same.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "tile.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t BF16_DEPTH = 32;    // depths come in multiples of this, zeros beyond
constexpr int64_t BF16_COLUMNS = 32;  // of sums made together

// An odd number of cache lines of bfloat16 values.
inline int64_t odd_lines_of_halves(int64_t values) {
  return (ceil_div(values, 32) | 1) * 32;
}

// An operand. Left: (rows, depth), rows `stride` apart. Right: (depth / 2, columns, 2), pairs of depths side by side as
// the instructions want them, a pair of rows `stride` after the other.
struct Bf16Operand {
  const uint16_t* data;
  int64_t stride;
};

inline void round_vector(__m512 values, uint16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(values));
}

// `factor` times (count,) values, rounded, and zeros up to `padded`, a multiple of 16.
inline void round_row(const float* values, float factor, int64_t count, int64_t padded, uint16_t* out) {
  for (int64_t d = 0; d < padded; d += 16) {
    const int64_t left = count - d;
    const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? __mmask16((1 << left) - 1) : 0;
    const __m512 value = _mm512_maskz_mul_ps(mask, _mm512_maskz_loadu_ps(mask, values + d), _mm512_set1_ps(factor));
    round_vector(value, out + d);
  }
}

// Two rows (count,), a multiple of 32, as pairs (count, 2).
inline void interleave(const uint16_t* a, const uint16_t* b, int64_t count, uint16_t* out) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < count; d += 32) {
    const __m512i first = _mm512_loadu_si512(a + d), second = _mm512_loadu_si512(b + d);
    _mm512_storeu_si512(out + 2 * d, _mm512_permutex2var_epi16(first, low, second));
    _mm512_storeu_si512(out + 2 * d + 32, _mm512_permutex2var_epi16(first, high, second));
  }
}

}  // namespace FM_ISA
}  // namespace fused_margins
