// nearest on a CPU: tiles of similarities, each row keeping its k best while they are hot; no (rows, columns) buffer.
//
// A group is a set of rows with the columns that may serve them: for relation "same" the rows and columns of one label,
// else everything. A task is a block of a group's rows against its columns in ascending order, packed by the task
// itself, so results do not depend on the number of threads and ties go to the lowest column.
//
// Euclidean: the expanded distance, with a bound on its error, only selects candidates; compared is sum (x - y)^2.
#include "cpu.h"

#include <vector>

#include "../common/checks.h"
#include "../common/labels.h"
#include "../common/strips.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

template <class T>
constexpr T none = -std::numeric_limits<T>::infinity();

struct Group {
  int64_t first_row, rows, first_column, columns;  // ranges of the two orders below
};

// Rows and columns ordered so that groups are ranges; columns of a group ascend.
struct Groups {
  Buffer<int64_t> row_order, column_order;
  std::vector<Group> list;

  explicit Groups(const NearestForward& a) : row_order(a.x.rows), column_order(a.y.rows) {
    for (int64_t i = 0; i < a.x.rows; ++i) row_order[i] = i;
    for (int64_t j = 0; j < a.y.rows; ++j) column_order[j] = j;
    if (a.relation != Relation::same) {
      list.push_back({0, a.x.rows, 0, a.y.rows});
      return;
    }
    const auto by = [](const int64_t* labels) {
      return [labels](int64_t i, int64_t j) { return labels[i] < labels[j]; };
    };
    std::stable_sort(row_order.get(), row_order.get() + a.x.rows, by(a.row_labels));
    std::stable_sort(column_order.get(), column_order.get() + a.y.rows, by(a.column_labels));
    int64_t c0 = 0;
    for (int64_t r0 = 0, r1; r0 < a.x.rows; r0 = r1) {
      const int64_t label = a.row_labels[row_order[r0]];
      for (r1 = r0; r1 < a.x.rows && a.row_labels[row_order[r1]] == label;) ++r1;
      while (c0 < a.y.rows && a.column_labels[column_order[c0]] < label) ++c0;
      int64_t c1 = c0;
      while (c1 < a.y.rows && a.column_labels[column_order[c1]] == label) ++c1;
      list.push_back({r0, r1 - r0, c0, c1 - c0});
      c0 = c1;
    }
  }
};

// The k best of one row, best first; equal values in the order of insertion.
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
};

template <class T>
class Search {
 public:
  explicit Search(const NearestForward& args)
      : a_(args),
        centre_(centre_of<T>(args.y, args.similarity)),
        x_(args.x, args.similarity, centre_.get()),
        y_(args.y, args.similarity, centre_.get()),
        labels_(args.row_labels, args.x.rows, args.column_labels, args.y.rows),
        width_(args.x.width) {}

  // In parallel: factors of both sides.
  void measure() {
    Buffer<T> scratch(width_);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < x_.count() + y_.count(); ++i)
      i < x_.count() ? x_.measure(i, scratch.get()) : y_.measure(i - x_.count(), scratch.get());
  }

  // Rows rows[0..count), at most ROW_BLOCK, against columns[0..total): fills the rows of the outputs.
  void run(const int64_t* rows, int64_t count, const int64_t* columns, int64_t total) const {
    constexpr int64_t wide = TILE_COLUMNS<T>;
    Buffer<T> row_panels(ROW_BLOCK * width_), column_panel(wide * width_), u(ROW_BLOCK * wide), squared(wide);
    Buffer<T> row_values(ROW_BLOCK * width_), column_values(wide * width_);
    Buffer<T> prepared(std::max(wide, TILE_ROWS) * width_);  // of one panel, of either side
    Buffer<int32_t> ids(wide);
    for (int64_t r = 0; r < count; r += TILE_ROWS)
      load(x_, rows + r, std::min(TILE_ROWS, count - r), row_values.get() + r * width_, prepared.get(),
           row_panels.get() + r * width_, TILE_ROWS);
    for (int64_t r = 0; r < count; ++r) best(rows[r]).clear();
    for (int64_t c = 0; c < total; c += wide) {
      const int64_t n = std::min(wide, total - c);
      load(y_, columns + c, n, column_values.get(), prepared.get(), column_panel.get(), wide);
      for (int64_t j = 0; j < n; ++j) {
        ids[j] = labels_.columns[columns[c + j]];
        squared[j] = y_.factor[columns[c + j]];
      }
      for (int64_t r = 0; r < count; r += TILE_ROWS)
        tile_product<T, Left::contiguous_rows>(row_panels.get() + r * width_, TILE_ROWS, column_panel.get(), width_,
                                               u.get() + r * wide, wide, false);
      for (int64_t r = 0; r < count; ++r)
        select(rows[r], row_values.get() + r * width_, columns + c, n, u.get() + r * wide, ids.get(), squared.get(),
               column_values.get());
    }
  }

 private:
  const NearestForward& a_;
  Buffer<T> centre_;
  Rows<T> x_, y_;
  LabelIds labels_;
  int64_t width_;

  Best<T> best(int64_t row) const { return {static_cast<T*>(a_.best) + row * a_.k, a_.index + row * a_.k, a_.k}; }

  // The named rows as they are, and as a panel of the products' operands.
  void load(const Rows<T>& side, const int64_t* names, int64_t count, T* values, T* prepared, T* panel,
            int64_t panel_rows) const {
    for (int64_t r = 0; r < count; ++r) {
      load_row(side.matrix, names[r], values + r * width_);
      side.prepared(names[r], prepared + r * width_);
    }
    pack_transposed(prepared, width_, count, width_, panel, panel_rows);
  }

  // Offers the admitted ones of n columns to the row's best; u (n,) holds products, and is overwritten.
  void select(int64_t row, const T* x, const int64_t* columns, int64_t n, T* u, const int32_t* ids, const T* squared,
              const T* y) const {
    const Best<T> best = this->best(row);
    const bool euclidean = a_.similarity == Similarity::negative_squared_euclidean;
    const T below = a_.below ? static_cast<const T*>(a_.below)[row] : -none<T>;
    T slack = 0;  // bound on the error of the expanded distances: rounding of the sums over width_, and of the centring
    if (euclidean) {
      const T unit = std::numeric_limits<T>::epsilon() * T(8 + width_);
      for (int64_t j = 0; j < n; ++j) {
        u[j] = 2 * u[j] - x_.factor[row] - squared[j];
        const T bound = unit * (x_.factor[row] + squared[j]);
        const bool known = bound <= std::numeric_limits<T>::max();
        u[j] = known ? u[j] : T(0);  // squares beyond the range of T tell nothing: every column is a candidate
        const T error = known ? bound : -none<T>;
        slack = error > slack ? error : slack;
      }
    }
    admit(u, n, ids, labels_.rows[row], a_.relation, -1);
    T top = none<T>;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) {
      const T value = u[j] < below + slack ? u[j] : none<T>;
      top = value > top ? value : top;
    }
    if (!(top + slack > best.worst())) return;
    const int64_t self = a_.self_index ? a_.self_index[row] : -1;
    for (int64_t j = 0; j < n; ++j) {
      if (!(u[j] + slack > best.worst()) || u[j] == none<T> || columns[j] == self) continue;
      const T value = euclidean ? -squared_distance(x, y + j * width_, width_) : u[j];
      if (value < below || !a_.below) best.insert(value, columns[j]);
    }
  }
};

template <class T>
void forward(const NearestForward& args) {
  if (args.self_index) check_index("self_index", args.self_index, args.x.rows, args.y.rows, -1);
  const Groups groups(args);
  Search<T> search(args);

  struct Task {
    const Group* group;
    int64_t first, rows;
  };
  std::vector<Task> tasks;
  double work = 0;
  for (const Group& g : groups.list) {
    for (int64_t r = 0; r < g.rows; r += ROW_BLOCK)
      tasks.push_back({&g, g.first_row + r, std::min(ROW_BLOCK, g.rows - r)});
    work += double(g.rows) * double(g.columns) * double(args.x.width);
  }

#pragma omp parallel num_threads(thread_count(work))
  {
    search.measure();
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < int64_t(tasks.size()); ++t) {
      const Task& task = tasks[size_t(t)];
      search.run(groups.row_order.get() + task.first, task.rows, groups.column_order.get() + task.group->first_column,
                 task.group->columns);
    }
  }
}

}  // namespace

void nearest_forward(const NearestForward& args) {
  args.x.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

}  // namespace FM_ISA
}  // namespace fused_margins
