// What makes the loss of a row of its positive similarity u and of negative_lse: softplus(negative_lse - z), z = scale
// (psi(u) - margin), and the gradients that it hands to the rest. A smoothing of e adds e (z - mean_j z_j), in which
// all columns are one vector, the sum of their unit vectors: of the logits z_j all but the own one are scale u_j.
#pragma once

#include "problem.h"
#include "unit_sum.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

template <class T>
class RowLoss {
 public:
  RowLoss(const Problem<T>& problem, const Saved<T>& saved)
      : p_(problem),
        positive_(saved.positive),
        lse_(saved.negative_lse),
        info_nce_(p_.in.epilogue == Epilogue::info_nce),
        per_row_(p_.in.reduction == Reduction::none),
        smoothing_(T(p_.in.smoothing)),
        share_(p_.columns ? T(p_.in.smoothing / double(p_.columns)) : T(0)) {
    int64_t counted = 0;
    for (int64_t i = 0; i < p_.rows; ++i) counted += p_.has_positive(i) && (!info_nce_ || lse_[i] > none<T>);
    divisor_ = p_.in.reduction == Reduction::mean && counted ? T(counted) : T(1);
  }

  // of_all (rows,): with smoothing the sum of a row's similarities with all columns.
  void forward(const T* of_all, T* loss) const {
    double sum = 0;  // of many rows: in float32 its rounding would exceed that of the losses
    for (int64_t i = 0; i < p_.rows; ++i) {
      T value = p_.has_positive(i) ? softplus(odds(i)) : T(0);
      if (smooths(i)) value += p_.scale(i) * apart(i, of_all[i]);
      if (per_row_)
        loss[i] = value;
      else
        sum += value;
    }
    if (!per_row_) loss[0] = T(sum / double(divisor_));
  }

  // Gradients of negative_lse, g, of positive, h, and of every similarity of a row alike, all.
  void backward(const T* grad_loss, T* g, T* h, T* all) const {
    for (int64_t i = 0; i < p_.rows; ++i) {
      const bool counts = p_.has_positive(i);
      const T grad = counts ? grad_loss[per_row_ ? i : 0] / divisor_ : T(0);
      g[i] = counts ? grad * sigmoid(odds(i)) : T(0);
      h[i] = counts ? -p_.scale(i) * g[i] * slope(i) : T(0);
      all[i] = smooths(i) ? -grad * p_.scale(i) * share_ : T(0);
      if (smooths(i)) h[i] += grad * p_.scale(i) * ((smoothing_ - share_) * slope(i) + share_);
    }
  }

  // Adds to grad_scale, and writes grad_margin, what goes through the logit of the positive, and of all.
  void backward_of_logit(const T* grad_loss, const T* g, const T* of_all, void* grad_scale, void* grad_margin) const {
    const auto grad = [&](int64_t i) { return grad_loss[per_row_ ? i : 0] / divisor_; };
    reduce(grad_scale, p_.in.scale_per_row, true, [&](int64_t i) {
      const T smooth = smooths(i) ? grad(i) * apart(i, of_all[i]) : T(0);
      return p_.has_positive(i) ? smooth - g[i] * reduced(i) : T(0);
    });
    reduce(grad_margin, p_.in.margin_per_row, false,
           [&](int64_t i) { return p_.scale(i) * (g[i] - (smooths(i) ? grad(i) * (smoothing_ - share_) : T(0))); });
  }

 private:
  const Problem<T>& p_;
  const T *positive_, *lse_;
  bool info_nce_, per_row_;
  T smoothing_, share_;  // of the own class; of every class
  T divisor_;            // of the sum of the losses

  bool smooths(int64_t i) const { return smoothing_ != 0 && p_.has_positive(i); }
  // What smoothing adds to the loss, by the scale: e times the own logit less the mean of all.
  T apart(int64_t i, T of_all) const { return smoothing_ * reduced(i) - share_ * (of_all - positive_[i] + reduced(i)); }

  T margin(int64_t i) const {
    return p_.in.margin ? static_cast<const T*>(p_.in.margin)[p_.in.margin_per_row ? i : 0] : T(0);
  }
  // psi(u) - margin.
  T reduced(int64_t i) const { return info_nce_ ? positive_[i] : p_.in.psi.value(positive_[i]) - margin(i); }
  T slope(int64_t i) const { return info_nce_ ? T(1) : p_.in.psi.derivative(positive_[i]); }
  T odds(int64_t i) const { return log_odds(lse_[i], p_.scale(i) * reduced(i)); }

  // One value for all rows gathers theirs in row order.
  template <class F>
  void reduce(void* out, bool one_each, bool add, F value) const {
    if (!out) return;
    T* o = static_cast<T*>(out);
    double sum = !one_each && add ? double(o[0]) : 0;
    for (int64_t i = 0; i < p_.rows; ++i) {
      const T term = value(i);
      if (one_each)
        o[i] = term + (add ? o[i] : T(0));
      else
        sum += double(term);
    }
    if (!one_each) o[0] = T(sum);
  }
};

}  // namespace
}  // namespace FM_ISA
}  // namespace fused_margins
