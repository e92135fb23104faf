// The backward half of the filter engine on the CPU: tiles, tasks. The kernels are in *_cpu_kernel.cpp.
#include "filter_engine_cpu.h"
#include "filter_tiles_cpu.h"

namespace effops::localfilter {
namespace {

template <typename A>
struct Backward {
  const FilterBackward& call;
  const FilterShape& shape = call.shape;
  const Window& window = shape.window;
  const bool normalized = shape.normalizer();
  const bool softmax = shape.normalize == kSoftmax;
  const int64_t channels = shape.channels / shape.groups;  // of a group

  const Tensor any = call.filters ? *call.filters : *call.grad_filters;  // where an argument is missing
  const FilterPlanes filters{any};
  const MapView image = view(call.image), grad_output = view(call.grad_output), output = view(call.output);
  const MapView flow = view(call.flow), grad_flow = view(call.grad_flow);
  const Tensor plain_normalizer = normalized ? as_contiguous(*call.normalizer) : any;
  const A* normalizer = static_cast<const A*>(plain_normalizer.const_data_ptr());
  const FilterPlanes grad_filters{call.grad_filters ? *call.grad_filters : any};

  MapView view(const std::optional<Tensor>& maps) const { return MapView(maps ? *maps : any); }

  // Rows of one tile, [rows][width] each: what T is normalised by, and D = sum_k T_k s_k.
  struct Statistics {
    Buffer<A> by, mean, grad_flow, flow, pixels, outputs;
  };
  struct Rows {
    A *by, *mean, *grad_flow;  // grad_flow: [2][rows][row_pitch] from its margin on, or null
  };

  Rows statistics(Statistics& buffers, const WindowTile<A>& tile, int64_t n, int64_t group, int64_t y) const {
    const int64_t rows = tile.rows().count, width = tile.columns().width, count = tile.columns().count;
    Rows result{buffers.by.sized(rows * width), buffers.mean.sized(rows * width), nullptr};
    std::fill_n(result.by, rows * width, A(1));
    for (int64_t r = 0; normalized && r < rows; ++r) {
      const int64_t pixel = ((n * shape.groups + group) * window.out_height + y + r) * window.out_width +
                            tile.columns().first;
      for (int64_t i = 0; i < count; ++i) {
        const A value = normalizer[pixel + i];
        result.by[r * width + i] = softmax ? value : A(1) / value;
      }
    }
    std::fill_n(result.mean, rows * width, A(0));
    if (shape.flow) {
      result.grad_flow = buffers.grad_flow.sized(tile.pixels_size(2));
      tile.stage_outputs(grad_flow, n, 2 * group, 2, y, result.grad_flow);
      if (normalized) {
        A* saved = buffers.flow.sized(tile.pixels_size(2));
        tile.stage_outputs(flow, n, 2 * group, 2, y, saved);
        add_products(tile, result.grad_flow, saved, 2, result.mean);
      }
    }
    return result;
  }

  // mean(r, i) += sum_c a_c(r, i) b_c(r, i)
  void add_products(const WindowTile<A>& tile, A* a, A* b, int64_t count, A* mean) const {
    const int64_t width = tile.columns().width;
    for (int64_t c = 0; c < count; ++c, a += tile.pixels_stride(), b += tile.pixels_stride()) {
      for (int64_t r = 0; r < tile.rows().count; ++r) {
        tile_row_kernels().add_products[WindowTile<A>::kIndex](tile.pixels_row(a, r), tile.pixels_row(b, r),
                                                               width, mean + r * width);
      }
    }
  }

  // Stages the output's gradient and adds its part to D.
  A* stage_grad(Statistics& buffers, const WindowTile<A>& tile, int64_t n, int64_t channel, int64_t count,
                int64_t y, A* mean) const {
    A* grad = buffers.pixels.sized(tile.pixels_size(count));
    tile.stage_outputs(grad_output, n, channel, count, y, grad);
    if (normalized && call.grad_filters) {
      A* saved = buffers.outputs.sized(tile.pixels_size(count));
      tile.stage_outputs(output, n, channel, count, y, saved);
      add_products(tile, grad, saved, count, mean);
    }
    return grad;
  }

  FilterPlanes::Row place(const WindowTile<A>& tile, int64_t n, int64_t group, int64_t y) const {
    const TileColumns& columns = tile.columns();
    return {n, group * window.taps(), window.taps(), y, columns.first, columns.count};
  }
  FilterRow row_of(const WindowTile<A>& tile, int64_t r, const FilterPlanes::Planes& planes) const {
    FilterRow row = filter_row(window, shape.normalize, tile.rows(), tile.columns(), r);
    row.filters = planes.data;
    row.plane_stride = planes.stride;
    return row;
  }

  // Calls f(buffers, tile, n, group, first row, bands, map, band) for the tiles of all bands, in order.
  template <typename Buffers, typename F>
  void for_bands(const TileGrid& grid, ImageBands<A>& bands, const F& f) const {
    const std::vector<TileColumns> columns = columns_of(window, grid, true);
    parallel_for(shape.batch * shape.groups * bands.bands(), 1, [&](int64_t begin, int64_t end) {
      Buffers buffers;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t map = i / bands.bands(), band = i % bands.bands();
        if (call.grad_image) bands.clear(map, band);
        for (int64_t down = bands.first_tile(band); down < bands.last_tile(band, grid); ++down) {
          const TileRows rows(window, grid.first_row(down), grid.rows_of(down));
          for (const TileColumns& part : columns) {
            const WindowTile<A> tile(window, rows, part);
            f(buffers, tile, map / shape.groups, map % shape.groups, grid.first_row(down),
              [&](const A* staged, int64_t channel, int64_t count) {
                bands.add(tile, staged, map, band, channel, count);
              });
          }
        }
      }
    });
    if (call.grad_image) bands.write(MapView(*call.grad_image), shape.groups);
  }

  ImageBands<A> bands_of(const TileGrid& grid) const {
    return ImageBands<A>(window, grid, shape.batch * shape.groups, call.grad_image ? channels : 0);
  }

  struct FewBuffers {
    Statistics statistics;
    Buffer<A> staged, weights, grad_image;
    Buffer<char> filters, grad_filters;
  };
  void run_few() const {
    const TileGrid grid = grid_of_few(window, filters);
    ImageBands<A> bands = bands_of(grid);
    for_bands<FewBuffers>(
        grid, bands,
        [&](FewBuffers& buffers, const WindowTile<A>& tile, int64_t n, int64_t group, int64_t y,
            const auto& fold) {
          const Rows saved = statistics(buffers.statistics, tile, n, group, y);
          A* staged = buffers.staged.sized(tile.staged_size(channels));
          tile.stage(image, n, group * channels, channels, staged);
          A* grad = stage_grad(buffers.statistics, tile, n, group * channels, channels, y, saved.mean);
          A* sums = buffers.grad_image.sized(tile.staged_size(channels));
          std::fill_n(sums, tile.staged_size(channels), A(0));
          for (int64_t r = 0; r < tile.rows().count; ++r) {
            const FilterPlanes::Row row = place(tile, n, group, y + r);
            const auto given = filters.read(row, buffers.filters);
            const auto wanted = call.grad_filters ? grad_filters.target(row, buffers.grad_filters)
                                                  : FilterPlanes::Planes{nullptr, 0};
            row_gradients(buffers, tile, row_of(tile, r, given), r, staged, grad, saved, wanted, sums);
            if (call.grad_filters) grad_filters.finish(row, wanted);
          }
          if (call.grad_image) fold(sums, 0, channels);
        });
  }

  // One row of pixels: two rows of taps at a time.
  void row_gradients(FewBuffers& buffers, const WindowTile<A>& tile, const FilterRow& row, int64_t r,
                     const A* staged, A* grad, const Rows& saved, const FilterPlanes::Planes& wanted,
                     A* sums) const {
    const auto run = filter_row_kernels().gradient[filters.type()][channels];
    const TileColumns& columns = tile.columns();
    const int64_t taps_size = window.kernel * columns.row_pitch;
    A* weights = buffers.weights.between_zeros(2 * taps_size, columns.width) + columns.margin;
    FilterGradient job{};
    job.channel_stride = tile.staged_stride();
    job.grad = tile.pixels_row(grad, r);
    job.grad_stride = tile.pixels_stride();
    job.normalizer = saved.by + r * columns.width;
    job.mean = saved.mean + r * columns.width;
    job.grad_flow = saved.grad_flow ? tile.pixels_row(saved.grad_flow, r) : nullptr;
    job.grad_filters = wanted.data;
    job.grad_plane_stride = wanted.stride;
    job.weights_stride = columns.row_pitch;
    const auto read_row = [&](int64_t dy) { return tile.rows().read_row[r * window.kernel + dy]; };
    for (int64_t dy = 0; dy < window.kernel; dy += 2) {
      const int64_t both = std::min<int64_t>(2, window.kernel - dy);
      for (int64_t i = 0; i < both; ++i) {
        job.tap_row = dy + i;
        job.image = staged + read_row(dy + i) * columns.pitch;
        job.weights = weights + i * taps_size;
        run(row, job);
      }
      if (!call.grad_image || channels == 0) continue;
      const bool second = both == 2;
      tile.add_transposed(
          {{job.grad, {weights, second ? weights + taps_size : nullptr}}}, channels, tile.pixels_stride(),
          {sums + read_row(dy) * columns.pitch, second ? sums + read_row(dy + 1) * columns.pitch : nullptr},
          tile.staged_stride(), true);
    }
  }

  struct ManyBuffers {
    Statistics statistics;
    Buffer<A> weights, slopes, staged, grad_image;
    Buffer<char> filters, grad_filters;
  };
  void run_many() const {
    const TileGrid grid = grid_of_weights(window, sizeof(A), 2);
    ImageBands<A> bands = bands_of(grid);
    for_bands<ManyBuffers>(
        grid, bands,
        [&](ManyBuffers& buffers, const WindowTile<A>& tile, int64_t n, int64_t group, int64_t y,
            const auto& fold) {
          const Rows saved = statistics(buffers.statistics, tile, n, group, y);
          A* weights = buffers.weights.between_zeros(tile.weights_size(), tile.columns().width);
          A* slopes = buffers.slopes.sized(tile.weights_size());
          if (call.filters) weigh_rows(buffers, tile, n, group, y, saved, weights);
          if (channels == 0) std::fill_n(slopes, tile.weights_size(), A(0));
          const int64_t together = channels_at_a_time(tile.staged_stride() * sizeof(A));
          for_channels(channels, together, [&](int64_t first, int64_t count) {
            const int64_t channel = group * channels + first;
            A* grad = stage_grad(buffers.statistics, tile, n, channel, count, y, saved.mean);
            if (call.grad_filters) {
              A* staged = buffers.staged.sized(tile.staged_size(count));
              tile.stage(image, n, channel, count, staged);
              tile.dot(grad, staged, count, first > 0, slopes);
            }
            if (call.grad_image) {
              A* sums = buffers.grad_image.sized(tile.staged_size(count));
              tile.mix_transposed(weights, grad, count, sums);
              fold(sums, first, count);
            }
          });
          if (call.grad_filters) write_slopes(buffers, tile, n, group, y, saved, weights, slopes);
        });
  }

  void weigh_rows(ManyBuffers& buffers, const WindowTile<A>& tile, int64_t n, int64_t group, int64_t y,
                  const Rows& saved, A* weights) const {
    const auto run = tile_row_kernels().weigh[filters.type()];
    for (int64_t r = 0; r < tile.rows().count; ++r) {
      WeighRow job{};
      job.weights = tile.weights_row(weights, r);
      job.tap_stride = tile.columns().row_pitch;
      job.normalizer = saved.by + r * tile.columns().width;
      const auto planes = filters.read(place(tile, n, group, y + r), buffers.filters);
      run(row_of(tile, r, planes), job);
    }
  }

  void write_slopes(ManyBuffers& buffers, const WindowTile<A>& tile, int64_t n, int64_t group, int64_t y,
                    const Rows& saved, A* weights, A* slopes) const {
    const auto run = tile_row_kernels().slopes[grad_filters.type()];
    for (int64_t r = 0; r < tile.rows().count; ++r) {
      SlopeRow job{};
      job.weights = tile.weights_row(weights, r);
      job.slopes = tile.weights_row(slopes, r);
      job.tap_stride = tile.columns().row_pitch;
      job.normalizer = saved.by + r * tile.columns().width;
      job.mean = saved.mean + r * tile.columns().width;
      job.grad_flow = saved.grad_flow ? tile.pixels_row(saved.grad_flow, r) : nullptr;
      job.flow_stride = tile.pixels_stride();
      const FilterPlanes::Row row = place(tile, n, group, y + r);
      const auto planes = grad_filters.target(row, buffers.grad_filters);
      job.grad_filters = planes.data;
      job.grad_plane_stride = planes.stride;
      run(row_of(tile, r, planes), job);
      grad_filters.finish(row, planes);
    }
  }
};

}  // namespace

void filter_backward(const FilterBackward& call) {
  const Window& window = call.shape.window;
  const auto run = [&](const auto& backward) {
    if (call.shape.batch * window.out_height * window.out_width == 0) return;
    const bool few = call.filters && are_few(window, call.shape.channels / call.shape.groups);
    few ? backward.run_few() : backward.run_many();
  };
  if ((call.filters ? call.filters : call.grad_filters)->scalar_type() == ScalarType::Double) {
    run(Backward<double>{call});
  } else {
    run(Backward<float>{call});
  }
}

}  // namespace effops::localfilter
