// Rows of tiles on the CPU: the weights of filters, their gradients, staged pixels and written outputs.
//
// Parallelism: the caller splits the tiles; lanes are neighbouring pixels. The planes of the taps are read
// one after the other: many at a time would compete for the few places of one set of the caches, and for the
// prefetchers.
// Bytes: filters once from memory (backward: once more), the rest from the caches. Bound by memory bandwidth
// or exp.
#include "tile_rows_cpu_kernel.h"
#include "lanes_cpu.h"

namespace effops::localfilter::EFFOPS_ISA {
namespace {

// Where the taps of a row of filters read.
template <typename A>
struct TapRange {
  const FilterRow& row;

  A offset(int64_t tap) const { return static_cast<A>(row.first_offset + tap * row.step); }
  EFFOPS_INLINE bool at_edge(int64_t tap_row, int64_t x) const {
    return !row.rows_inside[tap_row] || x < row.all_first || x + Vec<A>::lanes > row.all_last;
  }
  EFFOPS_INLINE typename Vec<A>::mask lanes_inside(int64_t dy, int64_t dx, int64_t x) const {
    const bool inside = row.rows_inside[dy];
    return lanes_within<A>(x, inside ? row.first[dx] : 0, inside ? row.last[dx] : 0);
  }
};

// Calls f(tap, dy, dx, x, part) tap by tap.
template <typename A, typename F>
EFFOPS_INLINE void for_taps(const FilterRow& row, const F& f) {
  for (int64_t dy = 0, tap = 0; dy < row.kernel; ++dy) {
    for (int64_t dx = 0; dx < row.kernel; ++dx, ++tap) {
      for_lanes<A>(row.count,
                   [&](int64_t x, auto part) __attribute__((always_inline)) { f(tap, dy, dx, x, part); });
    }
  }
}

template <typename F, typename A = accumulator_t<F>>
struct Weigh {
  using V = typename Vec<A>::type;
  static constexpr A kInfinity = static_cast<A>(__builtin_inff());

  const FilterRow& row;
  const WeighRow& job;
  TapRange<A> range{row};

  A* weights(int64_t tap) const { return static_cast<A*>(job.weights) + tap * job.tap_stride; }
  A* sums(int which) const { return static_cast<A*>(job.sums) + which * job.sums_stride; }

  // The logit of a tap; what is outside and does not count is `uncounted`.
  template <bool Part>
  EFFOPS_INLINE V logit(int64_t tap, int64_t dy, int64_t dx, int64_t x, A uncounted) const {
    V value = load_lanes<Part>(static_cast<const F*>(row.filters) + tap * row.plane_stride, x, row.count);
    if (job.similarities) value = value * static_cast<A>(job.scale);
    if ((job.similarities || row.renormalize) && range.at_edge(dy, x)) {
      const V other = broadcast(row.renormalize ? uncounted : A(0));
      value = range.lanes_inside(dy, dx, x) ? value : other;
    }
    return value;
  }

  template <bool Part>
  EFFOPS_INLINE void keep(int64_t tap, int64_t x, V weight) const {
    store_scratch<Part>(weights(tap), x, row.count, weight);
  }

  void find_largest() const {
    A* most = sums(3);
    for_taps<A>(
        row, [&](int64_t tap, int64_t dy, int64_t dx, int64_t x, auto part) __attribute__((always_inline)) {
          const V value = logit<part.value>(tap, dy, dx, x, -kInfinity);
          store(weights(tap) + x, value);
          store(most + x, larger(load<V>(most + x), value));
        });
  }

  void count_outside() const {
    for (int64_t x = 0; x < row.count; x += Vec<A>::lanes) {
      store(sums(2) + x, exp_weight<F>(-load<V>(sums(3) + x)) * static_cast<A>(job.outside));
    }
  }

  template <bool Softmax>
  void add_weights() const {
    for_taps<A>(
        row, [&](int64_t tap, int64_t dy, int64_t dx, int64_t x, auto part) __attribute__((always_inline)) {
          V weight;
          if constexpr (Softmax) {
            weight = exp_weight<F>(load<V>(weights(tap) + x) - load<V>(sums(3) + x));
          } else {
            weight = logit<part.value>(tap, dy, dx, x, A(0));
          }
          store(sums(2) + x, load<V>(sums(2) + x) + weight);
          if (job.flow) {
            store(sums(0) + x, load<V>(sums(0) + x) + weight * range.offset(dx));
            store(sums(1) + x, load<V>(sums(1) + x) + weight * range.offset(dy));
          }
          if (range.at_edge(dy, x)) weight = range.lanes_inside(dy, dx, x) ? weight : V{};
          keep<part.value>(tap, x, weight);
        });
  }

  void finish() const {
    for (int64_t x = 0; x < row.count; x += Vec<A>::lanes) {
      const V total = load<V>(sums(2) + x);
      const bool divided = row.normalize != kNone || row.renormalize;
      const V divisor = divided ? total : broadcast(A(1));
      if (row.normalize == kSoftmax) store(sums(2) + x, load<V>(sums(3) + x) + log_lanes(total));
      if (job.flow) {
        for (int axis = 0; axis < 2; ++axis) store(sums(axis) + x, load<V>(sums(axis) + x) / divisor);
      }
      store(sums(3) + x, divisor);
    }
  }

  void forward() const {
    for (int64_t x = 0; x < row.count; x += Vec<A>::lanes) {
      for (int which = 0; which < 3; ++which) store(sums(which) + x, V{});
      store(sums(3) + x, broadcast(job.outside > 0 ? A(0) : kLowest<A>));
    }
    if (row.normalize == kSoftmax) {
      find_largest();
      if (job.outside > 0) count_outside();
      add_weights<true>();
    } else {
      add_weights<false>();
    }
    finish();
  }

  void backward() const {
    const A* normalizer = static_cast<const A*>(job.normalizer);
    const bool softmax = row.normalize == kSoftmax;
    for_taps<A>(
        row, [&](int64_t tap, int64_t dy, int64_t dx, int64_t x, auto part) __attribute__((always_inline)) {
          const V by = load_lanes<part.value>(normalizer, x, row.count);
          const V value = logit<part.value>(tap, dy, dx, x, A(0));
          keep<part.value>(tap, x, softmax ? exp_weight<F>(value - by) : value * by);
        });
  }
};

template <typename F>
void weigh(const FilterRow& row, const WeighRow& job) {
  const Weigh<F> weigh{row, job};
  if (job.normalizer) {
    weigh.backward();
  } else {
    weigh.forward();
  }
}

template <typename F, typename A = accumulator_t<F>>
void slopes(const FilterRow& row, const SlopeRow& job) {
  using V = typename Vec<A>::type;
  const TapRange<A> range{row};
  const A* flow = static_cast<const A*>(job.grad_flow);
  for_taps<A>(row, [&](int64_t tap, int64_t dy, int64_t dx, int64_t x,
                       auto part) __attribute__((always_inline)) {
    A* slope = static_cast<A*>(job.slopes) + tap * job.tap_stride + x;
    V value = load<V>(slope);
    const bool edge = range.at_edge(dy, x);
    if (edge) value = range.lanes_inside(dy, dx, x) ? value : V{};
    if (flow)
      value += range.offset(dx) * load<V>(flow + x) + range.offset(dy) * load<V>(flow + job.flow_stride + x);
    value -= load_lanes<part.value>(static_cast<const A*>(job.mean), x, row.count);
    const V by = load_lanes<part.value>(static_cast<const A*>(job.normalizer), x, row.count);
    const V weight = load<V>(static_cast<const A*>(job.weights) + tap * job.tap_stride + x);
    value *= row.normalize == kSoftmax ? weight : by;
    if (edge && (row.renormalize || job.similarities)) value = range.lanes_inside(dy, dx, x) ? value : V{};
    if (job.similarities) {
      store_scratch<part.value>(slope - x, x, row.count, value * static_cast<A>(job.scale));
    } else {
      F* target = static_cast<F*>(job.grad_filters) + tap * job.grad_plane_stride;
      store_lanes<part.value>(target, x, row.count, value);
    }
  });
}

template <typename T, typename A = accumulator_t<T>>
void stage(const void* row, int64_t pixel_stride, const StagedColumns& columns, void* target) {
  const T* pixels = static_cast<const T*>(row);
  A* staged = static_cast<A*>(target);
  const auto stage_between = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t column = columns.columns[i];
      staged[i] = column >= 0 ? widen(pixels[column * pixel_stride]) : A(0);
    }
  };
  int64_t i = columns.run_first;
  stage_between(0, i);
  if (pixel_stride == 1 && i < columns.run_last) {
    const T* run = pixels + columns.columns[i] - i;
    for (; i + Vec<A>::lanes <= columns.run_last; i += Vec<A>::lanes) store(staged + i, load_wide(run + i));
  }
  stage_between(i, columns.count);
}

template <typename T, typename A = accumulator_t<T>>
void write(const void* scratch, const void* divisors, int64_t count, void* row, int64_t pixel_stride) {
  using V = typename Vec<A>::type;
  const A *sums = static_cast<const A*>(scratch), *by = static_cast<const A*>(divisors);
  T* target = static_cast<T*>(row);
  if (pixel_stride == 1) {
    for_lanes<A>(count, [&](int64_t x, auto part) __attribute__((always_inline)) {
      V value = load<V>(sums + x);
      if (by) value /= load<V>(by + x);
      store_lanes<part.value>(target, x, count, value);
    });
  } else {
    for (int64_t x = 0; x < count; ++x) target[x * pixel_stride] = narrow<T>(by ? sums[x] / by[x] : sums[x]);
  }
}

template <typename A>
void fold(const void* staged, const StagedColumns& columns, void* row) {
  using V = typename Vec<A>::type;
  const A* from = static_cast<const A*>(staged);
  A* pixels = static_cast<A*>(row);
  const auto fold_between = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t column = columns.columns[i];
      if (column >= 0) pixels[column] += from[i];
    }
  };
  int64_t i = columns.run_first;
  fold_between(0, i);
  if (i < columns.run_last) {
    A* run = pixels + columns.columns[i] - i;
    for (; i + Vec<A>::lanes <= columns.run_last; i += Vec<A>::lanes) {
      store(run + i, load<V>(run + i) + load<V>(from + i));
    }
  }
  fold_between(i, columns.count);
}

template <typename A>
void add_products(const void* a, const void* b, int64_t count, void* sums) {
  using V = typename Vec<A>::type;
  A* target = static_cast<A*>(sums);
  for (int64_t x = 0; x < count; x += Vec<A>::lanes) {
    store(target + x, load<V>(target + x) +
                          load<V>(static_cast<const A*>(a) + x) * load<V>(static_cast<const A*>(b) + x));
  }
}

template <typename A>
void add(const void* row, int64_t count, void* sums) {
  const A* from = static_cast<const A*>(row);
  A* target = static_cast<A*>(sums);
  for (int64_t x = 0; x < count; ++x) target[x] += from[x];
}

}  // namespace

#define EFFOPS_BY_TYPE(kernel) {&kernel<float>, &kernel<double>, &kernel<bf16>, &kernel<f16>}

extern const TileRowKernels tile_row_kernels = {
    EFFOPS_BY_TYPE(weigh),      EFFOPS_BY_TYPE(slopes),        EFFOPS_BY_TYPE(stage),
    EFFOPS_BY_TYPE(write),      {&fold<float>, &fold<double>}, {&add_products<float>, &add_products<double>},
    {&add<float>, &add<double>}};

}  // namespace effops::localfilter::EFFOPS_ISA
