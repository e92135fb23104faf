// The k-th largest element of a row by counting: scalar maths that CPU, CUDA and simulator builds share.
#pragma once

#include <math.h>

#include "../common/order_key.h"

namespace effops::binary {

// The k largest are the keys >= high and the first `ties` of those == high - 1.
template <typename A>
struct Threshold {
  key_t<A> high;
  int64_t ties;

  // k = length or k = 0: all elements or none.
  static EFFOPS_HD Threshold of_constant(bool all) { return {all ? kNoKey<A> + 1 : KeyOf<A>::nan + 1, 0}; }
};

// Looks for a key `high` with count(key >= high) = k. Where ties allow none, it is the one above the tie.
//
//   ThresholdSearch<float, 4> search(smallest key, largest key, length, k);   // 0 < k < length
//   while (search.is_open()) { search.guess(keys); search.update(keys, count(row's keys >= keys[i])); }
template <typename A, int kGuesses>
struct ThresholdSearch {
  using Key = key_t<A>;
  using Unsigned = typename KeyOf<A>::Unsigned;
  Key low, high;  // count(>= low) > k > count(>= high), until k is met
  int64_t count_low, count_high, k;
  int64_t last;  // candidates at the turn before
  A widening;
  int turn;

  EFFOPS_HD ThresholdSearch(Key smallest, Key largest, int64_t length, int64_t ones)
      : low(smallest),
        high(largest + 1),
        count_low(length),
        count_high(0),
        k(ones),
        last(INT64_MAX),
        widening(1),
        turn(0) {}

  EFFOPS_HD Unsigned width() const { return static_cast<Unsigned>(high) - static_cast<Unsigned>(low); }
  EFFOPS_HD bool is_open() const { return count_high != k && width() > 1; }
  EFFOPS_HD Threshold<A> threshold() const { return {high, k - count_high}; }
  EFFOPS_HD int64_t candidates() const { return count_low - count_high; }  // keys from low to high

  // Keys from low + 1 to high - 1 around the one expected there if the candidates were spread evenly, at
  // distances of their standard deviation, wider where that has failed to quarter the candidates. They are
  // taken to be even as numbers and, where they have one sign, as keys (numbers of many magnitudes), in turn.
  // Every fifth turn cuts the width in equal parts, which bounds the number of turns.
  EFFOPS_HD void guess(Key (&keys)[kGuesses]) {
    const A number = static_cast<A>(candidates()), mean = static_cast<A>(count_low - k) / number;
    widening = candidates() > last / 4 ? A(2) * widening : A(1);
    last = candidates();
    const A spread = kGuesses == 1 ? A(0) : widening * sqrt(mean * (A(1) - mean) / number);
    const A from = value_of<A>(low), size = value_of<A>(high) - from;
    const bool cut = turn == 4, odd = turn % 2 != 0, one_sign = (low < 0) == (high < 0);
    const bool as_numbers = !cut && !(odd && one_sign) && size < A(INFINITY);  // nor NaN
    for (int i = 0; i < kGuesses; ++i) {
      const A place = static_cast<A>(i + 1) / static_cast<A>(kGuesses + 1);
      A part = cut ? place : mean + spread * (A(2) * place - A(1));
      part = part < A(0) ? A(0) : part > A(0.999) ? A(0.999) : part;
      const Key key = as_numbers ? key_of(from + size * part)
                                 : static_cast<Key>(static_cast<Unsigned>(low) +
                                                    static_cast<Unsigned>(static_cast<A>(width()) * part));
      keys[i] = key <= low ? low + 1 : key >= high ? high - 1 : key;
    }
    turn = cut ? 0 : turn + 1;
  }

  EFFOPS_HD void update(const Key (&keys)[kGuesses], const int64_t (&counts)[kGuesses]) {
    for (int i = 0; i < kGuesses; ++i) {
      if (counts[i] > k && keys[i] > low) {
        low = keys[i];
        count_low = counts[i];
      } else if (counts[i] <= k && keys[i] < high) {
        high = keys[i];
        count_high = counts[i];
      }
    }
  }
};

}  // namespace effops::binary
