// See row_gemm_cpu_kernel.h. Compiled once per instruction set.
#include "row_gemm_cpu_kernel.h"

#include "row_tiles_cpu.h"

namespace effops::rowconv::EFFOPS_ISA {
namespace {

// ---------------------------------------------------------------------------------------- multiply

template <typename A, int R, int N>
EFFOPS_INLINE void multiply_tile(const RowPair* pairs, int64_t row_offset, int64_t sum_offset, int64_t depth,
                                 const A* panel) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  const A* rows[R];
  A* sums[R];
  V tile[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    rows[r] = static_cast<const A*>(pairs[r].row) + row_offset;
    sums[r] = static_cast<A*>(pairs[r].sums) + sum_offset;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) tile[r][n] = load<V>(sums[r] + n * lanes);
  }
  int64_t k = 0;
  do {  // at least once: otherwise the compiler moves the tile to the stack for the other case
    V weights[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) weights[n] = load<V>(panel + n * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V value = broadcast(rows[r][k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) tile[r][n] += value * weights[n];
    }
    panel += N * lanes;
  } while (++k < depth);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(sums[r] + n * lanes, tile[r][n]);
  }
}

template <typename A>
void multiply(const RowPair* pairs, int64_t count, int64_t row_offset, int64_t sum_offset, int64_t depth,
              const void* weights, int64_t columns) {
  constexpr int lanes = Vec<A>::lanes;
  for_panels<lanes>(columns, [&](auto registers, int64_t column) {
    constexpr int n = decltype(registers)::value;
    const A* panel = static_cast<const A*>(weights) + depth * column;
    for (int64_t begin = 0; begin < depth; begin += kDepthPiece) {
      const int64_t piece = depth - begin < kDepthPiece ? depth - begin : kDepthPiece;
      for_tiles<tile_rows(n)>(count, [&](auto rows, int64_t first) {
        multiply_tile<A, decltype(rows)::value, n>(pairs + first, row_offset + begin, sum_offset + column,
                                                   piece, panel + begin * n * lanes);
      });
    }
  });
}

// ---------------------------------------------------------------------------------------- outer product

template <typename A, int R, int N>
EFFOPS_INLINE void outer_tile(const RowPair* pairs, int64_t count, int64_t a_offset, int64_t g_offset,
                              int64_t columns, A* products) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  V tile[R][N] = {};
  int64_t i = 0;
  do {  // see multiply_tile
    const A* a = static_cast<const A*>(pairs[i].row) + a_offset;
    const A* g = static_cast<const A*>(pairs[i].sums) + g_offset;
    V row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load<V>(g + n * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V value = broadcast(a[r]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) tile[r][n] += value * row[n];
    }
  } while (++i < count);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      A* product = products + r * columns + n * lanes;
      store(product, load<V>(product) + tile[r][n]);
    }
  }
}

template <typename A>
void outer(const RowPair* pairs, int64_t count, int64_t a_offset, int64_t rows_a, int64_t g_offset,
           int64_t columns, void* products) {
  constexpr int lanes = Vec<A>::lanes;
  if (count == 0) return;
  for_panels<lanes>(columns, [&](auto registers, int64_t column) {
    constexpr int n = decltype(registers)::value;
    for_tiles<tile_rows(n)>(rows_a, [&](auto rows, int64_t first) {
      outer_tile<A, decltype(rows)::value, n>(pairs, count, a_offset + first, g_offset + column, columns,
                                              static_cast<A*>(products) + first * columns + column);
    });
  });
}

// ---------------------------------------------------------------------------------------- rows

template <typename A>
void multiply_channels(const RowPair* pairs, int64_t count, const void* weights, int64_t channels) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  const A* w = static_cast<const A*>(weights);
  for (int64_t i = 0; i < count; ++i) {
    const A* row = static_cast<const A*>(pairs[i].row);
    A* sums = static_cast<A*>(pairs[i].sums);
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) {
      store(sums + c, load<V>(sums + c) + load<V>(row + c) * load<V>(w + c));
    }
    for (; c < channels; ++c) sums[c] += row[c] * w[c];
  }
}

template <typename A>
void outer_channels(const RowPair* pairs, int64_t count, int64_t channels, void* products) {
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  A* target = static_cast<A*>(products);
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    V sum = {};
    for (int64_t i = 0; i < count; ++i) {
      const A* a = static_cast<const A*>(pairs[i].row);
      const A* g = static_cast<const A*>(pairs[i].sums);
      sum += load<V>(a + c) * load<V>(g + c);
    }
    store(target + c, load<V>(target + c) + sum);
  }
  for (; c < channels; ++c) {
    A sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += static_cast<const A*>(pairs[i].row)[c] * static_cast<const A*>(pairs[i].sums)[c];
    }
    target[c] += sum;
  }
}

// Bit i of the bytes, as a lane of all ones, for the lanes from `first` (a multiple of the lanes) on.
template <typename A>
EFFOPS_INLINE typename Vec<A>::mask lanes_of_bits(const uint8_t* bits, int64_t first) {
  using M = typename Vec<A>::mask;
  using I = typename Vec<A>::integer;
  constexpr int lanes = Vec<A>::lanes;
  uint32_t word = bits[first >> 3];
  if constexpr (lanes > 8) word |= static_cast<uint32_t>(bits[(first >> 3) + 1]) << 8;
  word >>= first & 7;
  M select;
  for (int i = 0; i < lanes; ++i) select[i] = I{1} << i;
  return (select & static_cast<I>(word)) != 0;
}

template <typename T>
void widen_row(const SignedRow& row, int64_t count, void* target) {
  using A = accumulator_t<T>;
  using V = typename Vec<A>::type;
  constexpr int lanes = Vec<A>::lanes;
  const T* from = static_cast<const T*>(row.data);
  A* to = static_cast<A*>(target);
  int64_t i = 0;
  if (row.bits == nullptr) {
    for (; i + lanes <= count; i += lanes) store(to + i, load_wide(from + i));
    for (; i < count; ++i) to[i] = widen(from[i]);
  } else {
    for (; i + lanes <= count; i += lanes) {
      store(to + i, lanes_of_bits<A>(row.bits, i) ? load_wide(from + i) : V{});
    }
    for (; i < count; ++i) to[i] = (row.bits[i >> 3] >> (i & 7)) & 1 ? widen(from[i]) : A(0);
  }
}

template <typename A>
void activate(void* values, const void* bias, int64_t count, uint8_t* bits) {
  A* to = static_cast<A*>(values);
  const A* b = static_cast<const A*>(bias);
  for (int64_t i = 0; b != nullptr && i < count; ++i) to[i] += b[i];
  if (bits == nullptr) return;
  for (int64_t i = 0; i < count; i += 8) {
    unsigned byte = 0;
    const int64_t last = count - i < 8 ? count - i : 8;
    for (int64_t j = 0; j < last; ++j) {
      const bool passes = !(to[i + j] <= 0);  // NaN passes
      byte |= static_cast<unsigned>(passes) << j;
      to[i + j] = passes ? to[i + j] : 0;
    }
    bits[i >> 3] = static_cast<uint8_t>(byte);
  }
}

}  // namespace

extern const RowGemmKernels row_gemm_kernels = {
    Vec<float>::lanes,
    kMaxRegisters,
    {&multiply<float>, &multiply<double>},
    {&outer<float>, &outer<double>},
    {&multiply_channels<float>, &multiply_channels<double>},
    {&outer_channels<float>, &outer_channels<double>},
    {&widen_row<float>, &widen_row<double>, &widen_row<bf16>, &widen_row<f16>},
    {&activate<float>, &activate<double>},
};

}  // namespace effops::rowconv::EFFOPS_ISA
