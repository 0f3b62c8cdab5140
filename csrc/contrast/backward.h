// The backward of contrast: the gradient of y, a product of the weights with x, scaled by row; a second one makes
// weights that were not saved. Columns are independent of each other, so no thread waits for another.
#pragma once

#include "epilogue.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

// The rows whose positive is column j, found by binary search in the rows sorted by target.
class Anchors {
 public:
  Anchors(const int64_t* target, int64_t rows, int64_t ignored) : target_(target), order_(rows) {
    for (int64_t i = 0; i < rows; ++i)
      if (target[i] != ignored) order_[count_++] = i;
    std::stable_sort(order_.get(), order_.get() + count_, [&](int64_t a, int64_t b) { return target[a] < target[b]; });
  }
  template <class F>
  void for_each(int64_t column, F f) const {
    const int64_t* end = order_.get() + count_;
    const int64_t* at = std::lower_bound(order_.get(), order_.get() + count_, column,
                                         [&](int64_t i, int64_t c) { return target_[i] < c; });
    for (; at != end && target_[*at] == column; ++at) f(*at);
  }

 private:
  const int64_t* target_;
  Buffer<int64_t> order_;
  int64_t count_ = 0;
};

template <class Products>
class Backward {
 public:
  using T = typename Products::Value;
  using Side = Weights<Products>;

  explicit Backward(const ContrastBackward& args)
      : args_(args),
        p_(args.in),
        epilogue_(args.in.epilogue != Epilogue::none),
        smooth_(args.in.smoothing != 0),
        maximum_(args.in.force_running_maximum || p_.needs_maximum()),
        relative_(maximum_),
        recompute_(args.in.saved_blocks < contrast_num_blocks(p_.columns, args.in.group_size)),
        columns_wanted_(args.grad_y || args.grad_bias),
        threads_(thread_count(double(p_.rows) * double(p_.columns) * double(p_.width) * (recompute_ ? 2 : 1))),
        group_(whole_groups(Products::group(p_.columns, threads_), args.in.group_size)),
        side_(p_, const_cast<void*>(args.saved)),
        loss_(p_, side_.saved),
        of_loss_(epilogue_ ? 3 * p_.rows : 0),
        g_(epilogue_ ? of_loss_.get() : static_cast<const T*>(args.grad_negative_lse)),
        h_(epilogue_ ? of_loss_.get() + p_.rows : static_cast<const T*>(args.grad_positive)),
        all_columns_(side_.y, smooth_ && (args.grad_x || args.grad_scale) ? threads_ : 0),
        all_rows_(side_.x, smooth_ && args.grad_y ? threads_ : 0),
        of_all_(smooth_ && args.grad_scale ? p_.rows : 0),
        anchors_(args.in.target, args.grad_y ? p_.rows : 0, args.in.ignore_index),
        row_factor_(side_.stride),
        bias_factor_(side_.stride),
        scratch_(threads_, scratch_size()) {
    if (columns_wanted_ && recompute_) side_.products.allocate_logits();
    if (args.grad_y) side_.products.allocate_gradient();
    if (epilogue_) loss_.backward(grad_loss(), of_loss_.get(), of_loss_.get() + p_.rows, of_loss_.get() + 2 * p_.rows);
  }

  void run() {
    in_huge_pages(args_.grad_x, args_.in.x);
    in_huge_pages(args_.grad_y, args_.in.y);
    // What the weights of each row are multiplied by to be dL/du, and dL/dbias; weights come relative to negative_lse,
    // or unshifted, and then factors may be near the smallest number of T, as exp(-lse) is at a large scale. They are
    // lifted for the product, to 2^-60: weights of float32 are below 2^125. By 2^100 at most, whose inverse float32
    // still holds. Where that leaves some row far below the largest, the weights are made relative after all.
    const auto of_row = [&](int64_t i) { return relative_ ? double(g_[i]) : g_[i] * std::exp(-double(lse(i))); };
    double largest = 0, smallest = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < p_.rows; ++i)
      if (counts(i) && g_[i] != 0) {
        const double factor = std::abs(of_row(i) * p_.scale(i));
        largest = std::max(largest, factor);
        smallest = std::min(smallest, factor);
      }
    if (!relative_ && largest > 0 && largest < 0x1p-60)
      lift_ = std::ldexp(1.0, std::min(100, -60 - std::ilogb(largest)));
    if (!relative_ && lift_ * smallest < 0x1p-90) relative_ = true, lift_ = 1;
    for (int64_t i = 0; i < side_.stride; ++i) {
      const bool there = i < p_.rows && counts(i);
      bias_factor_[i] = there ? T(of_row(i)) : T(0);
      row_factor_[i] = there ? T(lift_ * of_row(i) * p_.scale(i)) : T(0);
    }
    const int64_t panels = columns_wanted_ && recompute_ ? side_.panels() : 0;
    const int64_t right_operands = args_.grad_y ? side_.products.gradient_pieces() : 0;
    const int64_t groups = columns_wanted_ ? ceil_div(p_.columns, group_) : 0;
    const int64_t row_tasks = args_.grad_x ? ceil_div(p_.rows, ROW_TASK) : 0;
    Team::run(threads_, [&](Team team) {
      [[maybe_unused]] typename Products::Session session;
      if (smooth_) sum_units(team);
      // x as the products take it, for logits that are made again and for the gradient of y.
      team.each(panels + right_operands, 1, [&](int64_t i) {
        if (i < panels)
          side_.products.prepare_panel(i, false, rows_scratch());
        else
          side_.products.prepare_gradient(i - panels, row_factor_.get(), rows_scratch());
      });
      team.each(groups + row_tasks, 1, [&](int64_t task) {
        if (task < groups) return columns(task * group_);
        const int64_t first = (task - groups) * ROW_TASK;
        for (int64_t i = first; i < std::min(first + ROW_TASK, p_.rows); ++i) row(i);
      });
    });
    if (args_.grad_scale) grad_scale();
    if (epilogue_) loss_.backward_of_logit(grad_loss(), g_, of_all_.get(), args_.grad_scale, args_.grad_margin);
  }

 private:
  static constexpr int64_t ROW_TASK = 16;  // rows of x whose gradient is a task
  const ContrastBackward& args_;
  Problem<T> p_;
  bool epilogue_, smooth_;
  bool maximum_;   // weights come shifted
  bool relative_;  // and are made relative to negative_lse
  bool recompute_, columns_wanted_;
  int threads_;
  int64_t group_;  // columns of a task
  Side side_;
  RowLoss<T> loss_;
  Buffer<T> of_loss_;                  // with an epilogue: g, h, and the gradient of every similarity of a row alike
  const T *g_, *h_;                    // gradients of negative_lse and of positive
  UnitSum<T> all_columns_, all_rows_;  // the latter under those gradients
  Buffer<T> of_all_;                   // similarities with all columns, summed
  Anchors anchors_;
  Buffer<T> row_factor_, bias_factor_;
  double lift_ = 1;     // a power of two
  Scratch<T> scratch_;  // of a group: its columns, weights and gradient; two rows

  int64_t gradient_stride() const { return odd_lines(side_.products.parts() * Side::WIDE); }
  // Products write whole tiles: rows beyond those of a group are theirs, too.
  int64_t gradient_size() const { return round_up(group_, ROW_QUANTUM) * gradient_stride(); }
  int64_t columns_size() const { return recompute_ ? side_.products.block_size(group_) : 0; }
  int64_t scratch_size() const {
    const Products& products = side_.products;
    const int64_t of_group = columns_size() + group_ * side_.stride + gradient_size();
    return std::max(of_group + products.gradient_scratch_size(group_), products.scratch_size()) +
           std::max(products.scratch_size(), 3 * p_.width);
  }
  // Behind the rest: a few rows.
  T* rows_scratch() const {
    return scratch_.mine() + scratch_size() - std::max(side_.products.scratch_size(), 3 * p_.width);
  }
  const T* grad_loss() const { return static_cast<const T*>(args_.grad_loss); }
  const T* all() const { return of_loss_.get() + 2 * p_.rows; }
  T lse(int64_t i) const { return side_.saved.negative_lse[i]; }
  bool counts(int64_t i) const { return (epilogue_ ? p_.has_positive(i) : !p_.ignored(i)) && lse(i) != none<T>; }
  // Columns summed under the weights of a row.
  const T* sum_of_columns(int64_t i) const { return side_.saved.mean + i * round_up(p_.width, 16); }

  void sum_units(Team& team) {
    if (args_.grad_x || args_.grad_scale) all_columns_.run(team, side_.saved.y_factor, [](int64_t) { return 1.0; });
    if (args_.grad_y) all_rows_.run(team, side_.saved.x_factor, [&](int64_t i) { return double(all()[i]); });
    if (args_.grad_scale)
      team.each(p_.rows, ROW_TASK,
                [&](int64_t i) { of_all_[i] = all_columns_.along(side_.x, i, side_.saved.x_factor[i]); });
  }

  // The weights of a group of columns, as saved or made again, or relative to negative_lse.
  const T* weights(int64_t first, int64_t count, T* columns, T* own) const {
    const int64_t block = first / side_.saved.block;
    const T *shift = side_.saved.shifts(block), *w = own;
    if (block < args_.in.saved_blocks)
      w = side_.saved.weights(block) + first % side_.saved.block * side_.stride;
    else
      for (int64_t panel = 0; panel < side_.panels();
           panel += Products::TOGETHER)  // as the forward: while they are hot
        side_.make(first, count, columns, panel, std::min(Products::TOGETHER, side_.panels() - panel), false,
                   maximum_ ? shift : nullptr, own, nullptr, nullptr);
    if (!relative_) return w;
    // A block that admits nothing for a row has the shift 0, which may be far above that row's lse: its weights are 0,
    // and their factor must be finite. Unshifted weights take exp(-lse) in two halves, which T holds.
    const auto relative = [&](int64_t i) {
      return exponential(maximum_ ? std::min(shift[i] - lse(i), T(0)) : -lse(i) / 2);
    };
    T factor[BLOCK];
    for (int64_t i0 = 0; i0 < p_.rows; i0 += BLOCK) {
      const int64_t rows = std::min(BLOCK, p_.rows - i0);
      for (int64_t i = 0; i < rows; ++i) factor[i] = counts(i0 + i) ? relative(i0 + i) : T(0);
      for (int64_t j = 0; j < count; ++j) {
        T* out = own + j * side_.stride + i0;
        multiply(out, factor, w + j * side_.stride + i0, rows);
        if (!maximum_) multiply(out, factor, out, rows);
      }
    }
    return own;
  }

  // Gradients of columns first ... first + group_.
  void columns(int64_t first) {
    const int64_t count = std::min(group_, p_.columns - first);
    T *prepared = scratch_.mine(), *own = prepared + columns_size(), *gradient = own + group_ * side_.stride;
    T *rest = gradient + gradient_size(), *row = rows_scratch(), *other = row + p_.width;
    if (first / side_.saved.block >= args_.in.saved_blocks)
      side_.products.prepare_columns(first, 0, count, count, false, prepared, row);
    const T* w = weights(first, count, prepared, own);
    if (args_.grad_bias)
      for (int64_t j = 0; j < count; ++j)
        static_cast<T*>(args_.grad_bias)[first + j] = dot(w + j * side_.stride, bias_factor_.get(), p_.rows);
    if (!args_.grad_y) return;
    const int64_t stride = gradient_stride();
    side_.products.gradient(w, count, gradient, stride, rest);
    for (int64_t j = 0; j < count; ++j) {
      T* sum = gradient + j * stride;
      if (lift_ != 1) scale(sum, T(1 / lift_), sum, p_.width);
      if (p_.euclidean()) {
        const T weight = dot(w + j * side_.stride, row_factor_.get(), p_.rows);
        side_.y.prepare(first + j, row);
        combine(sum, T(2), sum, -weight, row, p_.width);
        anchors_.for_each(first + j, [&](int64_t i) {  // of the rows as they are: exact where they are near
          load_row(args_.in.x, i, row);
          load_row(args_.in.y, first + j, other);
          for (int64_t d = 0; d < p_.width; ++d) sum[d] += 2 * h_[i] * (row[d] - other[d]);
        });
      } else {
        if (smooth_) add_scaled(sum, T(1), all_rows_.get(), p_.width);
        anchors_.for_each(first + j, [&](int64_t i) {
          add_scaled(sum, h_[i] * side_.saved.x_factor[i], side_.x.row_of(i, row), p_.width);
        });
        const T* y = side_.y.row_of(first + j, row);
        chain(args_.grad_y, side_.y, first + j, side_.saved.y_factor[first + j], y, dot(sum, y, p_.width), sum);
        continue;
      }
      store(args_.grad_y, args_.in.y.dtype, (first + j) * p_.width, sum, p_.width);
    }
  }

  // Gradient of one row, from the average that the forward saved.
  void row(int64_t i) {
    T *sum = rows_scratch(), *x = sum + p_.width, *y = x + p_.width;
    const T weight = counts(i) ? g_[i] * p_.scale(i) : T(0), inverse = counts(i) ? side_.saved.inverse_sum[i] : T(0);
    const T* average = sum_of_columns(i);
    const int64_t j = args_.in.target[i];
    if (!p_.euclidean()) {
      const T* values = side_.x.row_of(i, x);
      const bool positive = p_.has_positive(i);
      const T* own = positive ? side_.y.row_of(j, y) : average;
      const T of_own = positive ? h_[i] * side_.saved.y_factor[j] : T(0);
      // The inverse first: a small weight times a small inverse is 0. Without a positive the row adds 0 times its own
      // average.
      T along = sum_terms<T>(
          p_.width,
          [=](int64_t d) {
            const Vector<T> v = of_own * load(own + d) + weight * (inverse * load(average + d));
            save(sum + d, v);
            return v * load(values + d);
          },
          [=](int64_t d) {
            sum[d] = of_own * own[d] + weight * (inverse * average[d]);
            return sum[d] * values[d];
          });
      if (smooth_) {
        add_scaled(sum, all()[i], all_columns_.get(), p_.width);
        along = dot(sum, values, p_.width);
      }
      return chain(args_.grad_x, side_.x, i, side_.saved.x_factor[i], values, along, sum);
    }
    scale(sum, inverse, average, p_.width);
    scale(sum, weight, sum, p_.width);
    side_.x.prepare(i, x);
    combine(sum, T(2), sum, -weight, x, p_.width);
    if (p_.has_positive(i)) {
      load_row(args_.in.x, i, x);
      load_row(args_.in.y, j, y);
      for (int64_t d = 0; d < p_.width; ++d) sum[d] += 2 * h_[i] * (y[d] - x[d]);
    }
    store(args_.grad_x, args_.in.x.dtype, i * p_.width, sum, p_.width);
  }

  // From the gradient `sum` of a row as the products take it, `factor` times `values`, to that of the row itself, which
  // is stored; along: <sum, values>.
  void chain(void* grad, const Rows<T>& side, int64_t i, T factor, const T* values, T along, T* sum) const {
    T* out = side.is_of_values() ? static_cast<T*>(grad) + i * p_.width : sum;
    if (p_.in.similarity == Similarity::cosine)
      combine(out, factor, sum, -along * factor * factor, values, p_.width);
    else if (out != sum)
      std::copy(sum, sum + p_.width, out);
    if (out == sum) store(grad, side.matrix.dtype, i * p_.width, sum, p_.width);
  }

  // g_i sum_j q_ij u_ij.
  void grad_scale() {
    T* out = static_cast<T*>(args_.grad_scale);
    double sum = 0;
    for (int64_t i = 0; i < p_.rows; ++i) {
      const T value = counts(i) ? g_[i] * side_.saved.mean_similarity[i] : T(0);
      p_.in.scale_per_row ? out[i] = value : sum += double(value);
    }
    if (!p_.in.scale_per_row) out[0] = T(sum);
  }
};

}  // namespace
}  // namespace FM_ISA
}  // namespace fused_margins
