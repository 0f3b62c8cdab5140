// Values that only the kernels read: labels and scales. A bad one raises before anything is computed.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../matrix.h"

namespace fused_margins {

// Every entry lies in [0, size) or equals `ignored`, or is ABSENT where that is allowed.
inline void check_index(const char* argument, const int64_t* index, int64_t count, int64_t size, int64_t ignored,
                        bool may_be_absent = false) {
  for (int64_t i = 0; i < count; ++i)
    if (index[i] != ignored && (index[i] < 0 || index[i] >= size) && !(may_be_absent && index[i] == ABSENT))
      throw std::out_of_range(std::string(argument) + ": expected values in [0, " + std::to_string(size) + ")" +
                              (ignored == ABSENT ? "" : " or " + std::to_string(ignored) + " (ignored)") + ", got " +
                              std::to_string(index[i]) + " in row " + std::to_string(i));
}

template <class T>
void check_scale(const T* scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(scale[i] > 0))
      throw std::invalid_argument("scale: expected positive values, got " + std::to_string(scale[i]) +
                                  (count > 1 ? " in row " + std::to_string(i) : std::string()));
}

}  // namespace fused_margins
