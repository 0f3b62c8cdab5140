// Blocks of similarities and of weighted sums, as a block of threads computes them from shared memory.
//
// A pair tile: up to 16 rows against 16 columns, the width in chunks, of which each warp takes a part: the parts are
// added in the order of the warps. A product tile: 16 or 32 rows of weights against 64 columns of a matrix.
#pragma once

#include <mma.h>

#include "device.h"

namespace fused_margins {
namespace cuda {

constexpr int TILE = 16;

// ROWS rows of a matrix of E, DEPTH columns at a time, on their way through registers to shared memory as S.
// WHOLE: see load_vector.
template <class E, class S, int ROWS, int DEPTH, bool WHOLE = false>
struct PanelLoader {
  using T = Accumulator<E>;
  static constexpr int PER_ROW = DEPTH / VECTOR<E>;          // vectors
  static constexpr int COUNT = ROWS * PER_ROW / THREADS;     // vectors of a thread
  static constexpr int PARTS = PER_ROW / WARP;               // warps that share a row
  static constexpr int PITCH = DEPTH + 16 / int(sizeof(S));  // elements between rows: no two of 8 rows share a bank
  static_assert(PER_ROW % WARP == 0 && ROWS * PER_ROW % THREADS == 0, "a warp stays within a row");

  uint4 held[COUNT];
  T squares[COUNT];

  static __device__ int row_of(int v) { return (v * THREADS + int(threadIdx.x)) / PER_ROW; }
  static __device__ int column_of(int v) { return (v * THREADS + int(threadIdx.x)) % PER_ROW * VECTOR<E>; }

  __device__ void load(const Matrix& m, bool whole, int64_t first_row, int64_t column) {
    if constexpr (WHOLE && THREADS % PER_ROW == 0) {  // one address, and steps from it
      const int there = int(m.rows - first_row < ROWS ? m.rows - first_row : ROWS);
      const bool inside = column + column_of(0) < m.width;
      const E* from = static_cast<const E*>(m.data) + (first_row + row_of(0)) * m.row_stride + column + column_of(0);
#pragma unroll
      for (int v = 0; v < COUNT; ++v) {
        held[v] = make_uint4(0, 0, 0, 0);
        if (inside && row_of(v) < there)
          held[v] = *reinterpret_cast<const uint4*>(from + v * (THREADS / PER_ROW) * m.row_stride);
      }
    } else {
#pragma unroll
      for (int v = 0; v < COUNT; ++v) held[v] = load_vector<E>(m, whole, first_row + row_of(v), column + column_of(v));
    }
  }

  __device__ void clear_squares() {
#pragma unroll
    for (int v = 0; v < COUNT; ++v) squares[v] = 0;
  }

  // tile (ROWS, PITCH). factors (ROWS,), powers of two, or null for 1. square: whether to add up the squares.
  __device__ void store(S* tile, const T* factors, bool square) {
#pragma unroll
    for (int v = 0; v < COUNT; ++v) {
      const E* values = reinterpret_cast<const E*>(&held[v]);
      uint4* to = reinterpret_cast<uint4*>(tile + row_of(v) * PITCH + column_of(v));
      if (std::is_same_v<E, S> && !factors) {  // bits as they are
        if (square)
#pragma unroll
          for (int e = 0; e < VECTOR<E>; ++e) squares[v] = fma(widen(values[e]), widen(values[e]), squares[v]);
        to[0] = held[v];
        continue;
      }
      alignas(16) S out[VECTOR<E>];
      const T factor = factors ? factors[row_of(v)] : T(1);
#pragma unroll
      for (int e = 0; e < VECTOR<E>; ++e) {
        const T value = widen(values[e]) * factor;  // times 1 is exact
        if (square) squares[v] += value * value;
        out[e] = narrow<S>(value);
      }
#pragma unroll
      for (int n = 0; n < VECTOR<E> * int(sizeof(S)) / 16; ++n) to[n] = reinterpret_cast<const uint4*>(out)[n];
    }
  }

  // out (ROWS * PARTS,): the squares of every row in parts.
  __device__ void save_squares(T* out) const {
#pragma unroll
    for (int v = 0; v < COUNT; ++v) {
      const T sum = warp_sum(squares[v]);
      if (threadIdx.x % WARP == 0) out[v * WARPS + int(threadIdx.x) / WARP] = sum;
    }
  }
};

// Of a warp's part of a chunk: products, or squared differences, of ROWS (8 or 16) rows and TILE columns.
template <class T, int ROWS, bool DISTANCES>
struct PairSums {
  static constexpr int M = ROWS / 8, N = TILE / 4;  // rows and columns of a lane
  T sums[M][N];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) sums[m][n] = 0;
  }

  // x (ROWS, pitch), y (TILE, pitch) in shared memory, of which `depth` columns count; zeros follow.
  __device__ void add(const T* x, const T* y, int pitch, int depth) {
    const int lane = int(threadIdx.x) % WARP;
    const T *mine_x = x + lane % 8 * pitch, *mine_y = y + lane / 8 * pitch;
#pragma unroll 1  // more needs more registers
    for (int k = int(threadIdx.x) / WARP * VECTOR<T>; k < depth; k += WARPS * VECTOR<T>) {
      uint4 a[M], b[N];
#pragma unroll
      for (int m = 0; m < M; ++m) a[m] = *reinterpret_cast<const uint4*>(mine_x + m * 8 * pitch + k);
#pragma unroll
      for (int n = 0; n < N; ++n) b[n] = *reinterpret_cast<const uint4*>(mine_y + n * 4 * pitch + k);
#pragma unroll
      for (int e = 0; e < VECTOR<T>; ++e)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < N; ++n) {
            const T left = reinterpret_cast<const T*>(&a[m])[e], right = reinterpret_cast<const T*>(&b[n])[e];
            const T difference = left - right;
            sums[m][n] = DISTANCES ? fma(difference, difference, sums[m][n]) : fma(left, right, sums[m][n]);
          }
    }
  }

  // out (WARPS, ROWS, TILE)
  __device__ void save(T* out) const {
    const int lane = int(threadIdx.x) % WARP;
    T* mine = out + int(threadIdx.x) / WARP * ROWS * TILE + lane % 8 * TILE + lane / 8;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) mine[m * 8 * TILE + n * 4] = sums[m][n];
  }
};

// The same products of 16 rows in 16 bits on the matrix unit: exact products, sums in float.
template <class E>
struct MatrixUnitSums {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sums;

  __device__ void clear() { nvcuda::wmma::fill_fragment(sums, 0.0f); }

  __device__ void add(const E* x, const E* y, int pitch, int depth) {
    using namespace nvcuda;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, E, wmma::row_major> a;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, E, wmma::col_major> b;
    for (int k = int(threadIdx.x) / WARP * 16; k < depth; k += WARPS * 16) {
      wmma::load_matrix_sync(a, x + k, unsigned(pitch));
      wmma::load_matrix_sync(b, y + k, unsigned(pitch));
      wmma::mma_sync(sums, a, b, sums);
    }
  }

  __device__ void save(float* out) const {
    nvcuda::wmma::store_matrix_sync(out + int(threadIdx.x) / WARP * TILE * TILE, sums, TILE,
                                    nvcuda::wmma::mem_row_major);
  }
};

// The sum over k of weight (ROWS, k) times row k of `values`, in columns [first_column, first_column + WIDTH).
//
// E, BASE: element types of `values` and `base`; ROWS: a multiple of 16; DIFFERENCES: of (row k - base), for each of
// the tile's rows a row of its own, else of row k; MATRIX_UNIT: on the tensor cores, values rounded to 11 bits, which
// the weights must be; WHOLE: of `values`, see load_vector.
template <class E, class BASE, int ROWS_, bool DIFFERENCES, bool MATRIX_UNIT_, bool WHOLE = false>
struct ProductTile {
  using T = Accumulator<E>;
  static constexpr bool MATRIX_UNIT = MATRIX_UNIT_;
  static_assert(!MATRIX_UNIT || (sizeof(T) == 4 && !DIFFERENCES), "the matrix unit multiplies floats");
  static constexpr int ROWS = ROWS_, WIDTH = 64, DEPTH = sizeof(T) == 8 ? 32 : 64;  // of a chunk: columns and k
  // Elements between rows: no two lanes that load a fragment share a bank.
  static constexpr int PITCH = WIDTH + (MATRIX_UNIT ? 8 : 4), WEIGHT_PITCH = DEPTH + 4;
  static constexpr int SPLITS =
      MATRIX_UNIT ? 2 : THREADS * 16 / (ROWS * WIDTH);                       // parts of k that are added at the end
  static constexpr int PER_ROW = WIDTH / VECTOR<E>;                          // vectors
  static constexpr int COUNT = DEPTH * PER_ROW / THREADS;                    // vectors of a thread
  static constexpr int OUTPUTS = ROWS * WIDTH / THREADS;                     // results of a thread
  static constexpr int OUTPUT_STEP = THREADS / WIDTH;                        // rows between two of them
  static constexpr int VALUES_SIZE = DEPTH * PITCH, PARTIAL = ROWS * WIDTH;  // elements
  static constexpr int STAGED = VALUES_SIZE + ROWS * WEIGHT_PITCH;
  static constexpr int SHARED = STAGED > SPLITS* PARTIAL ? STAGED : SPLITS * PARTIAL;  // elements of `shared`

  // Row of the tile that holds this thread's result v, and the column of all its results.
  static __device__ int output_row(int v) { return v * OUTPUT_STEP + int(threadIdx.x) / WIDTH; }
  static __device__ int output_column() { return int(threadIdx.x) % WIDTH; }

  // `weights.load(first)` reads the weights of all the tile's rows against rows [first, first + DEPTH) into registers,
  // `weights.store(tile)` puts them into shared memory (ROWS, WEIGHT_PITCH), 0 beyond `total`; `weights.factor(k)`
  // multiplies row k of `values`. base (its rows: first_row + the tile's row): for DIFFERENCES.
  // out (OUTPUTS,). Every thread must call it; `shared` (SHARED,) may be used again after it, not before a barrier.
  // total: rows of `values`.
  template <class Weights>
  static __device__ void run(const Matrix& values, int64_t first_column, int64_t total, Weights& weights,
                             const Matrix& base, int64_t first_row, T* shared, T* out) {
    T *staged = shared, *staged_weights = shared + VALUES_SIZE;
    const bool whole = whole_vectors<E>(values);
    const int thread = int(threadIdx.x), warp = thread / WARP;
    uint4 held[COUNT];
    T factors[COUNT];
    const auto load = [&](int64_t first) {
      constexpr int STEP = THREADS / PER_ROW;  // rows
      const int left = int(total - first < DEPTH ? total - first : DEPTH), mine = thread / PER_ROW;
      const int64_t component = first_column + thread % PER_ROW * VECTOR<E>;
      const E* from = static_cast<const E*>(values.data) + (first + mine) * values.row_stride + component;
#pragma unroll
      for (int v = 0; v < COUNT; ++v) {
        const bool there = mine + v * STEP < left;
        if constexpr (WHOLE) {
          held[v] = make_uint4(0, 0, 0, 0);
          if (there && component < values.width)
            held[v] = *reinterpret_cast<const uint4*>(from + v * STEP * values.row_stride);
        } else {
          held[v] = load_vector<E>(values, whole, first + mine + v * STEP, component);
        }
        factors[v] = there ? weights.factor(first + mine + v * STEP) : T(1);
      }
      weights.load(first);
    };

    // The plain units: 4 rows and 4 columns of a thread, in one of SPLITS parts of k.
    T sums[4][4], own[4][4];
    const int split = warp * SPLITS / WARPS, row = thread % (THREADS / SPLITS) / 16 * 4, column = thread % 16 * 4;
    // The matrix unit: ROWS rows and 16 columns of a warp.
    using namespace nvcuda;
    constexpr int STRIPS = ROWS / 16;
    wmma::fragment<wmma::accumulator, 16, 16, 8, float> unit_sums[STRIPS];
    if constexpr (MATRIX_UNIT) {
#pragma unroll
      for (int i = 0; i < STRIPS; ++i) wmma::fill_fragment(unit_sums[i], 0.0f);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = 0;
          own[i][j] = 0;
          if (DIFFERENCES && first_row + row + i < base.rows && first_column + column + j < base.width)
            own[i][j] = widen(element<BASE>(base, first_row + row + i, first_column + column + j));
        }
    }

    if (total > 0) load(0);
    for (int64_t first = 0; first < total; first += DEPTH) {
#pragma unroll
      for (int v = 0; v < COUNT; ++v) {
        const int e = v * THREADS + thread;
        const E* elements = reinterpret_cast<const E*>(&held[v]);
        alignas(16) T wide[VECTOR<E>];
#pragma unroll
        for (int n = 0; n < VECTOR<E>; ++n) {
          wide[n] = widen(elements[n]) * factors[v];
          if constexpr (MATRIX_UNIT) wide[n] = wmma::__float_to_tf32(wide[n]);
        }
        uint4* to = reinterpret_cast<uint4*>(staged + e / PER_ROW * PITCH + e % PER_ROW * VECTOR<E>);
#pragma unroll
        for (int n = 0; n < VECTOR<E> * int(sizeof(T)) / 16; ++n) to[n] = reinterpret_cast<const uint4*>(wide)[n];
      }
      weights.store(staged_weights);
      __syncthreads();
      if (first + DEPTH < total) load(first + DEPTH);
      const int depth = int(total - first < DEPTH ? total - first : DEPTH);
      if constexpr (MATRIX_UNIT) {
        wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> a;
        wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::row_major> b;
#pragma unroll 2
        for (int k = split * 8; k < depth; k += SPLITS * 8) {
          wmma::load_matrix_sync(b, staged + k * PITCH + warp % 4 * 16, PITCH);
#pragma unroll
          for (int i = 0; i < STRIPS; ++i) {
            wmma::load_matrix_sync(a, staged_weights + i * 16 * WEIGHT_PITCH + k, WEIGHT_PITCH);
            wmma::mma_sync(unit_sums[i], a, b, unit_sums[i]);
          }
        }
      } else {
        for (int k = split * 4; k < depth; k += SPLITS * 4)
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            T value[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) value[j] = staged[(k + n) * PITCH + column + j];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const T weight = staged_weights[(row + i) * WEIGHT_PITCH + k + n];
#pragma unroll
              for (int j = 0; j < 4; ++j)
                sums[i][j] = fma(weight, DIFFERENCES ? value[j] - own[i][j] : value[j], sums[i][j]);
            }
          }
      }
      __syncthreads();
    }

    T* partial = shared + split * PARTIAL;
    if constexpr (MATRIX_UNIT) {
#pragma unroll
      for (int i = 0; i < STRIPS; ++i)
        wmma::store_matrix_sync(partial + i * 16 * WIDTH + warp % 4 * 16, unit_sums[i], WIDTH, wmma::mem_row_major);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) partial[(row + i) * WIDTH + column + j] = sums[i][j];
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < OUTPUTS; ++v) {
      out[v] = 0;
#pragma unroll
      for (int s = 0; s < SPLITS; ++s) out[v] += shared[s * PARTIAL + v * THREADS + thread];
    }
  }
};

}  // namespace cuda
}  // namespace fused_margins
