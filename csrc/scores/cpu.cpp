// scores on a CPU: one product whose epilogue applies scale, margin and bias; backward, two products and, for the
// gradient of the scale, a third. Targets and scales are checked before anything is computed.
#include "cpu.h"

#include "../cpu/checks.h"
#ifdef __AVX512BF16__
#include "bf16.h"
#else
#include "../cpu/gradient.h"
#endif

namespace fused_margins {
namespace FM_ISA {
namespace {

template <class T>
struct Problem {
  const ScoresInputs& in;
  int64_t rows, columns, width;

  explicit Problem(const ScoresInputs& inputs)
      : in(inputs), rows(inputs.x.rows), columns(inputs.y.rows), width(inputs.x.width) {
    if (in.target) check_index("target", in.target, rows, columns, in.ignore_index);
    check_scale(static_cast<const T*>(in.scale), in.scale_per_row ? rows : 1);
    if (in.sign != 1 && in.sign != -1) throw std::invalid_argument("sign: expected 1 or -1");
  }

  T scale(int64_t i) const { return static_cast<const T*>(in.scale)[in.scale_per_row ? i : 0]; }
  T margin(int64_t i) const { return static_cast<const T*>(in.margin)[in.margin_per_row ? i : 0]; }
  const T* bias() const { return static_cast<const T*>(in.bias); }
  // The column of row i that gets the margin, or -1.
  int64_t target(int64_t i) const { return in.target && in.target[i] != in.ignore_index ? in.target[i] : -1; }
};

template <class S>
void forward(const ScoresForward& args) {
  using T = typename S::Value;
  const Problem<T> p(args.in);
  S strips(args.in.x, args.in.y, args.in.similarity, 1);
  const DType dtype = args.in.x.dtype;
  const T tiny = dtype == DType::float16 ? T(0x1p-25) : dtype == DType::bfloat16 ? T(0x1p-134) : T(0);
  in_huge_pages(args.scores, p.rows * p.columns * element_bytes(dtype));
  Team::run(strips.threads, [&](Team team) {
    [[maybe_unused]] typename S::Session session;
    strips.prepare_rows(team);
    for (int64_t c = 0; c < strips.chunks(); ++c) {
      const Chunk chunk = strips.chunk(c);
      strips.prepare_columns(team, chunk);
      strips.for_each(team, chunk, [&](int64_t i, int64_t first, int64_t count, T* u) {
        const int64_t target = p.target(i) - first;
        if (target >= 0 && target < count) u[target] -= p.margin(i);
        const T s = p.scale(i);
        for (int64_t j = 0; j < count; ++j) u[j] *= s;
        if (p.bias())
          for (int64_t j = 0; j < count; ++j) u[j] += p.bias()[first + j];
        if (p.in.sign < 0)  // what rounds to 0 becomes 0, never -0
          for (int64_t j = 0; j < count; ++j) u[j] = std::abs(u[j]) <= tiny ? T(0) : -u[j];
        store(args.scores, dtype, i * p.columns + first, u, count);
      });
    }
  });
}

template <class S, class G>
void backward(const ScoresBackward& args) {
  using T = typename S::Value;
  const ScoresInputs& in = args.in;
  const Problem<T> p(in);
  const Matrix grad{args.grad_scores, p.rows, p.columns, p.columns, 1, in.x.dtype};
  S strips(in.x, in.y, in.similarity, args.grad_scale ? 3 : 2);
  G gradient(strips, args.grad_x, args.grad_y);
  // Of each row, summed over the columns: dL/du, and dL/dscale = g u.
  Buffer<T> partial(p.rows * STRIPS * 2), total(p.rows * 2), inverse_scale(p.rows), at_target(p.rows);
  std::fill(total.get(), total.get() + p.rows * 2, T(0));
  std::fill(at_target.get(), at_target.get() + p.rows, T(0));
  for (int64_t i = 0; i < p.rows; ++i) inverse_scale[i] = 1 / p.scale(i);
  in_huge_pages(args.grad_x, in.x);
  in_huge_pages(args.grad_y, in.y);

  Team::run(strips.threads, [&](Team team) {
    [[maybe_unused]] typename S::Session session;
    // u is null where the gradient of the scale is not needed.
    const auto derivative = [&](int64_t i, int64_t first, int64_t count, const T* u, const Chunk& chunk) {
      T* d = gradient.row(i) + first - chunk.first;
      Matrix part = grad;
      part.width = count;
      part.data = static_cast<const char*>(grad.data) + first * element_bytes(grad.dtype);
      load_row(part, i, d);
      const T sign = T(in.sign), s = sign * p.scale(i);
      const int64_t target = p.target(i) - first;
      const bool here = target >= 0 && target < count;
      if (here) at_target[i] = sign * d[target];
      T weight = 0, along = 0;
      if (u) along = sign * (dot(d, u, count) - (here ? d[target] * p.margin(i) : T(0)));
#pragma omp simd reduction(+ : weight)
      for (int64_t j = 0; j < count; ++j) weight += d[j] *= s;
      T* sums = partial.get() + (i * STRIPS + (first - chunk.first) / STRIP) * 2;
      sums[0] = weight;
      sums[1] = along;
    };
    strips.prepare_rows(team);
    gradient.prepare_rows(team);
    for (int64_t c = 0; c < strips.chunks(); ++c) {
      const Chunk chunk = strips.chunk(c);
      strips.prepare_columns(team, chunk);
      gradient.prepare_columns(team, chunk);
      if (args.grad_scale)
        strips.for_each(team, chunk,
                        [&](int64_t i, int64_t first, int64_t count, T* u) { derivative(i, first, count, u, chunk); });
      else
        team.each(p.rows * chunk.strips(), ROW_BLOCK, [&](int64_t task) {
          const int64_t i = task / chunk.strips(), first = task % chunk.strips() * STRIP;
          derivative(i, chunk.first + first, std::min(STRIP, chunk.count - first), nullptr, chunk);
        });
      team.each(p.rows, STRIP, [&](int64_t i) {
        for (int64_t s = 0; s < chunk.strips() * 2; ++s) total[i * 2 + s % 2] += partial[i * STRIPS * 2 + s];
      });
      gradient.products(team, chunk, [&](int64_t j, T weight, T* sum, T* scratch) {
        strips.y.chain(j, weight, sum, scratch);
        store(args.grad_y, in.y.dtype, j * p.width, sum, p.width);
      });
      team.each(args.grad_bias ? chunk.count : 0, TILE_COLUMNS<T>, [&](int64_t j) {
        static_cast<T*>(args.grad_bias)[chunk.first + j] = gradient.column_sum(j, inverse_scale.get());
      });
    }
    gradient.rows(team, [&](int64_t i, T* sum, T* scratch) {
      strips.x.chain(i, total[i * 2], sum, scratch);
      store(args.grad_x, in.x.dtype, i * p.width, sum, p.width);
    });
  });
  // One value for all rows gathers theirs in row order.
  const auto reduce = [&](void* out, bool per_row, auto value) {
    if (!out) return;
    T* o = static_cast<T*>(out);
    if (!per_row) o[0] = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
      if (per_row)
        o[i] = value(i);
      else
        o[0] += value(i);
    }
  };
  reduce(args.grad_scale, in.scale_per_row, [&](int64_t i) { return total[i * 2 + 1]; });
  reduce(args.grad_margin, in.margin_per_row, [&](int64_t i) { return -p.scale(i) * at_target[i]; });
}

}  // namespace

#ifdef __AVX512BF16__
void scores_forward(const ScoresForward& args) {
  forward<Bf16Strips>(args);
}

void scores_backward(const ScoresBackward& args) {
  backward<Bf16Strips, Bf16Gradient>(args);
}
#else
void scores_forward(const ScoresForward& args) {
  args.in.x.dtype == DType::float64 ? forward<Strips<double>>(args) : forward<Strips<float>>(args);
}

void scores_backward(const ScoresBackward& args) {
  args.in.x.dtype == DType::float64 ? backward<Strips<double>, Gradient<double>>(args)
                                    : backward<Strips<float>, Gradient<float>>(args);
}
#endif

}  // namespace FM_ISA
}  // namespace fused_margins
