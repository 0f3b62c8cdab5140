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
  const int64_t pieces = ceil_div(side.block_columns(0), PIECE), row_tasks = ceil_div(p.rows, ROW_TASK),
                parts = average ? products.parts() : 1;
  // Averages: of weights and columns the larger one is gone through once, and the other again and again.
  const bool parts_first = p.rows > p.width;
  const int64_t block_size = products.block_size(std::min(saved.block, p.columns));
  const int64_t own_size =
      args.in.saved_blocks < side.blocks() ? (std::min(saved.block, p.columns) + SPARE) * side.stride : 0;
  // Panels of a task, which a part of the columns' depth serves; few enough for the threads to share them.
  const int64_t together = std::min(Products::TOGETHER, std::max<int64_t>(1, panels / (4 * threads)));
  // Blocks under way: enough to occupy the threads, and for a while without one of them, in memory that the caches and
  // the pool hold.
  const int64_t occupying = ceil_div(4 * threads, std::max<int64_t>(1, ceil_div(panels, together)));
  const int64_t affordable = (int64_t(4) << 20) / (int64_t(sizeof(T)) * (block_size + own_size + 2 * side.stride));
  const int64_t most = std::min(Team::MOST_AHEAD, std::max(occupying, affordable));
  const int64_t ahead = std::min(side.blocks(), threads == 1 ? 1 : most);
  Buffer<T> columns(ahead * block_size), own(ahead * own_size);
  Buffer<typename Side::Sums> sums(ahead * panels);
  Buffer<std::pair<T, T>> factors(ahead * p.rows);
  Buffer<LogSum<T>> total(p.rows);
  const bool smooth = args.in.smoothing != 0;
  UnitSum<T> all_columns(side.y, smooth ? threads : 0);
  Buffer<T> of_all(smooth ? p.rows : 0);
  Scratch<T> scratch(threads, std::max({products.scratch_size(), ROW_TASK * Side::WIDE, 2 * p.width}));
  std::fill(total.get(), total.get() + p.rows, LogSum<T>{0, 0});
  if (!p.rows)
    std::fill_n(saved.x_factor, contrast_weights_size(0, p.columns, args.in.group_size, args.in.saved_blocks), T(0));
  std::fill(saved.x_factor + p.rows, saved.y_factor, T(0));
  std::fill(saved.y_factor + p.columns, saved.all_shifts, T(0));
  products.allocate_logits();
  if (average) products.allocate_average(ahead);
  if (mean) std::fill(along, along + p.rows, T(0));
  const auto weights_of = [&](int64_t block, int64_t slot) {
    return block < args.in.saved_blocks ? saved.weights(block) : own.get() + slot * own_size;
  };

  const auto prepare_panel = [&](int64_t panel) { products.prepare_panel(panel, true, scratch.mine()); };
  const auto make = [&](int64_t block, int64_t slot, int64_t panel) {
    const int64_t count = side.block_columns(block), some = std::min(together, panels - panel);
    T *of_block = columns.get() + slot * block_size, *weights = weights_of(block, slot);
    typename Side::Sums* of_panels = sums.get() + slot * panels;
    for (int64_t i = panel; side.blocks() == 1 && i < panel + some; ++i) prepare_panel(i);  // and used while it is hot
    side.make(block * saved.block, count, of_block, panel, some, maximum, nullptr, weights, positive,
              of_panels + panel);
    for (int64_t i = panel; i < panel + some; ++i) {
      if (average) products.weights_are_made(slot, i, weights + i * Side::WIDE, count, of_block);
      side.save_shifts(i, of_panels[i], saved.shifts(block));
      if (block < args.in.saved_blocks) side.fill_margins(i, count, weights);
    }
  };
  const auto add_up = [&](int64_t slot, int64_t row) {
    const typename Side::Sums& of = sums[slot * panels + row / Side::WIDE];
    const int64_t lane = row % Side::WIDE;
    const std::pair<T, T> f = total[row].add({of.shift[lane], of.weight[lane]});
    factors[slot * p.rows + row] = f;
    if (mean) along[row] = along[row] * f.first + of.along[lane] * f.second;
  };
  const auto add_average = [&](int64_t block, int64_t slot, int64_t task) {
    const int64_t row_task = parts_first ? task / parts : task % row_tasks;
    const int64_t part = parts_first ? task % parts : task / row_tasks;
    const int64_t row0 = row_task * ROW_TASK, rows = std::min(ROW_TASK, p.rows - row0);
    const int64_t d0 = part * Side::WIDE, width = std::min(Side::WIDE, p.width - d0);
    T *out = mean + row0 * padded + d0, *product = scratch.mine();
    const bool direct = !maximum || block == 0;
    products.average(slot, weights_of(block, slot), columns.get() + slot * block_size, side.block_columns(block), row0,
                     rows, d0, direct ? out : product, direct ? padded : Side::WIDE, direct && block > 0);
    for (int64_t i = 0; !direct && i < rows; ++i) {
      const std::pair<T, T> f = factors[slot * p.rows + row0 + i];
      scale(out + i * padded, f.first, out + i * padded, width);
      add_scaled(out + i * padded, f.second, product + i * Side::WIDE, width);
    }
  };
  const auto finish = [&](int64_t i) {
    const bool has_positive = p.has_positive(i);
    if (!has_positive) positive[i] = 0;
    lse[i] = p.ignored(i) ? none<T> : total[i].value();
    if (p.euclidean() && has_positive)
      positive[i] = pair_similarity(side.x, i, side.y, args.in.target[i], scratch.mine(), scratch.mine() + p.width);
    if (!mean) return;
    const T inverse = lse[i] == none<T> ? T(0) : 1 / total[i].sum;
    saved.inverse_sum[i] = inverse;
    along[i] = inverse == 0 ? T(0) : along[i] * inverse;
    // The padding as well: what is handed over is the same at every call.
    std::fill(mean + i * padded + (inverse == 0 ? 0 : p.width), mean + (i + 1) * padded, T(0));
  };

  Team::run(threads, [&](Team team) {
    [[maybe_unused]] typename Products::Session session;
    if (side.blocks() != 1) team.each(panels, 1, prepare_panel);
    team.pipeline(side.blocks(), ahead,
                  {{pieces, false},
                   {ceil_div(panels, together), false},
                   {row_tasks, true},
                   {average ? row_tasks * parts : 1, true}},
                  [&](int stage, int64_t block, int64_t slot, int64_t i) {
                    const int64_t total = side.block_columns(block), at = i * PIECE;
                    if (stage == 0 && at < total)
                      products.prepare_columns(block * saved.block, at, std::min(PIECE, total - at), total, true,
                                               columns.get() + slot * block_size, scratch.mine());
                    if (stage == 1) make(block, slot, i * together);
                    for (int64_t row = i * ROW_TASK; stage == 2 && row < std::min(p.rows, (i + 1) * ROW_TASK); ++row)
                      add_up(slot, row);
                    if (stage == 3 && average) add_average(block, slot, i);
                  });
    team.each(p.rows, ROW_TASK, finish);
    if (!smooth) return;
    all_columns.run(team, saved.y_factor, [](int64_t) { return 1.0; });
    team.each(p.rows, ROW_TASK, [&](int64_t i) { of_all[i] = all_columns.along(side.x, i, saved.x_factor[i]); });
  });
  if (mean) std::fill(mean + p.rows * padded, saved.inverse_sum, T(0));  // likewise
  if (args.in.epilogue == Epilogue::none) {
    std::copy(positive, positive + p.rows, static_cast<T*>(args.positive));
    std::copy(lse, lse + p.rows, static_cast<T*>(args.negative_lse));
  } else {
    RowLoss<T>(p, saved).forward(of_all.get(), static_cast<T*>(args.loss));
  }
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fused_margins
