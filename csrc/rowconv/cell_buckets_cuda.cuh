// Which cells have each id of a map, on CUDA.
#pragma once

#include "../common/cuda_launch.cuh"

namespace effops::rowconv {

// Bucket b: the cells of id first_id + b in ascending order, cells[offsets[b]] to cells[offsets[b + 1] - 1].
struct CellBuckets {
  Tensor offsets;  // [buckets + 1] int64
  Tensor cells;    // int64, as many as the map has
};

// map: contiguous, int32 or int64. No sync.
CellBuckets bucket_cells(const CudaScope& scope, const Tensor& map, int64_t first_id, int64_t buckets);

}  // namespace effops::rowconv
