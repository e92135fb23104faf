// The threads that work on one row of a matrix, a warp or a block, and the elements they hold. No torch, no
// launches.
#pragma once

#include "../common/dtype.h"
#include "../common/host_device.h"
#include "../common/warp.h"

namespace effops::binary {

constexpr int kRowThreads = 256;  // of a block
constexpr int kRowWarps = kRowThreads / kWarpSize;

// Combines the values of a warp by a commutative operation; all lanes get the same bits.
template <typename V, typename F>
EFFOPS_DEVICE V combine_warp(V value, const F& f) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    value = f(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

template <typename V>
EFFOPS_DEVICE V sum_of_warp(V value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<V, int32_t>) return __reduce_add_sync(kFullWarp, value);
#endif
  return combine_warp(value, [](V a, V b) { return a + b; });
}

// A warp per row: kRowWarps rows at a time.
struct RowWarp {
  static constexpr int threads = kWarpSize, rows = kRowWarps;

  static EFFOPS_DEVICE int rank() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static EFFOPS_DEVICE int row() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  static EFFOPS_DEVICE bool any(bool value) { return __any_sync(kFullWarp, value) != 0; }

  template <typename V>
  static EFFOPS_DEVICE V sum(V value) {
    return sum_of_warp(value);
  }
  template <typename V>
  static EFFOPS_DEVICE V min(V value) {
    return combine_warp(value, [](V a, V b) { return a < b ? a : b; });
  }
  template <typename V>
  static EFFOPS_DEVICE V max(V value) {
    return combine_warp(value, [](V a, V b) { return a > b ? a : b; });
  }
};

// A block per row. All threads have to call its functions.
struct RowBlock {
  static constexpr int threads = kRowThreads, rows = 1;

  static EFFOPS_DEVICE int rank() { return static_cast<int>(threadIdx.x); }
  static EFFOPS_DEVICE int row() { return 0; }
  static EFFOPS_DEVICE bool any(bool value) { return __syncthreads_or(value) != 0; }

  template <typename V, typename F>
  static EFFOPS_DEVICE V combine(V of_warp, const F& f) {
    EFFOPS_SHARED(V, parts, kRowWarps);
    if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = of_warp;
    __syncthreads();
    V result = parts[0];
#pragma unroll
    for (int i = 1; i < kRowWarps; ++i) result = f(result, parts[i]);
    __syncthreads();  // the next call writes the parts
    return result;
  }

  template <typename V>
  static EFFOPS_DEVICE V sum(V value) {
    return combine(sum_of_warp(value), [](V a, V b) { return a + b; });
  }
  template <typename V>
  static EFFOPS_DEVICE V min(V value) {
    return combine(RowWarp::min(value), [](V a, V b) { return a < b ? a : b; });
  }
  template <typename V>
  static EFFOPS_DEVICE V max(V value) {
    return combine(RowWarp::max(value), [](V a, V b) { return a > b ? a : b; });
  }
};

// The elements of a row, number i * threads + rank in turn i of a thread: in registers where each thread has
// at most kPerThread, else (kPerThread = 0) read anew every time.
template <typename T, typename Group, int kPerThread>
class RowElements {
 public:
  using A = accumulator_t<T>;

  EFFOPS_DEVICE RowElements(const T* row, int64_t length) : row_(row), length_(length) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t j = int64_t{i} * Group::threads + Group::rank();
      values_[i] = j < length ? read(j) : A(0);
    }
  }

  // Calls f(turn, index in the row).
  template <typename F>
  EFFOPS_DEVICE void for_turns(const F& f) const {
    if constexpr (kPerThread > 0) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t j = int64_t{i} * Group::threads + Group::rank();
        if (j < length_) f(i, j);
      }
    } else {
      for (int64_t j = Group::rank(); j < length_; j += Group::threads) f(0, j);
    }
  }

  // Calls f(element, index in the row).
  template <typename F>
  EFFOPS_DEVICE void for_each(const F& f) const {
    for_turns([&](int i, int64_t j) { f(at(i, j), j); });
  }

  EFFOPS_DEVICE A at(int turn, int64_t index) const { return kPerThread > 0 ? values_[turn] : read(index); }

 private:
  EFFOPS_DEVICE A read(int64_t index) const { return widen(load_pack<1>(row_ + index).data[0]); }

  const T* row_;
  int64_t length_;
  A values_[kPerThread > 0 ? kPerThread : 1];
};

// How a row of `length` elements is worked on: calls f(Group, elements per thread as a constant).
template <int kValue>
struct PerThread {
  static constexpr int value = kValue;
};
template <typename F>
void choose_row_threads(int64_t length, const F& f) {
  if (length <= 2 * kWarpSize) return f(RowWarp{}, PerThread<2>{});
  if (length <= 8 * kWarpSize) return f(RowWarp{}, PerThread<8>{});
  if (length <= 32 * kWarpSize) return f(RowWarp{}, PerThread<32>{});
  f(RowBlock{}, PerThread<0>{});
}

template <typename Group>
int64_t row_blocks(int64_t rows) {
  return (rows + Group::rows - 1) / Group::rows;
}

}  // namespace effops::binary
