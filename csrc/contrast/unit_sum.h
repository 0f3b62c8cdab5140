// The sum over the rows of a side of weight_i times their unit vectors: with smoothing, all that one side's gradients
// need of the other beyond the weights of a softmax.
#pragma once

#include "../cpu/rows.h"
#include "../cpu/scratch.h"
#include "../cpu/team.h"

namespace fused_margins {
namespace FM_ISA {

template <class T>
class UnitSum {
 public:
  // Without threads there is none, and run() is not to be called.
  UnitSum(const Rows<T>& side, int threads)
      : side_(side),
        width_(threads ? side.width() : 0),
        per_piece_(std::max<int64_t>(64, ceil_div(side.count(), MOST_PIECES))),
        pieces_(ceil_div(side.count(), per_piece_)),
        parts_(pieces_ * width_),
        sum_(width_),
        row_(threads, width_) {
    std::fill(sum_.get(), sum_.get() + width_, T(0));
  }

  // factor (count,): what makes a row a unit vector; weight(i). Pieces and their order are those of the sizes.
  template <class F>
  void run(Team& team, const T* factor, F weight) {
    team.each(pieces_, 1, [&](int64_t piece) {
      double* part = parts_.get() + piece * width_;
      std::fill(part, part + width_, 0.0);
      for (int64_t i = piece * per_piece_; i < std::min(side_.count(), (piece + 1) * per_piece_); ++i) {
        const double w = weight(i);
        if (w == 0 || factor[i] == 0) continue;  // whatever such a row holds
        const T* row = side_.row_of(i, row_.mine());
        for (int64_t d = 0; d < width_; ++d) part[d] += w * double(factor[i]) * double(row[d]);
      }
    });
    team.each(width_, 64, [&](int64_t d) {
      double sum = 0;
      for (int64_t piece = 0; piece < pieces_; ++piece) sum += parts_[piece * width_ + d];
      sum_[d] = T(sum);
    });
  }

  const T* get() const { return sum_.get(); }

  // Its product with the unit vector of a row of the other side.
  T along(const Rows<T>& other, int64_t i, T factor) const {
    return factor * dot(other.row_of(i, row_.mine()), sum_.get(), width_);
  }

 private:
  static constexpr int64_t MOST_PIECES = 64;
  const Rows<T>& side_;
  int64_t width_, per_piece_, pieces_;
  Buffer<double> parts_;  // (pieces, width)
  Buffer<T> sum_;
  Scratch<T> row_;
};

}  // namespace FM_ISA
}  // namespace fused_margins
