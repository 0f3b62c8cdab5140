// A matrix as PyTorch hands it over: a raw pointer, sizes, strides in elements, a dtype. It owns nothing.
#pragma once

#include <cstdint>

namespace fused_margins {

enum class DType : int { float64, float32, bfloat16, float16 };
enum class Similarity { cosine, dot, negative_squared_euclidean };
enum class Relation { different, same, any };
enum class Reduction { mean, sum, none };

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// bfloat16 numbers have products of their own; distances are taken between centred numbers, which are float32.
inline bool has_bf16_products(DType dtype, Similarity similarity) {
  return dtype == DType::bfloat16 && similarity != Similarity::negative_squared_euclidean;
}

struct Matrix {
  const void* data;
  int64_t rows, width;
  int64_t row_stride, column_stride;
  DType dtype;
};

}  // namespace fused_margins
