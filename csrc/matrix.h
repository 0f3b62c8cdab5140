// What Python hands over: matrices by address, and the enums of fused_margins/core/enums.py, whose values are the same.
#pragma once

#include <cstdint>

namespace fused_margins {

// `last` is the largest value: anything beyond it raises in bindings.h.
enum class DType : int { float64, float32, bfloat16, float16, last = float16 };
enum class Similarity { cosine, dot, negative_squared_euclidean, last = negative_squared_euclidean };
enum class Relation { different, same, any, last = any };
enum class Reduction { mean, sum, none, last = none };
enum class Epilogue { none, margin_softmax, info_nce, last = info_nce };

// A reserved label. As a target: the row's class is not among the columns, so that it has negatives and no positive. As
// a column's label: no relation admits the column. As a row's label: it equals no column's.
constexpr int64_t ABSENT = INT64_MIN, UNADMITTED = INT64_MIN;

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// bfloat16 numbers have products of their own; distances are taken between centred numbers, which are float32.
inline bool has_bf16_products(DType dtype, Similarity similarity) {
  return dtype == DType::bfloat16 && similarity != Similarity::negative_squared_euclidean;
}

// A matrix as PyTorch hands it over: an address, sizes, strides in elements, a dtype. It owns nothing.
struct Matrix {
  const void* data;
  int64_t rows, width;
  int64_t row_stride, column_stride;
  DType dtype;
};

}  // namespace fused_margins
