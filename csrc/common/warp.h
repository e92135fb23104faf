// What kernels need beyond plain C++: vector access, vector atomics and warp exchange.
// Bodies for nvcc use intrinsics and PTX; the others serve the simulator (g++).
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "host_device.h"

namespace effops {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// N consecutive elements, moved by one instruction of at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16, "one access moves at most 16 bytes");
  T data[N];
};

// Elements of one 16-byte access.
template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

#if defined(__CUDACC__)
template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<1> {
  using type = unsigned char;
};
#endif

// Reads data that no thread writes during the kernel. `address` is aligned to the whole pack.
template <int N, typename T>
EFFOPS_DEVICE Pack<T, N> load_pack(const T* address) {
#if defined(__CUDACC__)
  using Word = typename WordOf<sizeof(T) * N>::type;
  return bit_cast<Pack<T, N>>(__ldg(reinterpret_cast<const Word*>(address)));
#else
  return *reinterpret_cast<const Pack<T, N>*>(address);
#endif
}

// The same for data read once: it is the first to leave the caches.
template <int N, typename T>
EFFOPS_DEVICE Pack<T, N> load_pack_once(const T* address) {
#if defined(__CUDACC__)
  using Word = typename WordOf<sizeof(T) * N>::type;
  return bit_cast<Pack<T, N>>(__ldcs(reinterpret_cast<const Word*>(address)));
#else
  return *reinterpret_cast<const Pack<T, N>*>(address);
#endif
}

template <typename T, int N>
EFFOPS_DEVICE void widen_pack(const Pack<T, N>& pack, accumulator_t<T> (&values)[N]) {
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    // Whole words: one shift or mask per element, where taking out 16 bits first would be two operations.
    struct Words {
      uint32_t word[N / 2];
    };
    const Words words = bit_cast<Words>(pack);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      values[2 * i] = bit_cast<float>(words.word[i] << 16);
      values[2 * i + 1] = bit_cast<float>(words.word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = widen(pack.data[i]);
  }
}

// Writes data that this kernel does not read again.
template <int N, typename T>
EFFOPS_DEVICE void store_pack_once(T* address, const Pack<T, N>& pack) {
#if defined(__CUDACC__)
  using Word = typename WordOf<sizeof(T) * N>::type;
  __stcs(reinterpret_cast<Word*>(address), bit_cast<Word>(pack));
#else
  *reinterpret_cast<Pack<T, N>*>(address) = pack;
#endif
}

// address[i] += values[i], each element atomically, without an answer. sm_90 has vector reductions: one
// operation in the L2 cache in place of four. `address` is aligned to N elements, at most 16 bytes.
template <int N>
EFFOPS_DEVICE void add_atomically(float* address, const float (&values)[N]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kVectors = N / 4;
#else
  constexpr int kVectors = 0;
#endif
#if defined(__CUDACC__)
  if constexpr (kVectors > 0) {
#pragma unroll
    for (int i = 0; i < 4 * kVectors; i += 4) {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address + i),
                   "f"(values[i]), "f"(values[i + 1]), "f"(values[i + 2]), "f"(values[i + 3]));
    }
  }
#endif
  if constexpr (4 * kVectors < N) {
#pragma unroll
    for (int i = 4 * kVectors; i < N; ++i) atomicAdd(address + i, values[i]);
  }
}

template <int N>
EFFOPS_DEVICE void add_atomically(double* address, const double (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) atomicAdd(address + i, values[i]);
}

// Two values per lane in, one out: lanes whose bit `offset` is clear get the sum of `low` over both lanes
// of the pair, the others that of `high`. One exchange does the work of two butterfly steps.
template <typename A>
EFFOPS_DEVICE A transpose_add(A low, A high, int offset, int lane) {
  const bool upper = (lane & offset) != 0;
  const A kept = upper ? high : low, sent = upper ? low : high;
  return kept + __shfl_xor_sync(kFullWarp, sent, offset);
}

// The same for the smaller of two values.
template <typename A>
EFFOPS_DEVICE A transpose_min(A low, A high, int offset, int lane) {
  const bool upper = (lane & offset) != 0;
  const A kept = upper ? high : low, sent = upper ? low : high;
  return min(kept, __shfl_xor_sync(kFullWarp, sent, offset));
}

// Index of the lowest set bit of a non-zero word.
EFFOPS_DEVICE int lowest_bit(uint32_t bits) {
#if defined(__CUDACC__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// threadIdx.x, which the compiler takes for a new number every time: it does not compute what depends on it
// ahead of a loop, to hold it in registers that the loop needs.
EFFOPS_DEVICE unsigned fresh_thread() {
#if defined(__CUDACC__)
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// Whether tensor cores multiply bits: before sm_80 they don't, from sm_100 on the instruction is emulated by
// others that are slower than plain ones.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
constexpr bool kHasBitMma = false;
#else
constexpr bool kHasBitMma = true;
#endif

// Counts the common ones of 16 rows and 8 columns of 256 bits: a warp adds them to its 16 x 8 sums. With
// g = lane / 4 and q = lane % 4 a lane passes words q (low) and q + 4 (high) of
//   rows = {row g low, row g + 8 low, row g high, row g + 8 high}, column = {column g low, column g high}
// and owns sums = {(g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1)}.
EFFOPS_DEVICE void add_common_ones(int32_t (&sums)[4], const uint32_t (&rows)[4],
                                   const uint32_t (&column)[2]) {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(column[0]), "r"(column[1]));
#endif
#else
  const auto both = [](uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; };
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
  for (int word = 0; word < 4; ++word) {
    uint64_t row[2], other[2];
    for (int i = 0; i < 2; ++i) {
      row[i] = __shfl_sync(kFullWarp, both(rows[i], rows[i + 2]), 4 * g + word);
      other[i] = __shfl_sync(kFullWarp, both(column[0], column[1]), 4 * (2 * q + i) + word);
    }
    for (int i = 0; i < 4; ++i) sums[i] += __popcll(row[i / 2] & other[i % 2]);
  }
#endif
}

}  // namespace effops
