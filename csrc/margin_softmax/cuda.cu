// margin_softmax on an NVIDIA GPU, for few columns: one launch each way.
//
// Forward: blocks of 16 rows x 16 columns of similarities; of a block of rows the one that ends last makes the losses,
// and of these the last one the sum. Backward: blocks of 16 rows x 64 components of both gradients, from the
// similarities that the forward keeps. Every sum runs in one order; no sum is made by atomics.
#include "cuda.h"

#include <type_traits>

#include "../common/cuda_tile.h"

namespace fused_margins {
namespace cuda {
namespace {

constexpr int PRODUCT_WIDTH = 64;  // components of a block of the backward

template <class T>
struct Saved {
  T *similarities, *inverse_x, *inverse_y, *gap, *lse, *divisor;

  __device__ Saved(void* saved, int64_t rows, int64_t columns)
      : similarities(static_cast<T*>(saved)),
        inverse_x(similarities + rows * columns),
        inverse_y(inverse_x + rows),
        gap(inverse_y + columns),
        lse(gap + rows),
        divisor(lse + rows) {}
};

// Not a number where it is not positive.
template <class T>
__device__ T scale_of(const MarginSoftmaxInputs& in, int64_t row) {
  const T scale = static_cast<const T*>(in.scale)[in.scale_per_row ? row : 0];
  return scale > 0 ? scale : not_a_number<T>();
}
template <class T>
__device__ T margin_of(const MarginSoftmaxInputs& in, int64_t row) {
  return static_cast<const T*>(in.margin)[in.margin_per_row ? row : 0];
}

template <class T>
__device__ T softplus(T gap) {
  return (gap > 0 ? gap : gap < 0 ? T(0) : gap) + log1p(exp(-fabs(gap)));
}
template <class T>
__device__ T sigmoid(T gap) {
  const T odds = exp(-fabs(gap));
  return (gap < 0 ? odds : T(1)) / (1 + odds);
}

// How a chunk is staged and multiplied: 16 bits on the matrix unit, all else widened to T.
template <class E, bool DISTANCES>
struct Pairs {
  using T = Accumulator<E>;
  static constexpr bool MATRIX_UNIT = sizeof(E) == 2 && !DISTANCES;
  using Staged = std::conditional_t<MATRIX_UNIT, E, T>;
  using Sums = std::conditional_t<MATRIX_UNIT, MatrixUnitSums<std::conditional_t<sizeof(E) == 2, E, __half>>,
                                  PairSums<T, TILE, DISTANCES>>;
  static constexpr int DEPTH = 1024 / int(sizeof(Staged));
  using Panel = PanelLoader<E, Staged, TILE, DEPTH>;
  static constexpr int STAGED = 2 * TILE * Panel::PITCH * int(sizeof(Staged));
  static constexpr int PARTIAL = WARPS * TILE * TILE * int(sizeof(T));
  static constexpr int SHARED = STAGED > PARTIAL ? STAGED : PARTIAL;  // bytes
};

template <class E, bool DISTANCES>
__global__ void __launch_bounds__(THREADS, 1) margin_softmax_forward_kernel(MarginSoftmaxForward args) {
  using P = Pairs<E, DISTANCES>;
  using T = typename P::T;
  using Panel = typename P::Panel;
  __shared__ __align__(32) unsigned char buffer[P::SHARED];  // two panels; then the warps' sums
  __shared__ T factors[2 * TILE], inverses[2 * TILE], squares[2 * TILE * Panel::PARTS];

  const MarginSoftmaxInputs& in = args.in;
  const int64_t rows = in.x.rows, columns = in.y.rows, width = in.x.width;
  const Saved<T> saved(args.saved, rows, columns);
  const int row_blocks = int(ceiling_divide(rows, TILE));
  const int column_blocks = int(gridDim.x) / row_blocks, row_block = int(blockIdx.x) / column_blocks;
  const int64_t first_row = int64_t(row_block) * TILE;
  const int64_t first_column = int64_t(int(blockIdx.x) % column_blocks) * TILE;
  const int thread = int(threadIdx.x), lane = thread % WARP, warp = thread / WARP;
  const bool cosine = in.similarity == Similarity::cosine;

  typename P::Staged *panel_x = reinterpret_cast<typename P::Staged*>(buffer), *panel_y = panel_x + TILE * Panel::PITCH;
  const bool whole_x = whole_vectors<E>(in.x), whole_y = whole_vectors<E>(in.y);
  T u = 0;  // of row thread / TILE and column thread % TILE
  // Once as they are. Where squares leave the range of T, again: vectors times the power of two of their largest entry.
  for (bool scaled = false;; scaled = true) {
    Panel x, y;
    typename P::Sums sums;
    x.clear_squares();
    y.clear_squares();
    sums.clear();
    x.load(in.x, whole_x, first_row, 0);
    y.load(in.y, whole_y, first_column, 0);
    for (int64_t depth = 0; depth < width; depth += P::DEPTH) {
      x.store(panel_x, scaled ? factors : nullptr, cosine);
      y.store(panel_y, scaled ? factors + TILE : nullptr, cosine);
      __syncthreads();
      if (depth + P::DEPTH < width) {
        x.load(in.x, whole_x, first_row, depth + P::DEPTH);
        y.load(in.y, whole_y, first_column, depth + P::DEPTH);
      }
      sums.add(panel_x, panel_y, Panel::PITCH, int(width - depth < P::DEPTH ? width - depth : P::DEPTH));
      __syncthreads();
    }
    T* partial = reinterpret_cast<T*>(buffer);
    sums.save(partial);
    if (cosine) {
      x.save_squares(squares);
      y.save_squares(squares + TILE * Panel::PARTS);
    }
    __syncthreads();
    u = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) u += partial[w * TILE * TILE + thread];
    if (!cosine) break;
    bool out_of_range = false;
    if (thread < 2 * TILE) {
      T squared = 0;
#pragma unroll
      for (int part = 0; part < Panel::PARTS; ++part) squared += squares[thread * Panel::PARTS + part];
      const bool there = thread < TILE ? first_row + thread < rows : first_column + thread - TILE < columns;
      out_of_range = there && !within_range(squared);
      const T factor = scaled ? factors[thread] : T(1), inverse = 1 / sqrt(squared), true_inverse = inverse * factor;
      const bool zero = true_inverse == infinity<T>();  // where it overflows the vector counts as zero
      inverses[thread] = zero ? T(0) : inverse;
      if (thread < TILE && there && first_column == 0) saved.inverse_x[first_row + thread] = zero ? T(0) : true_inverse;
      if (thread >= TILE && there && first_row == 0)
        saved.inverse_y[first_column + thread - TILE] = zero ? T(0) : true_inverse;
    }
    const bool again = __syncthreads_or(out_of_range) && !scaled;
    if (!again) {
      u = u * inverses[thread / TILE] * inverses[TILE + thread % TILE];
      break;
    }
    for (int n = warp; n < 2 * TILE; n += WARPS) {
      const Matrix& m = n < TILE ? in.x : in.y;
      const int64_t row = n < TILE ? first_row + n : first_column + n - TILE;
      T largest = 0;
      for (int64_t d = lane; row < m.rows && d < width; d += WARP)
        largest = larger(largest, T(fabs(widen(element<E>(m, row, d)))));
      largest = warp_max(largest);
      if (lane == 0) factors[n] = power_of_two_for(largest);
    }
    __syncthreads();
  }
  if (first_row + thread / TILE < rows && first_column + thread % TILE < columns)
    saved.similarities[(first_row + thread / TILE) * columns + first_column + thread % TILE] = DISTANCES ? -u : u;

  if (!last_to_arrive(args.tickets + row_block, column_blocks)) return;
  const bool per_row = in.reduction == Reduction::none;
  for (int64_t row = first_row + warp; row < first_row + TILE && row < rows; row += WARPS) {
    const int64_t target = in.target[row];
    const bool ignored = target == in.ignore_index, valid = !ignored && target >= 0 && target < columns;
    const T scale = scale_of<T>(in, row), *of_row = saved.similarities + row * columns;
    T gap = ignored ? -infinity<T>() : not_a_number<T>(), lse = gap;
    if (valid) {
      T largest = -infinity<T>(), sum = 0;
      for (int64_t j = lane; j < columns; j += WARP)
        if (j != target) largest = larger(largest, scale * __ldcg(of_row + j));
      largest = warp_max(largest);
      const T shift = fabs(largest) < infinity<T>() ? largest : T(0);
      for (int64_t j = lane; j < columns; j += WARP)
        if (j != target) sum += exp(scale * __ldcg(of_row + j) - shift);
      lse = shift + log(warp_sum(sum));  // -infinity where there is no other class
      gap = lse - scale * (__ldcg(of_row + target) - margin_of<T>(in, row));
    }
    if (lane == 0) {
      saved.gap[row] = gap;
      saved.lse[row] = lse;
      if (per_row) static_cast<T*>(args.loss)[row] = softplus(gap);
    }
  }
  if (per_row || !last_to_arrive(args.tickets + row_blocks, row_blocks)) return;
  T sum = 0, counted = 0;
  for (int64_t row = thread; row < rows; row += THREADS) {
    sum += softplus(__ldcg(saved.gap + row));
    counted += in.target[row] != in.ignore_index;
  }
  sum = block_sum(sum);
  counted = block_sum(counted);
  if (thread == 0) {
    const T divisor = in.reduction == Reduction::mean && counted > 0 ? counted : T(1);
    *saved.divisor = divisor;
    *static_cast<T*>(args.loss) = sum / divisor;
  }
}

// dL/du of any pair, from what the forward saved.
template <class T>
struct PairGradient {
  const MarginSoftmaxInputs& in;
  Saved<T> saved;
  const T* grad_loss;
  T share;  // of one loss in the reduction

  __device__ PairGradient(const MarginSoftmaxBackward& args)
      : in(args.in),
        saved(const_cast<void*>(args.saved), in.x.rows, in.y.rows),
        grad_loss(static_cast<const T*>(args.grad_loss)),
        share(in.reduction == Reduction::mean ? 1 / *saved.divisor : T(1)) {}

  // dL/dnegative_lse of a row; 0 where it is ignored.
  __device__ T of_row(int64_t row) const {
    const T gap = saved.gap[row];
    const T grad = in.reduction == Reduction::none ? grad_loss[row] : grad_loss[0] * share;
    return gap == -infinity<T>() ? T(0) : grad * sigmoid(gap);
  }
};

// The weights of a tile of rows (of x) against columns, or of columns against rows.
template <class E, int COUNT>
struct Weights {
  using T = Accumulator<E>;
  // The lengths go into the weights where 16 bits hold the vectors and the range of a float all products. Elsewhere
  // they go into the vectors: times a weight the inverse length of a short one could overflow.
  static constexpr bool LENGTHS_IN_WEIGHTS = std::is_same_v<E, __half>;
  const PairGradient<T>& gradient;
  bool of_columns, cosine;
  int64_t first;  // row (of columns: column) of the tile's first one
  T similarity[COUNT], of_row[COUNT], scale[COUNT], lse[COUNT], length[COUNT];
  bool own[COUNT];
  T along[COUNT];  // sums of dL/du times u

  __device__ Weights(const PairGradient<T>& g, bool columns, int64_t first_row)
      : gradient(g), of_columns(columns), cosine(g.in.similarity == Similarity::cosine), first(first_row) {
#pragma unroll
    for (int v = 0; v < COUNT; ++v) along[v] = 0;
  }
  __device__ bool transposed() const { return of_columns; }
  __device__ const T* lengths() const { return of_columns ? gradient.saved.inverse_x : gradient.saved.inverse_y; }
  __device__ T factor(int64_t k) const { return cosine && !LENGTHS_IN_WEIGHTS ? lengths()[k] : T(1); }

  __device__ void load(int v, int r, int64_t k) {
    const int64_t row = of_columns ? k : first + r, column = of_columns ? first + r : k;
    const int64_t columns = gradient.in.y.rows;
    of_row[v] = 0;
    if (row >= gradient.in.x.rows || column >= columns) return;
    similarity[v] = gradient.saved.similarities[row * columns + column];
    of_row[v] = gradient.of_row(row);
    scale[v] = scale_of<T>(gradient.in, row);
    lse[v] = gradient.saved.lse[row];
    own[v] = gradient.in.target[row] == column;
    length[v] = cosine && LENGTHS_IN_WEIGHTS ? lengths()[k] : T(1);
  }
  __device__ T weigh(int v, int, int64_t) {
    if (of_row[v] == 0) return 0;
    const T weight = of_row[v] * scale[v] * (own[v] ? T(-1) : exp(scale[v] * similarity[v] - lse[v]));
    along[v] += weight * similarity[v];
    return weight * length[v];
  }
};

template <class E, bool DISTANCES>
__global__ void __launch_bounds__(THREADS) margin_softmax_backward_kernel(MarginSoftmaxBackward args) {
  using T = Accumulator<E>;
  using Product = ProductTile<E, E, DISTANCES, sizeof(E) == 2 && !DISTANCES>;
  static_assert(Product::WIDTH == PRODUCT_WIDTH, "the grid is made for it");
  __shared__ __align__(32) T shared[Product::SHARED];
  __shared__ T along[TILE];

  const MarginSoftmaxInputs& in = args.in;
  const int64_t rows = in.x.rows, width = in.x.width;
  const int thread = int(threadIdx.x), lane = thread % WARP, warp = thread / WARP;
  // Blocks for the rows come first. Without a gradient of x there is one for each 16 rows, or none.
  const int width_blocks = int(width > 0 ? ceiling_divide(width, PRODUCT_WIDTH) : 1);
  const int row_blocks = int(ceiling_divide(rows, TILE));
  const bool factors = args.grad_scale || args.grad_margin;
  const int of_a_row = args.grad_x ? width_blocks : factors ? 1 : 0;
  const bool of_columns = int(blockIdx.x) >= row_blocks * of_a_row;
  const int block = of_columns ? int(blockIdx.x) - row_blocks * of_a_row : int(blockIdx.x);
  const int blocks_wide = of_columns ? width_blocks : of_a_row, width_block = block % blocks_wide;
  const int64_t first = int64_t(block / blocks_wide) * TILE, first_column = int64_t(width_block) * PRODUCT_WIDTH;

  const PairGradient<T> gradient(args);
  Weights<E, Product::WEIGHTS> weights(gradient, of_columns, first);
  const Matrix &own = of_columns ? in.y : in.x, &others = of_columns ? in.x : in.y;
  E* out = static_cast<E*>(of_columns ? args.grad_y : args.grad_x);
  T sums[Product::OUTPUTS];
  Product::run(others, first_column, others.rows, weights, out != nullptr, own, first, shared, sums);

  // The sum over the others of dL/du times u, for each of the tile's rows.
  __syncthreads();
  if (of_columns) {
    T sum = 0;
#pragma unroll
    for (int v = 0; v < Product::WEIGHTS; ++v) sum += weights.along[v];
    shared[thread] = sum;  // of row thread % TILE
  } else {
#pragma unroll
    for (int v = 0; v < Product::WEIGHTS; ++v) {
      const T sum = warp_sum(weights.along[v]);
      if (lane == 0) shared[v * WARPS + warp] = sum;  // of row (v * WARPS + warp) * WARP / DEPTH
    }
  }
  __syncthreads();
  if (thread < TILE) {
    constexpr int parts = Product::DEPTH / WARP;
    T sum = 0;
    if (of_columns)
      for (int part = 0; part < THREADS / TILE; ++part) sum += shared[part * TILE + thread];
    else
      for (int part = 0; part < parts; ++part) sum += shared[thread * parts + part];
    along[thread] = sum;
  }
  __syncthreads();

  if (out) {
    const T* inverse_lengths = of_columns ? gradient.saved.inverse_y : gradient.saved.inverse_x;
#pragma unroll
    for (int v = 0; v < Product::OUTPUTS; ++v) {
      const int64_t row = first + Product::output_row(v), d = first_column + Product::output_column(v);
      if (row >= own.rows || d >= width) continue;
      T value = sums[v];
      if (in.similarity == Similarity::cosine) {
        const T inverse = inverse_lengths[row], unit = widen(element<E>(own, row, d)) * inverse;
        value = inverse * (value - unit * along[Product::output_row(v)]);
      } else if (DISTANCES) {
        value *= 2;
      }
      out[row * width + d] = narrow<E>(value);
    }
  }

  if (of_columns || width_block != 0 || !factors) return;
  const auto scale_term = [&](int64_t row) {
    const T of_row = gradient.of_row(row);
    return of_row == 0 ? T(0) : along[row - first] / scale_of<T>(in, row) + of_row * margin_of<T>(in, row);
  };
  const auto margin_term = [&](int64_t row) {
    const T of_row = gradient.of_row(row);
    return of_row == 0 ? T(0) : of_row * scale_of<T>(in, row);
  };
  T *grad_scale = static_cast<T*>(args.grad_scale), *grad_margin = static_cast<T*>(args.grad_margin);
  T* scale_terms = in.scale_per_row ? grad_scale : static_cast<T*>(args.scale_terms);
  if (thread < TILE && first + thread < rows) {
    if (grad_scale) scale_terms[first + thread] = scale_term(first + thread);
    if (grad_margin && in.margin_per_row) grad_margin[first + thread] = margin_term(first + thread);
  }
  if (grad_margin && !in.margin_per_row && first == 0) {
    T sum = 0;
    for (int64_t row = thread; row < rows; row += THREADS) sum += margin_term(row);
    sum = block_sum(sum);
    if (thread == 0) *grad_margin = sum;
  }
  if (grad_scale && !in.scale_per_row && last_to_arrive(args.tickets, row_blocks)) {
    T sum = 0;
    for (int64_t row = thread; row < rows; row += THREADS) sum += __ldcg(scale_terms + row);
    sum = block_sum(sum);
    if (thread == 0) *grad_scale = sum;
  }
}

}  // namespace

int64_t margin_softmax_tickets(int64_t rows) {
  return ceiling_divide(rows, TILE) + 1;
}

int64_t margin_softmax_forward_grid(int64_t rows, int64_t columns) {
  return ceiling_divide(rows, TILE) * std::max<int64_t>(1, ceiling_divide(columns, TILE));
}

int64_t margin_softmax_backward_grid(int64_t rows, int64_t columns, int64_t width, bool grad_x, bool grad_y,
                                     bool grad_factors) {
  const int64_t width_blocks = std::max<int64_t>(1, ceiling_divide(width, PRODUCT_WIDTH));
  return ceiling_divide(rows, TILE) * (grad_x         ? width_blocks
                                       : grad_factors ? 1
                                                      : 0) +
         (grad_y ? ceiling_divide(columns, TILE) * width_blocks : 0);
}

void margin_softmax_forward(const MarginSoftmaxForward& args, void* stream) {
  const int64_t blocks = margin_softmax_forward_grid(args.in.x.rows, args.in.y.rows);
  dispatch(args.in.x.dtype, [&](auto zero) {
    using E = decltype(zero);
    const bool distances = args.in.similarity == Similarity::negative_squared_euclidean;
    launch("margin_softmax_forward",
           distances ? margin_softmax_forward_kernel<E, true> : margin_softmax_forward_kernel<E, false>, blocks, stream,
           args);
  });
}

void margin_softmax_backward(const MarginSoftmaxBackward& args, void* stream) {
  const int64_t blocks =
      margin_softmax_backward_grid(args.in.x.rows, args.in.y.rows, args.in.x.width, args.grad_x != nullptr,
                                   args.grad_y != nullptr, args.grad_scale || args.grad_margin);
  dispatch(args.in.x.dtype, [&](auto zero) {
    using E = decltype(zero);
    const bool distances = args.in.similarity == Similarity::negative_squared_euclidean;
    launch("margin_softmax_backward",
           distances ? margin_softmax_backward_kernel<E, true> : margin_softmax_backward_kernel<E, false>, blocks,
           stream, args);
  });
}

}  // namespace cuda
}  // namespace fused_margins
