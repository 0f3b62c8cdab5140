// One side of the similarity matrix, row by row, in the form in which a product of rows gives the similarity:
// unit length for cosine, as it is for dot, relative to a common centre for Euclidean distances.
#pragma once

#include <algorithm>

#include "threads.h"
#include "tile.h"

namespace fused_margins {
namespace FM_ISA {

template <class T>
struct Rows {
  Matrix matrix;
  Similarity similarity;
  const T* centre;   // (width,), Euclidean only
  Buffer<T> factor;  // cosine: 1 / |row|, 0 for a zero row; dot: 1; Euclidean: |row - centre|^2

  Rows(const Matrix& m, Similarity s, const T* c) : matrix(m), similarity(s), centre(c), factor(m.rows) {}

  int64_t count() const { return matrix.rows; }
  int64_t width() const { return matrix.width; }

  // out (width,): the row as the products take it; returns its factor.
  T prepare(int64_t row, T* out) const {
    const T* values = row_of(row, out);
    if (similarity == Similarity::cosine) {
      const T inverse = inverse_length(values);
      scale(out, inverse, values, width());
      return inverse;
    }
    if (values != out) std::copy(values, values + width(), out);
    if (similarity == Similarity::dot) return 1;
    for (int64_t d = 0; d < width(); ++d) out[d] -= centre[d];
    return dot(out, out, width());
  }

  // The same, and the factor is measured, or known and not written to.
  void prepare(int64_t row, bool measure, T& factor, T* out) const {
    if (!measure && similarity != Similarity::negative_squared_euclidean) {
      scale(out, factor, row_of(row, out), width());
    } else {
      const T value = prepare(row, out);
      if (measure) factor = value;
    }
  }

  // 1 / |values|; 0 where that would overflow.
  T inverse_length(const T* values) const {
    const double squared = sum_of_squares(values, width());
    const double length =
        sizeof(T) == 8 && !(squared > 1e-290 && squared < 1e300) ? length_beyond_range(values) : std::sqrt(squared);
    const bool zero = length < 1 / double(std::numeric_limits<T>::max());
    return std::isnan(squared) ? T(squared) : zero ? T(0) : T(1 / length);
  }

  // |values| where their squares overflow or vanish: relative to the largest.
  double length_beyond_range(const T* values) const {
    double largest = 0, sum = 0;
    for (int64_t d = 0; d < width(); ++d) largest = std::max(largest, std::abs(double(values[d])));
    if (largest == 0 || std::isinf(largest)) return largest;
    for (int64_t d = 0; d < width(); ++d) sum += (double(values[d]) / largest) * (double(values[d]) / largest);
    return largest * std::sqrt(sum);
  }

  bool is_of_values() const { return matrix.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32); }
  bool readable() const { return is_of_values() && matrix.column_stride == 1; }

  // The row where it lies, if it can be read there; else converted to T, in `scratch`.
  const T* row_of(int64_t row, T* scratch) const {
    if (readable()) return static_cast<const T*>(matrix.data) + row * matrix.row_stride;
    load_row(matrix, row, scratch);
    return scratch;
  }

  // The same as prepare() where the factor is known.
  void prepared(int64_t row, T* out) const {
    load_row(matrix, row, out);
    if (similarity == Similarity::cosine)
      for (int64_t d = 0; d < width(); ++d) out[d] *= factor[row];
    else if (similarity == Similarity::negative_squared_euclidean)
      for (int64_t d = 0; d < width(); ++d) out[d] -= centre[d];
  }

  // Turns sum_j dL/du_j y_j, accumulated in `sum`, into the gradient of this row of the input; `weight` is sum_j
  // dL/du_j.
  void chain(int64_t row, T weight, T* sum, T* scratch) const {
    if (similarity == Similarity::dot) return;
    prepared(row, scratch);
    if (similarity == Similarity::cosine) {
      const T along = dot(sum, scratch, width());
      for (int64_t d = 0; d < width(); ++d) sum[d] = (sum[d] - along * scratch[d]) * factor[row];
    } else {
      for (int64_t d = 0; d < width(); ++d) sum[d] = 2 * (sum[d] - weight * scratch[d]);
    }
  }
};

// Mean of the rows, in double and in row order, to centre (width,): the common centre of both sides. Any centre will
// do: 0 where a row that is not finite would pass its NaN on to all others.
template <class T>
void find_centre(const Matrix& m, T* centre) {
  Buffer<double> sum(m.width);
  Buffer<T> row(m.width);
  std::fill(sum.get(), sum.get() + m.width, 0.0);
  for (int64_t i = 0; i < m.rows; ++i) {
    load_row(m, i, row.get());
    for (int64_t d = 0; d < m.width; ++d) sum[d] += double(row[d]);
  }
  for (int64_t d = 0; d < m.width; ++d) centre[d] = m.rows && std::isfinite(sum[d]) ? T(sum[d] / double(m.rows)) : T(0);
}

template <class T>
Buffer<T> centre_of(const Matrix& m, Similarity similarity) {
  Buffer<T> centre(m.width);
  if (similarity == Similarity::negative_squared_euclidean) find_centre(m, centre.get());
  return centre;
}

// Similarity of row i of x with row j of y. A distance is taken between the rows as they are: after centring, the
// difference of two near rows would carry the rounding of their distance from the centre.
template <class T>
inline T pair_similarity(const Rows<T>& x, int64_t i, const Rows<T>& y, int64_t j, T* a, T* b) {
  if (x.similarity == Similarity::negative_squared_euclidean) {
    load_row(x.matrix, i, a);
    load_row(y.matrix, j, b);
    return -squared_distance(a, b, x.width());
  }
  x.prepared(i, a);
  y.prepared(j, b);
  return dot(a, b, x.width());
}

}  // namespace FM_ISA
}  // namespace fused_margins
