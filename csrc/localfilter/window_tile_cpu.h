// The products of one tile on the CPU: staging pixels, and the three sums that every op of this engine is
// made of. Buffers are accumulators A (float, or double for double).
#pragma once

#include "tile_cpu.h"
#include "window_sums_cpu_kernel.h"

namespace effops::localfilter {

template <typename A>
class WindowTile {
 public:
  static constexpr int kIndex = std::is_same_v<A, double> ? 1 : 0;  // into tables by accumulator

  WindowTile(const Window& window, const TileRows& rows, const TileColumns& columns)
      : window_(window), rows_(rows), columns_(columns) {}

  const TileRows& rows() const { return rows_; }
  const TileColumns& columns() const { return columns_; }

  // ------------------------------------------------------------------ sizes of buffers, for `channels`
  // Pixels that the taps read: [channels][read rows][pitch].
  int64_t staged_size(int64_t channels) const { return channels * staged_stride(); }
  int64_t staged_stride() const { return rows_.read_rows() * columns_.pitch; }
  // Weights of all taps, [rows][taps][row_pitch], and pixels at output positions,
  // [channels][rows][row_pitch].
  int64_t weights_size() const { return rows_.count * weights_stride(); }
  int64_t weights_stride() const { return window_.taps() * columns_.row_pitch; }
  int64_t pixels_size(int64_t channels) const { return channels * pixels_stride(); }
  int64_t pixels_stride() const { return rows_.count * columns_.row_pitch; }
  // Outputs: [channels][rows][width].
  int64_t outputs_size(int64_t channels) const { return channels * outputs_stride(); }
  int64_t outputs_stride() const { return rows_.count * columns_.width; }

  A* weights_row(A* weights, int64_t row) const {  // tap 0, pixel 0
    return weights + row * weights_stride() + columns_.margin;
  }
  A* pixels_row(A* pixels, int64_t row) const { return pixels + row * columns_.row_pitch + columns_.margin; }

  // ------------------------------------------------------------------ between tensors and buffers
  void stage(const MapView& image, int64_t n, int64_t channel, int64_t channels, A* staged) const {
    const auto copy = tile_row_kernels().stage[static_cast<int>(image.type)];
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t v = 0; v < rows_.read_rows(); ++v, staged += columns_.pitch) {
        const int64_t row = rows_.image_rows[v];
        if (row < 0) {
          std::fill_n(staged, columns_.pitch, A(0));
        } else {
          copy(image.at(n, channel + c, row, 0), image.strides[3], columns_.staged(), staged);
        }
      }
    }
  }

  // Pixels of the tile itself, between zeros.
  void stage_outputs(const MapView& maps, int64_t n, int64_t channel, int64_t channels, int64_t first_row,
                     A* pixels) const {
    std::vector<int32_t> numbers(columns_.row_pitch, -1);
    for (int64_t i = 0; i < columns_.count; ++i) {
      numbers[columns_.margin + i] = static_cast<int32_t>(columns_.first + i);
    }
    const StagedColumns own{numbers.data(), columns_.row_pitch, columns_.margin,
                            columns_.margin + columns_.count};
    const auto copy = tile_row_kernels().stage[static_cast<int>(maps.type)];
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t r = 0; r < rows_.count; ++r, pixels += columns_.row_pitch) {
        copy(maps.at(n, channel + c, first_row + r, 0), maps.strides[3], own, pixels);
      }
    }
  }

  // Writes a row of the tile divided by `divisors` (or null).
  void write_row(const A* row, const A* divisors, const MapView& maps, int64_t n, int64_t channel,
                 int64_t y) const {
    tile_row_kernels().write[static_cast<int>(maps.type)](
        row, divisors, columns_.count, maps.at(n, channel, y, columns_.first), maps.strides[3]);
  }

  // Adds staged gradients to whole rows of the image, [channels][rows from first_row on][window.width].
  void fold(const A* staged, int64_t channels, int64_t first_row, int64_t channel_stride, A* image) const {
    const auto add = tile_row_kernels().fold[kIndex];
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t v = 0; v < rows_.read_rows(); ++v, staged += columns_.pitch) {
        const int64_t row = rows_.image_rows[v];
        if (row < 0) continue;
        add(staged, columns_.staged(), image + c * channel_stride + (row - first_row) * window_.width);
      }
    }
  }

  // ------------------------------------------------------------------ products
  // outputs_c(p) = sum_k weights_k(p) staged_c(p + o_k)
  void mix(const A* weights, const A* staged, int64_t channels, A* outputs) const {
    const auto run = window_sum_kernels().sum_rows[kIndex];
    const std::vector<int64_t> by_tap = weight_offsets();
    for (const auto& [first, second] : rows_.output_pairs) {
      std::vector<SumStep> steps;
      for (int64_t v = 0; v < rows_.read_rows(); ++v) {
        if (rows_.image_rows[v] < 0) continue;
        const SumStep step{staged + v * columns_.pitch,
                           {weights_of(weights, v, first), weights_of(weights, v, second)}};
        if (step.weights[0] || step.weights[1]) steps.push_back(step);
      }
      const auto out = [&](int64_t row) { return row < 0 ? nullptr : outputs + row * columns_.width; };
      run({steps.data(),
           static_cast<int64_t>(steps.size()),
           window_.kernel,
           columns_.offsets.data(),
           by_tap.data(),
           staged_stride(),
           channels,
           columns_.width,
           {out(first), out(second)},
           outputs_stride(),
           false});
    }
  }

  // The adjoint of mix: staged_c(u) = sum_k weights_k(u - o_k) pixels_c(u - o_k)
  void mix_transposed(const A* weights, const A* pixels, int64_t channels, A* staged) const {
    for (const auto& [first, second] : rows_.read_pairs) {
      std::vector<SumStep> steps;
      for (int64_t r = 0; r < rows_.count; ++r) {
        const SumStep step{pixels + r * columns_.row_pitch + columns_.margin,
                           {weights_of(weights, first, r), weights_of(weights, second, r)}};
        if (step.weights[0] || step.weights[1]) steps.push_back(step);
      }
      const auto out = [&](int64_t v) { return v < 0 ? nullptr : staged + v * columns_.pitch; };
      add_transposed(steps, channels, pixels_stride(), {out(first), out(second)}, staged_stride(), false);
    }
  }

  // Sums of such steps over the taps of all phases. The weights of a step are those of a row of taps.
  void add_transposed(const std::vector<SumStep>& steps, int64_t channels, int64_t source_stride,
                      std::pair<A*, A*> outs, int64_t out_stride, bool accumulate) const {
    const auto run = window_sum_kernels().sum_rows[kIndex];
    for (const ColumnPhase& phase : columns_.phases) {
      std::vector<int64_t> source_offsets, by_tap;
      for (size_t i = 0; i < phase.taps.size(); ++i) {
        source_offsets.push_back(-phase.offsets[i]);
        by_tap.push_back(phase.taps[i] * columns_.row_pitch - phase.offsets[i]);
      }
      A* second = outs.second ? outs.second + phase.first : nullptr;
      run({steps.data(),
           static_cast<int64_t>(steps.size()),
           static_cast<int64_t>(phase.taps.size()),
           source_offsets.data(),
           by_tap.data(),
           source_stride,
           channels,
           phase.length,
           {outs.first + phase.first, second},
           out_stride,
           accumulate});
    }
  }

  // scores_k(p) (+)= sum_c pixels_c(p) staged_c(p + o_k), scores laid out as weights
  void dot(const A* pixels, const A* staged, int64_t channels, bool accumulate, A* scores) const {
    const auto run = window_sum_kernels().dot_rows[kIndex];
    for (const auto& [first, second] : rows_.output_pairs) {
      for (int64_t v = 0; v < rows_.read_rows(); ++v) {
        int64_t rows[2] = {first, second};
        if (!weights_of(scores, v, first)) std::swap(rows[0], rows[1]);
        A* score[2] = {weights_of(scores, v, rows[0]), weights_of(scores, v, rows[1])};
        if (!score[0]) continue;
        const auto pixel = [&](int i) {
          return score[i] ? pixels + rows[i] * columns_.row_pitch + columns_.margin : nullptr;
        };
        run({staged + v * columns_.pitch,
             staged_stride(),
             {pixel(0), pixel(1)},
             pixels_stride(),
             channels,
             columns_.width,
             window_.kernel,
             columns_.offsets.data(),
             {score[0], score[1]},
             columns_.row_pitch,
             accumulate});
      }
    }
  }

 private:
  // Weights of the row of taps of output row `row` that reads row v, or null.
  template <typename Pointer>
  Pointer* weights_of(Pointer* weights, int64_t v, int64_t row) const {
    if (v < 0 || row < 0) return nullptr;
    const int64_t dy = rows_.tap_row[v * rows_.count + row];
    if (dy < 0) return nullptr;
    return weights + row * weights_stride() + dy * window_.kernel * columns_.row_pitch + columns_.margin;
  }

  std::vector<int64_t> weight_offsets() const {
    std::vector<int64_t> offsets;
    for (int64_t dx = 0; dx < window_.kernel; ++dx) offsets.push_back(dx * columns_.row_pitch);
    return offsets;
  }

  const Window& window_;
  const TileRows& rows_;
  const TileColumns& columns_;
};

}  // namespace effops::localfilter
