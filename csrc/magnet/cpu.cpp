// magnet on a CPU: the clusters' means, all distances from them, the loss; and its gradient, in one call each.
//
// There are few clusters: rows are compared with all means pair by pair, and each distance is a sum of squared
// differences. Every sum over rows runs in their order, in double. Rows far from the origin are moved there: nothing
// depends on where it is, but rounding does. Clusters are checked before anything is computed.
#include "cpu.h"

#include "../cpu/checks.h"
#include "../cpu/pairs.h"
#include "../cpu/scratch.h"
#include "../cpu/team.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

template <class T>
class Magnet {
 public:
  Magnet(const MagnetInputs& in, void* saved)
      : in_(in),
        rows_(in.x.rows),
        clusters_(in.num_clusters),
        width_(in.x.width),
        stride_(round_up(width_, 16)),
        means_(static_cast<T*>(saved)),
        distances_(means_ + clusters_ * stride_),
        others_(distances_ + rows_ * clusters_),
        variance_(others_ + rows_),
        counts_(clusters_),
        origin_(origin_of(in.x)),
        as_it_is_(in.x.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32) && in.x.column_stride == 1 &&
                  width_ == stride_ && !origin_.get()),
        copy_(as_it_is_ ? 0 : rows_ * stride_),
        x_(as_it_is_ ? static_cast<const T*>(in.x.data) : copy_.get()),
        x_stride_(as_it_is_ ? in.x.row_stride : stride_),
        threads_(thread_count(2.0 * double(rows_) * double(clusters_) * double(width_))) {
    std::fill(counts_.get(), counts_.get() + clusters_, T(0));
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t m = in_.clusters[i];
      if (m < 0 || m >= clusters_)
        throw std::out_of_range("clusters: expected values in [0, " + std::to_string(clusters_) + "), got " +
                                std::to_string(m) + " in row " + std::to_string(i));
      ++counts_[m];
    }
    for (int64_t m = 0; m < clusters_; ++m)
      if (counts_[m] == 0)
        throw std::invalid_argument("clusters: every one of the " + std::to_string(clusters_) +
                                    " clusters needs a member, cluster " + std::to_string(m) + " has none");
  }

  void forward(void* out) {
    constexpr int64_t block = 16;  // rows of a task
    Scratch<const T*> pointers(threads_, block + clusters_);
    Team::run(threads_, [&](Team team) {
      load_rows(team);
      average(team);
      const T **rows = pointers.mine(), **means = rows + block;
      for (int64_t m = 0; m < clusters_; ++m) means[m] = means_ + m * stride_;
      team.each(ceil_div(rows_, block), 1, [&](int64_t piece) {
        const int64_t first = piece * block, count = std::min(block, rows_ - first);
        for (int64_t r = 0; r < count; ++r) rows[r] = row(first + r);
        all_pairs(rows, count, means, clusters_, width_, true, false, distances_ + first * clusters_, clusters_);
      });
    });
    double sum = 0;
    for (int64_t i = 0; i < rows_; ++i) sum += own(i);
    const T variance = T(sum / double(std::max<int64_t>(rows_ - 1, 1))), floor = T(in_.variance_floor);
    // Without a finite variance no loss is a number.
    variance_[0] = variance < floor ? floor : variance < -none<T> ? variance : std::numeric_limits<T>::quiet_NaN();
    variance_[1] = !(variance < floor);
    T* loss = static_cast<T*>(out);
    double total = 0;
    Buffer<T> logits(clusters_);
    for (int64_t i = 0; i < rows_; ++i) {
      make_logits(i, logits.get());
      T nearest = none<T>, weight = 0;
      for (int64_t m = 0; m < clusters_; ++m)
        if (other_class(i, m)) nearest = std::max(nearest, logits[m]);
      for (int64_t m = 0; m < clusters_; ++m)
        if (other_class(i, m)) weight += exponential(logits[m] - nearest);
      others_[i] = nearest == none<T> ? none<T> : nearest + std::log(weight);
      const T value = hinge(i);
      if (in_.reduction == Reduction::none)
        loss[i] = value > 0 || std::isnan(value) ? value : T(0);
      else
        total += value > 0 || std::isnan(value) ? value : T(0);
    }
    if (in_.reduction != Reduction::none) loss[0] = T(total / divisor());
  }

  void backward(const void* grad_loss, void* grad_x) {
    const T* grad = static_cast<const T*>(grad_loss);
    const T s = 1 / (2 * variance_[0]);
    // dL / d distance (rows, clusters) by halves: for -2 (x - mean); and of each row their sum.
    const int64_t padded = round_up(clusters_, 3 * ROW_QUANTUM);
    Buffer<T> c(round_up(rows_, TILE_ROWS) * padded), sums(rows_), logits(clusters_);
    double of_scale = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      // Not a number counts as well: its gradient is none either.
      const T g = hinge(i) <= 0 ? T(0) : grad[in_.reduction == Reduction::none ? i : 0] / divisor();
      T* of_row = c.get() + i * padded;
      std::fill(of_row, of_row + padded, T(0));
      T along = 0;
      if (g != 0) make_logits(i, logits.get());
      for (int64_t m = 0; g != 0 && m < clusters_; ++m) {
        if (!other_class(i, m)) continue;
        const T q = exponential(logits[m] - others_[i]);
        along += q * distance(i, m);
        of_row[m] = -g * s * q;
      }
      of_row[in_.clusters[i]] = g * s;
      if (g != 0) of_scale += g * (own(i) - along);
    }
    // Through the variance every row's own distance counts for all.
    const T shared = variance_[1] == 0
                         ? T(0)
                         : T(-of_scale) / (2 * variance_[0] * variance_[0]) / T(std::max<int64_t>(rows_ - 1, 1));
    Buffer<double> cluster_sums(clusters_);
    Buffer<T> pull(round_up(clusters_, TILE_ROWS) * stride_);
    std::fill(cluster_sums.get(), cluster_sums.get() + clusters_, 0.0);
    for (int64_t i = 0; i < rows_; ++i) {
      T* of_row = c.get() + i * padded;
      of_row[in_.clusters[i]] += shared;
      sums[i] = 0;
      for (int64_t m = 0; m < clusters_; ++m) {
        sums[i] += of_row[m];
        cluster_sums[m] += of_row[m];
      }
    }
    constexpr int64_t wide = TILE_COLUMNS<T>, block = 4 * TILE_ROWS;
    Scratch<T> scratch(threads_, block * stride_);
    Team::run(threads_, [&](Team team) {
      load_rows(team);
      // What each mean is pulled by, (clusters, width): c^T x - (sum of c) mean, divided among its members.
      team.each(ceil_div(stride_, wide), 1, [&](int64_t piece) {
        const int64_t d = piece * wide, count = std::min(wide, stride_ - d);
        panel_product<T, Left::contiguous_rows>(c.get(), padded, clusters_, x_ + d, x_stride_, count, rows_,
                                                pull.get() + d, stride_, false);
        for (int64_t m = 0; m < clusters_; ++m)
          for (int64_t e = d; e < d + count; ++e)
            pull[m * stride_ + e] = (pull[m * stride_ + e] - T(cluster_sums[m]) * means_[m * stride_ + e]) / counts_[m];
      });
      team.each(ceil_div(rows_, block), 1, [&](int64_t piece) {
        const int64_t first = piece * block, count = std::min(block, rows_ - first);
        T* out = scratch.mine();
        for (int64_t d = 0; d < stride_; d += wide)
          panel_product<T, Left::contiguous_depth>(c.get() + first * padded, padded, count, means_ + d, stride_,
                                                   std::min(wide, stride_ - d), clusters_, out + d, stride_, false);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t i = first + r;
          T* of_row = out + r * stride_;
          const T *x = row(i), *of_mean = pull.get() + in_.clusters[i] * stride_, weight = sums[i];
#pragma omp simd
          for (int64_t d = 0; d < width_; ++d) of_row[d] = 2 * (weight * x[d] - of_row[d] - of_mean[d]);
          store(grad_x, in_.x.dtype, i * width_, of_row, width_);
        }
      });
    });
  }

 private:
  const MagnetInputs& in_;
  int64_t rows_, clusters_, width_, stride_;
  T *means_, *distances_, *others_, *variance_;
  Buffer<T> counts_;  // (clusters,)
  Buffer<T> origin_;  // (width,), or none: the rows are not far from 0
  bool as_it_is_;     // x is T in whole vectors, and stays where it is
  Buffer<T> copy_;    // of x, (rows, stride), where it is not
  const T* x_;
  int64_t x_stride_;
  int threads_;

  const T* row(int64_t i) const { return x_ + i * x_stride_; }
  T distance(int64_t i, int64_t m) const { return distances_[i * clusters_ + m]; }
  T own(int64_t i) const { return distance(i, in_.clusters[i]); }
  bool other_class(int64_t i, int64_t m) const { return in_.cluster_labels[m] != in_.cluster_labels[in_.clusters[i]]; }
  // Of a row, and all clusters. Not inlined: a product that is not rounded before something is taken off, as where both
  // become one instruction, is not what the largest one was compared as; far from all clusters exp then overflows.
  __attribute__((noinline)) void make_logits(int64_t i, T* logits) const {
    const T s = 1 / (2 * variance_[0]), *of_row = distances_ + i * clusters_;
    for (int64_t m = 0; m < clusters_; ++m) logits[m] = -s * of_row[m];
  }
  // Above 0 where the row counts; -infinity where there is no other class.
  T hinge(int64_t i) const { return T(in_.alpha) + own(i) / (2 * variance_[0]) + others_[i]; }
  T divisor() const { return in_.reduction == Reduction::mean && rows_ ? T(rows_) : T(1); }

  // The first row, where rows are much further from 0 than from each other, as far as some of them tell.
  static Buffer<T> origin_of(const Matrix& x) {
    if (!x.rows || !x.width) return Buffer<T>();
    Buffer<T> first(x.width), other(x.width);
    load_row(x, 0, first.get());
    T from_zero = 0, apart = 0;
    for (int64_t d = 0; d < x.width; ++d) from_zero += first[d] * first[d];
    constexpr int64_t samples = 7;  // spread so that clusters in turn are not all the same one
    for (int64_t n = 1; n < samples; ++n) {
      load_row(x, n * x.rows / samples, other.get());
      T squared = 0;
      for (int64_t d = 0; d < x.width; ++d) squared += (first[d] - other[d]) * (first[d] - other[d]);
      apart = std::max(apart, squared);
    }
    return from_zero > 16 * apart && from_zero <= std::numeric_limits<T>::max() ? std::move(first) : Buffer<T>();
  }

  // x in T from the origin, rows padded with zeros.
  void load_rows(Team& team) {
    team.each(as_it_is_ ? 0 : rows_, 16, [&](int64_t i) {
      T* to = copy_.get() + i * stride_;
      load_row(in_.x, i, to);
      if (const T* origin = origin_.get())
        for (int64_t d = 0; d < width_; ++d) to[d] -= origin[d];
      std::fill(to + width_, to + stride_, T(0));
    });
  }

  // The mean of each cluster.
  void average(Team& team) {
    constexpr int64_t part = 64;
    Buffer<double> sums(clusters_ * part);  // of a thread
    team.each(ceil_div(stride_, part), 1, [&](int64_t piece) {
      const int64_t d = piece * part, count = std::min(part, stride_ - d);
      std::fill(sums.get(), sums.get() + clusters_ * part, 0.0);
      for (int64_t i = 0; i < rows_; ++i) {
        double* to = sums.get() + in_.clusters[i] * part;
        const T* from = row(i) + d;
#pragma omp simd
        for (int64_t e = 0; e < count; ++e) to[e] += double(from[e]);
      }
      for (int64_t m = 0; m < clusters_; ++m)
        for (int64_t e = 0; e < count; ++e) means_[m * stride_ + d + e] = T(sums[m * part + e] / double(counts_[m]));
    });
  }
};

}  // namespace

void magnet_forward(const MagnetForward& args) {
  args.in.x.dtype == DType::float64 ? Magnet<double>(args.in, args.saved).forward(args.loss)
                                    : Magnet<float>(args.in, args.saved).forward(args.loss);
}

void magnet_backward(const MagnetBackward& args) {
  void* saved = const_cast<void*>(args.saved);
  args.in.x.dtype == DType::float64 ? Magnet<double>(args.in, saved).backward(args.grad_loss, args.grad_x)
                                    : Magnet<float>(args.in, saved).backward(args.grad_loss, args.grad_x);
}

}  // namespace FM_ISA
}  // namespace fused_margins
