// Calls every kernel without Python, in heap blocks of exactly the size that its header states: for AddressSanitizer,
// UndefinedBehaviorSanitizer and valgrind, which then see every access beyond. tests/native/run.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/contrast/cpu.h"
#include "../../csrc/kmeans/cpu.h"
#include "../../csrc/magnet/cpu.h"
#include "../../csrc/nearest/cpu.h"
#include "../../csrc/sample/cpu.h"
#include "../../csrc/scores/cpu.h"

using namespace fused_margins;

namespace {

std::mt19937 random_bits(1);
int calls = 0;

// Exactly `bytes` on the heap, uninitialised.
struct Block {
  std::unique_ptr<char[]> data;
  explicit Block(int64_t bytes) : data(new char[size_t(bytes)]) {}
  void* get() const { return data.get(); }
};

// Random numbers of a dtype.
Block numbers(int64_t count, DType dtype) {
  Block block(count * element_bytes(dtype));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    const float value = normal(random_bits);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::float64) static_cast<double*>(block.get())[i] = value;
    if (dtype == DType::float32) static_cast<float*>(block.get())[i] = value;
    if (dtype == DType::bfloat16) static_cast<uint16_t*>(block.get())[i] = uint16_t(bits >> 16);
    if (dtype == DType::float16) static_cast<uint16_t*>(block.get())[i] = uint16_t(0x3800 | (bits & 0x83ff));
  }
  return block;
}

std::vector<int64_t> labels(int64_t count, int64_t classes) {
  std::vector<int64_t> values(static_cast<size_t>(count));
  for (int64_t& v : values) v = classes ? int64_t(random_bits() % uint64_t(classes)) : 0;
  return values;
}

struct Sizes {
  int64_t rows, columns, width;
};

// How the elements of a matrix lie: rows one after the other, columns one after the other, or every other element of
// rows that end with one more.
enum class Layout { rows, columns, gaps };

Matrix matrix(const Block& block, int64_t rows, int64_t width, DType dtype, Layout layout) {
  if (layout == Layout::columns) return {block.get(), rows, width, 1, rows, dtype};
  if (layout == Layout::gaps) return {block.get(), rows, width, 2 * width + 1, 2, dtype};
  return {block.get(), rows, width, width, 1, dtype};
}

// Elements from the first to the last of such a matrix, both counted: a block ends with the last.
int64_t extent(int64_t rows, int64_t width, Layout layout) {
  if (layout != Layout::gaps || !rows || !width) return rows * width;
  return (rows - 1) * (2 * width + 1) + 2 * (width - 1) + 1;
}

struct Problem {
  Sizes s;
  DType dtype, wide;
  Block x, y, scale, bias, margin, of_rows, of_rows_too;
  Matrix x_matrix, y_matrix;
  std::vector<int64_t> target, row_labels, column_labels, self;

  Problem(Sizes sizes, DType d, Layout layout)
      : s(sizes),
        dtype(d),
        wide(d == DType::float64 ? DType::float64 : DType::float32),
        x(numbers(extent(s.rows, s.width, layout), d)),
        y(numbers(extent(s.columns, s.width, layout), d)),
        scale(numbers(s.rows, wide)),
        bias(numbers(s.columns, wide)),
        margin(numbers(s.rows, wide)),
        of_rows(numbers(s.rows, wide)),
        of_rows_too(numbers(s.rows, wide)),
        x_matrix(matrix(x, s.rows, s.width, d, layout)),
        y_matrix(matrix(y, s.columns, s.width, d, layout)),
        target(labels(s.rows, s.columns)),
        row_labels(labels(s.rows, 5)),
        column_labels(labels(s.columns, 5)),
        self(labels(s.rows, s.columns)) {
    for (int64_t i = 0; i < s.rows; ++i) {
      if (wide == DType::float64)
        static_cast<double*>(scale.get())[i] = 1 + i % 7;
      else
        static_cast<float*>(scale.get())[i] = float(1 + i % 7);
      if (i % 4 == 3 || !s.columns) target[size_t(i)] = i % 8 == 3 ? ABSENT : -1;
      if (i % 6 == 5) row_labels[size_t(i)] = UNADMITTED;
      if (!s.columns) self[size_t(i)] = -1;
    }
    for (int64_t j = 2; j < s.columns; j += 5) column_labels[size_t(j)] = UNADMITTED;
  }
  // A row with a NaN and one with an infinity.
  void spoil() {
    const auto set = [&](int64_t i, float value) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == DType::float64) static_cast<double*>(x.get())[i] = value;
      if (dtype == DType::float32) static_cast<float*>(x.get())[i] = value;
      if (dtype == DType::bfloat16) static_cast<uint16_t*>(x.get())[i] = uint16_t(bits >> 16);
      if (dtype == DType::float16) static_cast<uint16_t*>(x.get())[i] = uint16_t(0x7c00 | (bits >> 13 & 0x3ff));
    };
    set(0, std::numeric_limits<float>::quiet_NaN());
    set(s.rows * s.width - 1, std::numeric_limits<float>::infinity());
  }
  Block out(int64_t count) const { return Block(count * element_bytes(wide)); }
  Block like_x(int64_t count) const { return Block(count * element_bytes(dtype)); }
};

constexpr Similarity similarities[] = {Similarity::cosine, Similarity::dot, Similarity::negative_squared_euclidean};
constexpr Relation relations[] = {Relation::different, Relation::same, Relation::any};
constexpr Reduction reductions[] = {Reduction::mean, Reduction::sum, Reduction::none};

constexpr Epilogue epilogues[] = {Epilogue::none, Epilogue::margin_softmax, Epilogue::info_nce};

// Blocks of columns whose weights are saved: none, all, the first, half.
int64_t blocks_of(int64_t columns, int64_t group_size, int variant) {
  const int64_t blocks = contrast_num_blocks(columns, group_size);
  return variant == 0 ? 0 : variant == 1 ? blocks : variant == 2 ? std::min<int64_t>(blocks, 1) : blocks / 2;
}

void contrast(const Problem& p) {
  const auto [rows, columns, width] = p.s;
  for (Similarity similarity : similarities)
    for (Relation relation : relations)
      for (int variant = 0; variant < 6; ++variant) {
        // The last two smooth labels, which only cosines of targets alone do.
        const double smoothing = variant == 4 ? 0.1 : variant == 5 ? 1.0 : 0.0;
        if (smoothing > 0 && (similarity != Similarity::cosine || relation != Relation::different)) continue;
        const Epilogue epilogue = smoothing > 0 ? Epilogue::margin_softmax : epilogues[(variant + int(relation)) % 3];
        const bool labelled = variant & 1 && smoothing == 0, with_bias = variant & 2;
        const bool has_loss = epilogue != Epilogue::none;
        const Reduction reduction = reductions[variant % 3];
        // Columns that stand alone, and groups that are not among the divisors of a block or a tile.
        const int64_t group_size = variant < 2 || smoothing > 0 ? 1 : columns % 5 == 0 ? 5 : columns % 3 == 0 ? 3 : 1;
        const Psi psis[] = {{1, 0, 0, 0, 1, 0, 0, false},  // none; below 0; beyond pi
                            {0.8, -0.6, 1, 0.8, 1, 0, 0.2, false},
                            {0.8, 0.6, -1, 0.8, -0.8, 0.6, -2, true}};
        ContrastInputs in{p.x_matrix,
                          p.y_matrix,
                          p.target.data(),
                          labelled ? p.row_labels.data() : nullptr,
                          labelled ? p.column_labels.data() : nullptr,
                          labelled ? p.self.data() : nullptr,
                          p.scale.get(),
                          true,
                          with_bias ? p.bias.get() : nullptr,
                          epilogue == Epilogue::margin_softmax ? p.margin.get() : nullptr,
                          true,
                          similarity,
                          relation,
                          -1,
                          group_size,
                          epilogue,
                          psis[variant % 3],
                          smoothing,
                          reduction,
                          false,
                          true,
                          blocks_of(columns, group_size, variant % 4)};
        const int64_t losses = !has_loss ? 0 : reduction == Reduction::none ? rows : 1, vector = has_loss ? 0 : rows;
        const Block positive = p.out(vector), lse = p.out(vector), loss = p.out(losses),
                    saved = p.out(contrast_saved_size(rows, columns, width, group_size, true, in.saved_blocks));
        contrast_forward({in, positive.get(), lse.get(), loss.get(), saved.get()});
        const Block grad_x = p.like_x(rows * width), grad_y = p.like_x(columns * width), grad_scale = p.out(rows),
                    grad_bias = p.out(columns), grad_margin = p.out(rows);
        contrast_backward({p.of_rows.get(), p.of_rows_too.get(), loss.get(), in, saved.get(), grad_x.get(),
                           grad_y.get(), grad_scale.get(), grad_bias.get(), grad_margin.get()});
        in.force_running_maximum = true, in.with_mean = false;
        const Block without = p.out(contrast_saved_size(rows, columns, width, group_size, false, in.saved_blocks));
        contrast_forward({in, positive.get(), lse.get(), loss.get(), without.get()});
        calls += 3;
      }
}

void search(const Problem& p) {
  const auto [rows, columns, width] = p.s;
  for (Similarity similarity : similarities)
    for (Relation relation : relations)
      for (int64_t k : {1, 4}) {
        const Block best = p.out(rows * k);
        std::vector<int64_t> index(static_cast<size_t>(rows * k));
        // The rows against themselves as well.
        std::vector<int64_t> self(static_cast<size_t>(rows));
        std::iota(self.begin(), self.end(), int64_t(0));
        for (bool largest : {true, false}) {
          const void* below = k == 1 ? nullptr : p.of_rows.get();
          nearest({p.x_matrix, p.y_matrix, p.row_labels.data(), p.column_labels.data(), p.self.data(), below,
                   similarity, relation, k, largest, best.get(), index.data()});
          nearest({p.x_matrix, p.x_matrix, p.row_labels.data(), p.row_labels.data(), self.data(), below, similarity,
                   relation, k, largest, best.get(), index.data()});
          calls += 2;
        }
      }
}

void sample(const Problem& p) {
  std::vector<int64_t> index(static_cast<size_t>(p.s.rows));
  for (Relation relation : relations)
    for (const int64_t* self : {p.self.data(), static_cast<const int64_t*>(nullptr)}) {
      fused_margins::sample(
          {p.x_matrix, p.y_matrix, p.row_labels.data(), p.column_labels.data(), self, 7, relation, index.data()});
      ++calls;
    }
}

void scores(const Problem& p) {
  const auto [rows, columns, width] = p.s;
  std::vector<int64_t> target = p.target;
  std::replace(target.begin(), target.end(), ABSENT, int64_t(-1));
  for (Similarity similarity : similarities) {
    const ScoresInputs in{p.x_matrix,
                          p.y_matrix,
                          target.data(),
                          p.scale.get(),
                          true,
                          p.bias.get(),
                          p.margin.get(),
                          true,
                          similarity,
                          -1,
                          similarity == Similarity::dot ? 1 : -1};
    const Block out = p.like_x(rows * columns);
    scores_forward({in, out.get()});
    const Block grad_x = p.like_x(rows * width), grad_y = p.like_x(columns * width), grad_scale = p.out(rows),
                grad_bias = p.out(columns), grad_margin = p.out(rows);
    scores_backward({out.get(), in, grad_x.get(), grad_y.get(), grad_scale.get(), grad_bias.get(), grad_margin.get()});
    calls += 2;
  }
}

void magnet(const Problem& p) {
  const auto [rows, columns, width] = p.s;
  const int64_t clusters = rows < 3 ? rows : 3;
  std::vector<int64_t> of_row(static_cast<size_t>(rows)), of_cluster{0, 1, 0};
  for (int64_t i = 0; i < rows; ++i) of_row[size_t(i)] = i % clusters;
  for (Reduction reduction : reductions) {
    const MagnetInputs in{p.x_matrix, clusters, of_row.data(), of_cluster.data(), 1.0, 1e-4, reduction};
    const Block loss = p.out(reduction == Reduction::none ? rows : 1),
                saved = p.out(magnet_saved_size(rows, clusters, width)), grad_x = p.like_x(rows * width);
    magnet_forward({in, loss.get(), saved.get()});
    magnet_backward({loss.get(), in, saved.get(), grad_x.get()});
    calls += 2;
  }
}

void kmeans(const Problem& p) {
  if (p.dtype != p.wide) return;
  const int64_t rows = p.s.rows, width = p.s.width, classes = 3, clusters = 4;
  std::vector<int64_t> members, first_member{0}, first_cluster{0};
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t i = 0; i < rows; ++i)
      if (i % 5 % classes == c) members.push_back(i);
    first_member.push_back(int64_t(members.size()));
    first_cluster.push_back(first_cluster.back() +
                            std::min(clusters, first_member[size_t(c) + 1] - first_member[size_t(c)]));
  }
  std::exponential_distribution<double> exponential;
  std::vector<double> waiting(size_t(clusters * rows));
  for (double& w : waiting) w = exponential(random_bits);
  const Block centroids = p.out(first_cluster.back() * width), squared = p.out(rows);
  std::vector<int64_t> assignments(static_cast<size_t>(rows));
  fused_margins::kmeans(Kmeans{p.x_matrix, classes, members.data(), first_member.data(), first_cluster.data(),
                               waiting.data(), 5, centroids.get(), assignments.data(), squared.get()});
  ++calls;
}

void every_kernel(const Problem& p) {
  contrast(p);
  search(p);
  sample(p);
  scores(p);
  magnet(p);
  kmeans(p);
}

// Faults on purpose, to see that each is caught.
int fault(const std::string& kind) {
  if (kind == "overrun") {
    const Problem p({3, 5, 7}, DType::float32, Layout::rows);
    const Block positive = p.out(3), lse = p.out(3), saved = p.out(contrast_saved_size(3, 5, 7, 1, false, 0) - 1);
    contrast_forward({{p.x_matrix,
                       p.y_matrix,
                       p.target.data(),
                       nullptr,
                       nullptr,
                       nullptr,
                       p.scale.get(),
                       true,
                       nullptr,
                       nullptr,
                       false,
                       Similarity::cosine,
                       Relation::different,
                       -1,
                       1,
                       Epilogue::none,
                       {},
                       0,
                       Reduction::none,
                       false,
                       false,
                       0},
                      positive.get(),
                      lse.get(),
                      nullptr,
                      saved.get()});
  } else if (kind == "overflow") {
    volatile int largest = 2147483647;
    largest = largest + 1;
  } else if (kind == "uninitialised") {
    const Block block(4);
    if (*static_cast<int*>(block.get()) == 12345) std::puts("by luck");
  } else {
    throw std::invalid_argument("fault: expected overrun, overflow or uninitialised, got " + kind);
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2 && std::string(arguments[1]) == "fault") return fault(arguments[2]);
  const bool few = count > 1 && std::string(arguments[1]) == "few";
  std::vector<Sizes> sizes{{1, 1, 1}, {5, 3, 7}, {13, 50, 33}, {0, 4, 3}, {3, 0, 5}, {4, 6, 0}};
  if (!few)
    sizes.insert(sizes.end(), {{37, 53, 19},
                               {33, 17, 64},
                               {70, 401, 40},
                               {300, 9, 16},
                               {1300, 3, 5},
                               {2, 2100, 3},
                               {40, 45, 100},
                               {150, 264, 300}});
  for (const Sizes& s : sizes)
    for (DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16})
      for (Layout layout : {Layout::rows, Layout::columns, Layout::gaps}) {
        Problem p(s, dtype, layout);
        every_kernel(p);
        if (layout != Layout::rows || !s.rows || !s.width) continue;
        p.spoil();
        every_kernel(p);
      }
  std::printf("%s, %d threads: %d calls\n", isa_name(), max_threads(), calls);
}
