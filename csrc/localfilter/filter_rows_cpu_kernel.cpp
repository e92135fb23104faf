// Rows of filter_flow with few channels on the CPU.
//
//   out_c(p) = sum_k T_k(p) X_c(p + o_k),  T = softmax_k L (or L as given, or divided by its sum)
//
// and the expected flow sum_k T_k o_k, in one pass over the logits L: an online softmax whose running maximum
// is renewed once per group of taps, of which the registers hold the logits.
//
// Parallelism: the caller splits the rows; lanes are neighbouring pixels, the taps of a group the inner loop.
// Groups are small because the planes of the taps may lie a power of two apart: then their lines compete for
// the few places of one set of the caches.
// Bytes: every logit once, from memory; pixels and sums from the first-level cache. Bound by memory bandwidth
// or, for half precision, by exp (8 instructions of about 15 per tap and register with 3 channels).
#include "filter_rows_cpu_kernel.h"
#include "lanes_cpu.h"

namespace effops::localfilter::EFFOPS_ISA {
namespace {

constexpr int64_t kGroup = 6;  // taps at a time
constexpr int64_t kPrefetchedBytes = 2048;  // ahead in each plane

// Once per line of pixels.
template <typename F>
EFFOPS_INLINE void prefetch_ahead(const F* plane, int64_t x) {
  if (x * static_cast<int64_t>(sizeof(F)) % 64 == 0) {
    __builtin_prefetch(reinterpret_cast<const char*>(plane + x) + kPrefetchedBytes);
  }
}

// Taps of the group that begins at dx: 6, 5, 3, 2 or 1.
EFFOPS_INLINE int64_t group_size(int64_t kernel, int64_t dx) {
  const int64_t left = kernel - dx;
  return left >= kGroup ? kGroup : left == 4 ? 3 : left;
}

// ---------------------------------------------------------------------------------------- forward

// A group of taps of one row of taps, for one register of pixels.
template <typename F, int C>
struct GroupSums {
  using A = accumulator_t<F>;
  using V = typename Vec<A>::type;

  const FilterRow& row;
  const FilterSums& job;
  int64_t dy, dx;
  const F* planes;  // of tap (dy, dx)
  const A* pixels;  // that tap reads, of channel 0
  bool inside;  // the row of taps

  GroupSums(const FilterRow& row, const FilterSums& job, int64_t dy, int64_t dx)
      : row(row),
        job(job),
        dy(dy),
        dx(dx),
        planes(static_cast<const F*>(row.filters) + (dy * row.kernel + dx) * row.plane_stride),
        pixels(static_cast<const A*>(job.image) + dy * job.row_stride + dx),
        inside(row.rows_inside[dy]) {}

  A* sums(int which) const { return static_cast<A*>(job.sums) + which * job.sums_stride; }
  A offset(int64_t tap) const { return static_cast<A>(row.first_offset + tap * row.step); }
  bool at_edge(int64_t x) const { return !inside || x < row.all_first || x + Vec<A>::lanes > row.all_last; }
  typename Vec<A>::mask lanes_inside(int64_t x, int64_t g) const {
    return lanes_within<A>(x, inside ? row.first[dx + g] : 0, inside ? row.last[dx + g] : 0);
  }

  // Adds weights w (those inside: seen) of tap g to the sums.
  struct Totals {
    V channels[C + 1], flow_x, weights;  // C may be 0
  };
  EFFOPS_INLINE void add(Totals& totals, int64_t x, int64_t g, V w, V seen) const {
    totals.weights += w;
    if (job.flow) totals.flow_x += w * offset(dx + g);
    for (int c = 0; c < C; ++c) totals.channels[c] += seen * load<V>(pixels + c * job.channel_stride + x + g);
  }
  EFFOPS_INLINE Totals start(int64_t x, V scale) const {
    Totals totals;
    for (int c = 0; c < C; ++c) totals.channels[c] = load<V>(sums(c) + x) * scale;
    if (job.flow) totals.flow_x = load<V>(sums(C) + x) * scale;
    totals.weights = V{};
    return totals;
  }
  EFFOPS_INLINE void finish(const Totals& totals, int64_t x, V scale) const {
    for (int c = 0; c < C; ++c) store(sums(c) + x, totals.channels[c]);
    if (job.flow) {
      store(sums(C) + x, totals.flow_x);
      store(sums(C + 1) + x, load<V>(sums(C + 1) + x) * scale + totals.weights * offset(dy));
    }
    store(sums(C + 2) + x, load<V>(sums(C + 2) + x) * scale + totals.weights);
  }

  template <int G, bool Part>
  EFFOPS_INLINE void softmax(int64_t x) const {
    V logits[G];
    for (int g = 0; g < G; ++g) {
      prefetch_ahead(planes + g * row.plane_stride, x);
      logits[g] = load_lanes<Part>(planes + g * row.plane_stride, x, row.count);
    }
    if (row.renormalize && at_edge(x)) {
      for (int g = 0; g < G; ++g) {
        logits[g] = lanes_inside(x, g) ? logits[g] : broadcast(-static_cast<A>(__builtin_inff()));
      }
    }
    const V before = load<V>(sums(C + 3) + x);
    V most = before;
    for (int g = 0; g < G; ++g) most = larger(most, logits[g]);
    store(sums(C + 3) + x, most);
    const V scale = exp_weight<F>(before - most);
    Totals totals = start(x, scale);
    for (int g = 0; g < G; ++g) {
      const V w = exp_weight<F>(logits[g] - most);
      add(totals, x, g, w, w);  // what is outside is 0 in the staged image, and w is finite or everything NaN
    }
    finish(totals, x, scale);
  }

  template <bool Part>
  EFFOPS_INLINE void plain(int64_t x, int64_t count) const {
    const V one = broadcast(A(1));
    Totals totals = start(x, one);
    const bool edge = at_edge(x);
    for (int64_t g = 0; g < count; ++g) {
      const V w = load_lanes<Part>(planes + g * row.plane_stride, x, row.count);
      const V seen = edge ? (lanes_inside(x, g) ? w : V{}) : w;
      add(totals, x, g, row.renormalize ? seen : w, seen);
    }
    finish(totals, x, one);
  }
};

template <typename F, int C, int G>
void softmax_group(const FilterRow& row, const FilterSums& job, int64_t dy, int64_t dx) {
  const GroupSums<F, C> group(row, job, dy, dx);
  constexpr int lanes = Vec<accumulator_t<F>>::lanes;
  int64_t x = 0;
  for (; x + lanes <= row.count; x += lanes) group.template softmax<G, false>(x);
  // The end of the row tap by tap: a group of each size for it would double the code.
  for (int g = 0; x < row.count && g < G; ++g)
    GroupSums<F, C>(row, job, dy, dx + g).template softmax<1, true>(x);
}

template <typename F, int C>
void softmax_sums(const FilterRow& row, const FilterSums& job, int64_t dy) {
  for (int64_t dx = 0; dx < row.kernel; dx += group_size(row.kernel, dx)) {
    switch (group_size(row.kernel, dx)) {
      case 1: softmax_group<F, C, 1>(row, job, dy, dx); break;
      case 2: softmax_group<F, C, 2>(row, job, dy, dx); break;
      case 3: softmax_group<F, C, 3>(row, job, dy, dx); break;
      case 5: softmax_group<F, C, 5>(row, job, dy, dx); break;
      default: softmax_group<F, C, kGroup>(row, job, dy, dx);
    }
  }
}

template <typename F, int C>
void plain_sums(const FilterRow& row, const FilterSums& job, int64_t dy) {
  for (int64_t dx = 0, size; dx < row.kernel; dx += size) {
    size = group_size(row.kernel, dx);
    const GroupSums<F, C> group(row, job, dy, dx);
    for_lanes<accumulator_t<F>>(row.count, [&](int64_t x, auto part) __attribute__((always_inline)) {
      group.template plain<part.value>(x, size);
    });
  }
}

template <typename A>
void fill(A* row, int64_t count, A value) {
  for (int64_t x = 0; x < count; ++x) row[x] = value;
}

// Divides by the sums of the weights and leaves the normalizer in their place.
template <typename A, int C>
void normalize_sums(const FilterRow& row, const FilterSums& job) {
  using V = typename Vec<A>::type;
  A* sums = static_cast<A*>(job.sums);
  for (int64_t x = 0; x < row.count; x += Vec<A>::lanes) {
    const V total = load<V>(sums + (C + 2) * job.sums_stride + x);
    for (int r = 0; r < C + (job.flow ? 2 : 0); ++r) {
      A* at = sums + r * job.sums_stride + x;
      store(at, load<V>(at) / total);
    }
    if (row.normalize == kSoftmax) {
      const V most = load<V>(sums + (C + 3) * job.sums_stride + x);
      store(sums + (C + 2) * job.sums_stride + x, most + log_lanes(total));
    }
  }
}

template <typename F, int C>
void filter_sums(const FilterRow& row, const FilterSums& job) {
  using A = accumulator_t<F>;
  A* sums = static_cast<A*>(job.sums);
  fill(sums, (C + 3) * job.sums_stride, A(0));
  fill(sums + (C + 3) * job.sums_stride, job.sums_stride, kLowest<A>);
  for (int64_t dy = 0; dy < row.kernel; ++dy) {
    if (row.renormalize && !row.rows_inside[dy]) continue;
    if (row.normalize == kSoftmax) {
      softmax_sums<F, C>(row, job, dy);
    } else {
      plain_sums<F, C>(row, job, dy);
    }
  }
  if (row.normalize != kNone || row.renormalize) normalize_sums<A, C>(row, job);
}

// ---------------------------------------------------------------------------------------- backward

// dL_k = p_k (s_k - D) for softmax, (s_k - D) / S for the others, with s_k = sum_c dY_c X_c(k) + o_k . dflow.
template <typename F, int C>
struct GroupGradient {
  using A = accumulator_t<F>;
  using V = typename Vec<A>::type;

  const FilterRow& row;
  const FilterGradient& job;
  int64_t dx, count;

  A offset(int64_t tap) const { return static_cast<A>(row.first_offset + tap * row.step); }

  template <bool Part, bool Softmax>
  EFFOPS_INLINE void run(int64_t x) const {
    const A* grad = static_cast<const A*>(job.grad) + x;
    const V normalizer = load_lanes<Part>(static_cast<const A*>(job.normalizer), x, row.count);
    const V mean = load_lanes<Part>(static_cast<const A*>(job.mean), x, row.count);
    V grads[C + 1];
    for (int c = 0; c < C; ++c) grads[c] = load<V>(grad + c * job.grad_stride);
    const A* grad_flow = static_cast<const A*>(job.grad_flow);
    V flow_x{}, constant = -mean;  // the parts of s - D that the taps of a row share
    if (grad_flow) {
      flow_x = load<V>(grad_flow + x);
      constant += offset(job.tap_row) * load<V>(grad_flow + job.grad_stride + x);
    }
    const bool inside = row.rows_inside[job.tap_row];
    const bool edge = !inside || x < row.all_first || x + Vec<A>::lanes > row.all_last;
    const int64_t tap = job.tap_row * row.kernel + dx;
    const F* plane = static_cast<const F*>(row.filters) + tap * row.plane_stride;
    F* target = static_cast<F*>(job.grad_filters) + tap * job.grad_plane_stride;
    const A* pixels = static_cast<const A*>(job.image) + dx + x;
    A* weights = static_cast<A*>(job.weights) + dx * job.weights_stride + x;
    for (int64_t g = 0; g < count; ++g, plane += row.plane_stride, target += job.grad_plane_stride) {
      prefetch_ahead(plane, x);
      const V given = load_lanes<Part>(plane, x, row.count);
      const V weight = Softmax ? exp_weight<F>(given - normalizer) : given * normalizer;
      V slope{};
      for (int c = 0; c < C; ++c) slope += grads[c] * load<V>(pixels + g + c * job.channel_stride);
      V result = slope + constant;
      if (grad_flow) result += flow_x * offset(dx + g);
      const auto seen = [&] {
        return lanes_within<A>(x, inside ? row.first[dx + g] : 0, inside ? row.last[dx + g] : 0);
      };
      if (edge) result = seen() ? result : constant + flow_x * offset(dx + g);
      result *= Softmax ? weight : normalizer;
      if (edge && row.renormalize) result = seen() ? result : V{};
      if (job.grad_filters) store_lanes<Part>(target, x, row.count, result);
      store_scratch<Part>(weights + g * job.weights_stride - x, x, row.count, weight);
    }
  }
};

template <typename F, int C>
void filter_gradient(const FilterRow& row, const FilterGradient& job) {
  for (int64_t dx = 0, size; dx < row.kernel; dx += size) {
    size = group_size(row.kernel, dx);
    const GroupGradient<F, C> group{row, job, dx, size};
    for_lanes<accumulator_t<F>>(row.count, [&](int64_t x, auto part) __attribute__((always_inline)) {
      if (row.normalize == kSoftmax) {
        group.template run<part.value, true>(x);
      } else {
        group.template run<part.value, false>(x);
      }
    });
  }
}

}  // namespace

#define EFFOPS_BY_CHANNELS(kernel, F) {&kernel<F, 0>, &kernel<F, 1>, &kernel<F, 2>, &kernel<F, 3>}
#define EFFOPS_BY_TYPE(kernel)                                                                              \
  {EFFOPS_BY_CHANNELS(kernel, float), EFFOPS_BY_CHANNELS(kernel, double), EFFOPS_BY_CHANNELS(kernel, bf16), \
   EFFOPS_BY_CHANNELS(kernel, f16)}

extern const FilterRowKernels filter_row_kernels = {EFFOPS_BY_TYPE(filter_sums),
                                                    EFFOPS_BY_TYPE(filter_gradient)};

}  // namespace effops::localfilter::EFFOPS_ISA
