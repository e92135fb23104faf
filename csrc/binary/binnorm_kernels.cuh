// CUDA kernels of binnorm. No torch, no launches.
#pragma once

#include "binnorm_math.h"
#include "row_threads_kernels.cuh"

namespace effops::binary {

EFFOPS_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
EFFOPS_DEVICE double quotient(double a, double b) { return a / b; }

template <typename A>
struct Sigmoid {
  A nearer;    // min(y, 1 - y)
  bool upper;  // y >= 1/2

  EFFOPS_DEVICE Sigmoid(A x, A origin, A offset) {
    const A z = (x - origin) + offset;
    const A e = exp(z < A(0) ? z : -z);
    nearer = quotient(e, A(1) + e);
    upper = z >= A(0);
  }
  EFFOPS_DEVICE A value() const { return upper ? A(1) - nearer : nearer; }
};

template <typename Group, typename Elements, typename A = typename Elements::A>
EFFOPS_DEVICE RowSummary<A> summarise(const Elements& elements, int64_t length) {
  RowSummary<A> row{A(INFINITY), -A(INFINITY), A(0), A(0), length, 0, false};
  bool special = false;
  elements.for_each([&](A value, int64_t) {
    if (!(fabs(value) < A(INFINITY))) {
      special = true;
      return;
    }
    row.min = value < row.min ? value : row.min;
    row.max = value > row.max ? value : row.max;
    row.sum += value;
    row.squares += value * value;
  });
  row.min = Group::min(row.min);
  row.max = Group::max(row.max);
  row.sum = Group::sum(row.sum);
  row.squares = Group::sum(row.squares);
  if (!Group::any(special)) return row;
  int64_t finite = 0;
  bool has_nan = false;
  elements.for_each([&](A value, int64_t) {
    finite += fabs(value) < A(INFINITY);
    row.positive_infinite += value == A(INFINITY);
    has_nan |= value != value;
  });
  row.finite = Group::sum(finite);
  row.positive_infinite = Group::sum(row.positive_infinite);
  row.has_nan = Group::any(has_nan);
  return row;
}

template <typename Group, typename Elements, typename A = typename Elements::A>
EFFOPS_DEVICE Balance<A> balance_of(const Elements& elements, int64_t k, A origin, A offset) {
  int32_t upper = 0;
  A excess = A(0), slope = A(0), curvature = A(0);
  elements.for_each([&](A value, int64_t) {
    const Sigmoid<A> y(value, origin, offset);
    const A h = y.nearer - y.nearer * y.nearer, bend = h - A(2) * h * y.nearer;
    upper += y.upper;
    excess += y.upper ? -y.nearer : y.nearer;
    slope += h;
    curvature += y.upper ? -bend : bend;
  });
  const int64_t uppers = Group::threads == kWarpSize ? int64_t{Group::sum(upper)}
                                                     : Group::sum(int64_t{upper});
  return {static_cast<A>(uppers - k) + Group::sum(excess), Group::sum(slope), Group::sum(curvature)};
}

// y = sigma(x + shift), where the shift is the root of sum sigma(x + shift) = k.
//
// Parallelism: a warp per row of at most 1024 elements, which it holds in registers; a block per longer row,
// which it reads again for each of about four sums. Sums are combined in a fixed order: the same bits at
// every run. Bytes: x and y once; of a longer row x about five times, from the second-level cache. Bound by
// the instructions of about four sigmoids per element (25 each) and, where double is slow, by the scalar
// steps between them (20 operations in double per row and step); memory comes close for rows of half types.
template <typename T, typename Group, int kPerThread>
__global__ void __launch_bounds__(kRowThreads, 1)
    binnorm_kernel(const T* x, int64_t rows, int64_t length, int64_t k, T* y) {
  using A = accumulator_t<T>;
  const int64_t step = int64_t{gridDim.x} * Group::rows;
  for (int64_t r = int64_t{blockIdx.x} * Group::rows + Group::row(); r < rows; r += step) {
    const RowElements<T, Group, kPerThread> elements(x + r * length, length);
    T* out = y + r * length;
    const RowSummary<A> summary = summarise<Group>(elements, length);
    const RowKind kind = kind_of(summary, k);
    if (kind != RowKind::kSolve) {
      elements.for_each([&](A value, int64_t j) { out[j] = narrow<T>(value_without_shift(kind, value)); });
      continue;
    }
    ShiftSearch<A> search(summary, logit_of<A>(k - summary.positive_infinite, summary.finite));
    while (search.step(balance_of<Group>(elements, k, search.origin, static_cast<A>(search.offset)))) {
    }
    const A origin = search.origin, offset = static_cast<A>(search.offset);
    elements.for_each(
        [&](A value, int64_t j) { out[j] = narrow<T>(Sigmoid<A>(value, origin, offset).value()); });
  }
}

// dx = h (dy - <h, dy> / <h, 1>), h = y (1 - y); 0 where <h, 1> = 0.
//
// Parallelism: as forward. Bytes: y, dy and dx once; of rows longer than 1024 elements y and dy twice. Bound
// by memory.
template <typename T, typename Group, int kPerThread>
__global__ void __launch_bounds__(kRowThreads, 1)
    binnorm_backward_kernel(const T* grad_output, const T* y, int64_t rows, int64_t length, T* grad_x) {
  using A = accumulator_t<T>;
  const int64_t step = int64_t{gridDim.x} * Group::rows;
  for (int64_t r = int64_t{blockIdx.x} * Group::rows + Group::row(); r < rows; r += step) {
    T* out = grad_x + r * length;
    const RowElements<T, Group, kPerThread> elements(y + r * length, length);
    const RowElements<T, Group, kPerThread> grads(grad_output + r * length, length);
    const auto weight = [](A value) { return value * (A(1) - value); };
    A weighted = A(0), total = A(0);
    elements.for_turns([&](int i, int64_t j) {
      const A h = weight(elements.at(i, j));
      weighted += h * grads.at(i, j);
      total += h;
    });
    weighted = Group::sum(weighted);
    total = Group::sum(total);
    const A mean = weighted / total;
    elements.for_turns([&](int i, int64_t j) {
      const A value = weight(elements.at(i, j)) * (grads.at(i, j) - mean);
      out[j] = narrow<T>(total == A(0) ? A(0) : value);
    });
  }
}

}  // namespace effops::binary
