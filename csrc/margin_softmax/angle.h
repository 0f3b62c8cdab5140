// A margin on the angle of a row and its class: psi(u) = cos(theta + angle), u = cos(theta), in two pieces.
#pragma once

namespace fused_margins {

// With s = sin(theta): psi(u) = cosine u - sine s, or, where side u > bound, slope u + bend s + rest.
struct Angle {
  double cosine, sine, side, bound, slope, bend, rest;
  bool straight_through;  // psi'(u) is taken as 1
};

}  // namespace fused_margins
