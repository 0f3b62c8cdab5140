// Labels of both sides as 32-bit ids: a comparison of ids fits the vectors that hold the similarities.
#pragma once

#include <algorithm>
#include <limits>

#include "tile.h"

namespace fused_margins {
namespace FM_ISA {

constexpr int32_t UNADMITTED_ID = std::numeric_limits<int32_t>::min();  // of a column whose label is UNADMITTED

struct LabelIds {
  Buffer<int32_t> rows, columns;
  bool all_admitted = true;  // no column's label is UNADMITTED

  // Equal labels get equal ids; a row's UNADMITTED is nobody's. `column_labels` null stands for 0, 1, 2, ...
  LabelIds(const int64_t* row_labels, int64_t row_count, const int64_t* column_labels, int64_t column_count)
      : rows(row_count), columns(column_count) {
    Buffer<int64_t> iota(column_labels ? 0 : column_count);
    if (!column_labels) {
      for (int64_t j = 0; j < column_count; ++j) iota[j] = j;
      column_labels = iota.get();
    }
    if (fits(row_labels, row_count) && fits(column_labels, column_count)) {
      std::copy(row_labels, row_labels + row_count, rows.get());
      std::copy(column_labels, column_labels + column_count, columns.get());
      return;
    }
    Buffer<int64_t> distinct(row_count + column_count);
    std::copy(row_labels, row_labels + row_count, distinct.get());
    std::copy(column_labels, column_labels + column_count, distinct.get() + row_count);
    std::sort(distinct.get(), distinct.get() + row_count + column_count);
    int64_t* end = std::unique(distinct.get(), distinct.get() + row_count + column_count);
    auto id = [&](int64_t label) { return int32_t(std::lower_bound(distinct.get(), end, label) - distinct.get()); };
    std::transform(row_labels, row_labels + row_count, rows.get(),
                   [&](int64_t label) { return label == UNADMITTED ? -1 : id(label); });
    std::transform(column_labels, column_labels + column_count, columns.get(),
                   [&](int64_t label) { return label == UNADMITTED ? UNADMITTED_ID : id(label); });
    all_admitted = std::find(column_labels, column_labels + column_count, UNADMITTED) == column_labels + column_count;
  }

 private:
  static bool fits(const int64_t* labels, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      if (labels[i] != int64_t(int32_t(labels[i])) || labels[i] == UNADMITTED_ID) return false;
    return true;
  }
};

// value[j] becomes -infinity where the row may not use the column. `self` is the row's own column relative to the
// first, or anything out of range; `all_admitted` as in LabelIds.
template <class T>
inline void admit(T* value, int64_t count, const int32_t* column_ids, int32_t row_id, Relation relation, int64_t self,
                  bool all_admitted) {
  if (!all_admitted)
    for (int64_t j = 0; j < count; ++j) value[j] = column_ids[j] != UNADMITTED_ID ? value[j] : none<T>;
  if (relation == Relation::different)
    for (int64_t j = 0; j < count; ++j) value[j] = column_ids[j] != row_id ? value[j] : none<T>;
  else if (relation == Relation::same)
    for (int64_t j = 0; j < count; ++j) value[j] = column_ids[j] == row_id ? value[j] : none<T>;
  if (self >= 0 && self < count) value[self] = none<T>;
}

}  // namespace FM_ISA
}  // namespace fused_margins
