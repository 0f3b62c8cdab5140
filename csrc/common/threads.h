// How many threads a piece of work deserves. They are torch's own: the extension shares its OpenMP runtime.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fused_margins {
namespace FM_ISA {

inline int thread_count(double multiply_adds) {
#ifdef _OPENMP
  const double worthwhile = multiply_adds / 5e5;  // waking a thread costs a few microseconds, this about ten
  const int most = omp_get_max_threads();
  return worthwhile < 1 ? 1 : worthwhile < most ? int(worthwhile) : most;
#else
  (void)multiply_adds;
  return 1;
#endif
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
