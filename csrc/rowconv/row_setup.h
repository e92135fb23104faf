// Arguments of the kernels over sparse rows, made on the host: what the CUDA library and the simulator share.
#pragma once

#include <vector>

#include "row_gemm.cuh"

namespace effops::rowconv {

inline void add_branch(BranchList& list, const Branch& branch) {
  list.branch[list.count++] = branch;
  list.taps += branch.taps();
}

// Convolutions of odd kernel size that keep the sides. At most kMaxBranches.
inline BranchList same_branches(const std::vector<int64_t>& kernels, const std::vector<int64_t>& dilations) {
  BranchList list{};
  for (size_t b = 0; b < kernels.size(); ++b) {
    const auto kernel = static_cast<int32_t>(kernels[b]), dilation = static_cast<int32_t>(dilations[b]);
    const int32_t padding = (kernel - 1) / 2 * dilation;
    add_branch(list, {kernel, kernel, padding, padding, dilation, dilation, 0});
  }
  return list;
}

inline BranchList one_branch(const Geometry& g) {
  BranchList list{};
  add_branch(list, {static_cast<int32_t>(g.kernel_height), static_cast<int32_t>(g.kernel_width),
                    static_cast<int32_t>(g.padding_y), static_cast<int32_t>(g.padding_x),
                    static_cast<int32_t>(g.dilation_y), static_cast<int32_t>(g.dilation_x), 0});
  return list;
}

struct MapTensors {
  IdMap index_map;  // [maps, height, width]
  const int32_t* roi;  // [NA]
  const int32_t* xy;  // [NA, 2]
  int64_t active, passive, maps, height, width;
};

// kind: kMap or kMapBack
inline RowSource map_rows(RowKind kind, const MapTensors& map) {
  RowSource source{};
  source.kind = kind;
  source.rows = kind == RowKind::kMap ? map.active + map.passive : map.active;
  source.batch = map.maps;
  source.height = map.height;
  source.width = map.width;
  source.index_map = map.index_map;
  source.roi = map.roi;
  source.xy = map.xy;
  return source;
}

// rows: active ones.
inline RowSource bucket_rows(const int64_t* offsets, const int64_t* members, int64_t rows) {
  RowSource source{};
  source.kind = RowKind::kBuckets;
  source.rows = rows;
  source.offsets = offsets;
  source.members = members;
  return source;
}

// Rows of the result are output cells: those of `positions`, or all.
inline RowSource pixel_rows(const Geometry& g, int64_t batch, const int64_t* positions) {
  RowSource source{};
  source.kind = RowKind::kPixels;
  source.batch = batch;
  source.height = g.in_height;
  source.width = g.in_width;
  source.own_height = g.out_height;
  source.own_width = g.out_width;
  source.stride_y = g.stride_y;
  source.stride_x = g.stride_x;
  source.positions = positions;
  return source;
}

// Rows of the result are all input cells. kind: kPixelsBack, with `table` the row of each output cell, of
// `rows`; or kChoiceBack, with `table` the choice of each output cell.
inline RowSource pixel_rows_back(RowKind kind, const Geometry& g, int64_t batch, const IdMap& table,
                                 int64_t rows) {
  RowSource source{};
  source.kind = kind;
  source.rows = rows;
  source.batch = batch;
  source.height = g.out_height;
  source.width = g.out_width;
  source.own_height = g.in_height;
  source.own_width = g.in_width;
  source.stride_y = g.stride_y;
  source.stride_x = g.stride_x;
  source.table = table;
  return source;
}

// Rows of a matrix.
inline MapLayout row_layout(int64_t channels) { return {0, 0, channels, 1}; }

// Maps of `channels` and `cells`, contiguous or channels_last; of one cell they are the same.
inline MapLayout map_layout(bool channels_last, int64_t channels, int64_t cells) {
  if (channels_last || cells == 1) return {cells, channels * cells, channels, 1};
  return {cells, channels * cells, 1, cells};
}

// Elements of a line of weights: the tiles read slices of 64 bytes, of which there is at least one.
inline int64_t padded_depth(int64_t depth, int64_t element_bytes, bool direct) {
  if (direct) return depth;
  const int64_t slice = 64 / element_bytes;
  return depth > 0 ? (depth + slice - 1) / slice * slice : slice;
}

}  // namespace effops::rowconv
