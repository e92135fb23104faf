// The threads of a block that can run, and the schedule that chooses among them.
#pragma once

#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

#include "fibers.h"

namespace simulator {

class Schedule {
 public:
  Schedule() = default;
  Schedule(Order order, uint64_t seed) : order_(order), state_(seed) {}

  Order order() const { return order_; }

  uint64_t random() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  std::vector<uint64_t> block_order(uint64_t count) {
    std::vector<uint64_t> order(count);
    for (uint64_t i = 0; i < count; ++i) order[i] = order_ == Order::kReverse ? count - 1 - i : i;
    if (order_ == Order::kRandom) {
      for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    }
    return order;
  }

 private:
  Order order_ = Order::kForward;
  uint64_t state_ = 0;
};

class ReadySet {
 public:
  void reset(unsigned num_threads) { words_.assign((num_threads + 63) / 64, 0); }
  void add(unsigned thread) { words_[thread / 64] |= uint64_t{1} << (thread % 64); }
  void remove(unsigned thread) { words_[thread / 64] &= ~(uint64_t{1} << (thread % 64)); }

  unsigned size() const {
    unsigned count = 0;
    for (const uint64_t word : words_) count += static_cast<unsigned>(std::popcount(word));
    return count;
  }

  // The thread to run next; the set must not be empty.
  unsigned pick(Schedule& schedule) const {
    switch (schedule.order()) {
      case Order::kForward: return at(0);
      case Order::kReverse: return at(size() - 1);
      default: return at(static_cast<unsigned>(schedule.random() % size()));
    }
  }

 private:
  // The member with `skip` members before it.
  unsigned at(unsigned skip) const {
    unsigned word = 0;
    for (;; ++word) {
      const auto count = static_cast<unsigned>(std::popcount(words_[word]));
      if (skip < count) break;
      skip -= count;
    }
    uint64_t rest = words_[word];
    while (skip-- > 0) rest &= rest - 1;
    return 64 * word + static_cast<unsigned>(std::countr_zero(rest));
  }

  std::vector<uint64_t> words_;  // one bit per thread
};

}  // namespace simulator
