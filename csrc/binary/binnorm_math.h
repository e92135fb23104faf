// The shift of binnorm: scalar maths that CPU, CUDA and simulator builds share.
//
//   y = sigma(x + shift), where the shift is the root of sum sigma(x + shift) = k
#pragma once

#include <math.h>

#include "../common/dtype.h"

namespace effops::binary {

// What one pass over a row finds. Infinite elements are counted, not summed.
template <typename A>
struct RowSummary {
  A min, max, sum, squares;  // of the finite elements
  int64_t finite, positive_infinite;
  bool has_nan;
};

enum class RowKind {
  kSolve,  // y = sigma(x + shift)
  kNan,    // no shift exists: y = NaN
  kZeros,  // y = 0, but 1 where x = Inf
  kOnes,   // y = 1, but 0 where x = -Inf
};

template <typename A>
EFFOPS_HD RowKind kind_of(const RowSummary<A>& row, int64_t k) {
  const int64_t share = k - row.positive_infinite;  // of the finite elements
  if (row.has_nan || share < 0 || share > row.finite) return RowKind::kNan;
  return share == 0 ? RowKind::kZeros : share == row.finite ? RowKind::kOnes : RowKind::kSolve;
}

template <typename A>
EFFOPS_HD A value_without_shift(RowKind kind, A x) {
  if (kind == RowKind::kNan) return A(NAN);
  const bool one = kind == RowKind::kZeros ? x == A(INFINITY) : x != -A(INFINITY);
  return one ? A(1) : A(0);
}

// logit(share / finite): the shift of a row of zeros.
template <typename A>
EFFOPS_HD A logit_of(int64_t share, int64_t finite) {
  return log(static_cast<A>(share) / static_cast<A>(finite - share));
}

// f(shift) - k and its derivatives, f = sum y: with q = min(y, 1 - y) and s = 1 where y < 1/2, else -1,
//
//   excess = #(y >= 1/2) - k + sum s q     slope = sum q (1 - q)     curvature = sum s q (1 - q) (1 - 2 q)
//
// No term is a difference of nearly equal numbers, so that the step excess / slope is as accurate where all
// elements are saturated.
template <typename A>
struct Balance {
  A excess, slope, curvature;
};

// A number between low and high: by factors where they are far apart, half way else.
template <typename A>
EFFOPS_HD double middle(double low, double high) {
  if (low < -256.0 && high > 256.0) return 0;
  if (!(high - low <= 256.0)) {
    const A a = static_cast<A>(fabs(low)), b = static_cast<A>(fabs(high));
    const A mean = sqrt(a > A(1) ? a : A(1)) * sqrt(b > A(1) ? b : A(1));
    const double result = static_cast<double>(low < 0 ? -mean : mean);
    if (result > low && result < high) return result;
  }
  return low + (high - low) / 2;
}

// Halley's iteration inside a bracket of the root, by bisection where it does not converge.
//
// The shift is offset - origin, so that x + shift = (x - origin) + offset is as accurate as x, however large
// both are: the difference is exact where it matters, and the offset is below the spacing of the numbers.
//
// After a step of size d the error is below 0.42 d^3, because neither the second nor the third derivative can
// exceed the first: a step below the cube root of the rounding error is the last.
template <typename A>
struct ShiftSearch {
  static constexpr A kLastStep = sizeof(A) == 4 ? A(5e-3) : A(6e-6);
  static constexpr A kNoExcess = sizeof(A) == 4 ? A(1e-10) : A(1e-19);

  A origin;
  double low, high, offset;  // low < root + origin < high
  A last;                    // size of the excess before, if the last step was Halley's

  EFFOPS_HD ShiftSearch(const RowSummary<A>& row, A logit)
      : origin(0),
        low(static_cast<double>(logit) - static_cast<double>(row.max)),
        high(static_cast<double>(logit) - static_cast<double>(row.min)),
        offset(0),
        last(A(INFINITY)) {
    // The root for normally distributed elements, nearly.
    const A count = static_cast<A>(row.finite), mean = row.sum / count;
    const A variance = row.squares / count - mean * mean;
    const A spread = sqrt(A(1) + A(0.3926991) * (variance > A(0) ? variance : A(0)));
    const double guess = static_cast<double>(logit * spread - mean);
    move_to(guess > low && guess < high ? guess : middle<A>(low, high));
  }

  // Takes a step. False: the shift is found.
  EFFOPS_HD bool step(const Balance<A>& balance) {
    const A size = fabs(balance.excess);
    if (!(size > kNoExcess)) return false;
    (balance.excess > A(0) ? high : low) = offset;
    const A newton = balance.excess / balance.slope;
    const A divisor = A(1) - newton * (balance.curvature / balance.slope) / A(2);
    const A distance = newton / (divisor > A(0.5) ? divisor : A(0.5));
    const double next = offset - static_cast<double>(distance);
    if (fabs(distance) <= kLastStep) {
      move_to(next);
      return false;
    }
    const bool good = size <= last / A(2) && next > low && next < high;
    last = good ? size : A(INFINITY);
    if (good) {
      move_to(next);
      return true;
    }
    const double center = static_cast<double>(origin);
    double chosen = middle<A>(low - center, high - center) + center;
    if (!(chosen > low && chosen < high)) chosen = low + (high - low) / 2;
    if (!(chosen > low && chosen < high)) return false;  // no number lies between
    move_to(chosen);
    // Equal elements that share the rest of k may be at the origin: it has to be met exactly.
    if (low < 0 && high > 0) offset = 0;
    return true;
  }

 private:
  EFFOPS_HD void move_to(double target) {
    const double from = static_cast<double>(origin);
    origin = static_cast<A>(from - target);
    const double moved = from - static_cast<double>(origin), rounding = fabs(moved) * 2.3e-16;
    low = low - moved - rounding;
    high = high - moved + rounding;
    offset = target - moved;
  }
};

}  // namespace effops::binary
