// Copies from global to shared memory that run while the thread goes on.
#pragma once

#include <cstdint>
#if !defined(__CUDACC__)
#include <vector>
#endif

#include "host_device.h"
#include "warp.h"

namespace effops {

// The copies of one thread, in groups that end in the order in which they were closed. What a copy has
// written may be read by the thread after wait(), by others after a barrier that follows. Before sm_80 a copy
// is done at once. In the simulator it is done by wait(), and its target is spoilt until then.
class AsyncCopies {
 public:
  // Starts to copy 16 bytes, both addresses aligned to them; writes zeros where the source does not exist, of
  // which nothing is read then.
  EFFOPS_DEVICE void start(void* shared, const void* global, bool exists) {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
                 "r"(exists ? 16 : 0)
                 : "memory");
#else
    uint4 value = make_uint4(0, 0, 0, 0);
    if (exists) value = *static_cast<const uint4*>(global);
    *static_cast<uint4*>(shared) = value;
#endif
#else
    *static_cast<Bytes*>(shared) = {{~uint64_t{0}, ~uint64_t{0}}};
    open_.push_back({static_cast<Bytes*>(shared), exists ? static_cast<const Bytes*>(global) : nullptr});
#endif
  }

  EFFOPS_DEVICE void close_group() {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
#else
    groups_.push_back(open_);
    open_.clear();
#endif
  }

  // Until at most kOpen groups are left.
  template <int kOpen>
  EFFOPS_DEVICE void wait() {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#endif
#else
    while (groups_.size() > kOpen) {
      for (const Copy& copy : groups_.front()) *copy.shared = copy.global != nullptr ? *copy.global : Bytes{};
      groups_.erase(groups_.begin());
    }
#endif
  }

#if !defined(__CUDACC__)
 private:
  // By assignments, which the race detector sees.
  using Bytes = Pack<uint64_t, 2>;
  struct Copy {
    Bytes* shared;
    const Bytes* global;
  };
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
#endif
};

}  // namespace effops
