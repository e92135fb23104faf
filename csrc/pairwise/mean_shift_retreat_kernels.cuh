// Kernels on rows of mean_shift, backward: what comes before and after the pairs. No torch, no launches.
#pragma once

#include "mean_shift_pairs.cuh"

namespace effops::pairwise {

template <typename T>
struct Retreat {
  const T* grad_output;  // of the iterate after this iteration, [B, rows, channels]; or null
  bool is_last;          // iteration: what follows has no part in the gradient
  SplitSums<T> sums;     // from the pairs of the iteration that follows
  T* carry;              // [B, rows, channels]: what passes by the pairs; of that iteration, then of this
  int64_t batch, rows, channels;
  double eta;
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
  const bool stays = total == T(0) || step.eta == 0;
  double tau = 0;
  for_lane_channels(place.lane, step.channels, [&](int i, int64_t channel) {
    const double next = step.to[begin + channel], x = step.from[begin + channel];
    const double g = (gradient[i] - next * dot) / divisor;
    step.carry[begin + channel] = static_cast<T>(stays ? g : (1 - step.eta) * g);
    step.x.put(place.image, place.row, channel, static_cast<T>(x));
    const double h = stays ? 0 : step.eta * g / static_cast<double>(total);  // g may be infinite
    step.h.put(place.image, place.row, channel, static_cast<T>(h));
    tau += g * (divisor * next - (1 - step.eta) * x);
  });
  tau = add_lanes(tau);
  if (place.lane == 0) {
    step.tau.at(place.image, place.row) = static_cast<T>(stays ? 0 : tau / static_cast<double>(total));
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
