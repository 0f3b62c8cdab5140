// Runs CUDA kernels on a CPU, to test their arithmetic and indices without a GPU: included before a .cu file that a
// plain C++ compiler then compiles. It is slow, and says nothing about speed.
//
// The threads of a block are coroutines, resumed in a random order between two barriers, and blocks run one after
// another in a random order: a missing barrier, or a result that depends on an order, shows in the numbers. A barrier
// that some threads of a warp do not reach is reported.
#pragma once

#include <cuda_runtime.h>
// After it:
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

inline dim3 gridDim;

namespace cuda_on_cpu {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;  // bytes of a thread

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline int current, count;
inline uint3 thread_index{0, 0, 0}, block_index{0, 0, 0};

inline uint64_t slots[1024];  // of each thread, for what a warp exchanges
inline int any_true;
inline std::function<void()> body;
inline std::mt19937 order(1);

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u)\n", what, block_index.x);
  std::abort();
}

inline void wait(State state) {
  Thread& me = threads[current];
  me.state = state;
  swapcontext(&me.context, &scheduler);
}
inline void block_barrier() {
  wait(State::at_block_barrier);
}
inline void warp_barrier() {
  wait(State::at_warp_barrier);
}

inline void enter() {
  body();
  wait(State::done);
}

inline void run_block() {
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    thread.state = State::ready;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  std::vector<int> sequence(count);
  std::iota(sequence.begin(), sequence.end(), 0);
  unsigned resting = unsigned(order());  // a bit for each warp
  while (true) {
    std::shuffle(sequence.begin(), sequence.end(), order);
    // Half of the warps rest for a while, so that one may be far ahead of another.
    if (order() % 16 == 0) resting = unsigned(order());
    for (int t : sequence)
      if (threads[t].state == State::ready && !(resting >> (t / WARP % 32) & 1)) {
        current = t;
        thread_index.x = unsigned(t);
        swapcontext(&scheduler, &threads[t].context);
      }
    int done = 0, at_block = 0;
    bool released = false;  // whether some thread can go on
    for (int first = 0; first < count; first += WARP) {
      int here = 0, gone = 0;
      for (int t = first; t < first + WARP; ++t) {
        here += threads[t].state == State::at_warp_barrier;
        gone += threads[t].state == State::done;
        at_block += threads[t].state == State::at_block_barrier;
        released |= threads[t].state == State::ready;
      }
      done += gone;
      if (here == WARP) {
        for (int t = first; t < first + WARP; ++t) threads[t].state = State::ready;
        released = true;
      } else if (here) {
        fail("some threads of a warp wait for the others, which never come");
      }
    }
    if (done == count) return;
    if (released) continue;
    if (at_block + done != count || done) fail("some threads of a block wait at a barrier that others never reach");
    for (Thread& thread : threads) thread.state = State::ready;
  }
}

template <class Kernel, class Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, Kernel kernel, const Arguments& arguments) {
  gridDim = config->gridDim;
  count = int(config->blockDim.x);
  if (int(threads.size()) != count) threads = std::vector<Thread>(size_t(count));
  body = [&] { kernel(arguments); };
  std::vector<unsigned> blocks(gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (unsigned block : blocks) {
    block_index.x = block;
    run_block();
  }
  return cudaSuccess;
}

template <class T>
T exchange(T value, int lane) {
  std::memcpy(&slots[current], &value, sizeof(T));
  warp_barrier();
  T result;
  std::memcpy(&result, &slots[current / WARP * WARP + lane], sizeof(T));
  warp_barrier();
  return result;
}

}  // namespace cuda_on_cpu

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define cudaLaunchKernelEx cuda_on_cpu::launch
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) "none"

inline void __syncthreads() {
  cuda_on_cpu::block_barrier();
}
inline int __syncthreads_or(int value) {
  __syncthreads();
  cuda_on_cpu::any_true = 0;
  __syncthreads();
  cuda_on_cpu::any_true |= value != 0;
  __syncthreads();
  return cuda_on_cpu::any_true;
}
inline void __syncwarp() {
  cuda_on_cpu::warp_barrier();
}
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return cuda_on_cpu::exchange(value, cuda_on_cpu::current % 32 ^ distance);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_cpu::exchange(value, lane);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  using namespace cuda_on_cpu;
  slots[current] = value;
  warp_barrier();
  unsigned mask = 0;
  for (int lane = 0; lane < WARP; ++lane) mask |= unsigned(slots[current / WARP * WARP + lane]) << lane;
  warp_barrier();
  return mask;
}
inline unsigned atomicOr(unsigned* at, unsigned bits) {
  const unsigned before = *at;
  *at |= bits;
  return before;
}
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}

// The matrix unit: the first lane of a warp holds whole tiles.
#define __CUDA_MMA_H__
namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32;
}

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static constexpr int ROWS = std::is_same_v<Use, matrix_b> ? K : M, COLUMNS = std::is_same_v<Use, matrix_a> ? K : N;
  float x[ROWS][COLUMNS];
};

inline bool first_lane() {
  return cuda_on_cpu::current % 32 == 0;
}
inline float value_of(float v) {
  return v;
}
inline float value_of(__half v) {
  return __half2float(v);
}
inline float value_of(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
inline float __float_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class F>
void fill_fragment(F& f, float value) {
  for (auto& row : f.x)
    for (float& entry : row) entry = value;
}

template <class Use, int M, int N, int K, class T, class Layout, class E>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f, const E* from, unsigned pitch) {
  using F = fragment<Use, M, N, K, T, Layout>;
  if (reinterpret_cast<uintptr_t>(from) % 32 || pitch * sizeof(E) % 16) cuda_on_cpu::fail("a tile is not aligned");
  if (first_lane())
    for (int r = 0; r < F::ROWS; ++r)
      for (int c = 0; c < F::COLUMNS; ++c)
        f.x[r][c] = value_of(std::is_same_v<Layout, row_major> ? from[r * pitch + c] : from[c * pitch + r]);
  cuda_on_cpu::warp_barrier();
}

template <int M, int N, int K, class T, class A, class B>
void mma_sync(fragment<accumulator, M, N, K, float>& d, const fragment<matrix_a, M, N, K, T, A>& a,
              const fragment<matrix_b, M, N, K, T, B>& b, const fragment<accumulator, M, N, K, float>& c) {
  if (!first_lane()) return;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float sum = c.x[i][j];
      for (int k = 0; k < K; ++k) sum += a.x[i][k] * b.x[k][j];
      d.x[i][j] = sum;
    }
}

template <int M, int N, int K>
void store_matrix_sync(float* to, const fragment<accumulator, M, N, K, float>& f, unsigned pitch, layout_t) {
  if (reinterpret_cast<uintptr_t>(to) % 32 || pitch % 4) cuda_on_cpu::fail("a tile is not aligned");
  if (first_lane())
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) to[i * pitch + j] = f.x[i][j];
  cuda_on_cpu::warp_barrier();
}

}  // namespace wmma
}  // namespace nvcuda
