// What the CUDA kernels share: element types, 16-byte loads of any matrix, reductions in a fixed order, tickets,
// launches. A kernel's accumulation type T is double for double and float for every narrower type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../matrix.h"

namespace fused_margins {
namespace cuda {

constexpr int WARP = 32, WARPS = 8, THREADS = WARP * WARPS;  // of every block
constexpr unsigned ALL_LANES = 0xffffffffu;

template <class E>
using Accumulator = std::conditional_t<std::is_same_v<E, double>, double, float>;

__host__ __device__ inline int64_t ceiling_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class E>
__device__ inline Accumulator<E> widen(E value) {
  return static_cast<Accumulator<E>>(value);
}
// Rounds to the nearest.
template <class E>
__device__ inline E narrow(Accumulator<E> value) {
  return static_cast<E>(value);
}

// In kernels std::numeric_limits is not at hand.
template <class T>
__device__ inline T infinity() {
  return T(INFINITY);
}
template <class T>
__device__ inline T not_a_number() {
  return T(NAN);
}

template <class E>
__device__ inline E element(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const E*>(m.data)[row * m.row_stride + column * m.column_stride];
}

// Elements of type E that 16 bytes hold.
template <class E>
constexpr int VECTOR = 16 / int(sizeof(E));

// Whether every row can be read 16 bytes at a time.
template <class E>
__host__ __device__ inline bool whole_vectors(const Matrix& m) {
  return m.column_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
         m.row_stride * int64_t(sizeof(E)) % 16 == 0;
}

// And nothing is left of a row: kernels made for this case have no other loads, and need fewer registers.
template <class E>
__host__ __device__ inline bool only_whole_vectors(const Matrix& m) {
  return whole_vectors<E>(m) && m.width % VECTOR<E> == 0;
}

// The elements of a row from `column` on that 16 bytes hold; zeros beyond the matrix. whole: see whole_vectors.
// WHOLE: see only_whole_vectors; `column` is a multiple of VECTOR.
template <class E, bool WHOLE = false>
__device__ inline uint4 load_vector(const Matrix& m, bool whole, int64_t row, int64_t column) {
  uint4 held = make_uint4(0, 0, 0, 0);
  if (row >= m.rows || column >= m.width) return held;
  if (WHOLE || (whole && column + VECTOR<E> <= m.width))
    return *reinterpret_cast<const uint4*>(static_cast<const E*>(m.data) + row * m.row_stride + column);
  E* values = reinterpret_cast<E*>(&held);
#pragma unroll
  for (int e = 0; e < VECTOR<E>; ++e)
    if (column + e < m.width) values[e] = element<E>(m, row, column + e);
  return held;
}

// In every lane, in one order.
template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}

template <class T>
__device__ inline T larger(T a, T b) {
  return a < b ? b : a;  // a where b is not a number
}

template <class T>
__device__ inline T warp_max(T value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value = larger(value, __shfl_xor_sync(ALL_LANES, value, distance));
  return value;
}

// In every thread of the block, in one order; every thread must call it.
template <class T>
__device__ inline T block_sum(T value) {
  __shared__ T of_warp[WARPS];
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
  __syncthreads();
  T sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += of_warp[w];
  __syncthreads();
  return sum;
}

// Squares within these bounds have lost nothing to overflow or underflow.
template <class T>
__device__ inline bool within_range(T squared) {
  return sizeof(T) == 8 ? squared > T(1e-200) && squared < T(1e200) : squared > T(1e-24) && squared < T(1e30);
}

// The power of two that brings `largest` near 1.
template <class T>
__device__ inline T power_of_two_for(T largest) {
  if (!(largest > 0) || largest == infinity<T>()) return 1;
  constexpr int bound = sizeof(T) == 8 ? 1022 : 126;
  int exponent = ilogb(largest);
  exponent = exponent > bound ? bound : exponent < -bound ? -bound : exponent;
  return ldexp(T(1), -exponent);
}

// True in the last of `count` blocks that come here with one counter: it sees all that the others wrote before, if it
// reads it with __ldcg. The counter must be 0 before the first and is 0 after the last. Every thread must call it.
__device__ inline bool last_to_arrive(int* counter, int count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == count - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// Calls f with a value of the element type.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64:
      return f(double());
    case DType::float32:
      return f(float());
    case DType::bfloat16:
      return f(__nv_bfloat16());
    case DType::float16:
      return f(__half());
  }
  throw std::invalid_argument("dtype: unknown code " + std::to_string(int(dtype)));
}

// Blocks of THREADS threads, one dimension, on the stream of the arguments; none where there is nothing to do.
template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), int64_t blocks, const Arguments& arguments) {
  if (blocks <= 0) return;
  if (blocks > std::numeric_limits<int>::max())
    throw std::invalid_argument(std::string(name) + ": a grid of " + std::to_string(blocks) + " blocks is too large");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(THREADS);
  config.stream = static_cast<cudaStream_t>(arguments.stream);
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, arguments);
  const cudaError_t last = cudaGetLastError();  // and forget it
  const cudaError_t error = launched == cudaSuccess ? last : launched;
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace fused_margins
