// The k largest elements of each row as bits, on the CPU.
//
//   bit j of out[row] = x[row, j] > t or (x[row, j] = t and fewer than the missing ones lie before it)
//
// t is found by counting the elements above four guesses, three to four times: see topk_pack_math.h.
//
// Parallelism: the caller splits the rows. Lanes are elements, as integer keys that are made once per row, or
// once per pass where a row is longer than the buffer. Long rows are left as soon as the candidates are few.
// Bytes: x and one bit per element. Bound by instructions (about 15 compares per element).
#include "topk_pack_cpu_kernel.h"
#include "../common/simd.h"
#include "topk_pack_math.h"

namespace effops::binary::EFFOPS_ISA {
namespace {

using namespace effops::simd;

constexpr int64_t kWord = 64;
constexpr int64_t kChunk = 4096;  // keys in a buffer: they stay in the first-level cache
constexpr int64_t kLongRow = 1024;  // from here on it pays to set the last candidates apart
constexpr int kGuesses = 4;

// One row, seen as chunks of keys; after the last one come kNoKey up to a whole word.
template <typename T>
class Row {
 public:
  using A = accumulator_t<T>;
  using Key = key_t<A>;
  using V = typename Vec<A>::type;
  using Keys = typename Vec<A>::mask;
  using Search = ThresholdSearch<A, kGuesses>;
  static constexpr int lanes = Vec<A>::lanes;

  // buffer: kChunk keys
  EFFOPS_INLINE Row(const T* x, int64_t length, Key* buffer)
      : x_(x), length_(length), keys_(buffer), filled_(-1) {}

  // Calls f(keys, number of keys with those after the last, first element).
  template <typename F>
  EFFOPS_INLINE void for_chunks(const F& f) {
    for (int64_t first = 0; first < length_; first += kChunk) {
      const int64_t count = length_ - first < kChunk ? length_ - first : kChunk;
      if (filled_ != first) fill(first, count, [](Keys) {});
      f(static_cast<const Key*>(keys_), (count + kWord - 1) / kWord * kWord, first);
    }
  }

  EFFOPS_INLINE void find_range(Key& smallest, Key& largest) {
    Keys low = Keys{} + KeyOf<A>::nan, high = Keys{} + kNoKey<A>;
    for (int64_t first = 0; first < length_; first += kChunk) {
      fill(first, length_ - first < kChunk ? length_ - first : kChunk, [&](Keys keys) {
        low = keys < low ? keys : low;
        high = keys > high ? keys : high;
      });
    }
    smallest = min_of_lanes<A>(low);
    largest = max_of_lanes<A>(high);
  }

  // kept[i], i < result: the keys from search.low to search.high, then kNoKey up to a whole word.
  EFFOPS_INLINE int64_t keep_candidates(const Search& search, Key* kept) {
    const Keys below = Keys{} + (search.low - 1), above = Keys{} + search.high;
    int64_t number = 0;
    for_chunks([&](const Key* keys, int64_t count, int64_t) {
      for (int64_t i = 0; i < count; i += lanes) {
        const Keys key = load<Keys>(keys + i);
        for (uint32_t bits = sign_bits((key > below) & (key < above)); bits != 0; bits &= bits - 1) {
          kept[number++] = keys[i + __builtin_ctz(bits)];
        }
      }
    });
    const int64_t padded = (number + kWord - 1) / kWord * kWord;
    for (int64_t i = number; i < padded; ++i) kept[i] = kNoKey<A>;
    return padded;
  }

 private:
  // Puts the keys of a chunk into the buffer; calls each(keys of a register), with repetitions at the end.
  template <typename F>
  EFFOPS_INLINE void fill(int64_t first, int64_t count, const F& each) {
    const T* x = x_ + first;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) put(x + i, i, each);
    if (i < count) {
      T padded[lanes];
      for (int j = 0; j < lanes; ++j) padded[j] = x[i + j < count ? i + j : count - 1];
      put(padded, i, each);
    }
    for (i = count; i % kWord != 0; ++i) keys_[i] = kNoKey<A>;
    filled_ = first;
  }

  template <typename F>
  EFFOPS_INLINE void put(const T* x, int64_t i, const F& each) {
    const V value = load_wide(x) + A(0);  // -0 becomes 0
    const Keys bits = reinterpret_cast<Keys>(value);
    const Keys key = bits ^ ((bits >> (8 * sizeof(Key) - 1)) & KeyOf<A>::magnitude);
    const Keys keys = value == value ? key : Keys{} + KeyOf<A>::nan;
    store(keys_ + i, keys);
    each(keys);
  }

  const T* x_;
  int64_t length_;
  Key* keys_;
  int64_t filled_;  // first element of the chunk in the buffer
};

// counts[i] += keys >= thresholds[i], of whole words
template <typename A, typename Key = key_t<A>>
EFFOPS_INLINE void count_keys(const Key* keys, int64_t number, const Key (&thresholds)[kGuesses],
                              int64_t (&counts)[kGuesses]) {
  using Keys = typename Vec<A>::mask;
  Keys below[kGuesses], sums[kGuesses] = {};  // sums: minus the counts
  for (int g = 0; g < kGuesses; ++g) below[g] = Keys{} + (thresholds[g] - 1);
  for (int64_t i = 0; i < number; i += Vec<A>::lanes) {
    const Keys key = load<Keys>(keys + i);
    for (int g = 0; g < kGuesses; ++g) sums[g] += key > below[g];
  }
  for (int g = 0; g < kGuesses; ++g) counts[g] -= sum_of_lanes<A>(sums[g]);
}

template <typename T, typename A = accumulator_t<T>>
EFFOPS_INLINE Threshold<A> find_threshold(Row<T>& row, int64_t length, int64_t k) {
  if (k == 0 || k == length) return Threshold<A>::of_constant(k != 0);
  key_t<A> smallest, largest, guesses[kGuesses];
  row.find_range(smallest, largest);
  ThresholdSearch<A, kGuesses> search(smallest, largest, length, k);
  alignas(64) key_t<A> kept[kChunk];
  int64_t number = -1, above = 0;  // of kept keys, and of those above them
  while (search.is_open()) {
    if (number < 0 && length >= kLongRow &&
        search.candidates() <= (length / 4 < kChunk ? length / 4 : kChunk)) {
      number = row.keep_candidates(search, kept);
      above = search.count_high;
    }
    search.guess(guesses);
    int64_t counts[kGuesses] = {};
    if (number >= 0) {
      for (int64_t& count : counts) count = above;
      count_keys<A>(kept, number, guesses, counts);
    } else {
      row.for_chunks(
          [&](const key_t<A>* keys, int64_t count, int64_t) { count_keys<A>(keys, count, guesses, counts); });
    }
    search.update(guesses, counts);
  }
  return search.threshold();
}

// Bits of the first `limit` ones of a word.
EFFOPS_INLINE uint64_t first_ones(uint64_t word, int64_t limit) {
  uint64_t result = 0;
  for (; word != 0 && limit > 0; --limit, word &= word - 1) result |= word & (~word + 1);
  return result;
}

template <typename T, typename A = accumulator_t<T>>
EFFOPS_INLINE void write_words(Row<T>& row, const Threshold<A>& threshold, uint64_t* out) {
  using Keys = typename Row<T>::Keys;
  constexpr int lanes = Row<T>::lanes;
  const Keys tie = Keys{} + (threshold.high - 1);
  int64_t ties = threshold.ties;
  row.for_chunks([&](const key_t<A>* keys, int64_t count, int64_t first) {
    for (int64_t i = 0; i < count; i += kWord) {
      uint64_t above = 0, equal = 0;
      for (int j = 0; j < kWord; j += lanes) {
        above |= uint64_t{sign_bits(load<Keys>(keys + i + j) > tie)} << j;
      }
      if (ties > 0) {
        for (int j = 0; j < kWord; j += lanes) {
          equal |= uint64_t{sign_bits(load<Keys>(keys + i + j) == tie)} << j;
        }
        equal = first_ones(equal, ties);
        ties -= __builtin_popcountll(equal);
      }
      out[(first + i) / kWord] = above | equal;
    }
  });
}

template <typename T>
void pack(const void* x, int64_t rows, int64_t length, int64_t k, uint64_t* out) {
  using A = accumulator_t<T>;
  alignas(64) key_t<A> buffer[kChunk];
  const int64_t words = (length + kWord - 1) / kWord;
  for (int64_t r = 0; r < rows; ++r, out += words) {
    Row<T> row(static_cast<const T*>(x) + r * length, length, buffer);
    write_words(row, find_threshold(row, length, k), out);
  }
}

}  // namespace

extern const TopkPackKernels topk_pack_kernels = {
    {&pack<float>, &pack<double>, &pack<bf16>, &pack<f16>},
};

}  // namespace effops::binary::EFFOPS_ISA
