// Memory of the threads of a parallel region, allocated before it begins: an exception cannot leave one.
#pragma once

#include "threads.h"
#include "tile.h"

namespace fused_margins {
namespace FM_ISA {

template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(int threads, int64_t count) : stride_(round_up(count, 64 / int64_t(sizeof(T)))), data_(threads * stride_) {}

  // (count,): of the calling thread.
  T* mine() const { return data_.get() + thread_index() * stride_; }

 private:
  int64_t stride_ = 0;
  Buffer<T> data_;
};

}  // namespace FM_ISA
}  // namespace fused_margins
