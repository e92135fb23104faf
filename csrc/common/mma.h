// Products of small matrices by a warp, on tensor cores. Bodies for nvcc are PTX; the others serve the
// simulator (g++).
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "host_device.h"
#include "warp.h"

namespace effops {

// Whether this architecture multiplies 16 x 8 x 16 matrices of half the precision.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasHalfMma = false;
#else
constexpr bool kHasHalfMma = true;
#endif

#if !defined(__CUDACC__)
// What the lanes of each warp of a block show each other. Blocks run one after another.
struct WarpTable {
  uint64_t words[32][kWarpSize][3];
};
inline WarpTable warp_table;

// Calls f(table) when all lanes of the warp have put their words into it, and waits for the others.
template <typename F>
void with_warp_table(const uint64_t (&words)[3], const F& f) {
  const auto thread = threadIdx.x;
  auto& table = warp_table.words[thread / kWarpSize];
  for (int i = 0; i < 3; ++i) table[thread % kWarpSize][i] = words[i];
  __syncwarp();
  f(table);
  __syncwarp();
}
#endif

// Four 8 x 8 matrices of 2-byte elements from shared memory: matrix i has its rows, 16 bytes each, where
// lanes 8 i to 8 i + 7 say. fragments[i] of a lane: elements 2 (lane % 4) and the next of row lane / 4.
// kTransposed: of the transposed matrix.
template <bool kTransposed>
EFFOPS_DEVICE void load_matrices(uint32_t (&fragments)[4], const void* row) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 750
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address)
                 : "memory");
  }
#endif
#else
  with_warp_table({reinterpret_cast<uint64_t>(row), 0, 0}, [&](const auto& table) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const auto element = [&](int r, int c) {
        return uint32_t{reinterpret_cast<const uint16_t*>(table[8 * i + r][0])[c]};
      };
      const uint32_t low = kTransposed ? element(2 * q, g) : element(g, 2 * q);
      const uint32_t high = kTransposed ? element(2 * q + 1, g) : element(g, 2 * q + 1);
      fragments[i] = high << 16 | low;
    }
  });
#endif
}

// sums += rows * columns: 16 x 8, over 16 elements of bf16 or f16. With g = lane / 4 and q = lane % 4 a lane
// passes the pairs of elements that begin at 2 q (low) and 2 q + 8 (high) of
//   rows = {row g low, row g + 8 low, row g high, row g + 8 high}, column = {column g low, column g high}
// and owns sums {(g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1)}.
template <typename T>
EFFOPS_DEVICE void multiply_add(float& sum0, float& sum1, float& sum2, float& sum3, const uint32_t (&rows)[4],
                                const uint32_t (&column)[2]) {
  static_assert(sizeof(T) == 2, "bf16 or f16");
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum0), "+f"(sum1), "+f"(sum2), "+f"(sum3)
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(column[0]), "r"(column[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum0), "+f"(sum1), "+f"(sum2), "+f"(sum3)
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(column[0]), "r"(column[1]));
  }
#endif
#else
  const auto both = [](uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; };
  const uint64_t words[3] = {both(rows[0], rows[2]), both(rows[1], rows[3]), both(column[0], column[1])};
  with_warp_table(words, [&](const auto& table) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
    // Element k of a row or column whose words the lanes 4 * index to 4 * index + 3 hold.
    const auto element = [&](int index, int word, int k) {
      const uint64_t bits = table[4 * index + k % 8 / 2][word] >> (32 * (k / 8) + 16 * (k % 2));
      return widen(T{static_cast<uint16_t>(bits)});
    };
    for (int k = 0; k < 16; ++k) {
      const float row[2] = {element(g, 0, k), element(g, 1, k)};
      const float value[2] = {element(2 * q, 2, k), element(2 * q + 1, 2, k)};
      sum0 += row[0] * value[0];
      sum1 += row[0] * value[1];
      sum2 += row[1] * value[0];
      sum3 += row[1] * value[1];
    }
  });
#endif
}

}  // namespace effops
