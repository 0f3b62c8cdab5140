// sample on a CPU: each row keeps the largest number seen while cosines are hot; no (rows, columns) buffer.
//
// Tasks of rows go through panels of columns, a chunk of which all threads share. A column can win a row only if its E
// is below a bound, which follows from the largest cosine of the panel and the row's best number; as U < E, logarithms
// are taken only of panels with a U below it. Columns come in ascending order, so of equal numbers the lowest wins, and
// nothing depends on the number of threads.
#include "cpu.h"

#include "../cpu/checks.h"
#include "../cpu/labels.h"
#include "../cpu/panels.h"
#include "../cpu/scratch.h"
#include "../cpu/team.h"
#include "philox.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

constexpr int64_t CHUNK = 2048;         // columns whose panels are made together
constexpr double WORK_OF_A_PAIR = 100;  // in multiply-adds, besides its product
constexpr double NEAREST_SQUARED = 0.25, FARTHEST_SQUARED = 1.96;
constexpr double BEYOND = 0x1p100;  // brings variates below every logarithm of a weight
constexpr double LEAST = 0x1p-33;   // U: of the word 0

template <class Tiles>
class Sampler {
 public:
  using T = typename Tiles::Value;

  explicit Sampler(const Sample& args)
      : a_(args),
        x_(args.x, Similarity::cosine, nullptr),
        y_(args.y, Similarity::cosine, nullptr),
        of_distance_(T(2 - args.x.width) / 2),
        of_chord_(T(3 - args.x.width) / 2),
        // What rounding may make of the difference of two numbers, and a little more.
        slack_(T(0.01) + 32 * std::numeric_limits<T>::epsilon() * T(args.x.width)) {}

  void run() {
    const int64_t rows = a_.x.rows, columns = a_.y.rows;
    std::fill(a_.index, a_.index + rows, int64_t(-1));
    if (!rows || !columns) return;
    const int threads = thread_count(double(rows) * double(columns) * (double(a_.x.width) + WORK_OF_A_PAIR));
    const LabelIds ids(a_.row_labels, rows, a_.column_labels, columns);
    const int64_t chunk = round_up(std::min(CHUNK, columns), WIDE), tasks = ceil_div(rows, ROWS);
    Tiles tiles(x_, y_, chunk);
    Buffer<T> best(rows), factors(chunk);
    std::fill(best.get(), best.get() + rows, none<T>);
    Scratch<T> scratch(threads, tiles.scratch_size() + ROWS * WIDE);
    Team::run(threads, [&](Team team) {
      [[maybe_unused]] typename Tiles::Session session;
      T *prepared = scratch.mine(), *u = prepared + tiles.scratch_size();
      T top[ROWS], bound[ROWS];
      for (int64_t first = 0; first < columns; first += chunk) {
        const int64_t count = std::min(chunk, columns - first);
        team.each(ceil_div(count, WIDE), 1, [&](int64_t panel) {
          int64_t names[WIDE];
          const int64_t c = panel * WIDE, n = std::min(WIDE, count - c);
          for (int64_t j = 0; j < n; ++j) names[j] = first + c + j;
          tiles.prepare_columns(panel, names, n, factors.get() + c, prepared);
        });
        team.each(tasks, 1, [&](int64_t task) {
          const int64_t row0 = task * ROWS, height = std::min(ROWS, rows - row0);
          for (int64_t r = 0; r < height; ++r) tiles.prepare_row(row0 + r, r, prepared);
          for (int64_t c = 0; c < count; c += WIDE) {
            const int64_t column = first + c, n = std::min(WIDE, count - c);
            tiles.products(prepared, height, c / WIDE, n, u);
            for (int64_t r = 0; r < height; ++r) top[r] = admitted(row0 + r, ids, column, n, u + r * WIDE);
            limit(height, top, best.get() + row0, bound);
            for (int64_t r = 0; r < height; ++r)
              if (bound[r] > T(LEAST)) offer(row0 + r, column, bound[r], u + r * WIDE, best[row0 + r]);
          }
        });
      }
    });
  }

 private:
  static constexpr int64_t WIDE = Tiles::WIDE;
  static_assert(WIDE % WORDS == 0, "panels are whole vectors of words");
  const Sample& a_;
  Rows<T> x_, y_;
  T of_distance_, of_chord_, slack_;

  // log w of a squared distance within the range.
  T log_weight(T squared) const { return of_distance_ * logarithm(squared) + of_chord_ * logarithm(1 - squared / 4); }

  static T within_range(T squared) {
    const T above = squared > T(NEAREST_SQUARED) ? squared : T(NEAREST_SQUARED);
    return above < T(FARTHEST_SQUARED) ? above : T(FARTHEST_SQUARED);
  }

  // Of n cosines u the ones that the row may not use become -infinity, as do those behind; returns the largest.
  T admitted(int64_t row, const LabelIds& ids, int64_t column, int64_t n, T* u) const {
    std::fill(u + n, u + WIDE, none<T>);
    admit(u, n, ids.columns.get() + column, ids.rows[row], a_.relation,
          a_.self_index ? a_.self_index[row] - column : -1, ids.all_admitted);
    T top = none<T>;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < WIDE; ++j) {
      u[j] = u[j] == u[j] ? u[j] : none<T>;
      top = u[j] > top ? u[j] : top;
    }
    return top;
  }

  // Of each row what E, and so U, has to be below for a column of at most this cosine to be better than the best.
  void limit(int64_t rows, const T* top, const T* best, T* bound) const {
    // The weight grows with the cosine: log w falls with d^2 up to (4 D - 8) / (2 D - 5), which is beyond the cut-off,
    // and on a line no distance lies between those of one weight and the cut-off.
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) {
      const T squared = 2 - 2 * top[r], before = best[r];
      const T by_weight = exponential(log_weight(within_range(squared)) - before + slack_);
      const T evenly = -before / T(BEYOND);
      const T of_others = top[r] > none<T> ? evenly : T(0);
      bound[r] = squared < T(FARTHEST_SQUARED) ? by_weight : of_others;
    }
  }

  // To a row the columns of a panel, if the random number of one is below the bound.
  void offer(int64_t row, int64_t column, T bound, const T* u, T& best) const {
    T uniform[WIDE], number[WIDE];
    uint32_t words[WIDE];
    for (int64_t j = 0; j < WIDE; j += WORDS) philox(uint32_t(row), uint32_t(column + j), a_.seed, words + j);
    T least = 1;
#pragma omp simd reduction(min : least)
    for (int64_t j = 0; j < WIDE; ++j) {
      const T value = (T(words[j]) + T(0.5)) * T(0x1p-32);
      uniform[j] = value < T(1 - 0x1p-24) ? value : T(1 - 0x1p-24);
      least = uniform[j] < least ? uniform[j] : least;
    }
    if (!(least < bound)) return;
    // In steps that vectorise: of all at once the compiler makes branches.
    T variate[WIDE], log_variate[WIDE], by_weight[WIDE], largest = none<T>;
#pragma omp simd
    for (int64_t j = 0; j < WIDE; ++j) {
      // 1 - U has lost the digits of a small U in float, of which the series makes up; in double it is exact.
      const T value = uniform[j], direct = -logarithm(1 - value);
      const T series = value * (1 + value * (T(0.5) + value * (T(1) / 3 + value * T(0.25))));
      variate[j] = sizeof(T) == 4 && value < T(0x1p-6) ? series : direct;
    }
#pragma omp simd
    for (int64_t j = 0; j < WIDE; ++j) log_variate[j] = logarithm(variate[j]);
#pragma omp simd
    for (int64_t j = 0; j < WIDE; ++j) by_weight[j] = log_weight(within_range(2 - 2 * u[j])) - log_variate[j];
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < WIDE; ++j) {
      const T evenly = u[j] > none<T> ? -variate[j] * T(BEYOND) : none<T>;
      number[j] = 2 - 2 * u[j] < T(FARTHEST_SQUARED) ? by_weight[j] : evenly;
      largest = number[j] > largest ? number[j] : largest;
    }
    if (!(largest > best)) return;
    best = largest;
    a_.index[row] = column + (std::find(number, number + WIDE, largest) - number);
  }
};

}  // namespace

void sample(const Sample& args) {
  if (args.self_index) check_index("self_index", args.self_index, args.x.rows, args.y.rows, -1);
#ifdef __AVX512BF16__
  Sampler<Bf16Tiles>(args).run();
#else
  args.x.dtype == DType::float64 ? Sampler<VectorTiles<double>>(args).run() : Sampler<VectorTiles<float>>(args).run();
#endif
}

}  // namespace FM_ISA
}  // namespace fused_margins
