// Uninitialised memory for the length of a call, aligned to a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace effops {

class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(bytes > 0 ? static_cast<char*>(::operator new(bytes, kAlignment)) : nullptr) {}

  void* at(int64_t byte) const { return memory_.get() + byte; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<char, Delete> memory_;
};

}  // namespace effops
