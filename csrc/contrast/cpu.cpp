// contrast on a CPU: logits are made strip by strip in the cache and reduced there.
//
// Forward, one product: sum of exp(logit) over the admitted columns of each strip, strips added in order. No running
// maximum where |logit| <= scale keeps the sum within range (cosine without bias); elsewhere each strip has its own.
//
// Backward, two products and, where the similarities were not kept, a third: dL/du of one chunk of columns at a time.
//
// Limits: labels, targets and scales are checked before anything is computed. Memory beyond the outputs: x and a chunk
// of columns, packed, and in the backward (rows, CHUNK) values of dL/du, whatever the memory budget.
#include "cpu.h"

#include "../common/checks.h"
#include "../common/gradient.h"
#include "../common/labels.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

template <class T>
constexpr T none = -std::numeric_limits<T>::infinity();

// What both directions know of every row.
template <class T>
struct Problem {
  const ContrastInputs& in;
  int64_t rows, columns, width;
  LabelIds labels;

  explicit Problem(const ContrastInputs& inputs)
      : in(inputs),
        rows(checked(inputs)),
        columns(inputs.y.rows),
        width(inputs.x.width),
        labels(inputs.row_labels ? inputs.row_labels : inputs.target, rows, inputs.column_labels, columns) {}

  T scale(int64_t i) const { return static_cast<const T*>(in.scale)[in.scale_per_row ? i : 0]; }
  const T* bias() const { return static_cast<const T*>(in.bias); }
  bool ignored(int64_t i) const { return in.target[i] == in.ignore_index; }

  // z (count,): logits of row i from its similarities u, -infinity where not admitted.
  void logits(int64_t i, int64_t first, int64_t count, const T* u, T* z) const {
    const T s = scale(i);
    if (bias())
      for (int64_t j = 0; j < count; ++j) z[j] = s * u[j] + bias()[first + j];
    else
      for (int64_t j = 0; j < count; ++j) z[j] = s * u[j];
    admit(z, count, labels.columns.get() + first, labels.rows[i], in.relation,
          in.self_index && in.self_index[i] >= 0 ? in.self_index[i] - first : -1);
  }

 private:
  static int64_t checked(const ContrastInputs& in) {
    check_index("target", in.target, in.x.rows, in.y.rows, in.ignore_index);
    if (in.self_index) check_index("self_index", in.self_index, in.x.rows, in.y.rows, -1);
    check_scale(static_cast<const T*>(in.scale), in.scale_per_row ? in.x.rows : 1);
    return in.x.rows;
  }
};

// The running log-sum-exp of a row: `sum` of exp(z - maximum).
template <class T>
struct LogSum {
  T maximum, sum;

  void add(const LogSum& other) {
    if (other.sum == 0) return;
    if (sum == 0) {
      *this = other;
    } else if (other.maximum > maximum) {
      sum = sum * exponential(maximum - other.maximum) + other.sum;
      maximum = other.maximum;
    } else {
      sum += other.sum * exponential(other.maximum - maximum);
    }
  }
  T value() const { return sum == 0 ? none<T> : maximum + std::log(sum); }
};

template <class T>
LogSum<T> sum_exponentials(const T* z, int64_t count, bool shifted) {
  T maximum = 0;
  if (shifted) {
    maximum = none<T>;
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < count; ++j) maximum = z[j] > maximum ? z[j] : maximum;
    if (maximum == none<T>) {  // nothing admitted, or nothing but NaN
      for (int64_t j = 0; j < count; ++j)
        if (std::isnan(z[j])) return {T(0), z[j]};
      return {T(0), T(0)};
    }
  }
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += exponential(z[j] - maximum);
  return {maximum, sum};
}

// Whether every exp(logit), and the sum of them all, stays well inside the range of T.
template <class T>
bool needs_maximum(const Problem<T>& p) {
  if (p.in.similarity != Similarity::cosine || p.in.bias) return true;
  T largest = 0;
  for (int64_t i = 0; i < (p.in.scale_per_row ? p.rows : 1); ++i) largest = std::max(largest, p.scale(i));
  return !(largest + std::log(T(p.columns + 1)) < T(sizeof(T) == 4 ? 86 : 700));
}

template <class T>
void forward(const ContrastForward& args) {
  const Problem<T> p(args.in);
  T *positive = static_cast<T*>(args.positive), *lse = static_cast<T*>(args.negative_lse);
  T* kept = static_cast<T*>(args.similarities);
  const bool shifted = args.force_running_maximum || needs_maximum(p);
  Strips<T> strips(args.in.x, args.in.y, args.in.similarity, 1);
  Buffer<LogSum<T>> total(p.rows), partial(p.rows * STRIPS);
  std::fill(total.get(), total.get() + p.rows, LogSum<T>{0, 0});

#pragma omp parallel num_threads(strips.threads)
  {
    strips.prepare_rows();
    for (int64_t c = 0; c < strips.chunks(); ++c) {
      const Chunk chunk = strips.chunk(c);
      strips.prepare_columns(chunk);
      strips.for_each(chunk, [&](int64_t i, int64_t first, int64_t count, T* u) {
        if (kept) std::copy(u, u + count, kept + i * p.columns + first);
        p.logits(i, first, count, u, u);
        partial[i * STRIPS + (first - chunk.first) / STRIP] = sum_exponentials(u, count, shifted);
      });
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.rows; ++i)
        for (int64_t s = 0; s < chunk.strips(); ++s) total[i].add(partial[i * STRIPS + s]);
    }
    Buffer<T> a(p.width), b(p.width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.rows; ++i) {
      positive[i] = 0;
      lse[i] = p.ignored(i) ? none<T> : total[i].value();
      if (p.ignored(i)) continue;
      positive[i] = pair_similarity(strips.x, i, strips.y, args.in.target[i], a.get(), b.get());
    }
  }
}

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

template <class T>
void backward(const ContrastBackward& args) {
  const ContrastInputs& in = args.in;
  const Problem<T> p(in);
  const T *g = static_cast<const T*>(args.grad_negative_lse), *h = static_cast<const T*>(args.grad_positive);
  const T *lse = static_cast<const T*>(args.negative_lse), *kept = static_cast<const T*>(args.similarities);
  const bool euclidean = in.similarity == Similarity::negative_squared_euclidean;
  Strips<T> strips(in.x, in.y, in.similarity, kept ? 2 : 3);
  Gradient<T> gradient(strips, args.grad_x, args.grad_y);
  const Anchors anchors(in.target, p.rows, in.ignore_index);
  // Of each row, summed over the columns: dL/du, and dL/dscale = g q u.
  Buffer<T> partial(p.rows * STRIPS * 2), total(p.rows * 2), inverse_scale(p.rows);
  std::fill(total.get(), total.get() + p.rows * 2, T(0));
  for (int64_t i = 0; i < p.rows; ++i) inverse_scale[i] = 1 / p.scale(i);

#pragma omp parallel num_threads(strips.threads)
  {
    Buffer<T> z(STRIP), other(p.width);
    const auto derivative = [&](int64_t i, int64_t first, int64_t count, const T* u, const Chunk& chunk) {
      T* d = gradient.row(i) + first - chunk.first;
      T weight = 0, along = 0;
      if (p.ignored(i) || lse[i] == none<T> || g[i] == 0) {
        std::fill(d, d + count, T(0));
      } else {
        p.logits(i, first, count, u, z.get());
        const T factor = g[i] * p.scale(i);
#pragma omp simd reduction(+ : weight, along)
        for (int64_t j = 0; j < count; ++j) {
          d[j] = factor * exponential(z[j] - lse[i]);
          weight += d[j];
          along += d[j] * u[j];
        }
      }
      T* sums = partial.get() + (i * STRIPS + (first - chunk.first) / STRIP) * 2;
      sums[0] = weight;
      sums[1] = along * inverse_scale[i];
    };
    strips.prepare_rows();
    gradient.prepare_rows();
    for (int64_t c = 0; c < strips.chunks(); ++c) {
      const Chunk chunk = strips.chunk(c);
      strips.prepare_columns(chunk);
      gradient.prepare_columns(chunk);
      if (kept) {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < p.rows * chunk.strips(); ++task) {
          const int64_t i = task / chunk.strips(), first = task % chunk.strips() * STRIP;
          derivative(i, chunk.first + first, std::min(STRIP, chunk.count - first),
                     kept + i * p.columns + chunk.first + first, chunk);
        }
      } else {
        strips.for_each(chunk,
                        [&](int64_t i, int64_t first, int64_t count, T* u) { derivative(i, first, count, u, chunk); });
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.rows; ++i)
        for (int64_t s = 0; s < chunk.strips() * 2; ++s) total[i * 2 + s % 2] += partial[i * STRIPS * 2 + s];
      gradient.products(chunk, [&](int64_t j, T* sum, T* scratch) {
        if (!euclidean)
          anchors.for_each(j, [&](int64_t i) {
            strips.x.prepared(i, scratch);
            add_scaled(sum, h[i], scratch, p.width);
          });
        strips.y.chain(j, euclidean ? gradient.column_sum(j - chunk.first, nullptr) : T(0), sum, scratch);
        if (euclidean)
          anchors.for_each(j, [&](int64_t i) {
            load_row(in.x, i, scratch);
            load_row(in.y, j, other.get());
            for (int64_t d = 0; d < p.width; ++d) sum[d] += 2 * h[i] * (scratch[d] - other[d]);
          });
        store(args.grad_y, in.y.dtype, j * p.width, sum, p.width);
      });
      if (args.grad_bias) {
#pragma omp for schedule(static)
        for (int64_t j = 0; j < chunk.count; ++j)
          static_cast<T*>(args.grad_bias)[chunk.first + j] = gradient.column_sum(j, inverse_scale.get());
      }
    }
    gradient.rows([&](int64_t i, T* sum, T* scratch) {
      const bool positive = !p.ignored(i);
      if (positive && !euclidean) {
        strips.y.prepared(in.target[i], other.get());
        add_scaled(sum, h[i], other.get(), p.width);
      }
      strips.x.chain(i, total[i * 2], sum, scratch);
      if (positive && euclidean) {
        load_row(in.x, i, scratch);
        load_row(in.y, in.target[i], other.get());
        for (int64_t d = 0; d < p.width; ++d) sum[d] += 2 * h[i] * (other[d] - scratch[d]);
      }
      store(args.grad_x, in.x.dtype, i * p.width, sum, p.width);
    });
  }
  if (!args.grad_scale) return;
  T* grad_scale = static_cast<T*>(args.grad_scale);
  if (!in.scale_per_row) grad_scale[0] = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    if (in.scale_per_row)
      grad_scale[i] = total[i * 2 + 1];
    else
      grad_scale[0] += total[i * 2 + 1];
}

}  // namespace

void contrast_forward(const ContrastForward& args) {
  args.in.x.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void contrast_backward(const ContrastBackward& args) {
  args.in.x.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace FM_ISA
}  // namespace fused_margins
