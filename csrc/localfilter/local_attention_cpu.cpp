// local_attention on the CPU: checks, tiles, tasks. Similarities are logits of filters that never leave the
// tile; the kernels are those of the filters.
#include "local_attention.h"

#include "../common/maps.h"
#include "filter_tiles_cpu.h"

namespace effops::localfilter {
namespace {

template <typename A>
constexpr int kTypeOf = static_cast<int>(std::is_same_v<A, double> ? FloatType::kDouble : FloatType::kFloat);

template <typename A>
struct Attention {
  AttentionShape shape;
  Window window = reachable(shape.window);
  // Taps that were cut off, whose similarity 0 counts.
  double outside = window.padding == kZeros ? count_of(shape.window) - count_of(window) : 0;

  static double count_of(const Window& of) { return static_cast<double>(of.kernel) * of.kernel; }
  // A window without the taps that lie outside the image for every pixel.
  static Window reachable(Window of) {
    const int64_t reach = divide_up(std::max(of.height, of.width) - 1, of.dilation);
    if (of.kernel / 2 > reach) of.kernel = 2 * reach + 1;
    return of;
  }

  struct Place {
    int64_t n, y;  // the image and the tile's first row
  };
  struct Buffers {
    Buffer<A> weights, slopes, staged, pixels, outputs, sums, mean, grad;
  };

  int64_t together(const WindowTile<A>& tile) const {
    return channels_at_a_time(tile.staged_stride() * sizeof(A));
  }

  // scores_k(p) = sum_c pixels_c(p) image_c(p + o_k), without the scale.
  void dot(Buffers& buffers, const WindowTile<A>& tile, const Place& at, const MapView& pixels,
           const MapView& image, int64_t channels, A* scores) const {
    if (channels == 0) std::fill_n(scores, tile.weights_size(), A(0));
    for_channels(channels, together(tile), [&](int64_t first, int64_t count) {
      A* staged = buffers.staged.sized(tile.staged_size(count));
      A* own = buffers.pixels.sized(tile.pixels_size(count));
      tile.stage(image, at.n, first, count, staged);
      tile.stage_outputs(pixels, at.n, first, count, at.y, own);
      tile.dot(own, staged, count, first > 0, scores);
    });
  }

  // out_c(p) = sum_k weights_k(p) image_c(p + o_k) / divisors(p); divisors: [rows] `stride` apart, or null.
  void mix(Buffers& buffers, const WindowTile<A>& tile, const Place& at, const A* weights,
           const MapView& image, int64_t channels, const A* divisors, int64_t stride,
           const MapView& out) const {
    for_channels(channels, together(tile), [&](int64_t first, int64_t count) {
      A* staged = buffers.staged.sized(tile.staged_size(count));
      A* outputs = buffers.outputs.sized(tile.outputs_size(count));
      tile.stage(image, at.n, first, count, staged);
      tile.mix(weights, staged, count, outputs);
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t r = 0; r < tile.rows().count; ++r) {
          tile.write_row(outputs + c * tile.outputs_stride() + r * tile.columns().width,
                         divisors ? divisors + r * stride : nullptr, out, at.n, first + c, at.y + r);
        }
      }
    });
  }

  // Adds sum_k weights_k(u - o_k) pixels_c(u - o_k) through `fold`.
  template <typename Fold>
  void mix_transposed(Buffers& buffers, const WindowTile<A>& tile, const Place& at, const A* weights,
                      const MapView& pixels, int64_t channels, const Fold& fold) const {
    for_channels(channels, together(tile), [&](int64_t first, int64_t count) {
      A* own = buffers.pixels.sized(tile.pixels_size(count));
      A* sums = buffers.grad.sized(tile.staged_size(count));
      tile.stage_outputs(pixels, at.n, first, count, at.y, own);
      tile.mix_transposed(weights, own, count, sums);
      fold(sums, first, count);
    });
  }

  FilterRow row_of(const WindowTile<A>& tile, int64_t r, const A* scores) const {
    FilterRow row = filter_row(window, kSoftmax, tile.rows(), tile.columns(), r);
    row.filters = scores;
    row.plane_stride = tile.columns().row_pitch;
    return row;
  }

  WeighRow weigh_row(const WindowTile<A>& tile, A* weights) const {
    WeighRow job{};
    job.weights = weights;
    job.tap_stride = tile.columns().row_pitch;
    job.similarities = true;
    job.scale = shape.scale;
    job.outside = outside;
    return job;
  }

  int64_t pixel(const WindowTile<A>& tile, const Place& at, int64_t r) const {
    return (at.n * window.height + at.y + r) * window.width + tile.columns().first;
  }

  // ------------------------------------------------------------------------------------ forward
  void forward(const MapView& q, const MapView& k, const MapView& v, const MapView& out,
               A* log_sum_exp) const {
    const TileGrid grid = grid_of_weights(window, sizeof(A), 1);
    const std::vector<TileColumns> columns = columns_of(window, grid, false);
    parallel_for(shape.batch * grid.down * grid.across, 1, [&](int64_t begin, int64_t end) {
      Buffers buffers;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t down = i / grid.across % grid.down;
        const TileRows rows(window, grid.first_row(down), grid.rows_of(down));
        const WindowTile<A> tile(window, rows, columns[i % grid.across]);
        const Place at{i / grid.across / grid.down, grid.first_row(down)};
        A* weights = buffers.weights.sized(tile.weights_size());
        dot(buffers, tile, at, q, k, shape.key_channels, weights);
        const int64_t width = tile.columns().width;
        A* sums = buffers.sums.sized(4 * width * rows.count);
        for (int64_t r = 0; r < rows.count; ++r) {
          A* row = tile.weights_row(weights, r);
          WeighRow job = weigh_row(tile, row);
          job.sums = sums + 4 * width * r;
          job.sums_stride = width;
          tile_row_kernels().weigh[kTypeOf<A>](row_of(tile, r, row), job);
          std::copy_n(sums + 4 * width * r + 2 * width, tile.columns().count,
                      log_sum_exp + pixel(tile, at, r));
        }
        mix(buffers, tile, at, weights, v, shape.value_channels, sums + 3 * width, 4 * width, out);
      }
    });
  }

  // ------------------------------------------------------------------------------------ backward
  struct Gradients {
    const MapView &q, &k, &v, &out, &grad_out;
    const A* log_sum_exp;
    std::optional<Tensor> grad_q, grad_k, grad_v;  // those that are wanted
  };

  void backward(const Gradients& of) const {
    const TileGrid grid = grid_of_weights(window, sizeof(A), 2);
    const std::vector<TileColumns> columns = columns_of(window, grid, true);
    ImageBands<A> bands_k(window, grid, shape.batch, of.grad_k ? shape.key_channels : 0);
    ImageBands<A> bands_v(window, grid, shape.batch, of.grad_v ? shape.value_channels : 0);
    const int64_t bands = bands_k.bands();
    parallel_for(shape.batch * bands, 1, [&](int64_t begin, int64_t end) {
      Buffers buffers;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / bands, band = i % bands;
        bands_k.clear(n, band);
        bands_v.clear(n, band);
        for (int64_t down = bands_k.first_tile(band); down < bands_k.last_tile(band, grid); ++down) {
          const TileRows rows(window, grid.first_row(down), grid.rows_of(down));
          for (const TileColumns& part : columns) {
            const WindowTile<A> tile(window, rows, part);
            tile_gradients(
                buffers, tile, {n, grid.first_row(down)}, of,
                [&](const A* sums, int64_t c, int64_t count) { bands_k.add(tile, sums, n, band, c, count); },
                [&](const A* sums, int64_t c, int64_t count) { bands_v.add(tile, sums, n, band, c, count); });
          }
        }
      }
    });
    if (of.grad_k) bands_k.write(MapView(*of.grad_k), 1);
    if (of.grad_v) bands_v.write(MapView(*of.grad_v), 1);
  }

  template <typename FoldK, typename FoldV>
  void tile_gradients(Buffers& buffers, const WindowTile<A>& tile, const Place& at, const Gradients& of,
                      const FoldK& fold_k, const FoldV& fold_v) const {
    A* weights = buffers.weights.between_zeros(tile.weights_size(), tile.columns().width);
    dot(buffers, tile, at, of.q, of.k, shape.key_channels, weights);
    for (int64_t r = 0; r < tile.rows().count; ++r) {
      A* row = tile.weights_row(weights, r);
      WeighRow job = weigh_row(tile, row);
      job.normalizer = of.log_sum_exp + pixel(tile, at, r);
      tile_row_kernels().weigh[kTypeOf<A>](row_of(tile, r, row), job);
    }
    if (of.grad_v) mix_transposed(buffers, tile, at, weights, of.grad_out, shape.value_channels, fold_v);
    if (!of.grad_q && !of.grad_k) return;
    A* slopes = buffers.slopes.between_zeros(tile.weights_size(), tile.columns().width);
    dot(buffers, tile, at, of.grad_out, of.v, shape.value_channels, slopes);
    score_gradients(buffers, tile, at, of, weights, slopes);
    if (of.grad_q) {
      mix(buffers, tile, at, slopes, of.k, shape.key_channels, nullptr, 0, MapView(*of.grad_q));
    }
    if (of.grad_k) mix_transposed(buffers, tile, at, slopes, of.q, shape.key_channels, fold_k);
  }

  // slopes become scale * p (dO . v - D), the gradients of the products of queries and keys.
  void score_gradients(Buffers& buffers, const WindowTile<A>& tile, const Place& at, const Gradients& of,
                       A* weights, A* slopes) const {
    const int64_t width = tile.columns().width;
    A* mean = buffers.mean.sized(tile.rows().count * width);
    std::fill_n(mean, tile.rows().count * width, A(0));
    const auto add = tile_row_kernels().add_products[WindowTile<A>::kIndex];
    for (int64_t c = 0; c < shape.value_channels; ++c) {
      A* out = buffers.pixels.sized(tile.pixels_size(1));
      A* grad = buffers.grad.sized(tile.pixels_size(1));
      tile.stage_outputs(of.out, at.n, c, 1, at.y, out);
      tile.stage_outputs(of.grad_out, at.n, c, 1, at.y, grad);
      for (int64_t r = 0; r < tile.rows().count; ++r) {
        add(tile.pixels_row(out, r), tile.pixels_row(grad, r), width, mean + r * width);
      }
    }
    for (int64_t r = 0; r < tile.rows().count; ++r) {
      SlopeRow job{};
      job.weights = tile.weights_row(weights, r);
      job.slopes = tile.weights_row(slopes, r);
      job.tap_stride = tile.columns().row_pitch;
      job.normalizer = of.log_sum_exp + pixel(tile, at, r);
      job.mean = mean + r * width;
      job.similarities = true;
      job.scale = shape.scale;
      tile_row_kernels().slopes[kTypeOf<A>](row_of(tile, r, weights), job);
    }
  }
};

// Calls f(tag) with the accumulator of q.
template <typename F>
void with_accumulator(const Tensor& q, const F& f) {
  if (q.scalar_type() == ScalarType::Double) {
    f(TypeTag<double>{});
  } else {
    f(TypeTag<float>{});
  }
}

std::tuple<Tensor, Tensor> local_attention(const Tensor& q,  // [N, C, H, W]
                                           const Tensor& k,  // [N, C, H, W]
                                           const Tensor& v,  // [N, Cv, H, W]
                                           int64_t window, int64_t dilation, double scale, int64_t border) {
  const AttentionShape shape = check_local_attention(q, k, v, window, dilation, scale, border);
  const int64_t height = shape.window.height, width = shape.window.width;
  const Tensor output = new_maps(q, {shape.batch, shape.value_channels, height, width});
  const Tensor log_sum_exp = empty_of(q, {shape.batch, height, width}, accumulator_dtype(q));
  if (log_sum_exp.numel() > 0) {
    with_accumulator(q, [&](auto tag) {
      using A = typename decltype(tag)::type;
      Attention<A>{shape}.forward(MapView(q), MapView(k), MapView(v), MapView(output),
                                  static_cast<A*>(log_sum_exp.mutable_data_ptr()));
    });
  }
  return {output, log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor> local_attention_backward(const Tensor& grad_output,  // [N, Cv, H, W]
                                                            const Tensor& q,            // [N, C, H, W]
                                                            const Tensor& k,            // [N, C, H, W]
                                                            const Tensor& v,            // [N, Cv, H, W]
                                                            const Tensor& output,       // [N, Cv, H, W]
                                                            const Tensor& log_sum_exp,  // [N, H, W]
                                                            int64_t window, int64_t dilation, double scale,
                                                            int64_t border, bool need_q, bool need_k,
                                                            bool need_v) {
  const AttentionShape shape =
      check_local_attention_grad(grad_output, q, k, v, output, log_sum_exp, window, dilation, scale, border);
  const auto gradient = [](const Tensor& x, bool wanted) {
    return wanted ? new_maps(x, {x.size(0), x.size(1), x.size(2), x.size(3)}) : empty_of(x, {0});
  };
  const Tensor grad_q = gradient(q, need_q), grad_k = gradient(k, need_k), grad_v = gradient(v, need_v);
  if (log_sum_exp.numel() > 0) {
    with_accumulator(q, [&](auto tag) {
      using A = typename decltype(tag)::type;
      const Tensor saved = as_contiguous(log_sum_exp);
      const MapView views[] = {MapView(q), MapView(k), MapView(v), MapView(output), MapView(grad_output)};
      typename Attention<A>::Gradients of{views[0], views[1], views[2],
                                          views[3], views[4], static_cast<const A*>(saved.const_data_ptr()),
                                          {},       {},       {}};
      if (need_q) of.grad_q = grad_q;
      if (need_k) of.grad_k = grad_k;
      if (need_v) of.grad_v = grad_v;
      Attention<A>{shape}.backward(of);
    });
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace effops::localfilter

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("local_attention", TORCH_BOX(&effops::localfilter::local_attention));
  m.impl("local_attention_backward", TORCH_BOX(&effops::localfilter::local_attention_backward));
}
