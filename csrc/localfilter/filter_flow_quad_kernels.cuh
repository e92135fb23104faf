// Forward CUDA kernel of filter_flow where a thread makes four neighbouring outputs. No torch, no launches.
#pragma once

#include "filter_flow_kernels.cuh"

namespace effops::localfilter {

constexpr int kQuadTaps = 4;  // of a step

// Goes through the taps of a window in steps of up to kQuadTaps taps of a row.
struct QuadSteps {
  int32_t kernel, first = 0, row = 0;

  EFFOPS_DEVICE int32_t count() const { return min(kernel - first, kQuadTaps); }
  EFFOPS_DEVICE bool ends_row() const { return first + kQuadTaps >= kernel; }
  EFFOPS_DEVICE void advance() {
    const bool ends = ends_row();
    first = ends ? 0 : first + kQuadTaps;
    row += ends;
  }
};

// The weights of the four outputs of a thread, step after step. They are read ahead: 64 bytes per thread are
// on their way.
template <typename F>
class QuadTaps {
 public:
  using A = accumulator_t<F>;

  EFFOPS_DEVICE QuadTaps(const F* first, int64_t plane, int32_t kernel, bool exists)
      : next_(first), plane_(plane), reading_{kernel}, exists_(exists) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) read(raw_[ahead]);
  }

  // The weights of the next step, which has `count` taps; `other` for the rest.
  EFFOPS_DEVICE void take(int32_t count, A other, A (&weights)[kQuadTaps][kQuad]) {
#pragma unroll
    for (int t = 0; t < kQuadTaps; ++t) {
      widen_pack(bit_cast<Pack<F, kQuad>>(raw_[0][t]), weights[t]);
#pragma unroll
      for (int p = 0; p < kQuad; ++p) {
        if (t >= count) weights[t][p] = other;
      }
#pragma unroll
      for (int ahead = 1; ahead < kAhead; ++ahead) raw_[ahead - 1][t] = raw_[ahead][t];
    }
    read(raw_[kAhead - 1]);
  }

 private:
  static constexpr int kAhead = sizeof(F) < 4 ? 2 : 1;  // steps

  // Whole words: the compiler would move halves one by one.
  using Raw = Pack<uint32_t, kQuad * sizeof(F) / 4>;

  EFFOPS_DEVICE void read(Raw (&raw)[kQuadTaps]) {
    const int32_t count = reading_.row < reading_.kernel ? reading_.count() : 0;
#pragma unroll
    for (int t = 0; t < kQuadTaps; ++t) {
      raw[t] = Raw{};
      if (t < count && exists_) raw[t] = bit_cast<Raw>(load_pack_once<kQuad>(next_ + t * plane_));
    }
    next_ += count * plane_;
    reading_.advance();
  }

  const F* next_;
  int64_t plane_;
  QuadSteps reading_;
  bool exists_;
  Raw raw_[kAhead][kQuadTaps];
};

// Eight neighbouring values of shared memory, aligned to 16 bytes: what a step of four outputs reads.
template <typename A>
EFFOPS_DEVICE void read_eight(const A* cell, A (&values)[2 * kQuad]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto pack = *reinterpret_cast<const Pack<A, kQuad>*>(cell + half * kQuad);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) values[half * kQuad + i] = pack.data[i];
  }
}

// values[c][p] += sum_t weights[t][p] X_c(tap t of output p), for a step whose first pixel is at `cell` of
// the first channel's plane. kFull: the step has all its taps.
template <bool kFull, typename A, int kChannels>
EFFOPS_DEVICE void filter_step(const A* cell, int32_t plane, int32_t count,
                               const A (&weights)[kQuadTaps][kQuad], A (&values)[kChannels][kQuad]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    A pixels[2 * kQuad];
    read_eight(cell + c * plane, pixels);
#pragma unroll
    for (int t = 0; t < kQuadTaps; ++t) {
      if (!kFull && t >= count) continue;
#pragma unroll
      for (int p = 0; p < kQuad; ++p) values[c][p] += weights[t][p] * pixels[t + p];
    }
  }
}

// A row of taps; `line`: its first pixel in the tile.
template <bool kChecked, typename F, typename A, int kChannels>
EFFOPS_DEVICE void filter_row(const FilterFlowArguments<F>& arguments, const OutputPlace& output, int32_t dy,
                              const A* line, int32_t plane, QuadTaps<F>& taps,
                              FilterSums<A, kQuad, kChannels>& sums) {
  const DeviceWindow& window = arguments.window;
  const bool row_is_inside = is_inside(output.center_row, window.offset(dy), window.height);
  for (int32_t first = 0; first < window.kernel; first += kQuadTaps) {
    const int32_t count = min(window.kernel - first, kQuadTaps);
    A weights[kQuadTaps][kQuad];
    taps.take(count, arguments.nothing(), weights);
    take_weights(arguments, kChecked, row_is_inside, output.center_column, first, count, sums, weights);
    if (count == kQuadTaps) {
      filter_step<true>(line + first, plane, count, weights, sums.values);
    } else {
      filter_step<false>(line + first, plane, count, weights, sums.values);
    }
  }
  sums.end_row(static_cast<A>(window.offset(dy)));
}

// Whether a tap of the tile's outputs may lie outside the image.
EFFOPS_DEVICE bool crosses_border(const DeviceWindow& window, const TilePlace& place) {
  const int32_t before = window.kernel / 2, behind = window.kernel - 1 - before;
  return place.row < before || place.column < before || window.height - place.row < kQuadRows + behind ||
         window.width - place.column < kQuadColumns + behind;
}

// Taps one pixel apart around every pixel of the image (no stride, upsampling, dilation), Wo a multiple of 4.
// Two tap rows never share a step.
//
// Parallelism: a block per tile of 64 x 8 outputs of a group and run of channels; a thread per 4 outputs of
// a row. A step is 4 taps x 4 outputs: four 8- or 16-byte reads of weights, coalesced, made ahead, and
// per channel two 16-byte reads of shared memory for 16 products.
// Bytes: per run of channels the weights, and the tile ((64 + K) (8 + K) / 512 of the image, mostly from
// the second-level cache). Bound: bandwidth; about 12 instructions per weight at 3 channels, of the 17 that
// an H100 has time for per bfloat16 weight.
// Limits: the tile fits the shared memory.
template <typename F, int kChannels>
__global__ void __launch_bounds__(kQuadThreads, kChannels > 1 ? 3 : 4)
    filter_flow_quad_kernel(const __grid_constant__ FilterFlowArguments<F> arguments, TileGrid grid,
                            TileShape shape) {
  using A = accumulator_t<F>;
  EFFOPS_DYNAMIC_SHARED(A, tile);
  const DeviceWindow& window = arguments.window;
  const int32_t tile_row = static_cast<int32_t>(threadIdx.x) / kQuadsAcross;
  const int32_t tile_column = static_cast<int32_t>(threadIdx.x) % kQuadsAcross * kQuad;
  for (int64_t work = blockIdx.x; work < grid.works; work += gridDim.x) {
    const TilePlace place(grid, work, kQuadRows, kQuadColumns);
    const OutputPlace output(window, place, tile_row, tile_column);
    const ChannelRun run(place.group, arguments.group_channels, place.part * kChannels, kChannels);
    QuadTaps<F> taps(arguments.first_tap(place.image, place.group) + output.index(window),
                     arguments.out_plane(), window.kernel, output.exists);
    load_tile<kQuadThreads, kChannels>(arguments.image, window, shape, place.image, run.first, run.count,
                                       place.row + window.offset(0), place.column + window.offset(0), tile);
    __syncthreads();
    const bool checked = window.leaves_out() && crosses_border(window, place);
    FilterSums<A, kQuad, kChannels> sums;
    for (int32_t dy = 0; dy < window.kernel; ++dy) {
      const A* line = tile + (tile_row + dy) * shape.pitch + tile_column;
      if (checked) {
        filter_row<true>(arguments, output, dy, line, shape.plane(), taps, sums);
      } else {
        filter_row<false>(arguments, output, dy, line, shape.plane(), taps, sums);
      }
    }
    if (output.exists) store_outputs(arguments, place, run, output, sums);
    __syncthreads();  // the next work fills the tile
  }
}

// ------------------------------------------------------------------------------------------- geometry

inline bool takes_quads(const Window& window) {
  return window.stride == 1 && window.upsample == 1 && window.dilation == 1 && window.out_width % kQuad == 0;
}

// The pitch lets the last step of a row of taps read whole packs.
inline TilePlan plan_quad_tile(const Window& window, int64_t channels, int64_t element_bytes, int64_t limit) {
  return plan_tile(kQuadRows + window.kernel - 1, kQuadColumns + window.kernel - 1,
                   kQuadColumns + (window.kernel + kQuadTaps - 1) / kQuadTaps * kQuadTaps, channels,
                   element_bytes, limit);
}

}  // namespace effops::localfilter
