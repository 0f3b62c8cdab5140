// The backward of contrast on an NVIDIA GPU, from what the forward saved, in two launches: the weights dL/du with
// their sums and the gradients of scale and margin; then the gradients of x and y, products with them.
#pragma once

#include "../cuda/tile.h"
#include "cuda_saved.h"

namespace fused_margins {
namespace cuda {
namespace {

constexpr int WEIGHT_ROWS = WARPS;                    // of a block of the first launch: a warp each
constexpr int PRODUCT_ROWS = 32, PRODUCT_WIDTH = 64;  // rows and components of a block of the second

// Elements between rows of weights, so that 16 bytes hold whole vectors; zeros fill them.
__host__ __device__ inline int64_t padded_columns(int64_t columns) {
  return ceiling_divide(columns, 4) * 4;
}
__host__ __device__ inline int64_t padded_rows(int64_t rows) {
  return ceiling_divide(rows, WEIGHT_ROWS) * WEIGHT_ROWS;
}

// The first launch writes it: weights (rows, padded_columns), their transpose (columns, padded_rows), sums of weight
// times u of each row (rows,) and of each column in parts, one of a block (blocks, columns), and the terms of one
// scale's gradient (rows,).
template <class T>
struct BackwardScratch {
  int64_t rows, columns;
  T *weights, *transposed, *along_rows, *along_columns, *scale_terms;

  __device__ explicit BackwardScratch(const ContrastBackward& args)
      : rows(args.in.x.rows),
        columns(args.in.y.rows),
        weights(static_cast<T*>(args.scratch)),
        transposed(weights + rows * padded_columns(columns)),
        along_rows(transposed + columns * padded_rows(rows)),
        along_columns(along_rows + rows),
        scale_terms(along_columns + padded_rows(rows) / WEIGHT_ROWS * columns) {}
};

// dL/dnegative_lse of rows, from what the forward saved.
template <class T>
struct RowGradient {
  const ContrastInputs& in;
  const Saved<T>& saved;
  const T* grad_loss;
  T share;  // of one loss in the reduction

  __device__ RowGradient(const ContrastBackward& args, const Saved<T>& from)
      : in(args.in),
        saved(from),
        grad_loss(static_cast<const T*>(args.grad_loss)),
        share(in.reduction == Reduction::mean ? 1 / *saved.divisor : T(1)) {}

  // 0 where the row is ignored.
  __device__ T of_row(int64_t row) const {
    const T gap = saved.gap[row];
    const T grad = in.reduction == Reduction::none ? grad_loss[row] : grad_loss[0] * share;
    return gap == -infinity<T>() ? T(0) : grad * sigmoid(gap);
  }
};

template <class E, bool DISTANCES, bool WHOLE = false>
using BackwardProduct = ProductTile<E, E, PRODUCT_ROWS, DISTANCES, sizeof(E) == 2 && !DISTANCES, WHOLE>;

// The lengths go into the weights where 16 bits hold the vectors and the range of a float all products. Elsewhere
// they go into the vectors: times a weight the inverse length of a short one could overflow.
template <class E>
constexpr bool LENGTHS_IN_WEIGHTS = std::is_same_v<E, __half>;

// A block: WEIGHT_ROWS rows, all columns.
template <class E, bool DISTANCES>
__global__ void __launch_bounds__(THREADS, 2) contrast_weights_kernel(ContrastBackward args) {
  using T = Accumulator<E>;
  constexpr int AHEAD = 8, CHUNK = AHEAD * WARP;  // loads of a lane in flight; columns
  static_assert(CHUNK == THREADS, "a thread for each column of a chunk");
  __shared__ T block_weights[WEIGHT_ROWS][CHUNK], block_terms[WEIGHT_ROWS][CHUNK];

  const ContrastInputs& in = args.in;
  const int64_t rows = in.x.rows, columns = in.y.rows, pitch = padded_columns(columns), tall = padded_rows(rows);
  const int thread = int(threadIdx.x), lane = thread % WARP, warp = thread / WARP;
  const int64_t row = int64_t(blockIdx.x) * WEIGHT_ROWS + warp;
  const bool there = row < rows, fold = in.similarity == Similarity::cosine && LENGTHS_IN_WEIGHTS<E>;
  const Saved<T> saved(const_cast<void*>(args.saved), rows, columns);
  const BackwardScratch<T> scratch(args);
  const RowGradient<T> gradient(args, saved);
  const auto staged = [](T weight) {  // as the second launch multiplies it
    if constexpr (BackwardProduct<E, DISTANCES>::MATRIX_UNIT) weight = nvcuda::wmma::__float_to_tf32(weight);
    return weight;
  };

  const T of_row = there ? gradient.of_row(row) : T(0), scale = there ? scale_of<T>(in, row) : T(1);
  const T lse = there ? saved.lse[row] : T(0), length = there && fold ? saved.inverse_x[row] : T(1);
  const int64_t target = there ? in.target[row] : -1;
  // Of the own class, with the margin on its angle.
  const T own = target >= 0 && target < columns ? saved.similarities[row * columns + target] : T(0);
  const T own_psi = in.psi.value(own), slope = in.psi.derivative(own);
  T along = 0;
  for (int64_t first = 0; first < columns; first += CHUNK) {
    T similarities[AHEAD], lengths[AHEAD];
#pragma unroll
    for (int v = 0; v < AHEAD; ++v) {
      const int64_t j = first + v * WARP + lane;
      similarities[v] = there && j < columns ? saved.similarities[row * columns + j] : T(0);
      lengths[v] = fold && j < columns ? saved.inverse_y[j] : T(1);
    }
#pragma unroll
    for (int v = 0; v < AHEAD; ++v) {
      const int64_t j = first + v * WARP + lane;
      T weight = 0, term = 0;
      if (of_row != 0 && j < columns) {
        weight = of_row * scale * (j == target ? -slope : exp(scale * similarities[v] - lse));
        term = weight * similarities[v];
      }
      along += term;
      if (args.grad_x && there && j < pitch) scratch.weights[row * pitch + j] = staged(weight * lengths[v]);
      block_weights[warp][v * WARP + lane] = staged(weight * length);
      block_terms[warp][v * WARP + lane] = term;
    }
    if (!args.grad_y) continue;
    __syncthreads();
    const int64_t column = first + thread;
    if (column < columns) {
      alignas(16) T held[WEIGHT_ROWS];
      T sum = 0;
#pragma unroll
      for (int r = 0; r < WEIGHT_ROWS; ++r) {
        held[r] = block_weights[r][thread];
        sum += block_terms[r][thread];
      }
      uint4* to = reinterpret_cast<uint4*>(scratch.transposed + column * tall + int64_t(blockIdx.x) * WEIGHT_ROWS);
#pragma unroll
      for (int n = 0; n < WEIGHT_ROWS * int(sizeof(T)) / 16; ++n) to[n] = reinterpret_cast<const uint4*>(held)[n];
      scratch.along_columns[int64_t(blockIdx.x) * columns + column] = sum;
    }
    __syncthreads();
  }

  along = warp_sum(along);
  T *grad_scale = static_cast<T*>(args.grad_scale), *grad_margin = static_cast<T*>(args.grad_margin);
  T* scale_terms = in.scale_per_row ? grad_scale : scratch.scale_terms;
  const auto margin_term = [&](int64_t i) {
    const T of = gradient.of_row(i);
    return of == 0 ? T(0) : of * scale_of<T>(in, i);
  };
  if (lane == 0 && there) {
    scratch.along_rows[row] = along;
    if (grad_scale)
      scale_terms[row] = of_row == 0 ? T(0) : along / scale + of_row * (slope * own - own_psi + margin_of<T>(in, row));
    if (grad_margin && in.margin_per_row) grad_margin[row] = of_row == 0 ? T(0) : of_row * scale;
  }
  if (grad_margin && !in.margin_per_row && blockIdx.x == 0) {
    T sum = 0;
    for (int64_t i = thread; i < rows; i += THREADS) sum += margin_term(i);
    sum = block_sum(sum);
    if (thread == 0) *grad_margin = sum;
  }
  if (grad_scale && !in.scale_per_row && last_to_arrive(args.tickets, int(gridDim.x))) {
    T sum = 0;
    for (int64_t i = thread; i < rows; i += THREADS) sum += __ldcg(scale_terms + i);
    sum = block_sum(sum);
    if (thread == 0) *grad_scale = sum;
  }
}

// The weights of a tile of rows of x, or of y, and the sums of weight times u, as the first launch wrote them.
template <class Product>
struct StoredWeights {
  using T = typename Product::T;
  static constexpr int PER_ROW = Product::DEPTH / VECTOR<T>, COUNT = Product::ROWS * PER_ROW / THREADS;  // vectors
  static constexpr int PARTS = Product::DEPTH / WEIGHT_ROWS;  // of a column's sum, made by the rows of a chunk
  static_assert(PARTS * Product::ROWS <= THREADS, "a thread for each part");
  const T* weights;  // of the tile's first row
  int64_t pitch;
  int rows;
  const T* lengths;  // of the others, or null for 1
  const T* sums;     // of the tile's first row, in num_parts parts; or null
  int num_parts;
  int64_t parts_pitch;
  uint4 held[COUNT];
  T part, along;  // of the tile's row thread % ROWS: a part, the sum of those before

  static __device__ int row_of(int v) { return (v * THREADS + int(threadIdx.x)) / PER_ROW; }
  static __device__ int k_of(int v) { return (v * THREADS + int(threadIdx.x)) % PER_ROW * VECTOR<T>; }

  __device__ T factor(int64_t k) const { return lengths ? lengths[k] : T(1); }
  __device__ void load(int64_t first) {
#pragma unroll
    for (int v = 0; v < COUNT; ++v) {
      held[v] = make_uint4(0, 0, 0, 0);
      if (row_of(v) < rows && first + k_of(v) < pitch)
        held[v] = *reinterpret_cast<const uint4*>(weights + row_of(v) * pitch + first + k_of(v));
    }
    const int r = int(threadIdx.x) % Product::ROWS, here = int(threadIdx.x) / Product::ROWS;
    const int n = int(first / WEIGHT_ROWS) + here;
    part = sums && r < rows && here < PARTS && n < num_parts ? sums[n * parts_pitch + r] : T(0);
  }
  __device__ void store(T* tile) {
#pragma unroll
    for (int v = 0; v < COUNT; ++v)
      *reinterpret_cast<uint4*>(tile + row_of(v) * Product::WEIGHT_PITCH + k_of(v)) = held[v];
    along += part;
  }
};

// Blocks that should share a multiprocessor: as many as registers allow without spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int MOST_BLOCKS = 2;
#else
constexpr int MOST_BLOCKS = 3;
#endif
template <class E, bool DISTANCES, bool WHOLE>
constexpr int product_blocks = !WHOLE || sizeof(E) == 8                     ? 1
                               : BackwardProduct<E, DISTANCES>::MATRIX_UNIT ? MOST_BLOCKS
                                                                            : 2;

// A block: PRODUCT_ROWS rows x PRODUCT_WIDTH components of the gradient of x, or, the later ones, of y.
template <class E, bool DISTANCES, bool WHOLE>
__global__ void __launch_bounds__(THREADS, product_blocks<E, DISTANCES, WHOLE>)
    contrast_products_kernel(ContrastBackward args) {
  using T = Accumulator<E>;
  using Product = BackwardProduct<E, DISTANCES, WHOLE>;
  static_assert(Product::WIDTH == PRODUCT_WIDTH, "the grid is made for it");
  constexpr int PARTS = THREADS / PRODUCT_ROWS;
  __shared__ __align__(32) T shared[Product::SHARED];
  // Parts and sums over the others of dL/du times u; inverse lengths of the tile's rows.
  __shared__ T parts[PARTS][PRODUCT_ROWS], along[PRODUCT_ROWS], lengths[PRODUCT_ROWS];

  const ContrastInputs& in = args.in;
  const int64_t width = in.x.width;
  const int thread = int(threadIdx.x);
  const int width_blocks = int(ceiling_divide(width, PRODUCT_WIDTH));
  const int of_rows = args.grad_x ? int(ceiling_divide(in.x.rows, PRODUCT_ROWS)) * width_blocks : 0;
  const bool of_columns = int(blockIdx.x) >= of_rows, cosine = in.similarity == Similarity::cosine;
  const int block = of_columns ? int(blockIdx.x) - of_rows : int(blockIdx.x);
  const int64_t first = int64_t(block / width_blocks) * PRODUCT_ROWS;
  const int64_t first_column = int64_t(block % width_blocks) * PRODUCT_WIDTH;

  const Saved<T> saved(const_cast<void*>(args.saved), in.x.rows, in.y.rows);
  const BackwardScratch<T> scratch(args);
  const Matrix &own = of_columns ? in.y : in.x, &others = of_columns ? in.x : in.y;
  const T* own_lengths = of_columns ? saved.inverse_y : saved.inverse_x;
  const T* other_lengths = of_columns ? saved.inverse_x : saved.inverse_y;
  const int64_t pitch = of_columns ? padded_rows(in.x.rows) : padded_columns(in.y.rows);
  const int rows = int(own.rows - first < PRODUCT_ROWS ? own.rows - first : PRODUCT_ROWS);

  const T* sums_along = of_columns ? scratch.along_columns : scratch.along_rows;
  StoredWeights<Product> weights{(of_columns ? scratch.transposed : scratch.weights) + first * pitch,
                                 pitch,
                                 rows,
                                 cosine && !LENGTHS_IN_WEIGHTS<E> ? other_lengths : nullptr,
                                 cosine ? sums_along + first : nullptr,
                                 of_columns ? int(padded_rows(in.x.rows) / WEIGHT_ROWS) : 1,
                                 own.rows,
                                 {},
                                 T(0),
                                 T(0)};
  T sums[Product::OUTPUTS];
  Product::run(others, first_column, others.rows, weights, own, first, shared, sums);

  const int64_t d = first_column + Product::output_column();
  const int first_output = Product::output_row(0);
  const E* vector = static_cast<const E*>(own.data) + (first + first_output) * own.row_stride + d * own.column_stride;
  T vectors[Product::OUTPUTS];
#pragma unroll
  for (int v = 0; v < Product::OUTPUTS; ++v) {
    const bool needed = cosine && d < width && Product::output_row(v) < rows;
    vectors[v] = needed ? widen(vector[v * Product::OUTPUT_STEP * own.row_stride]) : T(0);
  }
  if (cosine) {
    parts[thread / PRODUCT_ROWS][thread % PRODUCT_ROWS] = weights.along;
    if (thread < PRODUCT_ROWS) lengths[thread] = thread < rows ? own_lengths[first + thread] : T(0);
    __syncthreads();
    if (thread < PRODUCT_ROWS) {
      T sum = 0;
#pragma unroll
      for (int n = 0; n < PARTS; ++n) sum += parts[n][thread];
      along[thread] = sum;
    }
    __syncthreads();
  }
  if (d >= width) return;
  E* out = static_cast<E*>(of_columns ? args.grad_y : args.grad_x) + (first + first_output) * width + d;
#pragma unroll
  for (int v = 0; v < Product::OUTPUTS; ++v) {
    if (Product::output_row(v) >= rows) continue;
    T value = sums[v];
    if (cosine) {
      const T inverse = lengths[Product::output_row(v)], unit = vectors[v] * inverse;
      value = inverse * (value - unit * along[Product::output_row(v)]);
    } else if (DISTANCES) {
      value *= 2;
    }
    out[v * Product::OUTPUT_STEP * width] = narrow<E>(value);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fused_margins
