// The backward of mean_shift on the CPU, by recomputing the kernel weights of every iteration from the saved
// iterates (README.md: formulas).
#include "mean_shift_cpu.h"

namespace effops::pairwise {
namespace {

template <typename T>
struct Saved {
  const T* iterates;   // [T + 1, B, M, D]
  const T* sums;       // [T, 2, B, M]
  const int64_t* steps;  // [B]
};

template <typename T>
struct Gradients {
  const T* output;  // [B, M, D] or [T + 1, B, M, D]
  T *x, *weights, *seeds, *kappa;  // null: not needed
};

// A tile of points of a pair. Rows behind the channels hold 1, w and -tau.
template <typename T>
struct Side {
  const T* x;         // [channels + 1][64]
  const T* weighted;  // [channels + 1][64]: w x and w; null: nothing is drawn to these points
  const T* h;         // [channels + 1][64]: h and -tau; null: these points do not move
  T* drawn;           // [channels + 1][64]: sums of K h and -K tau over the others
  T* turned;          // [channels][64]: sums of C x over the others
};

// What a tile of pairs adds to both sides. With R_ij = w_i (x_i.h_j - tau_j) + w_j (x_j.h_i - tau_i),
// C = kappa K R.
template <typename T>
class PairGradient {
 public:
  PairGradient(int64_t channels, T kappa) : channels_(channels), kappa_(kappa), buffers_(1, 4, kTile) {}

  const T* similarities(const T* a, const T* b) {
    kernels_.product({a, 1, kTile, b, weights(), kTile, channels_, false});
    return weights();
  }

  // Returns sum (S - 1) K R.
  double weigh(const Side<T>& a, const Side<T>& b) {
    bool add = false;
    for (const auto& [drawing, moving] : {std::pair(a.weighted, b.h), std::pair(a.h, b.weighted)}) {
      if (!drawing || !moving) continue;
      kernels_.product({drawing, 1, kTile, moving, slopes(), kTile, channels_ + 1, add});
      add = true;
    }
    return kernels_.weigh_slopes(weights(), slopes(), kappa_);
  }
  void add_to_lanes(const Side<T>& rows, const Side<T>& lanes) { add(rows, weights(), slopes(), lanes); }
  void add_to_rows(const Side<T>& rows, const Side<T>& lanes) {
    T *const weights_over = buffers_.at(0, 2), *const slopes_over = buffers_.at(0, 3);
    if (lanes.h && rows.drawn) kernels_.transpose(weights(), weights_over);
    kernels_.transpose(slopes(), slopes_over);
    add(lanes, weights_over, slopes_over, rows);
  }

 private:
  T* weights() const { return buffers_.at(0, 0); }
  T* slopes() const { return buffers_.at(0, 1); }

  void add(const Side<T>& from, const T* weights, const T* slopes, const Side<T>& to) {
    if (from.h && to.drawn) {
      kernels_.product({from.h, kTile, 1, weights, to.drawn, channels_ + 1, kTile, true});
    }
    kernels_.product({from.x, kTile, 1, slopes, to.turned, channels_, kTile, true});
  }

  const TileKernels<T>& kernels_ = tile_kernels<T>();
  int64_t channels_;
  T kappa_;
  Frames<T> buffers_;
};

template <typename T>
class MeanShiftBackward {
 public:
  MeanShiftBackward(const MeanShiftShape& shape, double kappa, const T* x, const T* weights, const T* seeds)
      : shape_(shape),
        kappa_(static_cast<T>(kappa)),
        grid_{shape.batch, shape.points, shape.channels},
        row_grid_{shape.batch, shape.rows, shape.channels},
        points_(grid_, x, !shape.seeds),
        seeds_(TileGrid{shape.seeds ? shape.batch : 0, shape.rows, shape.channels}, seeds, false),
        weights_(points_, weights),
        weighted_(weights ? shape.batch : 0, grid_.tiles, shape.channels + 1),
        before_(shape.batch, row_grid_.tiles, shape.channels + 1),
        after_(shape.batch, row_grid_.tiles, shape.channels + 1),
        grad_(shape.batch, row_grid_.tiles, shape.channels),
        h_(shape.batch, row_grid_.tiles, shape.channels + 1),
        drawn_(shape.batch, grid_.tiles, shape.channels + 1),
        turned_(shape.batch, grid_.tiles, shape.channels),
        seeds_turned_(shape.seeds ? shape.batch : 0, row_grid_.tiles, shape.channels),
        grad_weights_(shape.batch, grid_.tiles, 1),
        limits_(grid_, kappa),
        kappa_parts_(shape.batch * grid_.tiles, 0.0) {}

  void run(const Saved<T>& saved, const Gradients<T>& grads) {
    start(saved, grads);
    for (int64_t t = shape_.iterations - 1; t >= 0; --t) {
      prepare(saved, t);
      add_up(saved, t);
      move(saved, grads, t);
    }
    finish(grads);
  }

 private:
  const PointSet<T>& rows() const { return shape_.seeds ? seeds_ : points_; }
  bool lost(int64_t image) const {
    return shape_.iterations > 0 && (!points_.finite(image) || !std::isfinite(weights_.total(image)));
  }
  bool runs(const Saved<T>& saved, int64_t image, int64_t t) const {
    return t < saved.steps[image] && !lost(image);
  }
  int64_t image_size() const { return shape_.rows * shape_.channels; }

  const T* current(int64_t image, int64_t tile) const {
    return shape_.seeds ? points_.frame(image, tile) : before_.at(image, tile);
  }
  const T* weighted(int64_t image, int64_t tile) const {
    return weights_.given() ? weighted_.at(image, tile) : current(image, tile);
  }
  Side<T> point_side(int64_t image, int64_t tile) const {
    return {current(image, tile), weighted(image, tile), shape_.seeds ? nullptr : h_.at(image, tile),
            drawn_.at(image, tile), turned_.at(image, tile)};
  }
  Side<T> seed_side(int64_t image, int64_t tile) const {
    return {before_.at(image, tile), nullptr, h_.at(image, tile), nullptr, seeds_turned_.at(image, tile)};
  }

  // Rows of an iterate of all images, or of a gradient of them, to a frame.
  void read(const T* iterate, int64_t image, int64_t tile, T* frame) const {
    rows().pack(iterate + image * image_size(), shape_.channels, image, tile, frame);
  }

  void start(const Saved<T>& saved, const Gradients<T>& grads) {
    const int64_t last = shape_.iterations * shape_.batch * image_size();
    row_grid_.for_tiles([&](int64_t image, int64_t tile) {
      read(grads.output + (shape_.return_all ? last : 0), image, tile, grad_.at(image, tile));
      read(saved.iterates + last, image, tile, after_.at(image, tile));
    });
    grid_.for_tiles([&](int64_t image, int64_t tile) {
      std::fill_n(grad_weights_.at(image, tile), kTile, T(0));
      clear_points(image, tile);
    });
    if (shape_.seeds && weights_.given()) {
      grid_.for_tiles([&](int64_t image, int64_t tile) { weigh_points(image, tile); });
    }
  }

  void clear_points(int64_t image, int64_t tile) {
    std::fill_n(drawn_.at(image, tile), drawn_.size(), T(0));
    std::fill_n(turned_.at(image, tile), turned_.size(), T(0));
  }
  void weigh_points(int64_t image, int64_t tile) {
    tile_kernels<T>().multiply_lanes(current(image, tile), weights_.lanes(image, tile),
                                     weighted_.at(image, tile), shape_.channels + 1);
  }

  // Whether every row of iterate t has a direction.
  bool is_unit(const Saved<T>& saved, int64_t image, int64_t t) const {
    if (t == 0) return rows().unit(image);
    const T* norms = saved.sums + ((2 * t - 1) * shape_.batch + image) * shape_.rows;
    return std::all_of(norms, norms + shape_.rows, [](T norm) { return norm >= T(kSmallestNorm); });
  }

  // Gradients of the sums of iteration t, and empty sums for what comes through them.
  void prepare(const Saved<T>& saved, int64_t t) {
    std::vector<char> unit(shape_.batch);
    for (int64_t image = 0; image < shape_.batch; ++image) unit[image] = is_unit(saved, image, t);
    row_grid_.for_tiles([&](int64_t image, int64_t tile) {
      if (!runs(saved, image, t)) return;
      T* const frame = before_.at(image, tile);
      read(saved.iterates + t * shape_.batch * image_size(), image, tile, frame);
      T* const ones = frame + shape_.channels * kTile;
      for (int64_t l = 0; l < kTile; ++l) ones[l] = l < row_grid_.count(tile) ? T(1) : T(0);
      T degrees[kTile], norms[kTile];
      rows().pack(saved.sums + ((2 * t) * shape_.batch + image) * shape_.rows, 1, image, tile, degrees);
      rows().pack(saved.sums + ((2 * t + 1) * shape_.batch + image) * shape_.rows, 1, image, tile, norms);
      tile_kernels<T>().retreat({grad_.at(image, tile), frame, after_.at(image, tile), degrees, norms,
                                 shape_.channels, row_grid_.count(tile), static_cast<T>(shape_.eta),
                                 h_.at(image, tile)});
      if (shape_.seeds) {
        std::fill_n(seeds_turned_.at(image, tile), seeds_turned_.size(), T(0));
        return;
      }
      clear_points(image, tile);
      if (weights_.given()) weigh_points(image, tile);
      limits_.set(image, tile, frame, weights_, unit[image]);
    });
  }

  void add_up(const Saved<T>& saved, int64_t t) {
    if (shape_.seeds) {
      for_cross_pairs(shape_.batch, grid_.tiles, row_grid_.tiles,
                      [&](int64_t image, int64_t tile, int64_t seeds) {
                        if (runs(saved, image, t)) add_seeds(image, tile, seeds);
                      });
      return;
    }
    for_block_pairs(grid_, [&](int64_t image, TileRange first, TileRange second) {
      if (!runs(saved, image, t)) return;
      PairGradient<T> pair(shape_.channels, kappa_);
      for (int64_t a = first.begin; a < first.end; ++a) {
        const int64_t begin = first.begin == second.begin ? a : second.begin;
        for (int64_t b = begin; b < second.end; ++b) add_pair(pair, image, a, b);
      }
    });
  }

  double& kappa_part(int64_t image, int64_t tile) { return kappa_parts_[image * grid_.tiles + tile]; }

  void add_pair(PairGradient<T>& pair, int64_t image, int64_t a, int64_t b) {
    const Side<T> rows = point_side(image, a), lanes = point_side(image, b);
    const double limit = limits_.of(image, a, b);
    if (a != b && limits_.bounds.apart(image, a, rows.x, b, lanes.x, limit)) return;
    const T* similarities = pair.similarities(rows.x, lanes.x);
    if (a != b && limits_.bounds.apart(similarities, limit)) return;
    const double change = pair.weigh(rows, lanes);
    kappa_part(image, a) += a == b ? change / 2 : change;  // a tile with itself has every pair twice
    pair.add_to_lanes(rows, lanes);
    if (a != b) pair.add_to_rows(rows, lanes);
  }

  void add_seeds(int64_t image, int64_t tile, int64_t seeds) {
    PairGradient<T> pair(shape_.channels, kappa_);
    const Side<T> rows = point_side(image, tile), lanes = seed_side(image, seeds);
    pair.similarities(rows.x, lanes.x);
    kappa_part(image, tile) += pair.weigh(rows, lanes);
    pair.add_to_lanes(rows, lanes);
    pair.add_to_rows(rows, lanes);
  }

  // The gradient of iterate t.
  void move(const Saved<T>& saved, const Gradients<T>& grads, int64_t t) {
    row_grid_.for_tiles([&](int64_t image, int64_t tile) {
      T* const grad = grad_.at(image, tile);
      if (runs(saved, image, t)) {
        if (shape_.seeds) {
          add_to(grad, seeds_turned_.at(image, tile), grad_.size());
        } else {
          collect_points(image, tile, grad);
        }
        std::copy_n(before_.at(image, tile), after_.size(), after_.at(image, tile));
      }
      if (!shape_.return_all) return;
      const Frames<T> own(1, 1, shape_.channels);
      read(grads.output + t * shape_.batch * image_size(), image, tile, own.at(0, 0));
      add_to(grad, own.at(0, 0), grad_.size());
    });
  }

  static void add_to(T* sums, const T* terms, int64_t count) {
    for (int64_t i = 0; i < count; ++i) sums[i] += terms[i];
  }

  // grad += w drawn + turned; the gradient of the weights += x.drawn - the drawn tau.
  void collect_points(int64_t image, int64_t tile, T* grad) {
    const T *x = current(image, tile), *drawn = drawn_.at(image, tile), *turned = turned_.at(image, tile);
    const T* weights = weights_.given() ? weights_.lanes(image, tile) : x + shape_.channels * kTile;
    T* const grad_weights = grad_weights_.at(image, tile);
    for (int64_t k = 0; k < shape_.channels; ++k) {
      for (int64_t i = k * kTile, l = 0; l < kTile; ++i, ++l) {
        grad[i] += weights[l] * drawn[i] + turned[i];
        grad_weights[l] += x[i] * drawn[i];
      }
    }
    add_to(grad_weights, drawn + shape_.channels * kTile, kTile);
  }

  void finish(const Gradients<T>& grads) {
    if (shape_.seeds) {
      if (grads.seeds) write_rows(grads.seeds, seeds_, row_grid_, grad_);
      grid_.for_tiles([&](int64_t image, int64_t tile) {
        const Frames<T> own(1, 1, shape_.channels);
        T* const grad = own.at(0, 0);
        std::fill_n(grad, own.size(), T(0));
        collect_points(image, tile, grad);
        std::copy_n(grad, own.size(), turned_.at(image, tile));
      });
    }
    if (grads.x) write_rows(grads.x, points_, grid_, shape_.seeds ? turned_ : grad_);
    if (grads.weights) {
      grid_.for_tiles([&](int64_t image, int64_t tile) {
        poison(image, grad_weights_.at(image, tile), kTile);
        points_.unpack(grad_weights_.at(image, tile), 1, image, tile, grads.weights + image * shape_.points);
      });
    }
    if (!grads.kappa) return;
    double total = 0;
    for (int64_t image = 0; image < shape_.batch; ++image) {
      if (lost(image)) total = std::numeric_limits<double>::quiet_NaN();
    }
    for (const double part : kappa_parts_) total += part;
    *grads.kappa = static_cast<T>(total);
  }

  void poison(int64_t image, T* values, int64_t count) const {
    if (lost(image)) std::fill_n(values, count, std::numeric_limits<T>::quiet_NaN());
  }

  // Back through the first normalisation. frames: [channels][64], of gradients of the normalised rows.
  void write_rows(T* to, const PointSet<T>& of, const TileGrid& grid, const Frames<T>& frames) const {
    grid.for_tiles([&](int64_t image, int64_t tile) {
      T* const grad = frames.at(image, tile);
      const T *x = of.frame(image, tile), *norms = of.norms(image, tile);
      T along[kTile] = {};
      for (int64_t k = 0; k < shape_.channels; ++k) {
        for (int64_t i = k * kTile, l = 0; l < kTile; ++i, ++l) along[l] += grad[i] * x[i];
      }
      for (int64_t k = 0; k < shape_.channels; ++k) {
        for (int64_t i = k * kTile, l = 0; l < kTile; ++i, ++l) {
          grad[i] = norms[l] < T(kSmallestNorm) ? grad[i] / T(kSmallestNorm)
                                                : (grad[i] - along[l] * x[i]) / norms[l];
        }
      }
      poison(image, grad, frames.size());
      of.unpack(grad, shape_.channels, image, tile, to + image * grid.points * shape_.channels);
    });
  }

  MeanShiftShape shape_;
  T kappa_;
  TileGrid grid_, row_grid_;
  PointSet<T> points_, seeds_;
  PointWeights<T> weights_;
  Frames<T> weighted_;
  Frames<T> before_, after_;  // the rows before and after an iteration
  Frames<T> grad_;            // of the rows
  Frames<T> h_;
  Frames<T> drawn_, turned_, seeds_turned_, grad_weights_;
  SkipLimits<T> limits_;
  std::vector<double> kappa_parts_;
};

Tensor gradient_of(const std::optional<Tensor>& tensor, bool wanted) {
  if (!wanted) return empty_of(*tensor, {0});
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor->dim(); ++i) sizes.push_back(tensor->size(i));
  return zeros_of(*tensor, sizes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mean_shift_backward(
    const Tensor& grad_output,                  // [B, M, D] or [T + 1, B, M, D]
    const Tensor& x,                            // [B, N, D]
    const std::optional<Tensor>& weights,       // [B, N]
    const std::optional<Tensor>& seeds,         // [B, M, D]
    const std::optional<Tensor>& kappa_tensor,  // [] or [1]
    const Tensor& iterates,                     // [T + 1, B, M, D]
    const Tensor& sums,                         // [T, 2, B, M]
    const Tensor& steps,                        // [B]
    double kappa, double eta, int64_t precision, bool return_all, bool need_x, bool need_weights,
    bool need_seeds, bool need_kappa) {
  const MeanShiftShape shape = check_mean_shift_grad(grad_output, x, weights, seeds, kappa_tensor, iterates,
                                                     sums, steps, kappa, eta, precision, return_all, need_x,
                                                     need_weights, need_seeds, need_kappa);
  const auto like = [&](const std::optional<Tensor>& tensor) { return tensor.has_value() ? tensor : x; };
  const Tensor grad_x = gradient_of(x, need_x), grad_weights = gradient_of(like(weights), need_weights),
               grad_seeds = gradient_of(like(seeds), need_seeds),
               grad_kappa = gradient_of(like(kappa_tensor), need_kappa);
  if (grad_output.numel() > 0) {
    dispatch_points(x, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const Tensor points = effops::as_contiguous(x), grads = effops::as_contiguous(grad_output),
                   saved = effops::as_contiguous(iterates), own_sums = effops::as_contiguous(sums),
                   own_steps = effops::as_contiguous(steps);
      const std::optional<Tensor> own_weights = as_contiguous(weights), own_seeds = as_contiguous(seeds);
      const double value = kappa_value<T>("mean_shift_backward", kappa_tensor, kappa);
      const auto to = [](const Tensor& gradient, bool wanted) {
        return wanted ? new_data<T>(gradient) : nullptr;
      };
      MeanShiftBackward<T>(shape, value, data_of<T>(points), data_of<T>(own_weights), data_of<T>(own_seeds))
          .run({data_of<T>(saved), data_of<T>(own_sums), data_of<int64_t>(own_steps)},
               {data_of<T>(grads), to(grad_x, need_x), to(grad_weights, need_weights),
                to(grad_seeds, need_seeds), to(grad_kappa, need_kappa)});
    });
  }
  return {grad_x, grad_weights, grad_seeds, grad_kappa};
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("mean_shift_backward", TORCH_BOX(&effops::pairwise::mean_shift_backward));
}
