// margin_softmax on a CPU: contrast, and the few lines over its two vectors that make the loss, in one call.
#include "cpu.h"

#include "../common/tile.h"
#include "../contrast/cpu.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

template <class T>
struct Problem {
  const MarginSoftmaxInputs& in;
  int64_t rows;
  T *kept, *mean, *positive, *lse;  // within `saved`

  Problem(const MarginSoftmaxInputs& inputs, void* saved) : in(inputs), rows(inputs.x.rows) {
    kept = static_cast<T*>(saved);
    mean = kept + contrast_kept_size(rows, in.y.rows, in.kept_blocks);
    positive = mean + (in.with_mean ? contrast_mean_size(rows, in.x.width) : 0);
    lse = positive + rows;
  }

  ContrastInputs contrast() const {
    return {in.x,    in.y,    in.scale,      in.scale_per_row,    nullptr,        in.target, nullptr,
            nullptr, nullptr, in.similarity, Relation::different, in.ignore_index};
  }
  T scale(int64_t i) const { return static_cast<const T*>(in.scale)[in.scale_per_row ? i : 0]; }
  T margin(int64_t i) const { return static_cast<const T*>(in.margin)[in.margin_per_row ? i : 0]; }
  bool ignored(int64_t i) const { return in.target[i] == in.ignore_index; }
  // psi(u) - margin of the own class.
  T reduced(int64_t i) const {
    const Angle& a = in.angle;
    const T u = positive[i];
    const T psi = beyond(u) ? T(a.slope) * u + T(a.bend) * sine(u) + T(a.rest) : T(a.cosine) * u - T(a.sine) * sine(u);
    return psi - margin(i);
  }
  // Its derivative; that of the sine is 0, not infinite, at the poles.
  T slope(int64_t i) const {
    const Angle& a = in.angle;
    const T u = positive[i], s = sine(u), of_sine = s > sine(T(1)) ? -u / s : T(0);
    if (a.straight_through) return 1;
    return beyond(u) ? T(a.slope) + T(a.bend) * of_sine : T(a.cosine) - T(a.sine) * of_sine;
  }
  // log of the odds against the own class; -infinity where no other class is there.
  T gap(int64_t i) const { return lse[i] - scale(i) * reduced(i); }
  // What the sum of the losses is divided by.
  T divisor() const {
    int64_t counted = 0;
    for (int64_t i = 0; i < rows; ++i) counted += !ignored(i);
    return in.reduction == Reduction::mean && counted ? T(counted) : T(1);
  }

 private:
  bool beyond(T u) const { return T(in.angle.side) * u > T(in.angle.bound); }
  static T sine(T u) { return std::sqrt(std::max((1 - u) * (1 + u), std::numeric_limits<T>::min())); }
};

template <class T>
void forward(const MarginSoftmaxForward& args) {
  const Problem<T> p(args.in, args.saved);
  fused_margins::contrast_forward(
      {p.contrast(), false, p.positive, p.lse, args.in.with_mean ? p.mean : nullptr, p.kept, args.in.kept_blocks});
  T* loss = static_cast<T*>(args.loss);
  double sum = 0;  // of many rows: in float32 its rounding would exceed that of the losses
  for (int64_t i = 0; i < p.rows; ++i) {
    const T gap = p.ignored(i) ? -std::numeric_limits<T>::infinity() : p.gap(i);
    const T value = (gap > 0 ? gap : gap < 0 ? T(0) : gap) + std::log1p(std::exp(-std::abs(gap)));  // softplus
    if (args.in.reduction == Reduction::none)
      loss[i] = value;
    else
      sum += value;
  }
  if (args.in.reduction != Reduction::none) loss[0] = T(sum / double(p.divisor()));
}

template <class T>
void backward(const MarginSoftmaxBackward& args) {
  const MarginSoftmaxInputs& in = args.in;
  const Problem<T> p(in, const_cast<void*>(args.saved));
  const bool per_row = in.reduction == Reduction::none;
  const T *grad = static_cast<const T*>(args.grad_loss), divisor = p.divisor();
  Buffer<T> g(p.rows), h(p.rows);  // gradients of negative_lse and positive
  for (int64_t i = 0; i < p.rows; ++i) {
    const T odds = std::exp(-std::abs(p.gap(i))), share = (p.gap(i) < 0 ? odds : T(1)) / (1 + odds);  // sigmoid
    g[i] = p.ignored(i) ? T(0) : grad[per_row ? i : 0] / divisor * share;
    h[i] = -p.scale(i) * g[i] * p.slope(i);
  }
  fused_margins::contrast_backward({p.contrast(), false, h.get(), g.get(), p.lse, p.mean, p.kept, in.kept_blocks,
                                    args.grad_x, args.grad_y, args.grad_scale, nullptr});
  const auto reduce = [&](void* out, bool one_each, bool add, auto value) {
    if (!out) return;
    T* o = static_cast<T*>(out);
    double sum = !one_each && add ? double(o[0]) : 0;
    for (int64_t i = 0; i < p.rows; ++i)
      if (one_each)
        o[i] = value(i) + (add ? o[i] : T(0));
      else
        sum += double(value(i));
    if (!one_each) o[0] = T(sum);
  };
  reduce(args.grad_scale, in.scale_per_row, true,
         [&](int64_t i) { return p.ignored(i) ? T(0) : -g[i] * p.reduced(i); });
  reduce(args.grad_margin, in.margin_per_row, false, [&](int64_t i) { return p.scale(i) * g[i]; });
}

}  // namespace

void margin_softmax_forward(const MarginSoftmaxForward& args) {
  args.in.x.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

void margin_softmax_backward(const MarginSoftmaxBackward& args) {
  args.in.x.dtype == DType::float64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace FM_ISA
}  // namespace fused_margins
