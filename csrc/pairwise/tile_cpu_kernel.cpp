// See tile_cpu_kernel.h. Compiled once per instruction set.
#include "tile_cpu_kernel.h"

#include "../common/exp_lanes.h"
#include "../common/transpose_block.h"
#include "pairwise_math.h"

namespace effops::pairwise::EFFOPS_ISA {
namespace {

using namespace effops::simd;

// Registers of lanes that a product keeps per row: 4 rows of them, with 4 more registers, are what there is.
constexpr int kColumns = kVectorBytes == 64 ? 4 : 2;
constexpr int kRows = 4;

// ---------------------------------------------------------------------------------------- product

template <typename T, int R>
EFFOPS_INLINE void product_tile(const Product<T>& of, int64_t row, int64_t lane) {
  using V = typename Vec<T>::type;
  constexpr int lanes = Vec<T>::lanes;
  const T* a = of.a + row * of.a_row;
  const T* b = of.b + lane;
  T* c = of.c + row * kTile + lane;
  V tile[R][kColumns] = {};
  if (of.add) {
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < kColumns; ++n) tile[r][n] = load<V>(c + r * kTile + n * lanes);
    }
  }
  int64_t k = 0;
  do {  // at least once: otherwise the compiler moves the tile to the stack for the other case
    V factors[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) factors[n] = load<V>(b + n * lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V value = broadcast(a[r * of.a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) tile[r][n] += value * factors[n];
    }
    a += of.a_depth;
    b += kTile;
  } while (++k < of.depth);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) store(c + r * kTile + n * lanes, tile[r][n]);
  }
}

template <typename T>
void product(const Product<T>& of) {
  for (int64_t lane = 0; lane < kTile; lane += kColumns * Vec<T>::lanes) {
    int64_t row = 0;
    for (; row + kRows <= of.rows; row += kRows) product_tile<T, kRows>(of, row, lane);
    switch (of.rows - row) {
      case 3: product_tile<T, 3>(of, row, lane); break;
      case 2: product_tile<T, 2>(of, row, lane); break;
      case 1: product_tile<T, 1>(of, row, lane); break;
      default: break;
    }
  }
}

// ---------------------------------------------------------------------------------------- tiles of pairs

// Calls f(index) for all registers of `count` numbers.
template <typename T, typename F>
EFFOPS_INLINE void for_registers(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += Vec<T>::lanes) f(i);
}

template <typename T>
void transpose(const T* from, T* to) {
  for (int64_t i = 0; i < kTile; i += kBlock) {
    for (int64_t j = 0; j < kTile; j += kBlock) {
      transpose_block(from + i * kTile + j, kTile, to + j * kTile + i, kTile);
    }
  }
}

template <typename T>
void multiply_lanes(const T* frame, const T* lanes, T* to, int64_t rows) {
  using V = typename Vec<T>::type;
  for (int64_t r = 0; r < rows; ++r) {
    for_registers<T>(kTile, [&](int64_t l) {
      store(to + r * kTile + l, load<V>(frame + r * kTile + l) * load<V>(lanes + l));
    });
  }
}

template <typename T>
T largest(const T* numbers, int64_t count) {
  using V = typename Vec<T>::type;
  V most[4];
  for (int i = 0; i < 4; ++i) most[i] = load<V>(numbers);
  for (int64_t at = 0; at < count; at += kTile) {
    for (int64_t l = 0; l < kTile; l += 4 * Vec<T>::lanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const V value = load<V>(numbers + at + l + i * Vec<T>::lanes);
        most[i] = most[i] > value ? most[i] : value;
      }
    }
  }
  for (int i = 1; i < 4; ++i) most[0] = most[0] > most[i] ? most[0] : most[i];
  return max_of_lanes<T>(most[0]);
}

template <typename T>
EFFOPS_INLINE T square_root(T value) {
  if constexpr (sizeof(T) == 8)
    return __builtin_sqrt(value);
  else
    return __builtin_sqrtf(value);
}

template <typename T>
T reach(const T* vector, const T* frame, int64_t channels) {
  T products[kTile];
  product<T>({vector, 0, 1, frame, products, 1, channels, false});
  return largest(products, kTile);
}

template <typename T>
T center(const T* frame, int64_t channels, int64_t count, T* center) {
  using V = typename Vec<T>::type;
  T square = 0;
  for (int64_t k = 0; k < channels; ++k) {
    V sum{};
    for_registers<T>(kTile, [&](int64_t l) { sum += load<V>(frame + k * kTile + l); });
    center[k] = sum_of_lanes<T>(sum);
    square += center[k] * center[k];
  }
  if (!(square > T(1e-20))) return T(-1);
  const T scale = 1 / square_root(square);
  for (int64_t k = 0; k < channels; ++k) center[k] *= scale;
  T products[kTile];
  product<T>({center, 0, 1, frame, products, 1, channels, false});
  T least = products[0];
  for (int64_t l = 1; l < count; ++l) least = products[l] < least ? products[l] : least;
  return least;
}

// exp(exponent) for exponents that rounding may have put above 0.
template <typename T>
EFFOPS_INLINE typename Vec<T>::type kernel_weight(typename Vec<T>::type exponent) {
  constexpr T kSmallest = sizeof(T) == 8 ? T(-708.3) : T(-87.3);  // its exponential is a normal number
  exponent = exponent > T(0) ? typename Vec<T>::type{} : exponent;
  const auto weight = exp_weight<T>(exponent);
  return exponent < kSmallest ? typename Vec<T>::type{} : weight;  // NaN stays
}

template <typename T>
void weigh(T* similarities, T kappa) {
  using V = typename Vec<T>::type;
  for_registers<T>(kTile * kTile, [&](int64_t i) {
    store(similarities + i, kernel_weight<T>(load<V>(similarities + i) * kappa - kappa));
  });
}

template <typename T>
double weigh_slopes(T* similarities, T* slopes, T kappa) {
  using V = typename Vec<T>::type;
  double total = 0;
  for (int64_t row = 0; row < kTile; ++row) {
    V sum{};
    for_registers<T>(kTile, [&](int64_t l) {
      const int64_t i = row * kTile + l;
      const V distance = load<V>(similarities + i) - T(1);
      const V weight = kernel_weight<T>(distance * kappa);
      const V slope = weight * load<V>(slopes + i);
      sum += distance * slope;
      store(similarities + i, weight);
      store(slopes + i, slope * kappa);
    });
    total += sum_of_lanes<T>(sum);
  }
  return total;
}

template <typename T>
void edges(const T* similarities, T least, uint64_t* edges) {
  using V = typename Vec<T>::type;
  for (int64_t row = 0; row < kTile; ++row) {
    uint64_t bits = 0;
    for_registers<T>(kTile, [&](int64_t l) {
      const uint64_t found = sign_bits(load<V>(similarities + row * kTile + l) > least);
      bits |= found << l;
    });
    edges[row] = bits;
  }
}

template <typename T>
void nearest(const T* similarities, int64_t rows, int32_t* nearest) {
  T most[kTile];
  for (int64_t l = 0; l < kTile; ++l) {
    most[l] = similarities[l];
    nearest[l] = 0;
  }
  for (int64_t row = 1; row < rows; ++row) {
    const T* now = similarities + row * kTile;
    for (int64_t l = 0; l < kTile; ++l) {
      nearest[l] = now[l] > most[l] ? static_cast<int32_t>(row) : nearest[l];
      most[l] = now[l] > most[l] ? now[l] : most[l];
    }
  }
}

// ---------------------------------------------------------------------------------------- steps of points

template <typename T>
double advance(const Advance<T>& step) {
  T squares[kTile] = {}, moved[kTile] = {}, y[kTile], scale[kTile];
  const T* d = step.sums + step.channels * kTile;
  const auto stepped = [&](int64_t k) {
    const T *x = step.x + k * kTile, *sums = step.sums + k * kTile;
    for (int64_t l = 0; l < kTile; ++l) {
      const T mean = sums[l] / (d[l] == 0 ? T(1) : d[l]);
      y[l] = d[l] == 0 ? x[l] : (1 - step.eta) * x[l] + step.eta * mean;
    }
  };
  for (int64_t k = 0; k < step.channels; ++k) {
    stepped(k);
    for (int64_t l = 0; l < kTile; ++l) squares[l] += y[l] * y[l];
  }
  for (int64_t l = 0; l < kTile; ++l) {
    const T norm = square_root(squares[l]);
    step.degrees[l] = d[l];
    step.norms[l] = norm;
    scale[l] = l < step.count ? norm : T(1);
    scale[l] = scale[l] < T(kSmallestNorm) ? T(kSmallestNorm) : scale[l];
  }
  for (int64_t k = 0; k < step.channels; ++k) {
    stepped(k);
    T* x = step.x + k * kTile;
    for (int64_t l = 0; l < kTile; ++l) {
      const T next = l < step.count ? y[l] / scale[l] : T(0);
      moved[l] += (next - x[l]) * (next - x[l]);
      x[l] = next;
    }
  }
  double most = 0;
  for (int64_t l = 0; l < step.count; ++l) most = moved[l] > most ? static_cast<double>(moved[l]) : most;
  return most;
}

template <typename T>
void retreat(const Retreat<T>& step) {
  T along[kTile] = {}, turn[kTile] = {}, scale[kTile], part[kTile], keep[kTile];
  for (int64_t k = 0; k < step.channels; ++k) {
    const T *grad = step.grad + k * kTile, *next = step.next + k * kTile;
    for (int64_t l = 0; l < kTile; ++l) along[l] += grad[l] * next[l];
  }
  for (int64_t l = 0; l < kTile; ++l) {
    const bool short_ = step.norms[l] < T(kSmallestNorm), stays = step.degrees[l] == 0 || step.eta == 0;
    scale[l] = short_ ? T(1 / kSmallestNorm) : 1 / step.norms[l];
    along[l] = short_ ? T(0) : along[l];  // the norm is a constant there
    keep[l] = stays ? T(1) : 1 - step.eta;
    part[l] = stays ? T(0) : 1 / step.degrees[l];
  }
  for (int64_t k = 0; k < step.channels; ++k) {
    T *grad = step.grad + k * kTile, *h = step.h + k * kTile;
    const T *next = step.next + k * kTile, *x = step.x + k * kTile;
    for (int64_t l = 0; l < kTile; ++l) {
      const T g = l < step.count ? (grad[l] - next[l] * along[l]) * scale[l] : T(0);
      const T y = (step.norms[l] < T(kSmallestNorm) ? T(kSmallestNorm) : step.norms[l]) * next[l];
      turn[l] += g * (y - (1 - step.eta) * x[l]);
      grad[l] = keep[l] * g;
      h[l] = part[l] == 0 ? T(0) : step.eta * g * part[l];  // g may be infinite
    }
  }
  T* tau = step.h + step.channels * kTile;
  for (int64_t l = 0; l < kTile; ++l) tau[l] = l < step.count && part[l] != 0 ? -turn[l] * part[l] : T(0);
}

// ---------------------------------------------------------------------------------------- costs

// Calls f(index, costs count here) for all registers of the pairs; lanes of one instance with the row do not.
template <typename T, typename F>
EFFOPS_INLINE void for_pairs(const Hinge<T>& hinge, const F& f) {
  using V = typename Vec<T>::type;
  for (int64_t row = 0; row < kTile; ++row) {
    for_registers<T>(kTile, [&](int64_t l) {
      V counts = broadcast(T(1));
      if (hinge.rows_of) {
        for (int i = 0; i < Vec<T>::lanes; ++i) {
          counts[i] = hinge.lanes_of[l + i] == hinge.rows_of[row] ? T(0) : T(1);
        }
      }
      f(row, l, counts);
    });
  }
}

template <typename T>
void hinge_costs(const Hinge<T>& hinge) {
  using V = typename Vec<T>::type;
  const T offset = T(0.5) - hinge.alpha;
  for_pairs<T>(hinge, [&](int64_t row, int64_t l, V counts) {
    const V excess = load<V>(hinge.similarities + row * kTile + l) * T(0.5) + offset;
    const V cost = (excess < T(0) ? V{} : excess) * counts;  // NaN stays
    store(hinge.lane_costs + l, load<V>(hinge.lane_costs + l) + cost * hinge.row_weights[row]);
    store(hinge.similarities + row * kTile + l, cost * load<V>(hinge.lane_weights + l));
  });
  for (int64_t row = 0; row < kTile; row += 4) {
    V sums[4] = {};
    for (int r = 0; r < 4; ++r) {
      for_registers<T>(kTile,
                       [&](int64_t l) { sums[r] += load<V>(hinge.similarities + (row + r) * kTile + l); });
    }
    add_sums(sums[0], sums[1], sums[2], sums[3], hinge.row_costs + row);
  }
}

template <typename T>
bool hinge_slopes(const Hinge<T>& hinge) {
  using V = typename Vec<T>::type;
  const T offset = T(0.5) - hinge.alpha;
  V any{};
  for_pairs<T>(hinge, [&](int64_t row, int64_t l, V counts) {
    T* const at = hinge.similarities + row * kTile + l;
    const V excess = load<V>(at) * T(0.5) + offset;
    const V slope = excess > T(0) ? counts : V{};
    any += slope;
    store(at, slope);
  });
  return sum_of_lanes<T>(any) != 0;
}

template <typename T>
constexpr TileKernels<T> kKernels{product<T>,     transpose<T>,    multiply_lanes<T>, largest<T>, center<T>,
                                  reach<T>,       weigh<T>,        weigh_slopes<T>,   advance<T>, retreat<T>,
                                  hinge_costs<T>, hinge_slopes<T>, edges<T>,          nearest<T>};

}  // namespace

extern const PairTileKernels pair_tile_kernels{kKernels<float>, kKernels<double>};

}  // namespace effops::pairwise::EFFOPS_ISA
