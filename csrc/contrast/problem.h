// What both directions of contrast know of a problem, and the matrix of weights exp(logit - shift) that they share.
//
// The weights lie with columns as rows: (columns, weight_stride(rows)). So the columns' vectors are left operands of
// every product and are never packed, sums over columns are sums of vectors, and the weights themselves serve as left
// operand of both weighted products. They are made in blocks of BLOCK columns, or at most FEW in a single one; whatever
// needs a running maximum has one shift for each block and row.
#pragma once

#include "../cpu/checks.h"
#include "../cpu/labels.h"
#include "../cpu/rows.h"
#include "../cpu/scratch.h"
#include "../cpu/team.h"
#include "saved.h"

namespace fused_margins {
namespace FM_ISA {

template <class T>
struct Problem {
  const ContrastInputs& in;
  int64_t rows, columns, width;
  bool one_label;     // each row excludes one column and no label is needed: the softmax case
  bool needs_labels;  // of both sides
  LabelIds labels;

  explicit Problem(const ContrastInputs& inputs)
      : in(inputs),
        rows(checked(inputs)),
        columns(inputs.y.rows),
        width(inputs.x.width),
        one_label(!inputs.column_labels && !inputs.row_labels && inputs.relation == Relation::different),
        needs_labels(!one_label && (inputs.relation != Relation::any || some_unadmitted(inputs))),
        labels(inputs.row_labels ? inputs.row_labels : inputs.target, needs_labels ? rows : 0, inputs.column_labels,
               needs_labels ? columns : 0) {}

  T scale(int64_t i) const { return static_cast<const T*>(in.scale)[in.scale_per_row ? i : 0]; }
  const T* bias() const { return static_cast<const T*>(in.bias); }
  bool ignored(int64_t i) const { return in.target[i] == in.ignore_index; }
  bool has_positive(int64_t i) const { return !ignored(i) && in.target[i] != ABSENT; }
  bool euclidean() const { return in.similarity == Similarity::negative_squared_euclidean; }

  // Whether some exp(logit), or the sum of them all, might leave the range of T.
  bool needs_maximum() const {
    if (in.similarity != Similarity::cosine || in.bias) return true;
    T largest = 0;
    for (int64_t i = 0; i < (in.scale_per_row ? rows : 1); ++i) largest = std::max(largest, scale(i));
    return !(largest + std::log(T(columns + 1)) < T(sizeof(T) == 4 ? 86 : 700));
  }

 private:
  static bool some_unadmitted(const ContrastInputs& in) {
    const int64_t* end = in.column_labels + (in.column_labels ? in.y.rows : 0);
    return std::find(in.column_labels, end, UNADMITTED) != end;
  }
  static int64_t checked(const ContrastInputs& in) {
    check_index("target", in.target, in.x.rows, in.y.rows, in.ignore_index, true);
    if (in.self_index) check_index("self_index", in.self_index, in.x.rows, in.y.rows, -1);
    check_scale(static_cast<const T*>(in.scale), in.scale_per_row ? in.x.rows : 1);
    return in.x.rows;
  }
};

// Both sides of a problem, and the weights made of their products.
template <class Products>
class Weights {
 public:
  using T = typename Products::Value;
  static constexpr int64_t WIDE = Products::WIDE;  // rows of x in a panel
  const Problem<T>& p;
  Saved<T> saved;
  Buffer<T> centre;
  Rows<T> x, y;
  Products products;
  int64_t stride;  // of the weights

  Weights(const Problem<T>& problem, void* memory)
      : p(problem),
        saved(p.in, memory),
        centre(centre_of<T>(p.in.y, p.in.similarity)),
        x(p.in.x, p.in.similarity, centre.get()),
        y(p.in.y, p.in.similarity, centre.get()),
        products(x, y, saved),
        stride(saved.stride) {}

  int64_t panels() const { return products.panels(); }
  int64_t blocks() const { return ceil_div(p.columns, saved.block); }
  int64_t block_columns(int64_t block) const { return std::min(saved.block, p.columns - block * saved.block); }

  // Of a panel's rows, summed over the columns.
  struct Sums {
    T weight[WIDE], shift[WIDE], along[WIDE];  // exp(logit - shift); what was taken off; weight * similarity
  };

  // The shifts of a panel's rows into those of their block.
  void save_shifts(int64_t panel, const Sums& sums, T* shifts) const {
    const int64_t row0 = panel * WIDE, rows = std::min(WIDE, p.rows - row0);
    std::copy(sums.shift, sums.shift + rows, shifts + row0);
    if (panel + 1 == panels()) std::fill(shifts + p.rows, shifts + stride, T(0));
  }

  // Zeros around the weights of a panel's rows: what is handed over is the same at every call.
  void fill_margins(int64_t panel, int64_t count, T* weights) const {
    const int64_t row0 = panel * WIDE, end = panel + 1 == panels() ? stride : row0 + WIDE;
    for (int64_t j = 0; j < count; ++j)
      std::fill(weights + j * stride + std::min(p.rows, end), weights + j * stride + end, T(0));
    for (int64_t j = count; j < count + SPARE; ++j)
      std::fill(weights + j * stride + row0, weights + j * stride + end, T(0));
  }

  // w: exp(logit - shift) of all `count` columns that `columns` holds, from `first` on, and of the rows of `together`
  // panels; 0 where a row does not admit a column. The shift is the one given for each row, else the largest logit if
  // `maximum`, else 0. `positive` (rows,), if any, gets the similarity of the rows whose target is among the columns;
  // `sums`, if any, is of the first of these panels.
  void make(int64_t first, int64_t count, T* columns, int64_t panel, int64_t together, bool maximum, const T* given,
            T* weights, T* positive, Sums* sums) const {
    products.logits(columns, count, count, panel, together, weights + panel * WIDE);
    for (int64_t i = 0; i < together; ++i)
      weigh_panel(first, count, panel + i, maximum, given, weights + (panel + i) * WIDE, positive,
                  sums ? sums + i : nullptr);
  }

 private:
  // Similarities of a panel in, weights out.
  void weigh_panel(int64_t first, int64_t count, int64_t panel, bool maximum, const T* given, T* w, T* positive,
                   Sums* sums) const {
    constexpr int64_t lanes = VectorOf<T>::lanes;
    const int64_t row0 = panel * WIDE, rows = std::min(WIDE, p.rows - row0);
    if (p.euclidean()) distances(first, count, row0, rows, w);
    if (positive)
      for (int64_t i = row0; i < row0 + rows; ++i) {
        const int64_t j = p.in.target[i];
        if (j >= first && j < first + count && !p.ignored(i)) positive[i] = w[(j - first) * stride + i - row0];
      }
    mask(first, count, row0, rows, w);
    for (int64_t v = 0; v < rows; v += lanes)
      exponentiate(first, count, row0 + v, std::min(lanes, rows - v), maximum, given, w + v, sums, v);
  }

  // -|x - y|^2 from products of centred rows and their squared lengths.
  void distances(int64_t first, int64_t count, int64_t row0, int64_t rows, T* w) const {
    const T* squared = saved.x_factor + row0;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < rows; ++i) {
        const T value = 2 * w[j * stride + i] - squared[i] - saved.y_factor[first + j];
        w[j * stride + i] = value > 0 ? T(0) : value;
      }
  }

  // Similarities that are not admitted become -infinity.
  void mask(int64_t first, int64_t count, int64_t row0, int64_t rows, T* w) const {
    const auto exclude = [&](const int64_t* index) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t j = index[row0 + i];
        if (j >= first && j < first + count) w[(j - first) * stride + i] = none<T>;
      }
    };
    if (p.one_label) exclude(p.in.target);
    for (int64_t j = 0; p.needs_labels && j < count; ++j) {
      const int32_t label = p.labels.columns[first + j];
      if (label == UNADMITTED_ID)
        std::fill_n(w + j * stride, rows, none<T>);
      else
        admit(w + j * stride, rows, p.labels.rows.get() + row0, label, p.in.relation, -1, true);
    }
    if (p.in.self_index) exclude(p.in.self_index);
    for (int64_t j = 0; p.in.group_size > 1 && j < count; j += p.in.group_size) leave_best(rows, w + j * stride);
  }

  // Of a group's columns each row sees the most similar one, the first of equal ones.
  void leave_best(int64_t rows, T* w) const {
    T best[WIDE];
    std::copy(w, w + rows, best);
    for (int64_t j = 1; j < p.in.group_size; ++j)
#pragma omp simd
      for (int64_t i = 0; i < rows; ++i) best[i] = best[i] < w[j * stride + i] ? w[j * stride + i] : best[i];
    for (int64_t j = 0; j < p.in.group_size; ++j)
#pragma omp simd
      for (int64_t i = 0; i < rows; ++i) {
        const bool is_best = !(w[j * stride + i] < best[i]);
        w[j * stride + i] = is_best ? w[j * stride + i] : none<T>;
        best[i] = is_best ? -none<T> : best[i];
      }
  }

  struct OfVector {
    Vector<T> weight, along;
  };

  // u in, exp(scale u + bias - shift) out, and their sums. Not inlined: both directions run the same instructions, for
  // a compiler that fuses multiplications and additions differently in two copies would give them different bits.
  __attribute__((noinline)) static OfVector weigh(T* w, int64_t stride, int64_t count, Vector<T> scale, const T* bias,
                                                  Vector<T> shift) {
    using V = Vector<T>;
    V weight = V{}, along = V{};
    const auto weigh_one = [&](int64_t j, V u, V z) {
      const V e = exponentials<T>(z);
      weight += e;
      along += e == T(0) ? V{} : e * u;  // u may be -infinity
      save(w + j * stride, e);
    };
    // Where a shift's own rounding is 1 and more, logits must be rounded as it was before it is taken off.
    constexpr T far = 1 / std::numeric_limits<T>::epsilon();
    bool is_far = false;
    for (int64_t l = 0; l < VectorOf<T>::lanes; ++l) is_far |= shift[l] > far || shift[l] < -far;
    if (is_far) {
      for (int64_t j = 0; j < count; ++j) {
        const V u = load(w + j * stride);
        weigh_one(j, u, (u * scale + (bias ? bias[j] : T(0))) - shift);
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        const V u = load(w + j * stride);
        weigh_one(j, u, u * scale + ((bias ? bias[j] : T(0)) - shift));
      }
    }
    return {weight, along};
  }

  // One vector of rows, all columns; u in, weights out.
  void exponentiate(int64_t first, int64_t count, int64_t row, int64_t rows, bool maximum, const T* given, T* w,
                    Sums* sums, int64_t at) const {
    using V = Vector<T>;
    T lane[VectorOf<T>::lanes] = {};
    for (int64_t i = 0; i < rows; ++i) lane[i] = p.scale(row + i);
    const V scale = load(lane);
    const T* bias = p.bias() ? p.bias() + first : nullptr;
    V shift = V{};
    if (given) {
      for (int64_t i = 0; i < rows; ++i) lane[i] = given[row + i];
      shift = load(lane);
    } else if (maximum) {
      V largest = V{} + none<T>;
      for (int64_t j = 0; j < count; ++j) {
        const V z = load(w + j * stride) * scale + (bias ? bias[j] : T(0));
        largest = z > largest ? z : largest;
      }
      shift = largest == none<T> ? V{} : largest;  // nothing admitted, or nothing but NaN
    }
    const OfVector of = weigh(w, stride, count, scale, bias, shift);
    if (!sums) return;
    save(sums->weight + at, of.weight);
    save(sums->shift + at, shift);
    save(sums->along + at, of.along);
  }
};

}  // namespace FM_ISA
}  // namespace fused_margins
