// Products on the matrix unit (AMX) of recent processors: tiles of bfloat16, sums in float32.
//
// The left operand may come in parts: a float32 number is the sum of its leading bfloat16 part, the leading part of the
// rest, and so on, each of 8 bits and a sign.
#pragma once

#include <immintrin.h>

#include "tile.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t AMX_ROWS = 16;   // rows and columns of a tile of sums
constexpr int64_t AMX_DEPTH = 32;  // depths that one instruction takes
constexpr int64_t AMX_BLOCK = 2 * AMX_ROWS;

// The tile unit, set up for a thread as long as this lives: eight tiles of 16 rows of 64 bytes.
class TileSession {
 public:
  TileSession() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64, "as the instruction reads it");
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
};

// An odd number of cache lines of bfloat16 values.
inline int64_t odd_lines_of_halves(int64_t values) {
  return (ceil_div(values, 32) | 1) * 32;
}

// An operand. Left: (parts, rows, depth), rows `stride` and parts `plane` apart. Right: (depth / 2, columns, 2), pairs
// of depths side by side as the instruction wants them, a pair of rows `stride` after the other.
struct Parts {
  const uint16_t* data;
  int64_t stride, plane;
};

// A vector as PARTS bfloat16 numbers, `plane` apart.
template <int PARTS>
inline void split(__m512 rest, uint16_t* out, int64_t plane) {
#pragma GCC unroll 3
  for (int p = 0; p < PARTS; ++p) {
    const __m256i part = (__m256i)_mm512_cvtneps_pbh(rest);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + p * plane), part);
    const __m512i value = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, part), 16);
    rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(value));
  }
}

// `factor` times (count,) values, rounded, and zeros up to `padded`, a multiple of 16.
inline void round_row(const float* values, float factor, int64_t count, int64_t padded, uint16_t* out) {
  for (int64_t d = 0; d < padded; d += 16) {
    const int64_t left = count - d;
    const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? __mmask16((1 << left) - 1) : 0;
    const __m512 value = _mm512_maskz_mul_ps(mask, _mm512_maskz_loadu_ps(mask, values + d), _mm512_set1_ps(factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), (__m256i)_mm512_cvtneps_pbh(value));
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

// One block of at most 32 x 32 sums over `steps` times AMX_DEPTH, M and N tiles of them, to out.
template <int PARTS, int M, int N>
inline void amx_tiles(const Parts& a, const Parts& b, int64_t steps, float* out, int64_t out_stride) {
  _tile_zero(0);
  if (N > 1) _tile_zero(1);
  if (M > 1) _tile_zero(2);
  if (M > 1 && N > 1) _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t* right = b.data + s * (AMX_DEPTH / 2) * b.stride;
    _tile_loadd(6, right, 2 * b.stride);
    if (N > 1) _tile_loadd(7, right + 2 * AMX_ROWS, 2 * b.stride);
#pragma GCC unroll 3
    for (int p = 0; p < PARTS; ++p) {
      const uint16_t* left = a.data + p * a.plane + s * AMX_DEPTH;
      _tile_loadd(4, left, 2 * a.stride);
      if (M > 1) _tile_loadd(5, left + AMX_ROWS * a.stride, 2 * a.stride);
      _tile_dpbf16ps(0, 4, 6);
      if (N > 1) _tile_dpbf16ps(1, 4, 7);
      if (M > 1) _tile_dpbf16ps(2, 5, 6);
      if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, 4 * out_stride);
  if (N > 1) _tile_stored(1, out + AMX_ROWS, 4 * out_stride);
  if (M > 1) _tile_stored(2, out + AMX_ROWS * out_stride, 4 * out_stride);
  if (M > 1 && N > 1) _tile_stored(3, out + AMX_ROWS * (out_stride + 1), 4 * out_stride);
}

// out (rows, columns), both at most 32, (+)= a b over `steps` times AMX_DEPTH. Both operands have whole tiles of rows
// and columns, whatever they hold beyond; a long depth is a sum of sums.
template <int PARTS>
__attribute__((noinline)) void amx_product(Parts a, Parts b, int64_t steps, int64_t rows, int64_t columns, float* out,
                                           int64_t out_stride, bool accumulate) {
  constexpr int64_t together = 512 / AMX_DEPTH;
  alignas(64) float block[AMX_BLOCK * AMX_BLOCK];
  for (int64_t m = 0; steps == 0 && !accumulate && m < rows; ++m)
    for (int64_t n = 0; n < columns; ++n) out[m * out_stride + n] = 0;
  for (int64_t s = 0; s < steps; s += together) {
    const int64_t count = steps - s < together ? steps - s : together;
    const bool direct = !accumulate && s == 0 && rows % AMX_ROWS == 0 && columns % AMX_ROWS == 0;
    float* to = direct ? out : block;
    const int64_t stride = direct ? out_stride : AMX_BLOCK;
    if (rows > AMX_ROWS && columns > AMX_ROWS)
      amx_tiles<PARTS, 2, 2>(a, b, count, to, stride);
    else if (rows > AMX_ROWS)
      amx_tiles<PARTS, 2, 1>(a, b, count, to, stride);
    else if (columns > AMX_ROWS)
      amx_tiles<PARTS, 1, 2>(a, b, count, to, stride);
    else
      amx_tiles<PARTS, 1, 1>(a, b, count, to, stride);
    for (int64_t m = 0; !direct && m < rows; ++m) {
      float* o = out + m * out_stride;
      const float* from = block + m * AMX_BLOCK;
      if (accumulate || s > 0)
        add_scaled(o, 1.0f, from, columns);
      else
        for (int64_t n = 0; n < columns; ++n) o[n] = from[n];
    }
    a.data += count * AMX_DEPTH;
    b.data += count * (AMX_DEPTH / 2) * b.stride;
  }
}

}  // namespace FM_ISA
}  // namespace fused_margins
