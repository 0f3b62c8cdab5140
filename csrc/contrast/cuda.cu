// contrast with the epilogue of margin softmax on an NVIDIA GPU, for few columns: one launch forward, two backward
// (cuda_backward.h).
//
// Forward: blocks of 16 rows x 16 columns of similarities; of a block of rows the one that ends last makes the losses,
// and of these the last one the sum. Every sum runs in one order; no sum is made by atomics.
#include "cuda.h"

#include <type_traits>

#include "../cuda/tile.h"
#include "cuda_backward.h"
#include "cuda_saved.h"

namespace fused_margins {
namespace cuda {
namespace {

// How a chunk is staged and multiplied: 16 bits on the matrix unit, all else widened to T.
template <class E, bool DISTANCES, bool WHOLE>
struct Pairs {
  using T = Accumulator<E>;
  static constexpr bool MATRIX_UNIT = sizeof(E) == 2 && !DISTANCES;
  using Staged = std::conditional_t<MATRIX_UNIT, E, T>;
  using Sums = std::conditional_t<MATRIX_UNIT, MatrixUnitSums<std::conditional_t<sizeof(E) == 2, E, __half>>,
                                  PairSums<T, TILE, DISTANCES>>;
  static constexpr int DEPTH = 1024 / int(sizeof(Staged));
  using Panel = PanelLoader<E, Staged, TILE, DEPTH, WHOLE>;
  static constexpr int STAGED = 2 * TILE * Panel::PITCH * int(sizeof(Staged));
  static constexpr int PARTIAL = WARPS * TILE * TILE * int(sizeof(T));
  static constexpr int SHARED = STAGED > PARTIAL ? STAGED : PARTIAL;  // bytes
};

// The losses of a warp's rows of a tile, once all their similarities are saved: loads of all rows are in flight
// together.
template <class T>
struct RowLosses {
  static constexpr int ROWS = TILE / WARPS, AHEAD = 8;  // rows of a warp; loads of a lane and row
  static constexpr int CHUNK = AHEAD * WARP;            // columns
  const ContrastInputs& in;
  int64_t first;
  int64_t target[ROWS];
  bool ignored[ROWS], valid[ROWS];
  T scale[ROWS], margin[ROWS];
  T gap[ROWS], lse[ROWS];

  __device__ int64_t row(int r) const { return first + r * WARPS; }

  // Reads what needs no other block.
  __device__ RowLosses(const ContrastInputs& inputs, int64_t first_row) : in(inputs), first(first_row) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const bool there = row(r) < in.x.rows;
      target[r] = there ? in.target[row(r)] : -1;
      ignored[r] = there && !has_positive(in, target[r]);
      valid[r] = there && !ignored[r] && target[r] >= 0 && target[r] < in.y.rows;
      scale[r] = there ? scale_of<T>(in, row(r)) : T(0);
      margin[r] = there ? margin_of<T>(in, row(r)) : T(0);
    }
  }

  __device__ void make(const Saved<T>& saved) {
    const int64_t columns = in.y.rows;
    const int lane = int(threadIdx.x) % WARP;
    T logits[ROWS][AHEAD], largest[ROWS], sum[ROWS], own[ROWS];
    const auto load = [&](int64_t chunk) {  // -infinity where there is none, and for the row's own class
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int v = 0; v < AHEAD; ++v) {
          const int64_t j = chunk + v * WARP + lane;
          logits[r][v] = -infinity<T>();
          if (valid[r] && j < columns && j != target[r])
            logits[r][v] = scale[r] * __ldcg(saved.similarities + row(r) * columns + j);
        }
    };
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      own[r] = valid[r] ? __ldcg(saved.similarities + row(r) * columns + target[r]) : T(0);
      largest[r] = -infinity<T>();
      sum[r] = 0;
    }
    for (int64_t chunk = 0; chunk < columns; chunk += CHUNK) {
      load(chunk);
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int v = 0; v < AHEAD; ++v) largest[r] = larger(largest[r], logits[r][v]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      largest[r] = warp_max(largest[r]);
      if (!(fabs(largest[r]) < infinity<T>())) largest[r] = 0;
    }
    for (int64_t chunk = 0; chunk < columns; chunk += CHUNK) {
      if (columns > CHUNK) load(chunk);  // else they are still here
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int v = 0; v < AHEAD; ++v) sum[r] += exp(logits[r][v] - largest[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const T others = largest[r] + log(warp_sum(sum[r]));  // -infinity where there is no other class
      const T unknown = ignored[r] ? -infinity<T>() : not_a_number<T>();
      lse[r] = valid[r] ? others : unknown;
      gap[r] = valid[r] ? log_odds(others, scale[r] * (in.psi.value(own[r]) - margin[r])) : unknown;
    }
  }
};

template <class E, bool DISTANCES, bool WHOLE>
__global__ void __launch_bounds__(THREADS, WHOLE && sizeof(E) < 8 ? 2 : 1)
    contrast_forward_kernel(ContrastForward args) {
  using P = Pairs<E, DISTANCES, WHOLE>;
  using T = typename P::T;
  using Panel = typename P::Panel;
  __shared__ __align__(32) unsigned char buffer[P::SHARED];  // two panels; then the warps' sums
  __shared__ T factors[2 * TILE], inverses[2 * TILE], squares[2 * TILE * Panel::PARTS];

  const ContrastInputs& in = args.in;
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

  RowLosses<T> losses(in, first_row + warp);
  if (!last_to_arrive(args.tickets + row_block, column_blocks)) return;
  losses.make(saved);
  const bool per_row = in.reduction == Reduction::none;
#pragma unroll
  for (int r = 0; r < RowLosses<T>::ROWS; ++r) {
    const int64_t row = losses.row(r);
    if (lane != r || row >= rows) continue;
    saved.gap[row] = losses.gap[r];
    saved.lse[row] = losses.lse[r];
    if (per_row) static_cast<T*>(args.loss)[row] = softplus(losses.gap[r]);
  }
  if (per_row || !last_to_arrive(args.tickets + row_blocks, row_blocks)) return;
  T sum = 0, counted = 0;
  for (int64_t row = thread; row < rows; row += THREADS) {
    sum += softplus(__ldcg(saved.gap + row));
    counted += has_positive(in, in.target[row]);
  }
  sum = block_sum(sum);
  counted = block_sum(counted);
  if (thread == 0) {
    const T divisor = in.reduction == Reduction::mean && counted > 0 ? counted : T(1);
    *saved.divisor = divisor;
    *static_cast<T*>(args.loss) = sum / divisor;
  }
}

// Calls f with a value of the element type, whether similarities are distances and whether loads are whole vectors.
template <class F>
void specialise(const ContrastInputs& in, const F& f) {
  dispatch(in.x.dtype, [&](auto zero) {
    using E = decltype(zero);
    const bool whole = only_whole_vectors<E>(in.x) && only_whole_vectors<E>(in.y);
    if (in.similarity == Similarity::negative_squared_euclidean)
      return whole ? f(zero, std::true_type(), std::true_type()) : f(zero, std::true_type(), std::false_type());
    return whole ? f(zero, std::false_type(), std::true_type()) : f(zero, std::false_type(), std::false_type());
  });
}

}  // namespace

int64_t contrast_tickets(int64_t rows) {
  return ceiling_divide(rows, TILE) + 1;
}

int64_t contrast_forward_grid(int64_t rows, int64_t columns) {
  return ceiling_divide(rows, TILE) * std::max<int64_t>(1, ceiling_divide(columns, TILE));
}

int64_t contrast_backward_grid(int64_t rows, int64_t columns, int64_t width, bool grad_x, bool grad_y) {
  const int64_t width_blocks = ceiling_divide(width, PRODUCT_WIDTH);
  return ((grad_x ? ceiling_divide(rows, PRODUCT_ROWS) : 0) + (grad_y ? ceiling_divide(columns, PRODUCT_ROWS) : 0)) *
         width_blocks;
}

int64_t contrast_scratch_size(int64_t rows, int64_t columns) {
  const int64_t blocks = ceiling_divide(rows, WEIGHT_ROWS);
  return rows * padded_columns(columns) + columns * padded_rows(rows) + 2 * rows + blocks * columns;
}

void contrast_forward(const ContrastForward& args) {
  const int64_t blocks = contrast_forward_grid(args.in.x.rows, args.in.y.rows);
  specialise(args.in, [&](auto zero, auto distances, auto whole) {
    launch("contrast_forward", contrast_forward_kernel<decltype(zero), distances.value, whole.value>, blocks, args);
  });
}

void contrast_backward(const ContrastBackward& args) {
  const int64_t blocks = contrast_backward_grid(args.in.x.rows, args.in.y.rows, args.in.x.width, args.grad_x != nullptr,
                                                args.grad_y != nullptr);
  specialise(args.in, [&](auto zero, auto distances, auto whole) {
    using E = decltype(zero);
    launch("contrast_weights", contrast_weights_kernel<E, distances.value>, ceiling_divide(args.in.x.rows, WEIGHT_ROWS),
           args);
    launch("contrast_products", contrast_products_kernel<E, distances.value, whole.value>, blocks, args);
  });
}

}  // namespace cuda
}  // namespace fused_margins
