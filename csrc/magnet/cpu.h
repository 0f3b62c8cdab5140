// magnet on a CPU. T, the accumulation type, is double where x is float64 and float elsewhere.
#pragma once

#include "../cpu/isa.h"
#include "inputs.h"

namespace fused_margins {

struct MagnetForward {
  MagnetInputs in;
  void* loss;  // T, (rows,) or one value
  void* saved;
};

struct MagnetBackward {
  const void* grad_loss;  // T, as the loss
  MagnetInputs in;
  const void* saved;
  void* grad_x;  // dtype of x, (rows, width)
};

FM_KERNEL(magnet_forward, MagnetForward)
FM_KERNEL(magnet_backward, MagnetBackward)

}  // namespace fused_margins
