// Kernels on rows of mean_shift: what comes before and after those on pairs. No torch, no launches.
#pragma once

#include "mean_shift_pairs.cuh"

namespace effops::pairwise {

constexpr int kWeightThreads = 256;

// ------------------------------------------------------------------------------------------ forward

// Copies the weights [B, points] (null: ones) of image blockIdx.x, whose padding is zeros. An image whose
// weights have no finite sum is lost.
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    copy_weights_kernel(const T* weights, int64_t points, PointScalars<T> padded, int32_t* lost) {
  const int64_t image = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < points; i += kWeightThreads) {
    const T weight = weights != nullptr ? weights[image * points + i] : T(1);
    padded.at(image, i) = weight;
    sum += fabs(static_cast<double>(weight));
  }
  EFFOPS_SHARED(double, parts, kWeightThreads / kWarpSize);
  sum = add_lanes(sum);
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < kWeightThreads / kWarpSize; ++i) total += parts[i];
  if (!is_finite(static_cast<T>(total))) atomicOr(lost + image, 1);
}

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

// ------------------------------------------------------------------------------------------ backward

template <typename T>
struct Retreat {
  const T* grad_output;  // of the iterate after this iteration, [B, rows, channels]; or null
  bool is_last;          // iteration: what follows has no part in the gradient
  SplitSums<T> sums;     // from the pairs of the iteration that follows
  T* carry;              // [B, rows, channels]: what passes by the pairs; of that iteration, then of this
  int64_t batch, rows, channels;
  T eta;
  const T *from, *to;    // the iterates before and after
  const T* saved;        // [2, B, rows]: d, ||y||
  PaddedPoints<T> x, h;  // of the rows, for the pairs
  PointScalars<T> tau;
  const int64_t* steps;
  int64_t iteration;
};

// From the gradient G of the iterate x' after an iteration, y / ||y|| with y = (1 - eta) x + eta V / d:
//   g = (G - x' (x' . G)) / ||y||,  h = eta g / d,  tau = h . V / d,
// where eta V / d = ||y|| x' - (1 - eta) x. Where d is 0, x is y: g passes on and h is 0.
template <typename T>
__global__ void __launch_bounds__(kPointThreads) mean_shift_retreat_kernel(Retreat<T> step) {
  const PointRow place(step.rows);
  if (place.image >= step.batch) return;
  const int64_t index = place.image * step.rows + place.row, begin = index * step.channels;
  const int64_t steps = step.steps[place.image];
  const bool has_pairs = !step.is_last && step.iteration + 1 < steps, stopped = step.iteration >= steps;
  T gradient[kLaneChannels];
  double dot = 0;
  for_lane_channels(place.lane, step.channels, [&](int i, int64_t channel) {
    gradient[i] = step.grad_output != nullptr ? step.grad_output[begin + channel] : T(0);
    if (!step.is_last) gradient[i] += step.carry[begin + channel];
    if (has_pairs) gradient[i] += step.sums.at(place.image, place.row, channel);
    dot += static_cast<double>(gradient[i]) * step.to[begin + channel];
  });
  if (stopped) {
    for_lane_channels(place.lane, step.channels,
                      [&](int i, int64_t channel) { step.carry[begin + channel] = gradient[i]; });
    return;
  }
  const T total = step.saved[index];
  const double norm = step.saved[step.batch * step.rows + index], divisor = divisor_of(norm);
  dot = norm < kSmallestNorm ? 0 : add_lanes(dot);
  const double to_h = total == T(0) ? 0 : step.eta / static_cast<double>(total);
  double tau = 0;
  for_lane_channels(place.lane, step.channels, [&](int i, int64_t channel) {
    const double next = step.to[begin + channel], x = step.from[begin + channel];
    const double g = (gradient[i] - next * dot) / divisor;
    step.carry[begin + channel] = static_cast<T>(total == T(0) ? g : (1 - step.eta) * g);
    step.x.put(place.image, place.row, channel, static_cast<T>(x));
    step.h.put(place.image, place.row, channel, static_cast<T>(g * to_h));
    tau += g * (divisor * next - (1 - step.eta) * x);
  });
  tau = add_lanes(tau);
  if (place.lane == 0) {
    step.tau.at(place.image, place.row) = static_cast<T>(total == T(0) ? 0 : tau / static_cast<double>(total));
  }
}

// grad_weights [B, points].
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    sum_weight_parts_kernel(SplitSums<T> sums, int64_t points, T* grad_weights) {
  const int64_t index = int64_t{blockIdx.x} * kWeightThreads + threadIdx.x;
  if (index >= sums.batch * points) return;
  grad_weights[index] = sums.at(index / points, index % points, 0);
}

// One block.
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    sum_kappa_parts_kernel(const double* parts, int64_t count, double factor, T* grad_kappa) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kWeightThreads) sum += parts[i];
  EFFOPS_SHARED(double, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  add_block<kWeightThreads>(sum, total);
  if (threadIdx.x == 0) *grad_kappa = static_cast<T>(factor * total[0]);
}

}  // namespace effops::pairwise
