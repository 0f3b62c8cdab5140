// How many threads a piece of work deserves. They are torch's own: the extension shares its OpenMP runtime.
#pragma once

#include <cstdint>

#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fused_margins {
namespace FM_ISA {

inline int thread_count(double multiply_adds) {
  const double worthwhile = multiply_adds / 5e5;  // waking a thread costs a few microseconds, this about ten
  const int most = max_threads();
  return worthwhile < 1 ? 1 : worthwhile < most ? int(worthwhile) : most;
}

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace FM_ISA
}  // namespace fused_margins
