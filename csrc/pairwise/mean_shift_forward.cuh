// The launches of mean_shift. No torch; see Device in mean_shift_plan.cuh.
#pragma once

#include "mean_shift_advance_kernels.cuh"
#include "mean_shift_plan.cuh"

namespace effops::pairwise {

template <typename T>
struct MeanShiftResult {
  T* output;       // the last iterate, or null
  T* iterates;     // [T + 1, B, M, D], or null
  T* sums;         // [T, 2, B, M], or null
  int64_t* steps;  // [B]
};

template <typename T, typename Device>
class MeanShiftForward {
 public:
  MeanShiftForward(Device& device, const MeanShiftCall<T>& call, const MeanShiftResult<T>& result)
      : device_(device),
        call_(call),
        result_(result),
        layout_(make_pair_layout<T>(call.channels, device.has_tensor_cores, call.precision)),
        points_(device, layout_, call.batch, call.points, false),
        seeds_(device, layout_, call.seeds != nullptr ? call.batch : 0, call.rows, false),
        tiling_(make_pair_tiling<T, 1>(layout_, call.batch, call.rows, call.points, device.multiprocessors)) {
    const int64_t sums = tiling_.splits * call.batch * rows().x.rows;
    sums_ = device.template allocate<T>(sums * layout_.channels, false);
    totals_ = device.template allocate<T>(sums, false);
    if (call.tol >= 0) {
      moved_ = device.template allocate<unsigned long long>(call.iterations * call.batch, true);
    }
  }

  void run() {
    if (call_.batch == 0) return;
    start();
    if (call_.rows > 0) {
      for (int64_t t = 0; t < call_.iterations; ++t) {
        add_pairs(t);
        advance(t);
      }
    }
    device_.launch(&count_steps_kernel, divide_up(call_.batch, kWeightThreads), kWeightThreads, 0, moved_,
                   call_.batch, call_.iterations, call_.tol, result_.steps);
  }

 private:
  const PointBuffers<T>& rows() const { return call_.seeds != nullptr ? seeds_ : points_; }
  // Where iterate t is. Without a tensor for all they follow each other in the output.
  T* iterate(int64_t t) const {
    if (result_.iterates == nullptr) return result_.output;
    return result_.iterates + t * call_.batch * call_.rows * call_.channels;
  }
  T* copy_of_last(int64_t t) const {
    return t == call_.iterations && result_.output != iterate(t) ? result_.output : nullptr;
  }
  StopRule stop_before(int64_t t) const {
    return {moved_ != nullptr && t > 0 ? moved_ + (t - 1) * call_.batch : nullptr, call_.tol};
  }

  void start() {
    int32_t* lost = device_.template allocate<int32_t>(call_.batch, true);
    const int64_t batch = call_.batch, points = call_.points, channels = call_.channels;
    if (points > 0) {
      device_.launch(&find_lost_images_kernel<T>, point_blocks(batch * points), kPointThreads, 0, call_.x,
                     batch, points, channels, lost);
      device_.launch(&copy_weights_kernel<T>, batch, kWeightThreads, 0, call_.weights, points,
                     points_.weights, lost);
    }
    const bool seeds = call_.seeds != nullptr;
    normalize_points<T>(device_, call_.x, batch, points, channels, lost, seeds ? nullptr : iterate(0),
                        points_.x);
    if (seeds) {
      normalize_points<T>(device_, call_.seeds, batch, call_.rows, channels, lost, iterate(0), seeds_.x);
    }
    if (copy_of_last(0) != nullptr) {  // no iteration writes it
      normalize_points<T>(device_, seeds ? call_.seeds : call_.x, batch, call_.rows, channels, lost,
                          result_.output, PaddedPoints<T>{});
    }
  }

  void add_pairs(int64_t t) {
    ShiftArguments<T> arguments{};
    arguments.tiling = tiling_;
    arguments.rows = rows().x;
    arguments.columns = points_.x;
    arguments.column_weights = points_.weights;
    arguments.kappa_tensor = call_.kappa_tensor;
    arguments.kappa = call_.kappa;
    arguments.sums = sums_;
    arguments.totals = totals_;
    arguments.stop = stop_before(t);
    with_pair_engine<T, 1>(layout_, [&](auto engine) {
      using Engine = decltype(engine);
      using Kernel = ShiftKernel<T, Engine>;
      device_.launch(Kernel::get(), tiling_.works(), Engine::kThreads, Kernel::kShared, arguments);
    });
  }

  void advance(int64_t t) {
    Advance<T> step{};
    step.sums = {sums_, tiling_.splits, call_.batch, rows().x.rows, layout_.channels};
    step.totals = {totals_, tiling_.splits, call_.batch, rows().x.rows, 1};
    step.batch = call_.batch;
    step.rows = call_.rows;
    step.channels = call_.channels;
    step.eta = static_cast<T>(call_.eta);
    step.from = iterate(t);
    step.to = iterate(t + 1);
    step.copy = copy_of_last(t + 1);
    step.padded = rows().x;
    if (result_.sums != nullptr) step.saved = result_.sums + t * 2 * call_.batch * call_.rows;
    step.stop = stop_before(t);
    step.moved = moved_ != nullptr ? moved_ + t * call_.batch : nullptr;
    device_.launch(&mean_shift_advance_kernel<T>, point_blocks(call_.batch * call_.rows), kPointThreads, 0,
                   step);
  }

  Device& device_;
  MeanShiftCall<T> call_;
  MeanShiftResult<T> result_;
  PairLayout layout_;
  PointBuffers<T> points_, seeds_;
  PairTiling tiling_;
  T *sums_ = nullptr, *totals_ = nullptr;  // of the pairs, see ShiftArguments
  unsigned long long* moved_ = nullptr;
};

}  // namespace effops::pairwise
