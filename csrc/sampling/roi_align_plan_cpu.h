// The weights of RoIs on each axis, added up over the samples of a bin. No torch.
#pragma once

#include <cstdint>
#include <vector>

#include "roi_align_cpu_kernel.h"
#include "roi_align_math.h"

namespace effops::sampling {

// AxisSums and the memory behind it. A is the accumulator type.
template <typename A>
struct AxisPlan {
  std::vector<int64_t> begin;
  std::vector<int32_t> source, target;
  std::vector<A> weight;

  AxisSums sums() const {
    return {static_cast<int64_t>(begin.size()) - 1, begin.data(), source.data(), weight.data(),
            target.empty() ? nullptr : target.data()};
  }
};

// Adds a term to the sum that began at `begin`. The samples of a bin move in one direction, and each reads
// two neighbours, so that an equal pixel is among the last few. A weight of 0 (a sample on a pixel's centre)
// stays a term of its own: 0 * Inf is NaN.
template <typename A>
void add_term(AxisPlan<A>& plan, size_t begin, int32_t pixel, A weight) {
  constexpr size_t kRecent = 4;
  const size_t end = plan.source.size(), oldest = end - begin > kRecent ? end - kRecent : begin;
  for (size_t k = oldest; k < end; ++k) {
    if (plan.source[k] == pixel && (plan.weight[k] == A(0)) == (weight == A(0))) {
      plan.weight[k] += weight;
      return;
    }
  }
  plan.source.push_back(pixel);
  plan.weight.push_back(weight);
}

// Bins as weighted sums of pixels: averages over the bin's samples.
template <typename A>
AxisPlan<A> sums_of_bins(const RoiAxis<A>& axis, int32_t bins) {
  AxisPlan<A> plan;
  plan.begin.reserve(bins + size_t{1});
  plan.source.reserve(size_t{4} * bins);
  plan.weight.reserve(size_t{4} * bins);
  plan.begin.push_back(0);
  for (int32_t bin = 0; bin < bins; ++bin) {
    const size_t begin = plan.source.size();
    for (int32_t s = 0; s < axis.samples; ++s) {
      const AxisSample<A> sample = sample_axis(axis, bin, s);
      if (sample.index < 0) continue;
      add_term(plan, begin, sample.index, A(1) - sample.fraction);
      if (sample.has_next) add_term(plan, begin, sample.index + 1, sample.fraction);
    }
    for (size_t k = begin; k < plan.weight.size(); ++k) plan.weight[k] /= static_cast<A>(axis.samples);
    plan.begin.push_back(static_cast<int64_t>(plan.source.size()));
  }
  return plan;
}

// The transpose: pixels that some bin reads, as weighted sums of bins. `place_of_pixel` has an element for
// every pixel of the axis, all -1, and is left like that.
template <typename A>
AxisPlan<A> sums_of_pixels(const AxisPlan<A>& bins, std::vector<int32_t>& place_of_pixel) {
  AxisPlan<A> plan;
  std::vector<int64_t> counts;
  for (const int32_t pixel : bins.source) {
    int32_t& place = place_of_pixel[pixel];
    if (place < 0) {
      place = static_cast<int32_t>(plan.target.size());
      plan.target.push_back(pixel);
      counts.push_back(0);
    }
    ++counts[place];
  }
  plan.begin.assign(1, 0);
  for (const int64_t count : counts) plan.begin.push_back(plan.begin.back() + count);
  plan.source.resize(bins.source.size());
  plan.weight.resize(bins.source.size());
  std::vector<int64_t> next(plan.begin.begin(), plan.begin.end() - 1);
  for (size_t bin = 0; bin + 1 < bins.begin.size(); ++bin) {
    for (int64_t k = bins.begin[bin]; k < bins.begin[bin + 1]; ++k) {
      const int64_t to = next[place_of_pixel[bins.source[k]]]++;
      plan.source[to] = static_cast<int32_t>(bin);
      plan.weight[to] = bins.weight[k];
    }
  }
  for (const int32_t pixel : plan.target) place_of_pixel[pixel] = -1;
  return plan;
}

template <typename A>
struct RoiPlan {
  AxisPlan<A> y, x;

  RoiSums sums(const RoiSettings& settings) const {
    return {y.sums(), x.sums(), settings.height, settings.width};
  }
};

}  // namespace effops::sampling
