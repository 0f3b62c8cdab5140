// A product of any depth, from the sums of the unit that is compiled for. Each unit's header defines BF16_ROWS, the
// rows of sums that are made together; bf16_sums, that many or fewer rows and at most BF16_COLUMNS columns; and
// Bf16Session, what a thread sets up. Both operands have whole tiles of rows and columns, whatever they hold beyond,
// and out has a multiple of ROW_QUANTUM rows.
#pragma once

#ifdef __AMX_BF16__
#include "bf16_amx.h"
#else
#include "bf16_vector.h"
#endif

namespace fused_margins {
namespace FM_ISA {

// out (rows, columns) (+)= a b over `steps` times BF16_DEPTH; a long depth is a sum of sums.
__attribute__((noinline)) inline void bf16_product(Bf16Operand a, Bf16Operand b, int64_t steps, int64_t rows,
                                                   int64_t columns, float* out, int64_t out_stride, bool accumulate) {
  constexpr int64_t together = DEPTH_BLOCK / BF16_DEPTH;
  for (int64_t m = 0; steps == 0 && !accumulate && m < rows; ++m) std::fill_n(out + m * out_stride, columns, 0.0f);
  for (int64_t s = 0; s < steps; s += together) {
    const int64_t count = std::min(together, steps - s);
    bf16_sums(a, b, count, rows, columns, out, out_stride, accumulate || s > 0);
    a.data += count * BF16_DEPTH;
    b.data += count * (BF16_DEPTH / 2) * b.stride;
  }
}

}  // namespace FM_ISA
}  // namespace fused_margins
