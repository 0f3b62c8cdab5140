// Sums of bf16.h on the matrix unit (AMX): tiles of 16 x 16.
#pragma once

#include "bf16.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int64_t AMX_ROWS = 16;   // rows and columns of a tile of sums
constexpr int64_t BF16_ROWS = 32;  // of sums made together: 2 x 2 tiles

// The tile unit, set up for a thread as long as this lives: eight tiles of 16 rows of 64 bytes.
class Bf16Session {
 public:
  Bf16Session() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64, "as the instruction reads it");
    _tile_loadconfig(&config);
  }
  ~Bf16Session() { _tile_release(); }
  Bf16Session(const Bf16Session&) = delete;
};

// One block of at most 32 x 32 sums over `steps` times BF16_DEPTH, M and N tiles of them, to out.
template <int M, int N>
inline void amx_tiles(const Bf16Operand& a, const Bf16Operand& b, int64_t steps, float* out, int64_t out_stride) {
  _tile_zero(0);
  if (N > 1) _tile_zero(1);
  if (M > 1) _tile_zero(2);
  if (M > 1 && N > 1) _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    const uint16_t* right = b.data + s * (BF16_DEPTH / 2) * b.stride;
    _tile_loadd(6, right, 2 * b.stride);
    if (N > 1) _tile_loadd(7, right + 2 * AMX_ROWS, 2 * b.stride);
    const uint16_t* left = a.data + s * BF16_DEPTH;
    _tile_loadd(4, left, 2 * a.stride);
    if (M > 1) _tile_loadd(5, left + AMX_ROWS * a.stride, 2 * a.stride);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) _tile_dpbf16ps(1, 4, 7);
    if (M > 1) _tile_dpbf16ps(2, 5, 6);
    if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 4 * out_stride);
  if (N > 1) _tile_stored(1, out + AMX_ROWS, 4 * out_stride);
  if (M > 1) _tile_stored(2, out + AMX_ROWS * out_stride, 4 * out_stride);
  if (M > 1 && N > 1) _tile_stored(3, out + AMX_ROWS * (out_stride + 1), 4 * out_stride);
}

inline void bf16_sums(const Bf16Operand& a, const Bf16Operand& b, int64_t steps, int64_t rows, int64_t columns,
                      float* out, int64_t out_stride, bool accumulate) {
  alignas(64) float block[BF16_ROWS * BF16_COLUMNS];
  const bool direct = !accumulate && rows % AMX_ROWS == 0 && columns % AMX_ROWS == 0;
  float* to = direct ? out : block;
  const int64_t stride = direct ? out_stride : BF16_COLUMNS;
  if (rows > AMX_ROWS && columns > AMX_ROWS)
    amx_tiles<2, 2>(a, b, steps, to, stride);
  else if (rows > AMX_ROWS)
    amx_tiles<2, 1>(a, b, steps, to, stride);
  else if (columns > AMX_ROWS)
    amx_tiles<1, 2>(a, b, steps, to, stride);
  else
    amx_tiles<1, 1>(a, b, steps, to, stride);
  for (int64_t m = 0; !direct && m < rows; ++m) {
    float* o = out + m * out_stride;
    const float* from = block + m * BF16_COLUMNS;
    if (accumulate)
      add_scaled(o, 1.0f, from, columns);
    else
      std::copy(from, from + columns, o);
  }
}

}  // namespace FM_ISA
}  // namespace fused_margins
