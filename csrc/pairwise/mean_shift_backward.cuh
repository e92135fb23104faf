// The launches of mean_shift's gradients. No torch; see Device in mean_shift_plan.cuh.
#pragma once

#include "mean_shift_plan.cuh"
#include "mean_shift_retreat_kernels.cuh"

namespace effops::pairwise {

// What the forward op has saved, and the gradient of its output.
template <typename T>
struct MeanShiftSaved {
  const T* grad_output;  // [B, M, D], or of all iterates
  bool of_all;
  const T* iterates;     // [T + 1, B, M, D]
  const T* sums;         // [T, 2, B, M]
  const int64_t* steps;  // [B]
};

// Null where not wanted.
template <typename T>
struct MeanShiftGradients {
  T* x;
  T* weights;
  T* seeds;
  T* kappa;
};

template <typename T, typename Device>
class MeanShiftBackward {
 public:
  MeanShiftBackward(Device& device, const MeanShiftCall<T>& call, const MeanShiftSaved<T>& saved,
                    const MeanShiftGradients<T>& gradients)
      : device_(device),
        call_(call),
        saved_(saved),
        gradients_(gradients),
        has_seeds_(call.seeds != nullptr),
        row_numbers_(call.batch * call.rows * call.channels),
        layout_(make_pair_layout<T>(call.channels, device.has_tensor_cores, call.precision)),
        points_(device, layout_, call.batch, call.points, !has_seeds_),
        seeds_(device, layout_, has_seeds_ ? call.batch : 0, call.rows, has_seeds_),
        carry_(device.template allocate<T>(row_numbers_, false)),
        of_rows_(device, *this, call.rows, call.points, rows(), !has_seeds_ && gradients.weights != nullptr,
                 false),
        of_points_(device, *this, has_seeds_ ? call.points : 0, call.rows, points_,
                   has_seeds_ && gradients.weights != nullptr, true) {
    if (gradients.kappa != nullptr) {
      kappa_sums_ = device.template allocate<double>(of_rows_.tiling.works(), true);
    }
  }

  void run() {
    start();
    for (int64_t t = call_.iterations - 1; t >= 0 && call_.batch * call_.rows > 0; --t) {
      retreat(t);
      add_pairs(t, of_rows_, rows(), points_, false);
      if (has_seeds_ && (gradients_.x != nullptr || gradients_.weights != nullptr)) {
        add_pairs(t, of_points_, points_, seeds_, true);
      }
    }
    finish();
  }

 private:
  // The sums over pairs of the rows of one kind.
  struct PairSums {
    PairTiling tiling;
    SplitSums<T> of_x{}, of_weights{};
    T *x, *weights = nullptr;

    PairSums(Device& device, const MeanShiftBackward& op, int64_t rows, int64_t columns,
             const PointBuffers<T>& buffers, bool has_weights, bool zeros)
        : tiling(make_pair_tiling<T, 2>(op.layout_, op.call_.batch, rows, columns, device.multiprocessors)) {
      const int64_t batch = op.call_.batch, padded = rows > 0 ? buffers.x.rows : 0;
      const int64_t count = tiling.splits * batch * padded;
      x = device.template allocate<T>(count * op.layout_.channels, zeros);
      of_x = {x, tiling.splits, batch, padded, op.layout_.channels};
      if (!has_weights) return;
      weights = device.template allocate<T>(count, true);
      of_weights = {weights, tiling.splits, batch, padded, 1};
    }
  };

  const PointBuffers<T>& rows() const { return has_seeds_ ? seeds_ : points_; }

  void start() {
    if (call_.batch * call_.points == 0) return;
    int32_t* lost =
        device_.template allocate<int32_t>(call_.batch, true);  // of no use: NaN is in the iterates
    device_.launch(&copy_weights_kernel<T>, call_.batch, kWeightThreads, 0, call_.weights, call_.points,
                   points_.weights, lost);
    if (has_seeds_) {
      normalize_points<T>(device_, call_.x, call_.batch, call_.points, call_.channels, nullptr, nullptr,
                          points_.x);
    }
  }

  // The part of grad_output that belongs to iterate t.
  const T* grad_of(int64_t t) const {
    if (saved_.of_all) return saved_.grad_output + t * row_numbers_;
    return t == call_.iterations ? saved_.grad_output : nullptr;
  }

  void retreat(int64_t t) {
    Retreat<T> step{};
    step.grad_output = grad_of(t + 1);
    step.is_last = t + 1 == call_.iterations;
    step.sums = of_rows_.of_x;
    step.carry = carry_;
    step.batch = call_.batch;
    step.rows = call_.rows;
    step.channels = call_.channels;
    step.eta = call_.eta;
    step.from = saved_.iterates + t * row_numbers_;
    step.to = step.from + row_numbers_;
    step.saved = saved_.sums + t * 2 * call_.batch * call_.rows;
    step.x = rows().x;
    step.h = rows().h;
    step.tau = rows().tau;
    step.steps = saved_.steps;
    step.iteration = t;
    device_.launch(&mean_shift_retreat_kernel<T>, point_blocks(call_.batch * call_.rows), kPointThreads, 0,
                   step);
  }

  void add_pairs(int64_t t, const PairSums& sums, const PointBuffers<T>& rows, const PointBuffers<T>& columns,
                 bool adds) {
    if (sums.tiling.works() == 0) return;
    ShiftGradArguments<T> arguments{};
    arguments.tiling = sums.tiling;
    arguments.rows = rows.x;
    arguments.columns = columns.x;
    arguments.column_weights = columns.weights;
    arguments.kappa_tensor = call_.kappa_tensor;
    arguments.kappa = call_.kappa;
    arguments.sums = sums.x;
    arguments.row_h = rows.h;
    arguments.column_h = columns.h;
    arguments.row_tau = rows.tau;
    arguments.column_tau = columns.tau;
    arguments.row_weights = rows.weights;
    arguments.weight_sums = sums.weights;
    arguments.kappa_sums = &sums == &of_rows_ ? kappa_sums_ : nullptr;
    arguments.adds = adds;
    arguments.steps = saved_.steps;
    arguments.iteration = t;
    with_pair_engine<T, 2>(layout_, [&](auto engine) {
      using Engine = decltype(engine);
      using Kernel = ShiftGradKernel<T, Engine>;
      device_.launch(Kernel::get(), sums.tiling.works(), Engine::kThreads, Kernel::kShared, arguments);
    });
  }

  void finish() {
    const bool has_iterations = call_.iterations > 0;
    const GradientParts<T> of_rows{grad_of(0), has_iterations ? carry_ : nullptr,
                                   has_iterations ? of_rows_.of_x : SplitSums<T>{}};
    if (has_seeds_) {
      finish_points(call_.seeds, call_.rows, of_rows, gradients_.seeds);
      finish_points(call_.x, call_.points, {nullptr, nullptr, of_points_.of_x}, gradients_.x);
    } else {
      finish_points(call_.x, call_.points, of_rows, gradients_.x);
    }
    const int64_t points = call_.batch * call_.points;
    if (gradients_.weights != nullptr && points > 0) {
      device_.launch(&sum_weight_parts_kernel<T>, divide_up(points, kWeightThreads), kWeightThreads, 0,
                     has_seeds_ ? of_points_.of_weights : of_rows_.of_weights, call_.points,
                     gradients_.weights);
    }
    if (gradients_.kappa != nullptr) {
      // Without seeds every pair was met twice, as a row and as a column.
      device_.launch(&sum_kappa_parts_kernel<T>, 1, kWeightThreads, 0, kappa_sums_, of_rows_.tiling.works(),
                     has_seeds_ ? 1.0 : 0.5, gradients_.kappa);
    }
  }

  void finish_points(const T* x, int64_t count, const GradientParts<T>& parts, T* grad_x) {
    if (grad_x == nullptr || call_.batch * count == 0) return;
    device_.launch(&normalize_points_grad_kernel<T>, point_blocks(call_.batch * count), kPointThreads, 0, x,
                   call_.batch, count, call_.channels, parts, grad_x);
  }

  Device& device_;
  MeanShiftCall<T> call_;
  MeanShiftSaved<T> saved_;
  MeanShiftGradients<T> gradients_;
  bool has_seeds_;
  int64_t row_numbers_;  // of an iterate
  PairLayout layout_;
  PointBuffers<T> points_, seeds_;
  T* carry_;  // [B, M, D]
  PairSums of_rows_, of_points_;
  double* kappa_sums_ = nullptr;
};

}  // namespace effops::pairwise
