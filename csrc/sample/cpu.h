// sample on a CPU.
#pragma once

#include "../cpu/isa.h"
#include "../matrix.h"

namespace fused_margins {

struct Sample {
  Matrix x, y;
  const int64_t* row_labels;     // (rows,)
  const int64_t* column_labels;  // (columns,)
  const int64_t* self_index;     // (rows,) or null; -1: none
  uint32_t seed;
  Relation relation;
  int64_t* index;  // (rows,); -1: nothing to sample
};

inline bool sample_suits_bf16(const Sample& args) {
  return has_bf16_products(args.x.dtype, Similarity::cosine);
}

FM_BF16_KERNEL(sample, Sample, sample_suits_bf16)

}  // namespace fused_margins
