// The forward of mean_shift on the CPU.
#include "mean_shift_cpu.h"

namespace effops::pairwise {
namespace {

template <typename T>
struct Outputs {
  T* last;      // [B, M, D], or null
  T* iterates;  // [T + 1, B, M, D], or null
  T* sums;      // [T, 2, B, M], or null
  int64_t* steps;  // [B]
};

// Sums over all points, of frames whose rows hold weight times point and weight:
//     sums_j = sum_i K_ij frame_i.
template <typename T>
class KernelSums {
 public:
  explicit KernelSums(int64_t channels, T kappa)
      : channels_(channels), kappa_(kappa), tile_(1, 1, kTile), transposed_(1, 1, kTile) {}

  T* similarities(const T* a, const T* b) {
    kernels_.product({a, 1, kTile, b, tile_.at(0, 0), kTile, channels_, false});
    return tile_.at(0, 0);
  }
  void weigh() { kernels_.weigh(tile_.at(0, 0), kappa_); }
  // To the lanes of the tile from its rows, and the other way round.
  void add_to_lanes(const T* rows, T* sums) { add(rows, tile_.at(0, 0), sums); }
  void add_to_rows(const T* lanes, T* sums) {
    kernels_.transpose(tile_.at(0, 0), transposed_.at(0, 0));
    add(lanes, transposed_.at(0, 0), sums);
  }

 private:
  void add(const T* frame, const T* tile, T* sums) {
    kernels_.product({frame, kTile, 1, tile, sums, channels_ + 1, kTile, true});
  }

  const TileKernels<T>& kernels_ = tile_kernels<T>();
  int64_t channels_;
  T kappa_;
  Frames<T> tile_, transposed_;
};

template <typename T>
class MeanShift {
 public:
  MeanShift(const MeanShiftShape& shape, double kappa, const T* x, const T* weights, const T* seeds)
      : shape_(shape),
        kappa_(static_cast<T>(kappa)),
        grid_{shape.batch, shape.points, shape.channels},
        points_(grid_, x, !shape.seeds),
        weights_(points_, weights),
        weighted_(weights ? shape.batch : 0, grid_.tiles, shape.channels + 1),
        row_grid_{shape.batch, shape.rows, shape.channels},
        seeds_(TileGrid{shape.seeds ? shape.batch : 0, shape.rows, shape.channels}, seeds, false),
        limits_(grid_, kappa),
        sums_(shape.batch, row_grid_.tiles, shape.channels + 1),
        moved_(shape.batch * row_grid_.tiles),
        short_(shape.batch * row_grid_.tiles, 0),
        unit_(shape.batch),
        active_(shape.batch, 1) {
    for (int64_t image = 0; image < shape.batch; ++image) unit_[image] = points_.unit(image);
  }

  void run(const Outputs<T>& out) {
    for (int64_t image = 0; image < shape_.batch; ++image) out.steps[image] = 0;
    keep(out, 0);
    for (int64_t t = 0; t < shape_.iterations; ++t) {
      prepare(t);
      add_up();
      move(out, t);
      stop(out, t);
    }
    finish(out);
  }

 private:
  PointSet<T>& rows() { return shape_.seeds ? seeds_ : points_; }
  bool lost(int64_t image) const { return !points_.finite(image) || !std::isfinite(weights_.total(image)); }
  bool runs(int64_t image) const { return active_[image] && !lost(image); }

  // What is multiplied by the kernel weights: w_i x_i and w_i.
  const T* weighted(int64_t image, int64_t tile) const {
    return weights_.given() ? weighted_.at(image, tile) : points_.frame(image, tile);
  }

  void prepare(int64_t t) {
    if (t == 0 || !shape_.seeds) {
      grid_.for_tiles([&](int64_t image, int64_t tile) {
        if (!runs(image)) return;
        const T* frame = points_.frame(image, tile);
        if (weights_.given()) {
          tile_kernels<T>().multiply_lanes(frame, weights_.lanes(image, tile), weighted_.at(image, tile),
                                           shape_.channels + 1);
        }
        if (!shape_.seeds) limits_.set(image, tile, frame, weights_, unit_[image]);
      });
    }
    row_grid_.for_tiles(
        [&](int64_t image, int64_t tile) { std::fill_n(sums_.at(image, tile), sums_.size(), T(0)); });
  }

  void add_up() {
    if (shape_.seeds) {
      row_grid_.for_tiles([&](int64_t image, int64_t seeds) {
        if (runs(image)) add_all_points(image, seeds);
      });
      return;
    }
    for_block_pairs(grid_, [&](int64_t image, TileRange first, TileRange second) {
      if (!runs(image)) return;
      KernelSums<T> kernel(shape_.channels, kappa_);
      for (int64_t a = first.begin; a < first.end; ++a) {
        const int64_t begin = first.begin == second.begin ? a : second.begin;
        for (int64_t b = begin; b < second.end; ++b) add_pair(kernel, image, a, b);
      }
    });
  }

  void add_all_points(int64_t image, int64_t seeds) {
    KernelSums<T> kernel(shape_.channels, kappa_);
    for (int64_t tile = 0; tile < grid_.tiles; ++tile) {
      kernel.similarities(points_.frame(image, tile), seeds_.frame(image, seeds));
      kernel.weigh();
      kernel.add_to_lanes(weighted(image, tile), sums_.at(image, seeds));
    }
  }

  // The kernel matrix is symmetric: one tile of it serves the sums of both tiles of points.
  void add_pair(KernelSums<T>& kernel, int64_t image, int64_t a, int64_t b) {
    const T *frame_a = points_.frame(image, a), *frame_b = points_.frame(image, b);
    const double limit = limits_.of(image, a, b);
    if (a != b && limits_.bounds.apart(image, a, frame_a, b, frame_b, limit)) return;
    const T* similarities = kernel.similarities(frame_a, frame_b);
    if (a != b && limits_.bounds.apart(similarities, limit)) return;
    kernel.weigh();
    kernel.add_to_lanes(weighted(image, a), sums_.at(image, b));
    if (a != b) kernel.add_to_rows(weighted(image, b), sums_.at(image, a));
  }

  void move(const Outputs<T>& out, int64_t t) {
    row_grid_.for_tiles([&](int64_t image, int64_t tile) {
      if (!runs(image)) return;
      T degrees[kTile], norms[kTile];
      moved_[image * row_grid_.tiles + tile] =
          tile_kernels<T>().advance({rows().frame(image, tile), sums_.at(image, tile), shape_.channels,
                                     row_grid_.count(tile), static_cast<T>(shape_.eta), degrees, norms});
      if (out.sums) {
        rows().unpack(degrees, 1, image, tile, saved_sums(out, t, 0, image));
        rows().unpack(norms, 1, image, tile, saved_sums(out, t, 1, image));
      }
      for (int64_t l = 0; l < row_grid_.count(tile); ++l) {
        if (!(norms[l] >= T(kSmallestNorm))) short_[image * row_grid_.tiles + tile] = 1;
      }
    });
    keep(out, t + 1);
  }

  // Images in which nothing moves any more stop; those with a row that lost its direction skip no pairs.
  void stop(const Outputs<T>& out, int64_t t) {
    for (int64_t image = 0; image < shape_.batch; ++image) {
      if (!active_[image]) continue;
      out.steps[image] = t + 1;
      double most = 0;
      for (int64_t tile = 0; tile < row_grid_.tiles; ++tile) {
        const double moved = moved_[image * row_grid_.tiles + tile];
        if (short_[image * row_grid_.tiles + tile]) unit_[image] = 0;
        most = std::max(most, moved);
      }
      if (shape_.tol >= 0 && !lost(image) && std::sqrt(most) <= shape_.tol) active_[image] = 0;
    }
  }

  T* saved_sums(const Outputs<T>& out, int64_t t, int64_t which, int64_t image) const {
    return out.sums + ((t * 2 + which) * shape_.batch + image) * shape_.rows;
  }
  int64_t image_size() const { return shape_.rows * shape_.channels; }

  void keep(const Outputs<T>& out, int64_t t) {
    if (!out.iterates) return;
    row_grid_.for_tiles([&](int64_t image, int64_t tile) {
      if (!active_[image]) return;
      T* to = out.iterates + (t * shape_.batch + image) * image_size();
      rows().unpack(rows().frame(image, tile), shape_.channels, image, tile, to);
    });
  }

  // What was not computed: iterates after an image stopped, and those of images with a NaN or Inf.
  void finish(const Outputs<T>& out) {
    if (out.last) {
      row_grid_.for_tiles([&](int64_t image, int64_t tile) {
        rows().unpack(rows().frame(image, tile), shape_.channels, image, tile,
                      out.last + image * image_size());
      });
    }
    for (int64_t image = 0; image < shape_.batch; ++image) {
      const T nan = std::numeric_limits<T>::quiet_NaN();
      if (lost(image) && shape_.iterations > 0 && out.last) {
        std::fill_n(out.last + image * image_size(), image_size(), nan);
      }
      const int64_t done = lost(image) ? 0 : out.steps[image];
      for (int64_t t = done; t < shape_.iterations; ++t) {
        if (out.iterates) {
          T* to = out.iterates + ((t + 1) * shape_.batch + image) * image_size();
          const T* from = out.iterates + (done * shape_.batch + image) * image_size();
          if (lost(image))
            std::fill_n(to, image_size(), nan);
          else
            std::copy_n(from, image_size(), to);
        }
        for (int64_t which = 0; out.sums && which < 2; ++which) {
          std::fill_n(saved_sums(out, t, which, image), shape_.rows, lost(image) ? nan : T(0));
        }
      }
    }
  }

  MeanShiftShape shape_;
  T kappa_;
  TileGrid grid_;
  PointSet<T> points_;
  PointWeights<T> weights_;
  Frames<T> weighted_;
  TileGrid row_grid_;
  PointSet<T> seeds_;
  SkipLimits<T> limits_;
  Frames<T> sums_;
  std::vector<double> moved_;
  std::vector<char> short_;  // tiles with a row that lost its direction
  std::vector<char> unit_, active_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mean_shift(const Tensor& x,  // [B, N, D]
                                                      const std::optional<Tensor>& weights,  // [B, N]
                                                      const std::optional<Tensor>& seeds,  // [B, M, D]
                                                      const std::optional<Tensor>& kappa_tensor,  // [] or [1]
                                                      double kappa, double eta, int64_t iterations,
                                                      double tol, int64_t precision, bool return_all,
                                                      bool save) {
  const MeanShiftShape shape = check_mean_shift(x, weights, seeds, kappa_tensor, kappa, eta, iterations, tol,
                                                precision, return_all, save);
  const std::vector<int64_t> one{shape.batch, shape.rows, shape.channels};
  const std::vector<int64_t> all{iterations + 1, shape.batch, shape.rows, shape.channels}, none{0};
  const Tensor output = empty_of(x, return_all ? all : one);
  const Tensor iterates = empty_of(x, save && !return_all ? all : none);
  const Tensor sums = empty_of(x, save ? std::vector<int64_t>{iterations, 2, shape.batch, shape.rows} : none);
  const Tensor steps = zeros_of(x, {shape.batch}, ScalarType::Long);
  if (output.numel() > 0) {
    dispatch_points(x, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const Tensor points = effops::as_contiguous(x);
      const std::optional<Tensor> own_weights = as_contiguous(weights), own_seeds = as_contiguous(seeds);
      const double value = kappa_value<T>("mean_shift", kappa_tensor, kappa);
      T* const data = new_data<T>(output);
      T* const kept = save && !return_all ? new_data<T>(iterates) : nullptr;
      MeanShift<T>(shape, value, data_of<T>(points), data_of<T>(own_weights), data_of<T>(own_seeds))
          .run({return_all ? nullptr : data, return_all ? data : kept, save ? new_data<T>(sums) : nullptr,
                new_data<int64_t>(steps)});
    });
  }
  return {output, iterates, sums, steps};
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { m.impl("mean_shift", TORCH_BOX(&effops::pairwise::mean_shift)); }
