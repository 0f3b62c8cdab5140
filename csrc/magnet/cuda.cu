// magnet on an NVIDIA GPU: the clusters' means, all distances from them, the losses and what becomes of the distances
// in a gradient; then what pulls the means, and the gradient. Five small launches, each of which needs all that the one
// before it made. Every sum over rows runs in one order.
#include "cuda.h"

#include "../cuda/tile.h"

namespace fused_margins {
namespace cuda {
namespace {

constexpr int MEAN_WIDTH = 128;   // components of a block that averages
constexpr int DISTANCE_ROWS = 8;  // rows of a block that compares
constexpr int PRODUCT_WIDTH = 64;

template <class T>
struct Magnet {
  const MagnetInputs& in;
  int64_t rows, clusters, width, stride;
  T *means, *distances, *losses, *own_weights, *terms, *variance;

  __device__ Magnet(const MagnetInputs& inputs, void* saved)
      : in(inputs),
        rows(in.x.rows),
        clusters(in.num_clusters),
        width(in.x.width),
        stride((width + 15) / 16 * 16),
        means(static_cast<T*>(saved)),
        distances(means + clusters * stride),
        losses(distances + rows * clusters),
        own_weights(losses + rows),
        terms(own_weights + rows),
        variance(terms + rows) {}

  __device__ Matrix mean_matrix() const {
    return {means, clusters, width, stride, 1, sizeof(T) == 8 ? DType::float64 : DType::float32};
  }
  __device__ bool valid(int64_t row) const { return in.clusters[row] >= 0 && in.clusters[row] < clusters; }
  __device__ T own(int64_t row) const { return __ldcg(distances + row * clusters + in.clusters[row]); }
  // The derivative of the loss by what a row's is before it is cut off at 0.
  __device__ T active(T loss) const { return loss > 0 ? 1 / divisor() : loss == 0 ? T(0) : not_a_number<T>(); }
  __device__ T divisor() const { return in.reduction == Reduction::mean && rows > 0 ? T(rows) : T(1); }
};

// A block: MEAN_WIDTH components of one cluster's mean. Warp w adds the members w, w + WARPS, ... of each run of
// THREADS rows, in the order of the rows.
template <class E>
__global__ void __launch_bounds__(THREADS) magnet_means_kernel(MagnetForward args) {
  using T = Accumulator<E>;
  constexpr int N = MEAN_WIDTH / WARP;
  __shared__ int members[THREADS], of_warp[WARPS];
  __shared__ T partial[WARPS][MEAN_WIDTH];
  const Magnet<T> magnet(args.in, args.saved);
  const int width_blocks = int(ceiling_divide(magnet.width, MEAN_WIDTH));
  const int64_t cluster = int(blockIdx.x) / width_blocks;
  const int64_t first_column = int64_t(int(blockIdx.x) % width_blocks) * MEAN_WIDTH;
  const int thread = int(threadIdx.x), lane = thread % WARP, warp = thread / WARP;

  T sums[N];
#pragma unroll
  for (int n = 0; n < N; ++n) sums[n] = 0;
  int64_t total = 0;
  for (int64_t first = 0; first < magnet.rows; first += THREADS) {
    const bool mine = first + thread < magnet.rows && args.in.clusters[first + thread] == cluster;
    const unsigned mask = __ballot_sync(ALL_LANES, mine);
    if (lane == 0) of_warp[warp] = __popc(mask);
    __syncthreads();
    int before = __popc(mask & ((1u << lane) - 1)), count = 0;
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) before += of_warp[w];
      count += of_warp[w];
    }
    if (mine) members[before] = thread;
    __syncthreads();
#pragma unroll 4
    for (int member = warp; member < count; member += WARPS)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int64_t d = first_column + n * WARP + lane;
        if (d < magnet.width) sums[n] += widen(element<E>(args.in.x, first + members[member], d));
      }
    total += count;
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < N; ++n) partial[warp][n * WARP + lane] = sums[n];
  __syncthreads();
  const int64_t d = first_column + thread;
  if (thread >= MEAN_WIDTH || d >= magnet.width) return;
  T sum = 0;
  for (int w = 0; w < WARPS; ++w) sum += partial[w][thread];
  magnet.means[cluster * magnet.stride + d] = sum / T(total);  // not a number without members
}

// A block: the squared distances of DISTANCE_ROWS rows from TILE means.
template <class E>
__global__ void __launch_bounds__(THREADS) magnet_distances_kernel(MagnetForward args) {
  using T = Accumulator<E>;
  constexpr int DEPTH = 1024 / int(sizeof(T));
  using PanelX = PanelLoader<E, T, DISTANCE_ROWS, DEPTH>;
  using PanelMeans = PanelLoader<T, T, TILE, DEPTH>;
  static_assert(PanelX::PITCH == PanelMeans::PITCH, "one distance between rows");
  constexpr int STAGED = (DISTANCE_ROWS + TILE) * PanelX::PITCH, PARTIAL = WARPS * DISTANCE_ROWS * TILE;
  __shared__ __align__(32) T shared[STAGED > PARTIAL ? STAGED : PARTIAL];
  T *panel_x = shared, *panel_means = shared + DISTANCE_ROWS * PanelX::PITCH;

  const Magnet<T> magnet(args.in, args.saved);
  const Matrix means = magnet.mean_matrix();
  const int column_blocks = int(ceiling_divide(magnet.clusters, TILE));
  const int64_t first_row = int64_t(int(blockIdx.x) / column_blocks) * DISTANCE_ROWS;
  const int64_t first_column = int64_t(int(blockIdx.x) % column_blocks) * TILE;
  const bool whole_x = whole_vectors<E>(args.in.x), whole_means = whole_vectors<T>(means);
  PanelX x;
  PanelMeans y;
  PairSums<T, DISTANCE_ROWS, true> sums;
  sums.clear();
  x.load(args.in.x, whole_x, first_row, 0);
  y.load(means, whole_means, first_column, 0);
  for (int64_t depth = 0; depth < magnet.width; depth += DEPTH) {
    x.store(panel_x, nullptr, false);
    y.store(panel_means, nullptr, false);
    __syncthreads();
    if (depth + DEPTH < magnet.width) {
      x.load(args.in.x, whole_x, first_row, depth + DEPTH);
      y.load(means, whole_means, first_column, depth + DEPTH);
    }
    sums.add(panel_x, panel_means, PanelX::PITCH, int(magnet.width - depth < DEPTH ? magnet.width - depth : DEPTH));
    __syncthreads();
  }
  sums.save(shared);
  __syncthreads();
  const int thread = int(threadIdx.x);
  const int64_t row = first_row + thread / TILE, column = first_column + thread % TILE;
  if (thread >= DISTANCE_ROWS * TILE || row >= magnet.rows || column >= magnet.clusters) return;
  T sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += shared[w * DISTANCE_ROWS * TILE + thread];
  magnet.distances[row * magnet.clusters + column] = sum;
}

// A block: the losses of TILE rows, each by a warp; the last block adds them up. Every block finds the variance, of the
// rows' own distances, which stay: in the place of the others come the derivatives of the loss by them. A term of each
// row is the derivative of its part of the loss by 1 / (2 variance).
template <class T>
__global__ void __launch_bounds__(THREADS) magnet_loss_kernel(MagnetForward args) {
  const Magnet<T> magnet(args.in, args.saved);
  const int thread = int(threadIdx.x), lane = thread % WARP, warp = thread / WARP;
  T sum = 0;
  for (int64_t row = thread; row < magnet.rows; row += THREADS)
    if (magnet.valid(row)) sum += magnet.own(row);
  const T variance = block_sum(sum) / T(magnet.rows > 1 ? magnet.rows - 1 : 1), floor = T(args.in.variance_floor);
  // Without a finite variance no loss is a number.
  const T used = variance < floor ? floor : variance < infinity<T>() ? variance : not_a_number<T>();
  const T half_precision = 1 / (2 * used);
  if (blockIdx.x == 0 && thread == 0) {
    magnet.variance[0] = used;
    magnet.variance[1] = !(variance < floor);
  }
  const bool per_row = args.in.reduction == Reduction::none;
  const int64_t first_row = int64_t(blockIdx.x) * TILE;
  for (int64_t row = first_row + warp; row < first_row + TILE && row < magnet.rows; row += WARPS) {
    T loss = not_a_number<T>(), active = loss, term = loss;
    T* of_row = magnet.distances + row * magnet.clusters;
    if (magnet.valid(row)) {
      const int64_t own = args.in.clusters[row], label = args.in.cluster_labels[own];
      T largest = -infinity<T>(), weight = 0;
      for (int64_t m = lane; m < magnet.clusters; m += WARP)
        if (args.in.cluster_labels[m] != label) largest = larger(largest, -half_precision * of_row[m]);
      largest = warp_max(largest);
      const T shift = largest > -infinity<T>() ? largest : T(0);
      for (int64_t m = lane; m < magnet.clusters; m += WARP)
        if (args.in.cluster_labels[m] != label) weight += exp(-half_precision * of_row[m] - shift);
      const T other = shift + log(warp_sum(weight));  // -infinity where there is no other class
      const T hinge = T(args.in.alpha) + magnet.own(row) * half_precision + other;
      loss = hinge < 0 ? T(0) : hinge;  // not a number stays
      active = magnet.active(loss);
      T along = 0;
      for (int64_t m = lane; m < magnet.clusters; m += WARP) {
        if (m == own) continue;
        T derivative = 0;
        if (active != 0 && args.in.cluster_labels[m] != label) {
          const T q = exp(-half_precision * of_row[m] - other);
          along += q * of_row[m];
          derivative = -active * half_precision * q;
        }
        of_row[m] = derivative;
      }
      along = warp_sum(along);
      term = active == 0 ? T(0) : active * (magnet.own(row) - along);
    } else {
      for (int64_t m = lane; m < magnet.clusters; m += WARP) of_row[m] = loss;
    }
    if (lane == 0) {
      magnet.losses[row] = loss;
      magnet.own_weights[row] = active * half_precision;
      magnet.terms[row] = term;
      if (per_row) static_cast<T*>(args.loss)[row] = loss;
    }
  }
  if (per_row || !last_to_arrive(args.tickets, int(gridDim.x))) return;
  T total = 0, terms = 0;
  for (int64_t row = thread; row < magnet.rows; row += THREADS) {
    total += __ldcg(magnet.losses + row);
    terms += __ldcg(magnet.terms + row);
  }
  total = block_sum(total);
  terms = block_sum(terms);
  if (thread == 0) {
    *static_cast<T*>(args.loss) = total / magnet.divisor();
    magnet.variance[2] = terms;
  }
}

// The gradient of each loss, and what the variance, of which all losses are made, adds to the derivative by every row's
// own distance; the same in every block.
template <class T>
struct Incoming {
  const T* grad_loss;
  int64_t each;  // all bits of a row's number where losses are not reduced, none where they are
  T shared;

  __device__ Incoming(const MagnetBackward& args, const Magnet<T>& magnet) {
    grad_loss = static_cast<const T*>(args.grad_loss);
    each = args.in.reduction == Reduction::none ? -1 : 0;
    const T variance = magnet.variance[0];
    T sum = 0;
    if (each == 0) {
      sum = times(0, magnet.variance[2]);
    } else {  // a batch of few rows: each block adds them up
      for (int64_t row = int(threadIdx.x); row < magnet.rows; row += THREADS) sum += times(row, magnet.terms[row]);
      sum = block_sum(sum);
    }
    const bool by_variance = magnet.variance[1] != 0;
    shared = by_variance ? -sum / (2 * variance * variance) / T(magnet.rows > 1 ? magnet.rows - 1 : 1) : T(0);
  }
  // A derivative of a row's part of the loss, times the gradient of that: 0 where either is, be the other infinite.
  __device__ T times(int64_t row, T derivative) const {
    const T g = grad_loss[row & each];
    return g == 0 || derivative == 0 ? T(0) : g * derivative;
  }
};

// Weights of a tile of clusters against rows, or of rows against clusters: dL / d distance; and the members among them.
template <class Product>
struct ClusterWeights {
  using T = typename Product::T;
  static constexpr int DEPTH = Product::DEPTH, COUNT = TILE * DEPTH / THREADS;  // weights of a thread
  static_assert(Product::ROWS == TILE, "a tile's rows");
  const Magnet<T>& magnet;
  const Incoming<T>& incoming;
  bool of_clusters;
  int64_t first;  // of the tile
  T held[COUNT];
  int members;

  __device__ T factor(int64_t) const { return 1; }
  // Neighbours in memory are neighbours in the tile's clusters: threads go along them.
  __device__ int row_of(int v) const {
    const int e = v * THREADS + int(threadIdx.x);
    return of_clusters ? e % TILE : e / DEPTH;
  }
  __device__ int k_of(int v) const {
    const int e = v * THREADS + int(threadIdx.x);
    return of_clusters ? e / TILE : e % DEPTH;
  }
  __device__ void load(int64_t first_k) {
#pragma unroll
    for (int v = 0; v < COUNT; ++v) {
      const int64_t k = first_k + k_of(v), r = first + row_of(v);
      const int64_t row = of_clusters ? k : r, cluster = of_clusters ? r : k;
      held[v] = 0;
      if (row >= magnet.rows || cluster >= magnet.clusters) continue;
      const bool own = magnet.in.clusters[row] == cluster;
      const T* weight = own ? magnet.own_weights + row : magnet.distances + row * magnet.clusters + cluster;
      held[v] = incoming.times(row, *weight) + (own ? incoming.shared : T(0));
      members += own;
    }
  }
  __device__ void store(T* tile) const {
#pragma unroll
    for (int v = 0; v < COUNT; ++v) tile[row_of(v) * Product::WEIGHT_PITCH + k_of(v)] = held[v];
  }
};

// A block: TILE clusters x 64 components of what pulls the means: sum_i weight (x_i - mean), divided among the members.
template <class E>
__global__ void __launch_bounds__(THREADS) magnet_pull_kernel(MagnetBackward args) {
  using T = Accumulator<E>;
  using Product = ProductTile<E, T, TILE, true, false>;
  static_assert(Product::WIDTH == PRODUCT_WIDTH, "the grid is made for it");
  __shared__ __align__(32) T shared[Product::SHARED];
  __shared__ int members[THREADS];
  const Magnet<T> magnet(args.in, const_cast<void*>(args.saved));
  const Incoming<T> incoming(args, magnet);
  T* pull = static_cast<T*>(args.scratch);
  const int width_blocks = int(ceiling_divide(magnet.width, PRODUCT_WIDTH));
  const int64_t first = int64_t(int(blockIdx.x) / width_blocks) * TILE;
  const int64_t first_column = int64_t(int(blockIdx.x) % width_blocks) * PRODUCT_WIDTH;
  ClusterWeights<Product> weights{magnet, incoming, true, first, {}, 0};
  T sums[Product::OUTPUTS];
  Product::run(args.in.x, first_column, magnet.rows, weights, magnet.mean_matrix(), first, shared, sums);
  members[threadIdx.x] = weights.members;  // of cluster thread % TILE
  __syncthreads();
#pragma unroll
  for (int v = 0; v < Product::OUTPUTS; ++v) {
    const int r = Product::output_row(v);
    const int64_t cluster = first + r, d = first_column + Product::output_column();
    if (cluster >= magnet.clusters || d >= magnet.width) continue;
    int count = 0;
    for (int part = 0; part < THREADS / TILE; ++part) count += members[part * TILE + r];
    pull[cluster * magnet.stride + d] = sums[v] / T(count);
  }
}

// A block: TILE rows x 64 components of the gradient.
template <class E>
__global__ void __launch_bounds__(THREADS) magnet_gradient_kernel(MagnetBackward args) {
  using T = Accumulator<E>;
  using Product = ProductTile<T, E, TILE, true, false>;
  static_assert(Product::WIDTH == PRODUCT_WIDTH, "the grid is made for it");
  __shared__ __align__(32) T shared[Product::SHARED];
  const Magnet<T> magnet(args.in, const_cast<void*>(args.saved));
  const Incoming<T> incoming(args, magnet);
  T* pull = static_cast<T*>(args.scratch);
  const int width_blocks = int(ceiling_divide(magnet.width, PRODUCT_WIDTH));
  const int64_t first = int64_t(int(blockIdx.x) / width_blocks) * TILE;
  const int64_t first_column = int64_t(int(blockIdx.x) % width_blocks) * PRODUCT_WIDTH;
  ClusterWeights<Product> weights{magnet, incoming, false, first, {}, 0};
  T sums[Product::OUTPUTS];
  Product::run(magnet.mean_matrix(), first_column, magnet.clusters, weights, args.in.x, first, shared, sums);
#pragma unroll
  for (int v = 0; v < Product::OUTPUTS; ++v) {
    const int64_t row = first + Product::output_row(v), d = first_column + Product::output_column();
    if (row >= magnet.rows || d >= magnet.width) continue;
    const T pulled = magnet.valid(row) ? pull[args.in.clusters[row] * magnet.stride + d] : not_a_number<T>();
    static_cast<E*>(args.grad_x)[row * magnet.width + d] = narrow<E>(-2 * (sums[v] + pulled));
  }
}

}  // namespace

void magnet_forward(const MagnetForward& args) {
  const int64_t rows = args.in.x.rows, clusters = args.in.num_clusters, width = args.in.x.width;
  dispatch(args.in.x.dtype, [&](auto zero) {
    using E = decltype(zero);
    launch("magnet_means", magnet_means_kernel<E>, clusters * ceiling_divide(width, MEAN_WIDTH), args);
    launch("magnet_distances", magnet_distances_kernel<E>,
           ceiling_divide(rows, DISTANCE_ROWS) * ceiling_divide(clusters, TILE), args);
    launch("magnet_loss", magnet_loss_kernel<Accumulator<E>>, ceiling_divide(rows, TILE), args);
  });
}

void magnet_backward(const MagnetBackward& args) {
  const int64_t rows = args.in.x.rows, clusters = args.in.num_clusters;
  const int64_t width_blocks = ceiling_divide(args.in.x.width, PRODUCT_WIDTH);
  dispatch(args.in.x.dtype, [&](auto zero) {
    using E = decltype(zero);
    launch("magnet_pull", magnet_pull_kernel<E>, ceiling_divide(clusters, TILE) * width_blocks, args);
    launch("magnet_gradient", magnet_gradient_kernel<E>, ceiling_divide(rows, TILE) * width_blocks, args);
  });
}

}  // namespace cuda
}  // namespace fused_margins
