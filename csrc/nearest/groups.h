// Rows and columns ordered so that those of one label are ranges.
#pragma once

#include <vector>

#include "../cpu/tile.h"
#include "cpu.h"

namespace fused_margins {
namespace FM_ISA {

struct Group {
  int64_t first_row, rows, first_column, columns;  // ranges of the two orders below
};

// Every row belongs to one group, which may have no columns; those of a group ascend.
struct Groups {
  Buffer<int64_t> row_order, column_order;
  std::vector<Group> list;

  explicit Groups(const Nearest& a) : row_order(a.x.rows), column_order(a.y.rows) {
    if (a.relation != Relation::same) {
      for (int64_t i = 0; i < a.x.rows; ++i) row_order[i] = i;
      for (int64_t j = 0; j < a.y.rows; ++j) column_order[j] = j;
      list.push_back({0, a.x.rows, 0, a.y.rows});
      return;
    }
    order(a.row_labels, a.x.rows, row_order.get());
    if (a.column_labels == a.row_labels && a.y.rows == a.x.rows)
      std::copy(row_order.get(), row_order.get() + a.x.rows, column_order.get());
    else
      order(a.column_labels, a.y.rows, column_order.get());
    int64_t c0 = 0;
    for (int64_t r0 = 0, r1; r0 < a.x.rows; r0 = r1) {
      const int64_t label = a.row_labels[row_order[r0]];
      for (r1 = r0; r1 < a.x.rows && a.row_labels[row_order[r1]] == label;) ++r1;
      while (c0 < a.y.rows && a.column_labels[column_order[c0]] < label) ++c0;
      int64_t c1 = c0;
      while (c1 < a.y.rows && a.column_labels[column_order[c1]] == label && label != UNADMITTED) ++c1;
      list.push_back({r0, r1 - r0, c0, c1 - c0});
      c0 = c1;
    }
  }

 private:
  // 0 ... count - 1 by label, equal labels as they come: by counting, where the labels are dense enough.
  static void order(const int64_t* labels, int64_t count, int64_t* out) {
    if (!count) return;
    const auto ends = std::minmax_element(labels, labels + count);
    const int64_t least = *ends.first;
    const uint64_t span = uint64_t(*ends.second) - uint64_t(least);
    if (span < 8 * uint64_t(count) + 1024) {
      Buffer<int64_t> next(int64_t(span) + 2);
      std::fill(next.get(), next.get() + span + 2, int64_t(0));
      for (int64_t i = 0; i < count; ++i) ++next[labels[i] - least + 1];
      for (uint64_t l = 0; l < span; ++l) next[int64_t(l) + 1] += next[int64_t(l)];
      for (int64_t i = 0; i < count; ++i) out[next[labels[i] - least]++] = i;
      return;
    }
    for (int64_t i = 0; i < count; ++i) out[i] = i;
    std::stable_sort(out, out + count, [=](int64_t i, int64_t j) { return labels[i] < labels[j]; });
  }
};

}  // namespace FM_ISA
}  // namespace fused_margins
