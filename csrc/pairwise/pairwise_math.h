// Scalar maths of all pairs, shared by CPU, CUDA and the tests.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace effops::pairwise {

enum Precision : int64_t { kHigh = 0, kMedium = 1 };
enum Normalize : int64_t { kSumWeights = 0, kThesis = 1, kNone = 2 };

constexpr int64_t kMaxChannels = 512;

// A row is divided by its norm, but by no less than this.
constexpr double kSmallestNorm = 1e-12;

// Half the distance from 1 to the next number: what the skipped kernel weights of a point may add up to,
// as a part of the others.
template <typename T>
constexpr double kRounding = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;

// What a dot product of two unit rows of this many channels, computed in T, may be off by.
template <typename T>
EFFOPS_HD double dot_error(int64_t channels) {
  return 2 * kRounding<T> * static_cast<double>(channels + 16);
}

// Upper bound of the dot products of two groups of unit rows. highest: the largest product of a row of the
// first group and the unit vector c; cos_radius: the smallest of a row of the second and c. A row at the
// angle a from c and one at the angle r from it are at least a - r apart: cos(a - r) = cos a cos r + sin a
// sin r. `error` is that of both products, which counts for most where an angle is small.
EFFOPS_HD double similarity_bound(double highest, double cos_radius, double error) {
  if (!(highest + error < cos_radius - error)) return 1 + error;
  const double sin_a = std::sqrt(1 - highest * highest + 3 * error);
  const double sin_r = std::sqrt(1 - cos_radius * cos_radius + 3 * error);
  return highest * cos_radius + sin_a * sin_r + 3 * error;
}

// Pairs up to this similarity count less than rounding: total * exp(kappa (s - 1)) <= rounding * least, where
// `total` is the sum of all weights and `least` a lower bound of the sum that the pair would be added to.
EFFOPS_HD double negligible_similarity(double kappa, double total, double least, double rounding) {
  if (!(kappa > 0 && least > 0)) return -2;  // none: less than every similarity
  return 1 + std::log(rounding * least / total) / kappa;
}

}  // namespace effops::pairwise
