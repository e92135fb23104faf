// Kernels on rows of mean_shift, forward: what comes before and after the pairs. No torch, no launches.
#pragma once

#include "mean_shift_pairs.cuh"

namespace effops::pairwise {

template <typename T>
struct Advance {
  SplitSums<T> sums;    // V of the rows
  SplitSums<T> totals;  // d, of one channel
  int64_t batch, rows, channels;
  T eta;
  const T* from;  // [B, rows, channels]
  T* to;          // the same; may be `from`
  T* copy;        // the same, or null
  PaddedPoints<T> padded;  // of the rows, for the next iteration
  T* saved;                // [2, B, rows]: d, ||y||; or null
  StopRule stop;           // in the iteration before
  unsigned long long* moved;  // [B], of this iteration; or null
};

// The next iterate: y = (1 - eta) x + eta V / d (x where d is 0), y / ||y||.
// Bytes: V and four times the iterate; bound by memory, and by launching.
template <typename T>
__global__ void __launch_bounds__(kPointThreads) mean_shift_advance_kernel(Advance<T> step) {
  const PointRow place(step.rows);
  if (place.image >= step.batch) return;
  const int64_t index = place.image * step.rows + place.row, begin = index * step.channels;
  const bool stopped = step.stop.stops(place.image);
  const T total = stopped ? T(0) : step.totals.at(place.image, place.row, 0);
  T x[kLaneChannels], y[kLaneChannels];
  double square = 0;
  for_lane_channels(place.lane, step.channels, [&](int i, int64_t channel) {
    y[i] = x[i] = step.from[begin + channel];
    if (total != T(0)) {
      y[i] = (T(1) - step.eta) * x[i] + step.eta * (step.sums.at(place.image, place.row, channel) / total);
    }
    square += static_cast<double>(y[i]) * y[i];
  });
  const double norm = sqrt(add_lanes(square)), divisor = divisor_of(norm);
  double moved = 0;
  for_lane_channels(place.lane, step.channels, [&](int i, int64_t channel) {
    const T value = stopped ? x[i] : static_cast<T>(y[i] / divisor);
    step.to[begin + channel] = value;
    if (step.copy != nullptr) step.copy[begin + channel] = value;
    step.padded.put(place.image, place.row, channel, value);
    const double difference = static_cast<double>(value) - x[i];
    moved += difference * difference;
  });
  if (step.saved != nullptr && place.lane == 0) {
    step.saved[index] = total;
    step.saved[step.batch * step.rows + index] = stopped ? T(0) : static_cast<T>(norm);
  }
  if (step.moved == nullptr) return;
  moved = sqrt(add_lanes(moved));
  // Positive numbers are ordered as their bits are. NaN counts as no move.
  if (place.lane == 0 && moved > 0) {
    atomicMax(step.moved + place.image, static_cast<unsigned long long>(bit_cast<uint64_t>(moved)));
  }
}

// moved: [iterations, B], or null.
__global__ void __launch_bounds__(kWeightThreads)
    count_steps_kernel(const unsigned long long* moved, int64_t batch, int64_t iterations, double tol,
                       int64_t* steps) {
  const int64_t image = int64_t{blockIdx.x} * kWeightThreads + threadIdx.x;
  if (image >= batch) return;
  int64_t count = 0;
  while (count < iterations) {
    const StopRule rule{moved != nullptr ? moved + count * batch : nullptr, tol};
    ++count;
    if (rule.stops(image)) break;
  }
  steps[image] = count;
}

}  // namespace effops::pairwise
