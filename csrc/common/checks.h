// Values that only the kernels read: labels and scales. A bad one raises before anything is computed.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "matrix.h"

namespace fused_margins {

inline Similarity parse_similarity(const std::string& name) {
  if (name == "cosine") return Similarity::cosine;
  if (name == "dot") return Similarity::dot;
  if (name == "negative_squared_euclidean") return Similarity::negative_squared_euclidean;
  throw std::invalid_argument("similarity: unknown value '" + name + "'");
}

inline Relation parse_relation(const std::string& name) {
  if (name == "different") return Relation::different;
  if (name == "same") return Relation::same;
  if (name == "any") return Relation::any;
  throw std::invalid_argument("relation: unknown value '" + name + "'");
}

inline Reduction parse_reduction(const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  if (name == "none") return Reduction::none;
  throw std::invalid_argument("reduction: unknown value '" + name + "'");
}

// Every entry lies in [0, size) or equals `ignored`.
inline void check_index(const char* argument, const int64_t* index, int64_t count, int64_t size, int64_t ignored) {
  for (int64_t i = 0; i < count; ++i)
    if (index[i] != ignored && (index[i] < 0 || index[i] >= size))
      throw std::out_of_range(std::string(argument) + ": expected values in [0, " + std::to_string(size) + ") or " +
                              std::to_string(ignored) + " (ignored), got " + std::to_string(index[i]) + " in row " +
                              std::to_string(i));
}

template <class T>
void check_scale(const T* scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(scale[i] > 0))
      throw std::invalid_argument("scale: expected positive values, got " + std::to_string(scale[i]) +
                                  (count > 1 ? " in row " + std::to_string(i) : std::string()));
}

}  // namespace fused_margins
