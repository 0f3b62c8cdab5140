// The forward of contrast: sums of the weights over the columns, one product; where a gradient will be asked for, also
// the columns' average under the weights, a second product that makes the gradient of x free. No running maximum where
// |logit| <= scale keeps every sum within range (cosine without bias); elsewhere each block of columns has its own.
#pragma once

#include "epilogue.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

// The running log-sum-exp of a row: `sum` of exp(z - maximum).
template <class T>
struct LogSum {
  T maximum, sum;

  // Adds another; what the two sums were multiplied by.
  std::pair<T, T> add(const LogSum& other) {
    std::pair<T, T> factors(1, 1);
    if (other.sum == 0) {
      factors.second = 0;
    } else if (sum == 0) {
      factors.first = 0;
      *this = other;
    } else {
      const T larger = std::max(maximum, other.maximum);
      factors = {exponential(maximum - larger), exponential(other.maximum - larger)};
      *this = {larger, sum * factors.first + other.sum * factors.second};
    }
    return factors;
  }
  T value() const { return sum == 0 ? none<T> : maximum + std::log(sum); }
};

template <class Products>
void forward(const ContrastForward& args) {
  using Side = Weights<Products>;
  using T = typename Products::Value;
  const Problem<T> p(args.in);
  constexpr int64_t PIECE = 4 * TILE_ROWS;  // columns that a task prepares
  constexpr int64_t ROW_TASK = Products::ROW_TASK;
  const bool maximum = args.in.force_running_maximum || p.needs_maximum(), average = args.in.with_mean && p.width > 0;
  const int threads = thread_count(double(p.rows) * double(p.columns) * double(p.width) * (average ? 2 : 1));
  Side side(p, args.saved);
  Products& products = side.products;
  const Saved<T>& saved = side.saved;
  T *positive = saved.positive, *lse = saved.negative_lse, *mean = saved.mean, *along = saved.mean_similarity;
  const int64_t panels = side.panels(), padded = round_up(p.width, 16);
  // Enough blocks at a time to occupy the threads; few, so that what one phase leaves in the caches serves the next.
  const int64_t chunk = std::min(side.blocks(), threads == 1 ? 1 : std::max<int64_t>(1, ceil_div(4 * threads, panels)));

  const int64_t block_size = products.block_size(std::min(BLOCK, p.columns));
  Buffer<T> columns(chunk * block_size), own(chunk * (BLOCK + SPARE) * side.stride);
  Buffer<typename Side::Sums> sums(chunk * panels);
  Buffer<std::pair<T, T>> factors(chunk * p.rows);
  Buffer<LogSum<T>> total(p.rows);
  Scratch<T> scratch(threads, std::max({products.scratch_size(), ROW_TASK * Side::WIDE, 2 * p.width}));
  std::fill(total.get(), total.get() + p.rows, LogSum<T>{0, 0});
  if (!p.rows) std::fill_n(saved.x_factor, contrast_weights_size(0, p.columns, args.in.saved_blocks), T(0));
  std::fill(saved.x_factor + p.rows, saved.y_factor, T(0));
  std::fill(saved.y_factor + p.columns, saved.all_shifts, T(0));
  products.allocate_logits();
  if (average) products.allocate_average(chunk);
  if (mean) std::fill(along, along + p.rows, T(0));
  const auto weights = [&](int64_t first, int64_t block) {
    return block < args.in.saved_blocks ? saved.weights(block)
                                        : own.get() + (block - first) * (BLOCK + SPARE) * side.stride;
  };

#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] typename Products::Session session;
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) products.prepare_panel(panel, true, scratch.mine());
    for (int64_t first = 0; first < side.blocks(); first += chunk) {
      const int64_t last = std::min(first + chunk, side.blocks()), pieces = BLOCK / PIECE;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < (last - first) * pieces; ++task) {
        const int64_t block = first + task / pieces, at = task % pieces * PIECE, total = side.block_columns(block);
        if (at < total)
          products.prepare_columns(block * BLOCK, at, std::min(PIECE, total - at), total, true,
                                   columns.get() + (block - first) * block_size, scratch.mine());
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < (last - first) * panels; ++task) {
        const int64_t block = first + task / panels, panel = task % panels, count = side.block_columns(block);
        T* of_block = columns.get() + (block - first) * block_size;
        typename Side::Sums& of = sums[task];
        side.make(block * BLOCK, count, of_block, panel, maximum, nullptr, weights(first, block), positive, &of);
        if (average)
          products.weights_are_made(block - first, panel, weights(first, block) + panel * Side::WIDE, count, of_block);
        side.save_shifts(panel, of, saved.shifts(block));
        if (block < args.in.saved_blocks) side.fill_margins(panel, count, weights(first, block));
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.rows; ++i)
        for (int64_t block = first; block < last; ++block) {
          const typename Side::Sums& of = sums[(block - first) * panels + i / Side::WIDE];
          const int64_t lane = i % Side::WIDE;
          const std::pair<T, T> f = total[i].add({of.shift[lane], of.weight[lane]});
          factors[(block - first) * p.rows + i] = f;
          if (mean) along[i] = along[i] * f.first + of.along[lane] * f.second;
        }
      if (!average) continue;
      const int64_t row_tasks = ceil_div(p.rows, ROW_TASK), parts = products.parts();
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < row_tasks * parts; ++task) {
        const int64_t row0 = task % row_tasks * ROW_TASK, rows = std::min(ROW_TASK, p.rows - row0);
        const int64_t d0 = task / row_tasks * Side::WIDE, width = std::min(Side::WIDE, p.width - d0);
        T *out = mean + row0 * padded + d0, *product = scratch.mine();
        for (int64_t block = first; block < last; ++block) {
          const bool direct = !maximum || block == 0;
          products.average(block - first, weights(first, block), columns.get() + (block - first) * block_size,
                           side.block_columns(block), row0, rows, d0, direct ? out : product,
                           direct ? padded : Side::WIDE, direct && block > 0);
          for (int64_t i = 0; !direct && i < rows; ++i) {
            const std::pair<T, T> f = factors[(block - first) * p.rows + row0 + i];
            scale(out + i * padded, f.first, out + i * padded, width);
            add_scaled(out + i * padded, f.second, product + i * Side::WIDE, width);
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.rows; ++i) {
      const bool has_positive = p.has_positive(i);
      if (!has_positive) positive[i] = 0;
      lse[i] = p.ignored(i) ? none<T> : total[i].value();
      if (p.euclidean() && has_positive)
        positive[i] = pair_similarity(side.x, i, side.y, args.in.target[i], scratch.mine(), scratch.mine() + p.width);
      if (!mean) continue;
      const T inverse = lse[i] == none<T> ? T(0) : 1 / total[i].sum;
      saved.inverse_sum[i] = inverse;
      along[i] = inverse == 0 ? T(0) : along[i] * inverse;
      // The padding as well: what is handed over is the same at every call.
      std::fill(mean + i * padded + (inverse == 0 ? 0 : p.width), mean + (i + 1) * padded, T(0));
    }
  }
  if (mean) std::fill(mean + p.rows * padded, saved.inverse_sum, T(0));  // likewise
  if (args.in.epilogue == Epilogue::none) {
    std::copy(positive, positive + p.rows, static_cast<T*>(args.positive));
    std::copy(lse, lse + p.rows, static_cast<T*>(args.negative_lse));
  } else {
    RowLoss<T>(p, saved).forward(static_cast<T*>(args.loss));
  }
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fused_margins
