// The forward half of the filter engine on the CPU: tiles, tasks. The kernels are in *_cpu_kernel.cpp.
#include "filter_engine_cpu.h"
#include "filter_tiles_cpu.h"

namespace effops::localfilter {
namespace {

template <typename A>
struct Forward {
  const FilterForward& call;
  const FilterShape& shape = call.shape;
  const Window& window = shape.window;
  const FilterPlanes filters{call.filters};
  const MapView image{call.image ? *call.image : call.filters};
  const MapView output{call.output ? *call.output : call.filters};
  const MapView flow{call.flow ? *call.flow : call.filters};
  A* normalizer = static_cast<A*>(call.normalizer.mutable_data_ptr());
  const int64_t channels = shape.channels / shape.groups;  // of a group

  struct Place {
    int64_t n, group, y, x;  // the first pixel of a row of a tile
  };

  FilterRow row_of(const WindowTile<A>& tile, int64_t row, const Place& at, Buffer<char>& memory) const {
    FilterRow result = filter_row(window, shape.normalize, tile.rows(), tile.columns(), row);
    const int64_t taps = window.taps();
    const auto planes = filters.read({at.n, at.group * taps, taps, at.y, at.x, result.count}, memory);
    result.filters = planes.data;
    result.plane_stride = planes.stride;
    return result;
  }

  // `sums`: flow (dx, dy) and the normalizer, `stride` apart.
  void write_statistics(const WindowTile<A>& tile, const A* sums, int64_t stride, const Place& at) const {
    if (shape.flow) {
      for (int axis = 0; axis < 2; ++axis) {
        tile.write_row(sums + axis * stride, nullptr, flow, at.n, 2 * at.group + axis, at.y);
      }
    }
    if (!shape.normalizer()) return;
    const int64_t pixel = ((at.n * shape.groups + at.group) * window.out_height + at.y) * window.out_width +
                          at.x;
    std::copy_n(sums + 2 * stride, tile.columns().count, normalizer + pixel);
  }

  // Calls f(buffers, tile, n, group, first row) for all tiles.
  template <typename Buffers, typename F>
  void for_tiles(const TileGrid& grid, const F& f) const {
    const std::vector<TileColumns> columns = columns_of(window, grid, false);
    parallel_for(shape.batch * shape.groups * grid.down * grid.across, 1, [&](int64_t begin, int64_t end) {
      Buffers buffers;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t down = i / grid.across % grid.down, map = i / grid.across / grid.down;
        const TileRows rows(window, grid.first_row(down), grid.rows_of(down));
        const WindowTile<A> tile(window, rows, columns[i % grid.across]);
        f(buffers, tile, map / shape.groups, map % shape.groups, grid.first_row(down));
      }
    });
  }

  struct FewBuffers {
    Buffer<A> staged, sums;
    Buffer<char> filters;
  };
  void run_few() const {
    const auto run = filter_row_kernels().sums[filters.type()][channels];
    for_tiles<FewBuffers>(grid_of_few(window, filters), [&](FewBuffers& buffers, const WindowTile<A>& tile,
                                                            int64_t n, int64_t group, int64_t y) {
      A* staged = buffers.staged.sized(tile.staged_size(channels));
      tile.stage(image, n, group * channels, channels, staged);
      const int64_t stride = tile.columns().width, pitch = tile.columns().pitch;
      A* sums = buffers.sums.sized((channels + 4) * stride);
      for (int64_t r = 0; r < tile.rows().count; ++r) {
        const Place at{n, group, y + r, tile.columns().first};
        const int64_t first_read = tile.rows().read_row[r * window.kernel];
        run(row_of(tile, r, at, buffers.filters),
            {staged + first_read * pitch, tile.staged_stride(), pitch, shape.flow, sums, stride});
        for (int64_t c = 0; c < channels; ++c) {
          tile.write_row(sums + c * stride, nullptr, output, n, group * channels + c, at.y);
        }
        write_statistics(tile, sums + channels * stride, stride, at);
      }
    });
  }

  struct ManyBuffers {
    Buffer<A> weights, sums, staged, outputs;
    Buffer<char> filters;
  };
  void run_many() const {
    const auto weigh = tile_row_kernels().weigh[filters.type()];
    for_tiles<ManyBuffers>(
        grid_of_weights(window, sizeof(A), 1),
        [&](ManyBuffers& buffers, const WindowTile<A>& tile, int64_t n, int64_t group, int64_t y) {
          const int64_t rows = tile.rows().count, stride = tile.columns().width;
          A* weights = buffers.weights.sized(tile.weights_size());
          A* sums = buffers.sums.sized(rows * 4 * stride);
          for (int64_t r = 0; r < rows; ++r) {
            const Place at{n, group, y + r, tile.columns().first};
            WeighRow job{};
            job.weights = tile.weights_row(weights, r);
            job.tap_stride = tile.columns().row_pitch;
            job.sums = sums + r * 4 * stride;
            job.sums_stride = stride;
            job.flow = shape.flow;
            weigh(row_of(tile, r, at, buffers.filters), job);
            write_statistics(tile, sums + r * 4 * stride, stride, at);
          }
          const int64_t together = channels_at_a_time(tile.staged_stride() * sizeof(A));
          for_channels(channels, together, [&](int64_t first, int64_t count) {
            A* staged = buffers.staged.sized(tile.staged_size(count));
            A* outputs = buffers.outputs.sized(tile.outputs_size(count));
            tile.stage(image, n, group * channels + first, count, staged);
            tile.mix(weights, staged, count, outputs);
            for (int64_t c = 0; c < count; ++c) {
              for (int64_t r = 0; r < rows; ++r) {
                tile.write_row(outputs + c * tile.outputs_stride() + r * stride, sums + (r * 4 + 3) * stride,
                               output, n, group * channels + first + c, y + r);
              }
            }
          });
        });
  }
};

}  // namespace

void filter_forward(const FilterForward& call) {
  const Window& window = call.shape.window;
  if (call.shape.batch * window.out_height * window.out_width == 0) return;
  const bool few = are_few(window, call.shape.channels / call.shape.groups);
  const auto run = [&](const auto& forward) { few ? forward.run_few() : forward.run_many(); };
  if (call.filters.scalar_type() == ScalarType::Double) {
    run(Forward<double>{call});
  } else {
    run(Forward<float>{call});
  }
}

}  // namespace effops::localfilter
