// pairwise_embedding_loss on the CPU. Pairs of one instance have a closed form (README.md); those of two
// instances are added up tile by tile, and tiles of pairs that are too far apart to cost anything are left
// out.
#include "pairwise_embedding_loss.h"

#include "pair_rounds_cpu.h"
#include "tensors_cpu.h"
#include "tile_bounds_cpu.h"

namespace effops::pairwise {
namespace {

// The points of one image that have a label, sorted by it.
template <typename T>
class Image {
 public:
  // order, segments: of those points.
  Image(int64_t channels, const T* x, const T* weights, const int64_t* order, const int64_t* segments,
        int64_t count, double alpha)
      : grid_{1, count, channels},
        points_(grid_, x, std::vector<int32_t>(order, order + count)),
        weights_(1, grid_.tiles, 1),
        segments_(1, grid_.tiles, 1),
        bounds_(grid_),
        alpha_(alpha) {
    grid_.for_tiles([&](int64_t, int64_t tile) {
      points_.pack(weights, 1, 0, tile, weights_.at(0, tile));
      for (int64_t l = 0; l < kTile; ++l) {
        const bool real = l < grid_.count(tile);
        segments_.at(0, tile)[l] = real ? static_cast<int32_t>(segments[tile * kTile + l]) : -1;
      }
      bounds_.set(0, tile, points_.frame(0, tile));
    });
    add_means();
  }

  // costs: [N], written at the points.
  void costs(T* costs) {
    const Frames<T> sums(1, grid_.tiles, 1);
    std::fill_n(sums.at(0, 0), grid_.tiles * kTile, T(0));
    for_costly_pairs([&](int64_t a, int64_t b, T* similarities, bool mixed) {
      T nowhere[kTile];
      T* const rows = a == b ? nowhere : sums.at(0, a);  // a tile with itself has every pair twice
      tile_kernels<T>().hinge_costs(hinge(a, b, similarities, mixed, rows, sums.at(0, b)));
    });
    grid_.for_tiles([&](int64_t, int64_t tile) {
      for (int64_t l = 0; l < grid_.count(tile); ++l) {
        costs[points_.row_at(0, tile * kTile + l)] = sums.at(0, tile)[l] + same_cost(tile, l);
      }
    });
  }

  // grad_x: [N, D], written at the points: of sum_i (w_i / divisors[0]) (costs_i / divisors[1]), times
  // `grad`.
  void backward(double grad, const double (&divisors)[2], T* grad_x) {
    const Frames<T> weighted(1, grid_.tiles, grid_.channels + 1), sums(1, grid_.tiles, grid_.channels);
    grid_.for_tiles([&](int64_t, int64_t tile) {
      tile_kernels<T>().multiply_lanes(points_.frame(0, tile), weights_.at(0, tile), weighted.at(0, tile),
                                       grid_.channels + 1);
      std::fill_n(sums.at(0, tile), sums.size(), T(0));
    });
    for_costly_pairs([&](int64_t a, int64_t b, T* similarities, bool mixed) {
      const TileKernels<T>& kernels = tile_kernels<T>();
      if (!kernels.hinge_slopes(hinge(a, b, similarities, mixed, nullptr, nullptr))) return;
      add(weighted.at(0, a), similarities, sums.at(0, b));
      if (a == b) return;
      T* const transposed = similarities + kTile * kTile;
      kernels.transpose(similarities, transposed);
      add(weighted.at(0, b), transposed, sums.at(0, a));
    });
    grid_.for_tiles([&](int64_t, int64_t tile) { finish(tile, grad, divisors, sums.at(0, tile), grad_x); });
  }

 private:
  double* mean(int32_t segment) { return means_.data() + segment * (grid_.channels + 1); }

  // Of each instance the sum of w x, and that of w, which follows it.
  void add_means() {
    int32_t last = -1;
    for (int64_t l = 0; l < grid_.count(grid_.tiles - 1); ++l) last = segments_.at(0, grid_.tiles - 1)[l];
    means_.assign((last + 1) * (grid_.channels + 1), 0.0);
    parallel_for(grid_.channels + 1, 8, [&](int64_t begin, int64_t end) {
      for (int64_t tile = 0; tile < grid_.tiles; ++tile) {
        const T *frame = points_.frame(0, tile), *weights = weights_.at(0, tile);
        for (int64_t k = begin; k < end; ++k) {
          for (int64_t l = 0; l < grid_.count(tile); ++l) {
            mean(segments_.at(0, tile)[l])[k] += static_cast<double>(weights[l]) * frame[k * kTile + l];
          }
        }
      }
    });
  }

  // sum_j w_j (1 - s_ij) over the points j of the instance of i, itself included.
  T same_cost(int64_t tile, int64_t lane) {
    const double* const sums = mean(segments_.at(0, tile)[lane]);
    double product = 0;
    for (int64_t k = 0; k < grid_.channels; ++k)
      product += sums[k] * points_.frame(0, tile)[k * kTile + lane];
    return static_cast<T>((sums[grid_.channels] - product) / 2);
  }

  // Calls f(a, b, similarities, mixed) for all unordered pairs of tiles that may hold a pair of points of two
  // instances with a cost; mixed: there may be pairs of one instance too.
  template <typename F>
  void for_costly_pairs(const F& f) {
    const double limit = points_.finite(0) ? 2 * alpha_ - 1 : -2;
    for_block_pairs(grid_, [&](int64_t, TileRange first, TileRange second) {
      const Frames<T> buffers(1, 2, kTile);
      T* const similarities = buffers.at(0, 0);
      for (int64_t a = first.begin; a < first.end; ++a) {
        const int64_t begin = first.begin == second.begin ? a : second.begin;
        for (int64_t b = begin; b < second.end; ++b) {
          const int32_t last_a = segments_.at(0, a)[grid_.count(a) - 1], first_b = segments_.at(0, b)[0];
          const bool mixed = a == b || last_a == first_b;
          if (segments_.at(0, a)[0] == segments_.at(0, b)[grid_.count(b) - 1]) continue;  // one instance
          const T *frame_a = points_.frame(0, a), *frame_b = points_.frame(0, b);
          if (a != b && bounds_.apart(0, a, frame_a, b, frame_b, limit)) continue;
          tile_kernels<T>().product({frame_a, 1, kTile, frame_b, similarities, kTile, grid_.channels, false});
          if (!bounds_.apart(similarities, limit)) f(a, b, similarities, mixed);
        }
      }
    });
  }

  Hinge<T> hinge(int64_t a, int64_t b, T* similarities, bool mixed, T* row_costs, T* lane_costs) const {
    return {similarities,       mixed ? segments_.at(0, a) : nullptr,
            segments_.at(0, b), weights_.at(0, a),
            weights_.at(0, b),  row_costs,
            lane_costs,         static_cast<T>(alpha_)};
  }

  void add(const T* weighted, const T* slopes, T* sums) const {
    tile_kernels<T>().product({weighted, kTile, 1, slopes, sums, grid_.channels, kTile, true});
  }

  // From the sums of w_j x_j over the costly points of other instances to the gradient of the rows.
  void finish(int64_t tile, double grad, const double (&divisors)[2], const T* sums, T* grad_x) {
    const T *frame = points_.frame(0, tile), *norms = points_.norms(0, tile);
    for (int64_t l = 0; l < grid_.count(tile); ++l) {
      const double* const same = mean(segments_.at(0, tile)[l]);
      const double weight = points_.finite(0) ? weights_.at(0, tile)[l] : __builtin_nan("");
      const double factor = grad * (weight / divisors[0]);
      const bool is_short = norms[l] < T(kSmallestNorm);
      const auto grad_at = [&](int64_t k) {
        return factor * ((sums[k * kTile + l] - same[k]) / divisors[1]);
      };
      double along = 0;
      for (int64_t k = 0; k < grid_.channels; ++k) along += grad_at(k) * frame[k * kTile + l];
      T* const to = grad_x + points_.row_at(0, tile * kTile + l) * grid_.channels;
      for (int64_t k = 0; k < grid_.channels; ++k) {
        to[k] = static_cast<T>(is_short ? grad_at(k) / kSmallestNorm
                                        : (grad_at(k) - along * frame[k * kTile + l]) / norms[l]);
      }
    }
  }

  TileGrid grid_;
  PointSet<T> points_;
  Frames<T> weights_;
  Frames<int32_t> segments_;
  TileBounds<T> bounds_;
  double alpha_;
  std::vector<double> means_;
};

// The arguments of one call; order and segments have been checked.
template <typename T>
struct Batch {
  LossShape shape;
  const T *x, *weights;
  const int64_t *order, *segments;

  // Where the points with a label begin.
  int64_t begin(int64_t image) const {
    const int64_t* const of = segments + image * shape.points;
    return std::upper_bound(of, of + shape.points, int64_t{-1}) - of;
  }
  Image<T> image(int64_t n) const {
    const int64_t first = begin(n), at = n * shape.points;
    return Image<T>(shape.channels, x + at * shape.channels, weights + at, order + at + first,
                    segments + at + first, shape.points - first, shape.alpha);
  }
  // Calls f(image) for every image that has points with a label, on several threads if there are many.
  template <typename F>
  void for_images(const F& f) const {
    const auto range = [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; ++n) {
        if (begin(n) < shape.points) f(n);
      }
    };
    if (shape.batch < num_threads())
      range(0, shape.batch);  // then each is split up
    else
      parallel_for(shape.batch, 1, range);
  }

  // The place of a point in the order of x, in the arrays of all images.
  int64_t at(int64_t image, int64_t i) const {
    return image * shape.points + order[image * shape.points + i];
  }

  // A loss is sum_i (w_i / divisors[0]) (c_i / divisors[1]): two factors, as the square of the sum of weights
  // may overflow. It is 0 where that sum is 0.
  struct Total {
    double loss, weight, divisors[2];
  };
  Total total(int64_t image, const T* costs) const {
    Total total{0, 0, {1, 1}};
    const int64_t first = begin(image);
    T weight = 0;  // overflows as T does
    for (int64_t i = first; i < shape.points; ++i) weight += weights[at(image, i)];
    total.weight = weight;
    if (shape.normalize == kThesis) total.divisors[0] = static_cast<double>(shape.points - first);
    if (shape.normalize == kSumWeights) total.divisors[0] = total.divisors[1] = total.weight;
    if (!counts(image, total)) return total;
    for (int64_t i = first; i < shape.points; ++i) {
      total.loss += weights[at(image, i)] / total.divisors[0] * (costs[at(image, i)] / total.divisors[1]);
    }
    return total;
  }
  bool counts(int64_t image, const Total& total) const {
    return begin(image) < shape.points && total.divisors[0] != 0;
  }
};

void check_values(const char* op, const LossShape& shape, const int64_t* order, const int64_t* segments) {
  for (int64_t n = 0; n < shape.batch; ++n) {
    int64_t last = -1;
    for (int64_t i = n * shape.points; i < (n + 1) * shape.points; ++i) {
      if (order[i] < 0 || order[i] >= shape.points) {
        fail(op, ": expected order in [0, ", shape.points, "), got ", order[i]);
      }
      if (segments[i] < last || segments[i] >= shape.points) {
        fail(op, ": expected segments that do not decrease, from -1 to ", shape.points - 1, ", got ",
             segments[i], " after ", last);
      }
      last = segments[i];
    }
  }
}

std::tuple<Tensor, Tensor> pairwise_embedding_loss(const Tensor& x,         // [B, N, D]
                                                   const Tensor& order,     // [B, N]
                                                   const Tensor& segments,  // [B, N]
                                                   const Tensor& weights,   // [B, N]
                                                   double alpha, int64_t normalize) {
  const LossShape shape = check_pairwise_embedding_loss(x, order, segments, weights, alpha, normalize);
  const Tensor loss = zeros_of(x, {}), costs = zeros_of(x, {shape.batch, shape.points});
  const Tensor own_order = effops::as_contiguous(order), own_segments = effops::as_contiguous(segments);
  check_values("pairwise_embedding_loss", shape, data_of<int64_t>(own_order), data_of<int64_t>(own_segments));
  dispatch_points(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor points = effops::as_contiguous(x), own_weights = effops::as_contiguous(weights);
    const Batch<T> batch{shape, data_of<T>(points), data_of<T>(own_weights), data_of<int64_t>(own_order),
                         data_of<int64_t>(own_segments)};
    T* const to = new_data<T>(costs);
    batch.for_images([&](int64_t n) { batch.image(n).costs(to + n * shape.points); });
    double sum = 0;
    for (int64_t n = 0; n < shape.batch; ++n) sum += batch.total(n, to).loss;
    if (shape.batch > 0) sum /= static_cast<double>(shape.batch);
    *new_data<T>(loss) = static_cast<T>(sum);
  });
  return {loss, costs};
}

std::tuple<Tensor, Tensor> pairwise_embedding_loss_backward(const Tensor& grad_loss,  // []
                                                            const Tensor& x,          // [B, N, D]
                                                            const Tensor& order,      // [B, N]
                                                            const Tensor& segments,   // [B, N]
                                                            const Tensor& weights,    // [B, N]
                                                            const Tensor& costs,      // [B, N]
                                                            double alpha, int64_t normalize, bool need_x,
                                                            bool need_weights) {
  constexpr const char* op = "pairwise_embedding_loss_backward";
  const LossShape shape =
      check_pairwise_embedding_loss_grad(grad_loss, x, order, segments, weights, costs, alpha, normalize);
  const Tensor grad_x = need_x ? zeros_of(x, {shape.batch, shape.points, shape.channels}) : empty_of(x, {0});
  const Tensor grad_weights = need_weights ? zeros_of(x, {shape.batch, shape.points}) : empty_of(x, {0});
  const Tensor own_order = effops::as_contiguous(order), own_segments = effops::as_contiguous(segments);
  check_values(op, shape, data_of<int64_t>(own_order), data_of<int64_t>(own_segments));
  dispatch_points(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor points = effops::as_contiguous(x), own_weights = effops::as_contiguous(weights),
                 own_costs = effops::as_contiguous(costs);
    const Batch<T> batch{shape, data_of<T>(points), data_of<T>(own_weights), data_of<int64_t>(own_order),
                         data_of<int64_t>(own_segments)};
    const double grad = static_cast<double>(*data_of<T>(grad_loss)) / static_cast<double>(shape.batch);
    batch.for_images([&](int64_t n) {
      const auto total = batch.total(n, data_of<T>(own_costs));
      if (!batch.counts(n, total)) return;
      if (need_x) {
        T* const to = new_data<T>(grad_x) + n * shape.points * shape.channels;
        batch.image(n).backward(grad, total.divisors, to);
      }
      if (!need_weights) return;
      const double shared = normalize == kSumWeights ? 2 * total.loss / total.weight : 0;
      for (int64_t i = batch.begin(n); i < shape.points; ++i) {
        const double cost = data_of<T>(own_costs)[batch.at(n, i)] / total.divisors[1];
        new_data<T>(grad_weights)[batch.at(n, i)] =
            static_cast<T>(grad * (2 * cost / total.divisors[0] - shared));
      }
    });
  });
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace effops::pairwise

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("pairwise_embedding_loss", TORCH_BOX(&effops::pairwise::pairwise_embedding_loss));
  m.impl("pairwise_embedding_loss_backward", TORCH_BOX(&effops::pairwise::pairwise_embedding_loss_backward));
}
