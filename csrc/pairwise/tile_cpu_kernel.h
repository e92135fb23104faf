// The inner loops over pairs of points, one table per instruction set.
//
// Points come in tiles of 64, stored by channels: a frame is [rows][64], and lanes are points everywhere, so
// that no number of channels wastes lanes. One product serves all steps,
//     c[r][l] (+)= sum_k a(r, k) b[k][l],      a read one element at a time with any strides:
// - similarities of two tiles: a = the first frame transposed (strides 1, 64), b = the second frame, k =
// channels;
// - sums of kernel weights times points, of lanes l: a = the other frame (strides 64, 1), b = the weights
// [64][64]. For the other tile's sums the weights are transposed. 4 rows x 64 lanes stay in registers (16 of
// AVX-512): per k, 4 loads, 4 broadcasts and 16 multiply-adds, so it is bound by the rate of multiply-adds;
// all operands of a step stay in the caches: 64 x 64 numbers are 16 KB of float. The exponential takes 10
// instructions per register of weights, the product 3 C for C channels (both sides' sums counted).
//
// The rest are element-wise loops over frames, O(points x channels).
#pragma once

#include <cstdint>

#include "../common/cpu_capability.h"

namespace effops::pairwise {

constexpr int64_t kTile = 64;

// What a product adds up.
template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_depth;  // strides
  const T* b;              // [depth][64]
  T* c;                    // [rows][64]
  int64_t rows, depth;
  bool add;  // to what c holds
};

// One step of a tile of points x -> y = (1 - eta) x + eta sums / d, d = sums[channels] -> y / ||y||.
template <typename T>
struct Advance {
  T* x;           // [channels][64], changed
  const T* sums;  // [channels + 1][64]
  int64_t channels, count;
  T eta;
  T* degrees;  // [64]: d
  T* norms;    // [64]: ||y||
};

// The gradient of a step, as far as it is a matter of each point: of `grad`, the gradient of the new points,
// it makes that of the points but for what comes through the kernel weights, and h, tau (see mean_shift.h).
template <typename T>
struct Retreat {
  T* grad;           // [channels][64], changed
  const T* x;        // [channels][64]: before the step
  const T* next;     // [channels][64]: after it
  const T* degrees;  // [64], as `norms`
  const T* norms;
  int64_t channels, count;
  T eta;
  T* h;  // [channels + 1][64]: h, and -tau
};

// Costs of the pairs of two tiles of different instances: max(s - alpha, 0), s = (1 + similarity) / 2.
template <typename T>
struct Hinge {
  T* similarities;                    // [64][64]; slopes() replaces them by 1 where s > alpha, else 0
  const int32_t* rows_of;             // [64]: instances of the rows; null if no pair is of one instance
  const int32_t* lanes_of;            // [64]
  const T *row_weights, *lane_weights;  // [64]
  T *row_costs, *lane_costs;            // [64]: sum_j w_j cost is added
  T alpha;
};

template <typename T>
struct TileKernels {
  void (*product)(const Product<T>& product);
  void (*transpose)(const T* from, T* to);              // [64][64]
  void (*multiply_lanes)(const T* frame, const T* lanes, T* to,
                         int64_t rows);  // to[r][l] = frame[r][l] lanes[l]
  // The largest of `count` = a multiple of 64 numbers, none of which is NaN.
  T (*largest)(const T* numbers, int64_t count);
  // The unit vector along the sum of `count` points, and the smallest product of one of them with it; -1
  // where the sum has no direction.
  T (*center)(const T* frame, int64_t channels, int64_t count, T* center);
  // The largest product of a vector and a point of a frame (which is 0 behind the last).
  T (*reach)(const T* vector, const T* frame, int64_t channels);
  // Similarities become exp(kappa (s - 1)); s <= 1 is not relied on. Below the smallest normal number: 0.
  void (*weigh)(T* similarities, T kappa);
  // The same, and slopes[i] becomes kappa * weight * slope. Returns sum (s - 1) * weight * slope.
  double (*weigh_slopes)(T* similarities, T* slopes, T kappa);
  // Returns the largest squared distance between a point and what it became; NaN does not count.
  double (*advance)(const Advance<T>& step);
  void (*retreat)(const Retreat<T>& step);
  void (*hinge_costs)(const Hinge<T>& hinge);
  bool (*hinge_slopes)(const Hinge<T>& hinge);  // whether any is not 0
  // Bit l of edges[r]: similarities[r][l] > least.
  void (*edges)(const T* similarities, T least, uint64_t* edges);
  // For each lane, the row of the largest element; the first of equal ones.
  void (*nearest)(const T* similarities, int64_t rows, int32_t* nearest);
};

struct PairTileKernels {
  TileKernels<float> of_float;
  TileKernels<double> of_double;
};

EFFOPS_DECLARE_KERNEL_TABLE(PairTileKernels, pair_tile_kernels)

template <typename T>
const TileKernels<T>& tile_kernels() {
  if constexpr (sizeof(T) == 8)
    return pair_tile_kernels().of_double;
  else
    return pair_tile_kernels().of_float;
}

}  // namespace effops::pairwise
