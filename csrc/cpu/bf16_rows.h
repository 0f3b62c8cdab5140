// Rows of bfloat16 inputs as operands of bf16_product.h: taken as they are, their factors applied to the results.
#pragma once

#include "bf16_product.h"
#include "rows.h"
#include "transpose.h"

namespace fused_margins {
namespace FM_ISA {

// A row, zeros up to the depth; returns what its products are to be multiplied by. It is scaled by the power of two
// that brings its length near 1: exact but for values 2^126 times shorter than the row, which are lost, and no product
// leaves the range of float32. scratch (width,); `measure`: the
// factor is written, else it is known.
inline float bf16_row(const Rows<float>& side, int64_t row, bool measure, float& factor, float* scratch,
                      uint16_t* out) {
  load_row(side.matrix, row, scratch);
  const bool cosine = side.similarity == Similarity::cosine;
  const float inverse = cosine && !measure ? factor : side.inverse_length(scratch);
  if (measure) factor = cosine ? inverse : 1.0f;
  float power = bits<float>(bits<uint32_t>(inverse) & 0x7f800000u);
  if (power == 0 && inverse > 0) power = std::numeric_limits<float>::min();
  if (power == 0 && !cosine) {  // too short to tell, or nothing but zeros, or something infinite
    const double squared = sum_of_squares(scratch, side.width());
    power = squared > 0 && squared < 1 ? 0x1p127f : 1.0f;
  }
  if (std::isnan(inverse)) power = 1.0f;  // a value that is not a number is alone in it
  round_row(scratch, power, side.width(), round_up(side.width(), BF16_DEPTH), out);
  return power == 0 ? 0.0f : factor / power;
}

// Rows (BF16_COLUMNS, stride) into a right operand (depth / 2, BF16_COLUMNS, 2): pairs of depths are 32 bits, as floats
// are.
inline void bf16_panel(const uint16_t* rows, int64_t stride, int64_t depth, uint16_t* panel) {
  transpose_panel(reinterpret_cast<const float*>(rows), stride / 2, depth / 2, reinterpret_cast<float*>(panel));
}

}  // namespace FM_ISA
}  // namespace fused_margins
