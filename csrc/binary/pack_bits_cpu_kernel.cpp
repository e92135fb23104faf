// Packing of bits into words and back, on the CPU.
//
//   out[row, word], bit j = x[row, 64 * word + j] > 0        out[row, j] = bit j of the packed row
//
// Parallelism: the caller splits the words of all rows. Lanes are elements; comparison masks are packed by
// the movemask instruction, bits are spread to bytes by a byte shuffle.
// Bytes: x and one bit per element, each once. Bound by memory bandwidth.
#include "pack_bits_cpu_kernel.h"
#include "byte_lanes_cpu.h"

namespace effops::binary::EFFOPS_ISA {
namespace {

using namespace effops::simd;

constexpr int64_t kWord = 64;

// ------------------------------------------------------------------------------------------------- pack

template <typename T>
EFFOPS_INLINE uint64_t word_of(const T* x) {
  using V = typename Vec<accumulator_t<T>>::type;
  constexpr int lanes = Vec<accumulator_t<T>>::lanes;
  uint64_t word = 0;
  for (int i = 0; i < kWord; i += lanes) word |= uint64_t{sign_bits(load_wide(x + i) > V{})} << i;
  return word;
}

EFFOPS_INLINE uint64_t word_of(const uint8_t* x) {
  uint64_t word = 0;
  for (int i = 0; i < kWord; i += kByteLanes) {
    word |= lanes_set(reinterpret_cast<Bytes>(load<Bytes>(x + i) != 0)) << i;
  }
  return word;
}

template <typename T>
void pack(const void* x, int64_t bits, int64_t words, int64_t begin, int64_t end, uint64_t* out) {
  T padded[kWord] = {};
  const int64_t full = bits / kWord, rest = bits % kWord;
  int64_t word = begin % words;
  const T* row = static_cast<const T*>(x) + begin / words * bits;
  for (int64_t i = begin; i < end; row += bits, word = 0) {
    for (; word < full && i < end; ++word) out[i++] = word_of(row + word * kWord);
    if (rest > 0 && i < end) {
      for (int64_t j = 0; j < rest; ++j) padded[j] = row[full * kWord + j];
      out[i++] = word_of(padded);
    }
  }
}

// ----------------------------------------------------------------------------------------------- unpack

// Byte i / 8 in lane i. Every 16 lanes hold all bytes that are read, so that the shuffle stays within them.
template <size_t... I>
EFFOPS_INLINE Bytes spread_bytes(Bytes v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I / 16 * 16 + I / 8)...);
}
template <size_t... I>
EFFOPS_INLINE Bytes bit_of_lane(std::index_sequence<I...>) {
  return Bytes{static_cast<uint8_t>(1 << I % 8)...};
}

// kVectorBytes bits to as many bytes.
EFFOPS_INLINE void spread(const uint8_t* packed, uint8_t* out) {
  constexpr auto indices = std::make_index_sequence<kVectorBytes>{};
  constexpr int read = kVectorBytes / 8;
  Bytes repeated;
  if constexpr (read == 8) {
    typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
    repeated = reinterpret_cast<Bytes>(Words{} + load<uint64_t>(packed));
  } else if constexpr (read == 4) {
    typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
    repeated = reinterpret_cast<Bytes>(Words{} + load<uint32_t>(packed));
  } else {
    typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
    repeated = reinterpret_cast<Bytes>(Words{} + load<uint16_t>(packed));
  }
  const Bytes bits = spread_bytes(repeated, indices) & bit_of_lane(indices);
  store(out, reinterpret_cast<Bytes>(bits != 0) & 1);
}

void unpack(const uint8_t* packed, int64_t stride, int64_t bits, int64_t words, int64_t begin, int64_t end,
            uint8_t* out) {
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / words, word = i % words, last = end - i < words - word ? end - i + word : words;
    const int64_t stop = last * kWord < bits ? last * kWord : bits;
    const uint8_t* from = packed + row * stride;
    uint8_t* to = out + row * bits;
    int64_t j = word * kWord;
    for (; j + kVectorBytes <= stop; j += kVectorBytes) spread(from + j / 8, to + j);
    for (; j < stop; ++j) to[j] = from[j / 8] >> j % 8 & 1;
    i += last - word;
  }
}

}  // namespace

extern const PackBitsKernels pack_bits_kernels = {
    {&pack<float>, &pack<double>, &pack<bf16>, &pack<f16>, &pack<uint8_t>},
    &unpack,
};

}  // namespace effops::binary::EFFOPS_ISA
