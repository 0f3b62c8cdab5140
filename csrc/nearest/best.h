// The k best columns of one row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu.h"

namespace fused_margins {
namespace FM_ISA {

// Best first; equal values in the order of insertion.
template <class T>
struct Best {
  T* value;
  int64_t* index;
  int64_t k;

  T worst() const { return value[k - 1]; }
  void clear() const {
    std::fill(value, value + k, none<T>);
    std::fill(index, index + k, int64_t(-1));
  }
  void insert(T v, int64_t j) const {
    if (!(v > worst())) return;
    int64_t at = k - 1;
    for (; at > 0 && v > value[at - 1]; --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = v;
    index[at] = j;
  }
  // Wherever j stands among the columns that are there already.
  void insert_unordered(T v, int64_t j) const {
    int64_t at = k;
    while (at > 0 && (v > value[at - 1] || (v == value[at - 1] && j < index[at - 1]))) --at;
    if (at == k) return;
    std::copy_backward(value + at, value + k - 1, value + k);
    std::copy_backward(index + at, index + k - 1, index + k);
    value[at] = v;
    index[at] = j;
  }
};

// Where a call's answers are, and what it admits.
template <class T>
struct Answers {
  const Nearest& args;

  Best<T> best(int64_t row) const {
    return {static_cast<T*>(args.best) + row * args.k, args.index + row * args.k, args.k};
  }
  // From the best of negated similarities to the similarities themselves.
  void negate() const {
    T* value = static_cast<T*>(args.best);
    for (int64_t i = 0; i < args.x.rows * args.k; ++i) value[i] = args.index[i] < 0 ? none<T> : -value[i];
  }
  T below(int64_t row) const { return args.below ? static_cast<const T*>(args.below)[row] : -none<T>; }
  int64_t self(int64_t row) const { return args.self_index ? args.self_index[row] : -1; }
};

}  // namespace FM_ISA
}  // namespace fused_margins
