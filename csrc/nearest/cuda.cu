// nearest on an NVIDIA GPU, among the columns of a row's own label: one launch.
//
// A block reads all column labels once. A filter of one bit for each hash of its rows' labels lets few pass; they mark
// the columns that match each row. A warp then takes a row's marks in column order, a few at a time, and keeps the
// best, or of negated similarities for the least similar columns. A similarity is one sum whose order depends on the
// width alone, so that equal columns have equal bits, wherever they lie.
#include "cuda.h"

#include "../cuda/device.h"

namespace fused_margins {
namespace cuda {
namespace {

constexpr int ROWS = 16;       // of a block
constexpr int COLUMNS = 4096;  // whose marks are in shared memory at a time
constexpr int WORDS = COLUMNS / WARP;
constexpr int FILTER_BITS = 13;  // of a hash
constexpr int LABELS = 4;        // that a thread reads at once
constexpr int K_IN_SHARED = 16;  // up to which a row's list is in shared memory

// Where a label is in the filter.
__device__ unsigned hash(int64_t label) {
  return (unsigned(label) ^ unsigned(uint64_t(label) >> 32)) * 2654435761u >> (32 - FILTER_BITS);
}

// The largest absolute value of a row; by a warp.
template <class E>
__device__ Accumulator<E> largest_of(const Matrix& m, int64_t row) {
  using T = Accumulator<E>;
  T largest = 0;
  for (int64_t d = threadIdx.x % WARP; d < m.width; d += WARP)
    largest = larger(largest, T(fabs(widen(element<E>(m, row, d)))));
  return warp_max(largest);
}

// 1 / length of a vector with these squares after a multiplication by factor, and 0 where that of the vector itself
// overflows.
template <class T>
__device__ T inverse_length(T squared, T factor) {
  const T inverse = 1 / sqrt(squared);
  return inverse * factor == infinity<T>() ? T(0) : inverse;
}

// The products of factor_x x and factor_y y_j (or of their differences with themselves), and the squares of factor_y
// y_j, for each column j; by a warp.
template <class E, bool DISTANCES, bool SQUARES, int COUNT>
__device__ void compare(const Matrix& x, bool whole_x, int64_t row, const Matrix& y, bool whole_y,
                        const int64_t* columns, Accumulator<E> factor_x, Accumulator<E> factor_y, Accumulator<E>* sums,
                        Accumulator<E>* squares) {
  using T = Accumulator<E>;
#pragma unroll
  for (int n = 0; n < COUNT; ++n) sums[n] = squares[n] = 0;
  for (int64_t d = threadIdx.x % WARP * VECTOR<E>; d < x.width; d += WARP * VECTOR<E>) {
    const uint4 a = load_vector<E>(x, whole_x, row, d);
    uint4 b[COUNT];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) b[n] = load_vector<E>(y, whole_y, columns[n], d);
#pragma unroll
    for (int e = 0; e < VECTOR<E>; ++e) {
      const T left = widen(reinterpret_cast<const E*>(&a)[e]) * factor_x;
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        const T right = widen(reinterpret_cast<const E*>(&b[n])[e]) * factor_y, difference = left - right;
        sums[n] = DISTANCES ? fma(difference, difference, sums[n]) : fma(left, right, sums[n]);
        if (SQUARES) squares[n] = fma(right, right, squares[n]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    sums[n] = warp_sum(sums[n]);
    if (SQUARES) squares[n] = warp_sum(squares[n]);
  }
}

// Puts u of a column into a row's list of k, best first, behind those that are as good; by a warp.
template <class T>
__device__ void insert(T* best, int64_t* index, int k, T u, int64_t column) {
  if (!(u > best[k - 1])) return;  // nor is NaN better than anything, nor -infinity than an empty place
  const int lane = int(threadIdx.x) % WARP;
  int place = 0;
  for (int e = 0; e < k; e += WARP) place += __popc(__ballot_sync(ALL_LANES, e + lane < k && best[e + lane] >= u));
  for (int e = (k - 1) / WARP * WARP; e >= 0 && e + WARP > place; e -= WARP) {
    const int from = e + lane;
    const bool moves = from >= place && from < k - 1;
    const T value = moves ? best[from] : T(0);
    const int64_t old = moves ? index[from] : 0;
    __syncwarp();
    if (moves) {
      best[from + 1] = value;
      index[from + 1] = old;
    }
    __syncwarp();
  }
  if (lane == 0) {
    best[place] = u;
    index[place] = column;
  }
  __syncwarp();
}

// The sum of squares of a row times factor; by a warp.
template <class E>
__device__ Accumulator<E> squares_of(const Matrix& m, bool whole, int64_t row, Accumulator<E> factor) {
  using T = Accumulator<E>;
  constexpr int AHEAD = sizeof(T) == 8 ? 1 : 4;
  T squared = 0;
#pragma unroll AHEAD
  for (int64_t d = threadIdx.x % WARP * VECTOR<E>; d < m.width; d += WARP * VECTOR<E>) {
    const uint4 a = load_vector<E>(m, whole, row, d);
#pragma unroll
    for (int e = 0; e < VECTOR<E>; ++e) {
      const T value = widen(reinterpret_cast<const E*>(&a)[e]) * factor;
      squared = fma(value, value, squared);
    }
  }
  return warp_sum(squared);
}

template <class E, Similarity SIMILARITY>
__global__ void __launch_bounds__(THREADS, 2) nearest_kernel(Nearest args) {
  using T = Accumulator<E>;
  constexpr int AT_ONCE = sizeof(T) == 8 ? 2 : 4;  // columns that a warp compares at once
  constexpr bool COSINE = SIMILARITY == Similarity::cosine;
  constexpr bool DISTANCES = SIMILARITY == Similarity::negative_squared_euclidean;
  __shared__ unsigned marks[ROWS][WORDS], filter[1 << (FILTER_BITS - 5)];
  __shared__ int64_t labels[ROWS];
  __shared__ T best_shared[ROWS][K_IN_SHARED];
  __shared__ int64_t index_shared[ROWS][K_IN_SHARED];

  const int thread = int(threadIdx.x), lane = thread % WARP, warp = thread / WARP;
  const int64_t first_row = int64_t(blockIdx.x) * ROWS, rows = args.x.rows, columns = args.y.rows;
  const int row_count = int(rows - first_row < ROWS ? rows - first_row : ROWS), k = int(args.k);
  const bool whole_x = whole_vectors<E>(args.x), whole_y = whole_vectors<E>(args.y);

  static_assert(THREADS << 5 == 1 << FILTER_BITS, "a word of the filter for each thread");
  filter[thread] = 0;
  if (thread < row_count) labels[thread] = args.row_labels[first_row + thread];
  __syncthreads();
  if (thread < row_count) {
    const unsigned at = hash(labels[thread]);
    atomicOr(&filter[at / 32], 1u << at % 32);
  }
  const auto list_of = [&](int r, T*& best, int64_t*& index) {
    const bool in_shared = k <= K_IN_SHARED;
    best = in_shared ? best_shared[r] : static_cast<T*>(args.best) + (first_row + r) * k;
    index = in_shared ? index_shared[r] : args.index + (first_row + r) * k;
  };
  for (int r = warp; r < row_count; r += WARPS) {
    T* best;
    int64_t* index;
    list_of(r, best, index);
    for (int e = lane; e < k; e += WARP) {
      best[e] = -infinity<T>();
      index[e] = -1;
    }
  }

  for (int64_t first = 0; first < columns; first += COLUMNS) {
    for (int word = thread; word < ROWS * WORDS; word += THREADS) marks[word / WORDS][word % WORDS] = 0;
    __syncthreads();
    const int count = int(columns - first < COLUMNS ? columns - first : COLUMNS);
    for (int start = thread; start < count; start += LABELS * THREADS) {
      int64_t label[LABELS];  // read before the first is looked at: their latencies overlap
#pragma unroll
      for (int n = 0; n < LABELS; ++n)
        label[n] = start + n * THREADS < count ? args.column_labels[first + start + n * THREADS] : 0;
#pragma unroll
      for (int n = 0; n < LABELS; ++n) {
        const int c = start + n * THREADS;
        const unsigned at = hash(label[n]);
        if (c >= count || label[n] == UNADMITTED || !(filter[at / 32] >> at % 32 & 1)) continue;
        for (int r = 0; r < row_count; ++r)  // bits of one word, in any order
          if (labels[r] == label[n]) atomicOr(&marks[r][c / 32], 1u << c % 32);
      }
    }
    __syncthreads();
    for (int r = warp; r < row_count; r += WARPS) {
      const int64_t row = first_row + r, self = args.self_index ? args.self_index[row] : -1;
      const T below = args.below ? static_cast<const T*>(args.below)[row] : T(0);
      T *best, factor_x = 1, inverse_x = 1;
      int64_t* index;
      list_of(r, best, index);
      if (COSINE) {
        T squared = squares_of<E>(args.x, whole_x, row, T(1));
        if (!within_range(squared)) {
          factor_x = power_of_two_for(largest_of<E>(args.x, row));
          squared = squares_of<E>(args.x, whole_x, row, factor_x);
        }
        inverse_x = inverse_length(squared, factor_x);
      }
      for (int group = 0; group < WORDS; group += WARP) {
        const unsigned of_lane = marks[r][group + lane];
        unsigned words = __ballot_sync(ALL_LANES, of_lane != 0), mask = 0;
        int word = 0;
        while (words || mask) {
          int64_t candidates[AT_ONCE] = {};
          int found = 0;
          while (found < AT_ONCE && (words || mask)) {
            if (!mask) {
              word = __ffs(int(words)) - 1;
              words &= words - 1;
              mask = __shfl_sync(ALL_LANES, of_lane, word);
            }
            const int64_t column = first + (group + word) * WARP + __ffs(int(mask)) - 1;
            mask &= mask - 1;
            if (column == self) continue;
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n)
              if (n >= found) candidates[n] = column;  // the last one again where there are no more
            ++found;
          }
          if (!found) break;
          T sums[AT_ONCE], squares[AT_ONCE];
          compare<E, DISTANCES, COSINE, AT_ONCE>(args.x, whole_x, row, args.y, whole_y, candidates, factor_x, T(1),
                                                 sums, squares);
#pragma unroll
          for (int n = 0; n < AT_ONCE; ++n) {
            if (n >= found) break;
            T u = DISTANCES ? -sums[n] : sums[n];
            if (COSINE) {
              T inverse_y = inverse_length(squares[n], T(1));
              if (!within_range(squares[n])) {
                const T factor_y = power_of_two_for(largest_of<E>(args.y, candidates[n]));
                T squared;
                compare<E, DISTANCES, COSINE, 1>(args.x, whole_x, row, args.y, whole_y, candidates + n, factor_x,
                                                 factor_y, &u, &squared);
                inverse_y = inverse_length(squared, factor_y);
              }
              u = u * inverse_x * inverse_y;
            }
            if (!args.below || u < below) insert(best, index, k, args.largest ? u : -u, candidates[n]);
          }
        }
      }
    }
    __syncthreads();
  }
  __syncthreads();
  for (int r = warp; r < row_count; r += WARPS) {
    const int64_t row = first_row + r, self = args.self_index ? args.self_index[row] : -1;
    const bool invalid = self != -1 && (self < 0 || self >= columns);
    T* best;
    int64_t* index;
    list_of(r, best, index);
    for (int e = lane; e < k; e += WARP) {
      const int64_t column = index[e];
      const T value = args.largest || column < 0 ? best[e] : -best[e];
      static_cast<T*>(args.best)[row * k + e] = invalid ? not_a_number<T>() : value;
      args.index[row * k + e] = column;
    }
  }
}

}  // namespace

int64_t nearest_grid(int64_t rows) {
  return ceiling_divide(rows, ROWS);
}

void nearest(const Nearest& args) {
  if (args.k > std::numeric_limits<int>::max()) throw std::invalid_argument("k: too large");
  dispatch(args.x.dtype, [&](auto zero) {
    using E = decltype(zero);
    const auto kernel = args.similarity == Similarity::cosine ? nearest_kernel<E, Similarity::cosine>
                        : args.similarity == Similarity::dot
                            ? nearest_kernel<E, Similarity::dot>
                            : nearest_kernel<E, Similarity::negative_squared_euclidean>;
    launch("nearest", kernel, nearest_grid(args.x.rows), args);
  });
}

}  // namespace cuda
}  // namespace fused_margins
