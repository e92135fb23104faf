// Copies between planes of channels and rows of channels on the CPU.
//
// Parallelism: the caller splits the cells. Blocks of 8 cells and 8 channels are transposed in registers.
// Bytes: every element is read once and written once. Bound by memory bandwidth.
#include "row_copy_cpu_kernel.h"
#include "transpose_block.h"

namespace effops::EFFOPS_ISA {
namespace {

using namespace effops::simd;

// Calls f(first) for blocks of 8 that cover [0, count), the last one moved back so that it ends at `count`.
template <typename F>
EFFOPS_INLINE void for_blocks(int64_t count, const F& f) {
  for (int64_t first = 0; first < count; first += kBlock) f(first + kBlock <= count ? first : count - kBlock);
}

template <typename T>
void to_rows(const PlaneRun& planes, int64_t count, int64_t channels, void* const* rows) {
  const T* data = static_cast<const T*>(planes.data);
  const int64_t cell_stride = planes.cell_stride, channel_stride = planes.channel_stride;
  if (channels == 0) return;  // there may be no memory
  if (channel_stride == 1) {
    for (int64_t i = 0; i < count; ++i) memcpy(rows[i], data + i * cell_stride, channels * sizeof(T));
  } else if (cell_stride == 1 && count >= kBlock && channels >= kBlock) {
    for_blocks(channels, [&](int64_t c) {
      for_blocks(count, [&](int64_t first) {
        const T* block = data + c * channel_stride + first;
        // The next call reads on where this one ends, in more planes than hardware prefetchers follow.
        constexpr int64_t kPrefetched = 128 / sizeof(T);
        if (first % kPrefetched == 0) {
          for (int k = 0; k < kBlock; ++k) prefetch(block, k * channel_stride + kCopyTile);
        }
        transpose_lines<T>([=](int k) { return block + k * channel_stride; },
                           [&](int i) { return static_cast<T*>(rows[first + i]) + c; });
      });
    });
  } else {
    for (int64_t i = 0; i < count; ++i) {
      T* row = static_cast<T*>(rows[i]);
      const T* cell = data + i * cell_stride;
      for (int64_t c = 0; c < channels; ++c) row[c] = cell[c * channel_stride];
    }
  }
}

template <typename T>
void to_planes(const void* const* rows, int64_t count, int64_t channels, void* planes,
               int64_t channel_stride) {
  T* data = static_cast<T*>(planes);
  if (count >= kBlock && channels >= kBlock) {
    for_blocks(channels, [&](int64_t c) {
      for_blocks(count, [&](int64_t first) {
        transpose_lines<T>([&](int i) { return static_cast<const T*>(rows[first + i]) + c; },
                           [&](int k) { return data + (c + k) * channel_stride + first; });
      });
    });
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < count; ++i) data[c * channel_stride + i] = static_cast<const T*>(rows[i])[c];
    }
  }
}

template <typename T, typename A = accumulator_t<T>>
void add(const void* row, int64_t channels, void* sums) {
  const T* source = static_cast<const T*>(row);
  A* target = static_cast<A*>(sums);
  constexpr int lanes = Vec<A>::lanes;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    store(target + c, load<typename Vec<A>::type>(target + c) + load_wide(source + c));
  }
  for (; c < channels; ++c) target[c] += widen(source[c]);
}

template <typename T, typename A = accumulator_t<T>>
void add_four(const void* four, int64_t channels, void* row) {
  const T* a = static_cast<const T*>(four);
  const T *b = a + channels, *c = b + channels, *d = c + channels;
  T* sum = static_cast<T*>(row);
  constexpr int lanes = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= channels; i += lanes) {
    store_narrow(sum + i, (load_wide(a + i) + load_wide(b + i)) + (load_wide(c + i) + load_wide(d + i)));
  }
  for (; i < channels; ++i) sum[i] = narrow<T>((widen(a[i]) + widen(b[i])) + (widen(c[i]) + widen(d[i])));
}

template <typename T, typename A = accumulator_t<T>>
void round(const void* sums, int64_t channels, void* row) {
  const A* source = static_cast<const A*>(sums);
  T* target = static_cast<T*>(row);
  constexpr int lanes = Vec<A>::lanes;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) store_narrow(target + c, load_wide(source + c));
  for (; c < channels; ++c) target[c] = narrow<T>(source[c]);
}

}  // namespace

extern const RowCopyKernels row_copy_kernels = {
    {&to_rows<uint16_t>, &to_rows<uint32_t>, &to_rows<uint64_t>},
    {&to_planes<uint16_t>, &to_planes<uint32_t>, &to_planes<uint64_t>},
    {&add<float>, &add<double>, &add<bf16>, &add<f16>},
    {&add_four<float>, &add_four<double>, &add_four<bf16>, &add_four<f16>},
    {&round<float>, &round<double>, &round<bf16>, &round<f16>},
};

}  // namespace effops::EFFOPS_ISA
