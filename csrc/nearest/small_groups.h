// Groups of few rows and columns: compared pair by pair where they lie.
//
// A batch is as many of them as fill vectors of rows. Its similarities are u (columns, lanes): every row is a lane, and
// the j-th line holds each row's similarity with the j-th column of its own group. One pass over the lines then finds
// the best of all rows, and no branch depends on values.
#pragma once

#include <vector>

#include "../cpu/pairs.h"
#include "../cpu/rows.h"
#include "../cpu/scratch.h"
#include "best.h"
#include "groups.h"

namespace fused_margins {
namespace FM_ISA {

template <class T>
class SmallGroups {
  using V = Vector<T>;
  using Int = typename VectorOf<T>::Int;
  using I = typename VectorOf<T>::int_type;
  static constexpr int64_t LANES = VectorOf<T>::lanes;
  static constexpr int64_t MOST = 256;     // rows, and columns, of a group; columns of a batch
  static constexpr int64_t BLOCK = 4;      // groups begin at multiples of it: whole blocks of pairs then fit u
  static constexpr int64_t TOGETHER = 64;  // rows of a batch of several groups

 public:
  static bool suit(const Group& g) { return g.rows <= MOST && g.columns <= MOST; }

  SmallGroups(const Nearest& args, const Groups& groups, const std::vector<const Group*>& list, const Rows<T>& x,
              const Rows<T>& y, bool itself, int threads)
      : answers_{args},
        groups_(groups),
        list_(list),
        x_(x),
        y_(y),
        itself_(itself),
        width_(x.width()),
        batches_(int64_t(list.size())) {
    int64_t most = 0;
    for (int64_t g = 0; g < int64_t(list.size()); ++g) {
      const int64_t rows = round_up(list[size_t(g)]->rows, BLOCK), columns = round_up(list[size_t(g)]->columns, BLOCK);
      const Batch* last = count_ ? &batches_[count_ - 1] : nullptr;
      if (last && last->rows + rows <= TOGETHER && last->columns + columns <= MOST)
        batches_[count_ - 1] = {last->first, g + 1, last->rows + rows, last->columns + columns,
                                std::max(last->deepest, columns)};
      else
        batches_[count_++] = {g, g + 1, rows, columns, columns};
      most = std::max(most, values_of(batches_[count_ - 1]));
    }
    values_ = Scratch<T>(threads, most);
    pointers_ = Scratch<const T*>(threads, 3 * MOST);
    ints_ = Scratch<Int>(threads, 2 * MOST);
  }

  int64_t batches() const { return count_; }

  // Finds the best of every row of batch b; in_range (groups,): not of those groups whose lengths are so far from 1
  // that products of rows as they are might leave the range of T.
  void search(int64_t b, uint8_t* in_range) const {
    const Batch& batch = batches_[b];
    const int64_t stride = round_up(batch.rows, LANES);
    T *u = values_.mine(), *limit = u + batch.deepest * stride, *row_factor = limit + stride;
    T* column_factor = row_factor + stride;
    const T** left = pointers_.mine();
    View v{batch,
           stride,
           u,
           limit,
           row_factor,
           itself_ ? row_factor : column_factor,
           column_factor + batch.columns,
           left,
           itself_ ? left : left + MOST,
           left + 2 * MOST,
           ints_.mine(),
           ints_.mine() + MOST};
    multiply(v);
    const auto similarity = answers_.args.similarity;
    if (similarity == Similarity::cosine) measure(v, in_range);
    if (similarity != Similarity::dot) to_similarities(v);
    if (!answers_.args.largest) negate(v);
    answers_.args.k == 1 ? choose(v) : rank(v);
  }

 private:
  struct Batch {
    int64_t first, end;              // groups of the list
    int64_t rows, columns, deepest;  // all of them in multiples of BLOCK; deepest: columns of the widest group
  };

  // A batch in a thread's memory.
  struct View {
    const Batch& batch;
    int64_t stride;  // lanes, a multiple of a vector's
    T *u, *limit, *row_factor, *column_factor, *copies;
    const T **left, **right, **soon;  // rows and columns where they lie, columns that will be wanted soon
    Int *self, *depth;                // of a lane: the line that is the row itself or -1, and how many lines it has
  };

  const Answers<T> answers_;
  const Groups& groups_;
  const std::vector<const Group*>& list_;
  const Rows<T>&x_, &y_;
  bool itself_;
  int64_t width_, count_ = 0;
  Buffer<Batch> batches_;
  Scratch<T> values_;
  Scratch<const T*> pointers_;
  Scratch<Int> ints_;

  int64_t values_of(const Batch& b) const {
    const bool copies = !x_.readable() || !y_.readable();
    return (b.deepest + 2) * round_up(b.rows, LANES) + b.columns + (copies ? (b.rows + b.columns) * width_ : 0);
  }

  // f(g, group, its rows, its columns, its first lane, its first of the batch's columns)
  template <class F>
  void for_each(const View& v, F f) const {
    int64_t lane = 0, column = 0;
    for (int64_t g = v.batch.first; g < v.batch.end; ++g) {
      const Group& group = *list_[size_t(g)];
      f(g, group, groups_.row_order.get() + group.first_row, groups_.column_order.get() + group.first_column, lane,
        column);
      lane += round_up(group.rows, BLOCK);
      column += round_up(group.columns, BLOCK);
    }
  }

  // u: products, or squared distances; and what choose() has to know of every lane.
  void multiply(View& v) const {
    const bool distances = answers_.args.similarity == Similarity::negative_squared_euclidean;
    const auto gather = [&](const Rows<T>& side, const int64_t* names, int64_t count, const T** to) {
      for (int64_t r = 0; r < count; ++r) {
        to[r] = side.row_of(names[r], v.copies);
        if (to[r] == v.copies) v.copies += width_;
      }
    };
    for_each(v, [&](int64_t g, const Group& group, const int64_t* rows, const int64_t* columns, int64_t lane,
                    int64_t column) {
      const T **left = v.left + lane, **right = v.right + column;
      gather(x_, rows, group.rows, left);
      if (!itself_) gather(y_, columns, group.columns, right);
      for (int64_t r = 0; r < round_up(group.rows, BLOCK); ++r) {
        const int64_t row = rows[r < group.rows ? r : 0];
        v.self[lane + r] = Int(place_of(answers_.self(row), columns, group.columns, r));
        v.depth[lane + r] = Int(group.columns);
        v.limit[lane + r] = answers_.below(row);
      }
      // A line of the columns after the next ones comes into the cache with every line of this group's.
      const Group* later = y_.readable() && g + 2 < int64_t(list_.size()) ? list_[size_t(g) + 2] : nullptr;
      const int64_t soon = later ? round_up(later->columns, BLOCK) : 0;
      for (int64_t j = 0; j < soon; ++j)
        v.soon[j] = y_.row_of(groups_.column_order[later->first_column + std::min(j, later->columns - 1)], nullptr);
      if (group.columns)
        all_pairs(right, group.columns, left, group.rows, width_, distances, itself_, v.u + lane, v.stride, true,
                  v.soon, soon);
    });
    std::fill(v.depth + v.batch.rows, v.depth + v.stride, Int(0));
    std::fill(v.self + v.batch.rows, v.self + v.stride, Int(0));
    std::fill(v.limit + v.batch.rows, v.limit + v.stride, T(0));
  }

  // Where `name` stands among `count` ascending columns, -1 if it does not; `guess` is tried first.
  static int64_t place_of(int64_t name, const int64_t* columns, int64_t count, int64_t guess) {
    if (guess < count && columns[guess] == name) return guess;
    const int64_t* at = std::lower_bound(columns, columns + count, name);
    return at < columns + count && *at == name ? at - columns : -1;
  }

  // Factors of rows and columns.
  void measure(const View& v, uint8_t* in_range) const {
    const auto usual = [](T factor) { return factor > T(1e-12) && factor < T(1e12); };
    if (itself_) {  // each row's product with itself is in u: nobody need read the row once more
      for_each(v, [&](int64_t, const Group& group, const int64_t*, const int64_t*, int64_t lane, int64_t) {
        for (int64_t r = 0; r < round_up(group.rows, BLOCK); ++r)
          v.row_factor[lane + r] = r < group.rows ? v.u[r * v.stride + lane + r] : T(1);
      });
#pragma omp simd
      for (int64_t r = 0; r < v.batch.rows; ++r) v.row_factor[r] = T(1 / std::sqrt(double(v.row_factor[r])));
      int unusual = 0;
#pragma omp simd reduction(+ : unusual)
      for (int64_t r = 0; r < v.batch.rows; ++r) unusual += usual(v.row_factor[r]) ? 0 : 1;
      if (unusual == 0) return;
    }
    for_each(v, [&](int64_t g, const Group& group, const int64_t*, const int64_t*, int64_t lane, int64_t column) {
      bool all = true;
      const auto set = [&](T& factor, const Rows<T>& side, const T* row) {
        if (itself_ && usual(factor)) return;  // whatever other rows are in the batch
        factor = side.inverse_length(row);
        all = all && (factor == 0 || usual(factor));
      };
      for (int64_t r = 0; r < group.rows; ++r) set(v.row_factor[lane + r], x_, v.left[lane + r]);
      for (int64_t j = 0; j < group.columns && !itself_; ++j) set(v.column_factor[column + j], y_, v.right[column + j]);
      in_range[g] = all;
    });
  }

  void to_similarities(const View& v) const {
    const bool cosine = answers_.args.similarity == Similarity::cosine;
    for_each(v, [&](int64_t, const Group& group, const int64_t*, const int64_t*, int64_t lane, int64_t column) {
      const T* of_row = v.row_factor + lane;
      for (int64_t j = 0; j < group.columns; ++j) {
        T* line = v.u + j * v.stride + lane;
        const T of_column = cosine ? v.column_factor[column + j] : T(0);
        for (int64_t r = 0; r < group.rows; r += BLOCK)
#pragma omp simd
          for (int64_t b = r; b < r + BLOCK; ++b) line[b] = cosine ? line[b] * (of_row[b] * of_column) : -line[b];
      }
    });
  }

  // -u, and -infinity where u is not below the limit.
  void negate(const View& v) const {
    const bool unbounded = !answers_.args.below;
    for_each(v, [&](int64_t, const Group& group, const int64_t*, const int64_t*, int64_t lane, int64_t) {
      for (int64_t j = 0; j < group.columns; ++j) {
        T *line = v.u + j * v.stride + lane, *limit = v.limit + lane;
#pragma omp simd
        for (int64_t r = 0; r < group.rows; ++r) line[r] = unbounded || line[r] < limit[r] ? -line[r] : none<T>;
      }
    });
  }

  // Whether a limit is still to be applied.
  bool bounded() const { return answers_.args.below && answers_.args.largest; }

  // The best column of every row.
  void choose(const View& v) const {
    const I unbounded = I{} - Int(bounded() ? 0 : 1);
    for (int64_t first = 0; first < v.stride; first += LANES) {
      const V limit = load(v.limit + first);
      const I self = reinterpret_cast<const I&>(v.self[first]), depth = reinterpret_cast<const I&>(v.depth[first]);
      V top = V{} + none<T>;
      I where = I{} - 1;
      for (int64_t j = 0; j < v.batch.deepest; ++j) {
        const V value = load(v.u + j * v.stride + first);
        const I line = I{} + Int(j);
        const I better = (I)(value > top) & (I)(line != self) & (I)(line < depth) & ((I)(value < limit) | unbounded);
        top = better ? value : top;
        where = better ? line : where;
      }
      save(v.limit + first, top);
      reinterpret_cast<I&>(v.self[first]) = where;
    }
    for_each(v, [&](int64_t, const Group& group, const int64_t* rows, const int64_t* columns, int64_t lane, int64_t) {
      for (int64_t r = 0; r < group.rows; ++r) {
        const Best<T> best = answers_.best(rows[r]);
        const Int where = v.self[lane + r];
        *best.value = v.limit[lane + r];
        *best.index = where < 0 ? -1 : columns[where];
      }
    });
  }

  // The k best.
  void rank(const View& v) const {
    for_each(v, [&](int64_t, const Group& group, const int64_t* rows, const int64_t* columns, int64_t lane, int64_t) {
      for (int64_t r = 0; r < group.rows; ++r) {
        const Best<T> best = answers_.best(rows[r]);
        best.clear();
        for (int64_t j = 0; j < group.columns; ++j) {
          const T value = v.u[j * v.stride + lane + r];
          const bool admitted = j != v.self[lane + r] && (!bounded() || value < v.limit[lane + r]);
          if (admitted) best.insert(value, columns[j]);
        }
      }
    });
  }
};

}  // namespace FM_ISA
}  // namespace fused_margins
