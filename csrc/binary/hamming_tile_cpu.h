// Distances of two queries to a group of rows: one row per byte of a register, so that nothing has to be
// summed across a register.
//
// A group is packed once for all queries of a tile: place p (a byte, or half of one) of all its rows lies
// together. For each place the part of the two queries is loaded once for kBlocks registers of rows.
#pragma once

#include "byte_lanes_cpu.h"
#include "hamming_cpu_kernel.h"

namespace effops::binary {
namespace {

using namespace effops::simd;

constexpr int kQueries = 2;
constexpr int kBlocks = 4;
constexpr int kGroupRows = kBlocks * kByteLanes;

// ---------------------------------------------------------------- two ways to count

// sums[q * kBlocks + b]: differing bits of query q and block b.
using ByteSums = Bytes[kQueries * kBlocks];
using AllBlocks = std::make_index_sequence<kBlocks>;

// By bytes: xor, count, add. One instruction counts where there is AVX-512 BITALG. Sums saturate at 255.
struct CountBytes {
  static constexpr int kPlacesPerByte = 1;
  static constexpr int kCodesPerPlace = 2;

  // What sum() needs of two queries, from one byte of each.
  static EFFOPS_INLINE void encode(uint8_t first, uint8_t second, uint8_t* codes) {
    codes[0] = first;
    codes[1] = second;
  }
  template <typename V>
  static EFFOPS_INLINE void split(V bytes, V (&places)[kPlacesPerByte]) {
    places[0] = bytes;
  }

  template <size_t... B>
  static EFFOPS_INLINE void sum(const uint8_t* codes, const uint8_t* rows, int64_t places, ByteSums& sums,
                                std::index_sequence<B...>) {
    Bytes first[] = {(static_cast<void>(B), Bytes{})...}, second[] = {(static_cast<void>(B), Bytes{})...};
    for (int64_t place = 0; place < places; ++place, rows += kGroupRows) {
      const Bytes a = splat(codes[2 * place]), b = splat(codes[2 * place + 1]);
      const Bytes block[] = {load<Bytes>(rows + B * kByteLanes)...};
      ((first[B] = add_saturated(first[B], count_ones(a ^ block[B]))), ...);
      ((second[B] = add_saturated(second[B], count_ones(b ^ block[B]))), ...);
    }
    ((sums[B] = first[B], sums[kBlocks + B] = second[B]), ...);
  }
};

#if defined(__AVX2__)
// By half bytes: those of the two queries choose a table, in which one shuffle looks up the distances of a
// register of rows to both: one in the low, one in the high half of a byte. Three of them, at most 12 each,
// are added before the halves are taken apart: 9 instructions for 3 half bytes of 2 queries. Sums are
// modulo 256.
struct LookUpHalfBytes {
  static constexpr int kPlacesPerByte = 2;
  static constexpr int kCodesPerPlace = 1;

  static EFFOPS_INLINE void encode(uint8_t first, uint8_t second, uint8_t* codes) {
    codes[0] = static_cast<uint8_t>((first & 15) | second << 4);
    codes[1] = static_cast<uint8_t>(first >> 4 | (second & 0xf0));
  }
  template <typename V>
  static EFFOPS_INLINE void split(V bytes, V (&places)[kPlacesPerByte]) {
    places[0] = bytes & 15;
    places[1] = bytes >> 4;
  }

  struct Tables {
    alignas(64) uint8_t data[256 * kByteLanes];

    static constexpr int ones(int x) { return (x & 1) + (x >> 1 & 1) + (x >> 2 & 1) + (x >> 3 & 1); }
    constexpr Tables() : data() {
      for (int code = 0; code < 256; ++code) {
        for (int lane = 0; lane < kByteLanes; ++lane) {
          const int row = lane % 16;
          data[code * kByteLanes + lane] =
              static_cast<uint8_t>(ones((code & 15) ^ row) | ones(code >> 4 ^ row) << 4);
        }
      }
    }
  };

  // Adds kPlaces places.
  template <int kPlaces, size_t... B>
  static EFFOPS_INLINE void step(const uint8_t* tables, const uint8_t* codes, const uint8_t* rows,
                                 Bytes (&both)[kBlocks], Bytes (&high)[kBlocks], std::index_sequence<B...>) {
    Bytes sum[] = {
        look_up(load<Bytes>(tables + codes[0] * kByteLanes), load<Bytes>(rows + B * kByteLanes))...};
    for (int place = 1; place < kPlaces; ++place) {
      const Bytes table = load<Bytes>(tables + codes[place] * kByteLanes);
      const uint8_t* block = rows + place * kGroupRows;
      ((sum[B] += look_up(table, load<Bytes>(block + B * kByteLanes))), ...);
    }
    ((both[B] += sum[B], high[B] += sum[B] >> 4), ...);
  }

  template <size_t... B>
  static EFFOPS_INLINE void sum(const uint8_t* codes, const uint8_t* rows, int64_t places, ByteSums& sums,
                                std::index_sequence<B...> blocks) {
    static constexpr Tables tables;
    Bytes both[] = {(static_cast<void>(B), Bytes{})...}, high[] = {(static_cast<void>(B), Bytes{})...};
    int64_t place = 0;
    for (; place + 3 <= places; place += 3) {
      step<3>(tables.data, codes + place, rows + place * kGroupRows, both, high, blocks);
    }
    for (; place < places; ++place) {
      step<1>(tables.data, codes + place, rows + place * kGroupRows, both, high, blocks);
    }
    ((sums[B] = both[B] - (high[B] << 4), sums[kBlocks + B] = high[B]), ...);
  }
};
#endif

#if defined(__AVX2__) && !defined(__AVX512BITALG__)
using Counter = LookUpHalfBytes;
#else
using Counter = CountBytes;
#endif

// ---------------------------------------------------------------- packing

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

template <size_t... I>
EFFOPS_INLINE void interleave(Bytes16 a, Bytes16 b, Bytes16* pair, std::index_sequence<I...>) {
  pair[0] = __builtin_shufflevector(a, b, (I / 2 + I % 2 * 16)...);
  pair[1] = __builtin_shufflevector(a, b, (8 + I / 2 + I % 2 * 16)...);
}

// Four perfect shuffles of the rows: afterwards rows[y] holds byte y of all 16 rows.
EFFOPS_INLINE void transpose(Bytes16 (&rows)[16]) {
  for (int round = 0; round < 4; ++round) {
    Bytes16 next[16];
    for (int i = 0; i < 8; ++i) {
      interleave(rows[i], rows[i + 8], next + 2 * i, std::make_index_sequence<16>{});
    }
    memcpy(rows, next, sizeof(next));
  }
}

EFFOPS_INLINE int64_t group_bytes(int64_t bytes) { return bytes * Counter::kPlacesPerByte * kGroupRows; }

// Packs `count` rows (the others of the group become zero).
EFFOPS_INLINE void pack_rows(const uint8_t* rows, int64_t count, int64_t bytes, uint8_t* packed) {
  constexpr int places = Counter::kPlacesPerByte;
  for (int64_t first = 0; first < kGroupRows; first += 16) {
    for (int64_t start = 0; start < bytes; start += 16) {
      const int64_t length = bytes - start < 16 ? bytes - start : 16;
      Bytes16 block[16] = {};
      for (int64_t i = 0; i < 16 && first + i < count; ++i) {
        const uint8_t* row = rows + (first + i) * bytes + start;
        if (length == 16) {
          block[i] = load<Bytes16>(row);
        } else {
          memcpy(&block[i], row, length);
        }
      }
      transpose(block);
      for (int64_t y = 0; y < length; ++y) {
        Bytes16 parts[places];
        Counter::split(block[y], parts);
        for (int part = 0; part < places; ++part) {
          store(packed + ((start + y) * places + part) * kGroupRows + first, parts[part]);
        }
      }
    }
  }
}

EFFOPS_INLINE int64_t code_bytes(int64_t bytes) {
  return bytes * Counter::kPlacesPerByte * Counter::kCodesPerPlace;
}

// The codes of two rows; of one row beside zeros if `second` is null.
EFFOPS_INLINE void encode_pair(const uint8_t* first, const uint8_t* second, int64_t bytes, uint8_t* codes) {
  for (int64_t y = 0; y < bytes; ++y) {
    Counter::encode(first[y], second != nullptr ? second[y] : 0, codes + code_bytes(y));
  }
}

// ---------------------------------------------------------------- one pair of rows

EFFOPS_INLINE int32_t exact_distance(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int32_t total = 0;
  int64_t y = 0;
  for (; y + 8 <= bytes; y += 8) total += count_ones(load<uint64_t>(a + y) ^ load<uint64_t>(b + y));
  for (; y < bytes; ++y) total += count_ones(uint64_t{a[y]} ^ b[y]);
  return total;
}

}  // namespace
}  // namespace effops::binary
