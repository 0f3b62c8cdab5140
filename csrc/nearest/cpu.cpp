// nearest on a CPU: each row keeps its k best while similarities are hot; no (rows, columns) buffer.
//
// A group is a set of rows with the columns that may serve them: for relation "same" the rows and columns of one label,
// else everything. Small groups are compared pair by pair where they lie. Large ones go through tiles, a chunk of
// columns at a time, which all threads share. Columns come in ascending order, so ties go to the lowest, and nothing
// depends on the number of threads. Where a batch is searched against itself, a product serves both of its rows.
//
// Euclidean tiles: the expanded distance, with a bound on its error, only selects candidates; compared is sum (x -
// y)^2. The least similar columns are found as the best of negated similarities, and negated again at the end.
#include "cpu.h"

#include "../cpu/checks.h"
#include "../cpu/labels.h"
#include "../cpu/panels.h"
#include "../cpu/rows.h"
#include "../cpu/scratch.h"
#include "../cpu/team.h"
#include "small_groups.h"

namespace fused_margins {
namespace FM_ISA {
namespace {

constexpr int64_t CHUNK = 2048;        // columns whose panels are made together
constexpr int64_t HALF_CHUNK = 512;    // the same where products serve both rows: within a chunk's own rows they do not
constexpr int64_t MIRRORED = 1 << 21;  // values that serving both rows of a product may take, of all threads

template <class Tiles>
class Search {
 public:
  using T = typename Tiles::Value;

  explicit Search(const Nearest& args)
      : a_(args),
        answers_{args},
        groups_(args),
        centre_(args.y.width),
        x_(args.x, args.similarity, centre_.get()),
        y_(args.y, args.similarity, centre_.get()),
        euclidean_(args.similarity == Similarity::negative_squared_euclidean),
        itself_(args.x.data == args.y.data && args.row_labels == args.column_labels && args.x.rows == args.y.rows &&
                args.x.row_stride == args.y.row_stride && args.x.column_stride == args.y.column_stride),
        width_(args.x.width) {}

  void run() {
    double work = 0;
    std::vector<const Group*> small, large;
    for (const Group& g : groups_.list) {
      const bool pairs = a_.relation == Relation::same && SmallGroups<T>::suit(g) && (g.columns || !itself_);
      (pairs ? small : large).push_back(&g);
      work += double(g.rows) * double(g.columns) * double(width_);
    }
    const int threads = thread_count(work);
    if (!small.empty()) {
      // The least similar by cosine have the bits of a search with -x, which is not y.
      const bool itself = itself_ && (a_.largest || a_.similarity != Similarity::cosine);
      const SmallGroups<T> pairs(a_, groups_, small, x_, y_, itself, threads);
      Buffer<uint8_t> in_range(int64_t(small.size()));
      std::fill(in_range.get(), in_range.get() + small.size(), uint8_t(1));
      Team::run(threads,
                [&](Team team) { team.each(pairs.batches(), 1, [&](int64_t b) { pairs.search(b, in_range.get()); }); });
      for (size_t g = 0; g < small.size(); ++g)
        if (!in_range[int64_t(g)]) large.push_back(small[g]);
    }
    if (!large.empty()) through_tiles(large, threads);
    if (!a_.largest) answers_.negate();
  }

 private:
  const Nearest& a_;
  const Answers<T> answers_;
  Groups groups_;
  Buffer<T> centre_;
  Rows<T> x_, y_;
  bool euclidean_, itself_;
  int64_t width_;

  // The best of a chunk's columns as rows, among the rows that each thread has seen.
  class Mirrored {
   public:
    Mirrored(int threads, int64_t columns, int64_t k)
        : threads_(threads), columns_(columns), k_(k), value_(threads * columns * k), index_(threads * columns * k) {
      for (int thread = 0; thread < threads; ++thread)
        for (int64_t j = 0; j < columns; ++j) best(thread, j).clear();
    }

    Best<T> best(int thread, int64_t j) const {
      const int64_t at = (thread * columns_ + j) * k_;
      return {value_.get() + at, index_.get() + at, k_};
    }

    // All threads' best of column j to `to`.
    void move(int64_t j, const Best<T>& to) const {
      for (int thread = 0; thread < threads_; ++thread) {
        const Best<T> from = best(thread, j);
        for (int64_t i = 0; i < k_ && from.index[i] >= 0; ++i) to.insert_unordered(from.value[i], from.index[i]);
        from.clear();
      }
    }

   private:
    int threads_;
    int64_t columns_, k_;
    Buffer<T> value_;        // (threads, columns, k)
    Buffer<int64_t> index_;  // likewise
  };

  void through_tiles(const std::vector<const Group*>& groups, int threads) {
    constexpr int64_t wide = Tiles::WIDE;
    int64_t most = 0;
    for (const Group* g : groups) most = std::max(most, g->columns);
    const LabelIds ids(a_.row_labels, a_.x.rows, a_.column_labels, a_.y.rows);
    static_assert(ROWS % wide == 0, "a strip of rows is whole panels of columns");
    if (euclidean_) find_centre(a_.y, centre_.get());
    const bool halves = itself_ && threads * HALF_CHUNK * a_.k <= MIRRORED;
    const int64_t chunk = round_up(std::min(halves ? HALF_CHUNK : CHUNK, most), ROWS);
    Tiles tiles(x_, y_, chunk);
    Buffer<T> factors(chunk), longest(chunk / wide);
    Buffer<int32_t> labels(chunk);
    // Of a thread: rows as the products take them, products, the same with columns as rows, a pair of rows as they are.
    Scratch<T> scratch(threads, tiles.scratch_size() + 2 * ROWS * wide + 2 * width_);
    Buffer<T> row_factor(a_.x.rows);
    Mirrored mirrored(halves ? threads : 0, chunk, a_.k);

    Team::run(threads, [&](Team team) {
      [[maybe_unused]] typename Tiles::Session session;
      T *prepared = scratch.mine(), *u = prepared + tiles.scratch_size(), *turned = u + ROWS * wide;
      T* pair = turned + ROWS * wide;
      std::fill(u, turned, T(0));  // may_improve looks at whole panels, also where the products fill less
      T strip_factors[ROWS], strip_longest[ROWS / wide];
      int32_t strip_labels[ROWS];
      for (const Group* g : groups) {
        const int64_t* rows = groups_.row_order.get() + g->first_row;
        team.each(g->rows, CHUNK, [&](int64_t r) { answers_.best(rows[r]).clear(); });
        for (int64_t first = 0; first < g->columns; first += chunk) {
          const int64_t* columns = groups_.column_order.get() + g->first_column + first;
          const int64_t count = std::min(chunk, g->columns - first);
          // Rows behind the chunk get its columns when they are columns themselves.
          const int64_t tasks = ceil_div(halves ? first + count : g->rows, ROWS);
          team.each(ceil_div(count, wide), 1, [&](int64_t panel) {
            const int64_t c = panel * wide, n = std::min(wide, count - c);
            tiles.prepare_columns(panel, columns + c, n, factors.get() + c, prepared);
            for (int64_t j = c; j < c + n; ++j) labels[j] = ids.columns[columns[j]];
            for (int64_t j = c + n; j < c + wide; ++j) factors[j] = 0;
            longest[panel] = *std::max_element(factors.get() + c, factors.get() + c + n);
          });
          team.each(tasks, 1, [&](int64_t task) {
            const int64_t row0 = task * ROWS, height = std::min(ROWS, g->rows - row0);
            for (int64_t r = 0; r < height; ++r)
              row_factor[rows[row0 + r]] = tiles.prepare_row(rows[row0 + r], r, prepared);
            const bool mirror = halves && row0 < first;  // all ROWS of them are: chunks begin with a strip
            if (mirror) {
              for (int64_t r = 0; r < ROWS; ++r) {
                strip_factors[r] = row_factor[rows[row0 + r]];
                strip_labels[r] = ids.columns[rows[row0 + r]];
              }
              for (int64_t r = 0; r < ROWS; r += wide)
                strip_longest[r / wide] = *std::max_element(strip_factors + r, strip_factors + r + wide);
            }
            for (int64_t c = 0; c < count; c += wide) {
              const int64_t n = std::min(wide, count - c);
              tiles.products(prepared, height, c / wide, n, u);
              if (mirror)
                for (int64_t r = 0; r < ROWS; r += wide) transpose_panel(u + r * wide, wide, wide, turned + r * wide);
              for (int64_t r = 0; r < height; ++r) {
                const int64_t row = rows[row0 + r];
                const Best<T> best = answers_.best(row);
                if (may_improve(best, row_factor[row], u + r * wide, factors.get() + c, longest[c / wide]))
                  select(best, row, row_factor[row], ids.rows[row], columns + c, n, u + r * wide, labels.get() + c,
                         ids.all_admitted, factors.get() + c, pair);
              }
              for (int64_t r = 0; mirror && r < ROWS; r += wide)
                for (int64_t j = 0; j < n; ++j) {
                  const Best<T> best = mirrored.best(thread_index(), c + j);
                  T* of_column = turned + (r + j) * wide;
                  if (may_improve(best, factors[c + j], of_column, strip_factors + r, strip_longest[r / wide]))
                    select(best, columns[c + j], factors[c + j], ids.rows[columns[c + j]], rows + row0 + r, wide,
                           of_column, strip_labels + r, ids.all_admitted, strip_factors + r, pair);
                }
            }
          });
          team.each(halves ? count : 0, wide, [&](int64_t j) { mirrored.move(j, answers_.best(columns[j])); });
        }
      }
    });
  }

  // Of a panel's products: false where none of them, whatever its label, can be among the row's best.
  bool may_improve(const Best<T>& best, T row_factor, const T* u, const T* squared, T longest) const {
    using V = Vector<T>;
    constexpr int64_t lanes = VectorOf<T>::lanes;
    V first = load(u), second = load(u + lanes);
    T bound = best.worst();
    if (euclidean_) {
      const T slack = std::numeric_limits<T>::epsilon() * T(10 + width_) * (row_factor + longest);
      if (!(slack <= std::numeric_limits<T>::max())) return true;
      bound += (a_.largest ? row_factor : -row_factor) - slack;
      first = 2 * first - load(squared);
      second = 2 * second - load(squared + lanes);
    }
    if (!a_.largest) first = -first, second = -second;
    const auto above = first > bound || second > bound;
    bool any = false;
    for (int64_t l = 0; l < lanes; ++l) any |= above[l] != 0;
    return any;
  }

  // Offers the admitted ones of n columns to the row's best; u (n,) holds products, and is overwritten.
  void select(const Best<T>& best, int64_t row, T row_factor, int32_t label, const int64_t* columns, int64_t n, T* u,
              const int32_t* ids, bool all_admitted, const T* squared, T* pair) const {
    const T below = answers_.below(row), worst = best.worst();
    T slack = 0;  // bound on the error of the expanded distances: rounding of the sums over width_, and of the centring
    if (euclidean_) {
      const T unit = std::numeric_limits<T>::epsilon() * T(8 + width_);
      for (int64_t j = 0; j < n; ++j) {
        u[j] = 2 * u[j] - row_factor - squared[j];
        const T bound = unit * (row_factor + squared[j]);
        const bool known = bound <= std::numeric_limits<T>::max();
        u[j] = known ? u[j] : T(0);  // squares beyond the range of T tell nothing: every column is a candidate
        const T error = known ? bound : -none<T>;
        slack = error > slack ? error : slack;
      }
    }
    const bool bounded = a_.below && a_.largest;
    if (!a_.largest)
      for (int64_t j = 0; j < n; ++j) u[j] = !a_.below || u[j] < below + slack ? -u[j] : none<T>;
    admit(u, n, ids, label, a_.relation, -1, all_admitted);
    T top = none<T>;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) {
      const T value = !bounded || u[j] < below + slack ? u[j] : none<T>;
      top = value > top ? value : top;
    }
    if (!(top + slack > worst)) return;
    const int64_t self = answers_.self(row);
    for (int64_t j = 0; j < n; ++j) {
      if (!(u[j] + slack > best.worst()) || u[j] == none<T> || columns[j] == self) continue;
      T value = a_.largest ? u[j] : -u[j];
      if (euclidean_) value = -squared_distance(x_.row_of(row, pair), y_.row_of(columns[j], pair + width_), width_);
      if (value < below || !a_.below) best.insert(a_.largest ? value : -value, columns[j]);
    }
  }
};

}  // namespace

void nearest(const Nearest& args) {
  if (args.self_index) check_index("self_index", args.self_index, args.x.rows, args.y.rows, -1);
#ifdef __AVX512BF16__
  Search<Bf16Tiles>(args).run();
#else
  args.x.dtype == DType::float64 ? Search<VectorTiles<double>>(args).run() : Search<VectorTiles<float>>(args).run();
#endif
}

}  // namespace FM_ISA
}  // namespace fused_margins
