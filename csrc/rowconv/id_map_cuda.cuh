// Maps of ids as the CUDA kernels see them, from tensors.
#pragma once

#include "../common/torch.h"
#include "id_map_kernels.cuh"

namespace effops::rowconv {

// map: contiguous, int32 or int64.
inline IdMap id_map_of(const Tensor& map) {
  return {map.const_data_ptr(), map.scalar_type() == ScalarType::Long};
}

}  // namespace effops::rowconv
