// binnorm on the CPU.
//
//   y = sigma(x + shift), rows sum to k        dx = h (dy - <h, dy> / <h, 1>), h = y (1 - y)
//
// Parallelism: the caller splits the rows. Lanes are elements. About three passes of sums of the sigmoid find
// the shift (binnorm_math.h), a last one writes y; two passes make the gradient.
// Bytes: x and y, or dy, y and dx, each once from memory where a row fits in the caches; nothing is stored
// between passes. Bound by the instructions of exp (about 25 per register and pass).
#include "binnorm_cpu_kernel.h"
#include "../common/simd.h"
#include "binnorm_math.h"

namespace effops::binary::EFFOPS_ISA {
namespace {

using namespace effops::simd;

// Elements whose sums are kept in the accumulator type: those of a longer row are added up in double.
constexpr int64_t kChunk = 512;

template <typename T>
struct Lanes {
  using A = accumulator_t<T>;
  using V = typename Vec<A>::type;
  static constexpr int count = Vec<A>::lanes;
};

// Calls f(register, first element, elements of the register) for a row; lanes after its end hold `rest`.
template <typename T, typename F>
EFFOPS_INLINE void for_lanes(const T* row, int64_t length, T rest, const F& f) {
  constexpr int lanes = Lanes<T>::count;
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) f(load_wide(row + i), i, lanes);
  if (i == length) return;
  T padded[lanes];
  for (int j = 0; j < lanes; ++j) padded[j] = i + j < length ? row[i + j] : rest;
  f(load_wide(static_cast<const T*>(padded)), i, static_cast<int>(length - i));
}

template <typename T, typename V>
EFFOPS_INLINE void store_lanes(T* to, V values, int count) {
  constexpr int lanes = Lanes<T>::count;
  if (count == lanes) return store_narrow(to, values);
  T padded[lanes];
  store_narrow(padded, values);
  for (int j = 0; j < count; ++j) to[j] = padded[j];
}

// ----------------------------------------------------------------------------------------------- forward

// Of any row, one element at a time.
template <typename T, typename A = accumulator_t<T>>
RowSummary<A> summarise_any(const T* x, int64_t length) {
  RowSummary<A> row{A(INFINITY), -A(INFINITY), 0, 0, 0, 0, false};
  for (int64_t i = 0; i < length; ++i) {
    const A value = widen(x[i]);
    row.has_nan |= value != value;
    row.positive_infinite += value == A(INFINITY);
    if (!(fabs(value) < A(INFINITY))) continue;
    row.finite += 1;
    row.min = value < row.min ? value : row.min;
    row.max = value > row.max ? value : row.max;
    row.sum += value;
    row.squares += value * value;
  }
  return row;
}

template <typename T, typename A = accumulator_t<T>>
EFFOPS_INLINE RowSummary<A> summarise(const T* x, int64_t length) {
  using V = typename Lanes<T>::V;
  V min = broadcast(A(INFINITY)), max = -min, sum{}, squares{}, special{};
  // The first element stands for those after the end, and is taken out of the sums again.
  const A first = widen(x[0]);
  for_lanes(x, length, x[0], [&](V value, int64_t, int) {
    min = value < min ? value : min;
    max = value > max ? value : max;
    sum += value;
    squares += value * value;
    special += value * A(0);  // NaN for infinite values and NaN
  });
  if (sum_of_lanes<A>(special) != A(0)) return summarise_any(x, length);
  const A extra = static_cast<A>((Lanes<T>::count - length % Lanes<T>::count) % Lanes<T>::count);
  return {min_of_lanes<A>(min),
          max_of_lanes<A>(max),
          sum_of_lanes<A>(sum) - extra * first,
          sum_of_lanes<A>(squares) - extra * first * first,
          length,
          0,
          false};
}

template <typename A>
struct Sigmoid {
  typename Vec<A>::type nearer;  // min(y, 1 - y)
  typename Vec<A>::mask upper;  // y >= 1/2
};

template <typename A, typename V>
EFFOPS_INLINE Sigmoid<A> sigmoid(V x, A origin, A offset) {
  const V z = (x - origin) + offset;
  const V e = simd::exp<A>(z < 0 ? z : -z);
  return {e / (e + A(1)), z >= 0};
}

template <typename T, typename A = accumulator_t<T>>
EFFOPS_INLINE Balance<A> balance_of(const T* x, int64_t length, int64_t k, A origin, A offset) {
  using V = typename Lanes<T>::V;
  using Mask = typename Vec<A>::mask;
  int64_t upper = 0;
  double excess = 0, slope = 0, curvature = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    V signed_sum{}, slopes{}, bends{};
    Mask uppers{};  // minus the count
    const int64_t count = length - begin < kChunk ? length - begin : kChunk;
    for_lanes(x + begin, count, narrow<T>(-A(INFINITY)), [&](V value, int64_t, int) {
      const Sigmoid<A> y = sigmoid(value, origin, offset);
      const V h = y.nearer - y.nearer * y.nearer, bend = h - 2 * h * y.nearer;
      uppers += y.upper;
      signed_sum += y.upper ? -y.nearer : y.nearer;
      slopes += h;
      bends += y.upper ? -bend : bend;
    });
    upper -= sum_of_lanes<A>(uppers);
    excess += sum_of_lanes<A>(signed_sum);
    slope += sum_of_lanes<A>(slopes);
    curvature += sum_of_lanes<A>(bends);
  }
  return {static_cast<A>(static_cast<double>(upper - k) + excess), static_cast<A>(slope),
          static_cast<A>(curvature)};
}

template <typename T>
void forward(const void* x, int64_t rows, int64_t length, int64_t k, void* y) {
  using A = accumulator_t<T>;
  using V = typename Lanes<T>::V;
  const A logit = logit_of<A>(k, length);
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = static_cast<const T*>(x) + r * length;
    T* out = static_cast<T*>(y) + r * length;
    const RowSummary<A> summary = summarise(row, length);
    const RowKind kind = kind_of(summary, k);
    if (kind != RowKind::kSolve) {
      for (int64_t i = 0; i < length; ++i) out[i] = narrow<T>(value_without_shift<A>(kind, widen(row[i])));
      continue;
    }
    ShiftSearch<A> search(summary, summary.finite == length
                                       ? logit
                                       : logit_of<A>(k - summary.positive_infinite, summary.finite));
    while (search.step(balance_of(row, length, k, search.origin, static_cast<A>(search.offset)))) {
    }
    const A origin = search.origin, offset = static_cast<A>(search.offset);
    for_lanes(row, length, T{}, [&](V value, int64_t i, int count) {
      const Sigmoid<A> result = sigmoid(value, origin, offset);
      store_lanes(out + i, result.upper ? 1 - result.nearer : result.nearer, count);
    });
  }
}

// ---------------------------------------------------------------------------------------------- backward

// Calls f(y, dy, first element, elements), zeros after the end.
template <typename T, typename F>
EFFOPS_INLINE void for_pairs(const T* y, const T* grad, int64_t length, const F& f) {
  constexpr int lanes = Lanes<T>::count;
  const int64_t full = length / lanes * lanes;
  for (int64_t i = 0; i < full; i += lanes) f(load_wide(y + i), load_wide(grad + i), i, lanes);
  if (full == length) return;
  T rest_y[lanes] = {}, rest_grad[lanes] = {};
  for (int64_t i = full; i < length; ++i) {
    rest_y[i - full] = y[i];
    rest_grad[i - full] = grad[i];
  }
  f(load_wide(static_cast<const T*>(rest_y)), load_wide(static_cast<const T*>(rest_grad)), full,
    static_cast<int>(length - full));
}

template <typename T>
void backward(const void* grad_output, const void* y, int64_t rows, int64_t length, void* grad_x) {
  using A = accumulator_t<T>;
  using V = typename Lanes<T>::V;
  for (int64_t r = 0; r < rows; ++r) {
    const T* grad = static_cast<const T*>(grad_output) + r * length;
    const T* row = static_cast<const T*>(y) + r * length;
    T* out = static_cast<T*>(grad_x) + r * length;
    double weighted = 0, total = 0;
    for (int64_t begin = 0; begin < length; begin += kChunk) {
      V sums[2] = {};
      const int64_t count = length - begin < kChunk ? length - begin : kChunk;
      for_pairs(row + begin, grad + begin, count, [&](V value, V g, int64_t, int) {
        const V h = value * (1 - value);
        sums[0] += h * g;
        sums[1] += h;
      });
      weighted += sum_of_lanes<A>(sums[0]);
      total += sum_of_lanes<A>(sums[1]);
    }
    if (total == 0) {
      for (int64_t i = 0; i < length; ++i) out[i] = T{};
      continue;
    }
    const A mean = static_cast<A>(weighted / total);
    for_pairs(row, grad, length, [&](V value, V g, int64_t i, int count) {
      store_lanes(out + i, value * (1 - value) * (g - mean), count);
    });
  }
}

}  // namespace

extern const BinnormKernels binnorm_kernels = {
    {&forward<float>, &forward<double>, &forward<bf16>, &forward<f16>},
    {&backward<float>, &backward<double>, &backward<bf16>, &backward<f16>},
};

}  // namespace effops::binary::EFFOPS_ISA
