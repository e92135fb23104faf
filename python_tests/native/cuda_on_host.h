// CUDA's language for g++: with this header the bodies of __global__ functions run on the CPU, under the
// sanitizers. csrc/common/host_device.h includes it where EFFOPS_SIMULATOR is defined.
//
// Missing on purpose: `__shared__` (use EFFOPS_SHARED, EFFOPS_DYNAMIC_SHARED), textures, cooperative
// groups, tensor cores, asynchronous copies, everything that makes blocks wait for each other.
#pragma once

#include <math.h>

#include <concepts>
#include <cstring>
#include <type_traits>

#include "cuda_vector_types.h"
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ error_use_EFFOPS_SHARED_of_host_device_h

// Both arrays are the running block's own; see fibers.h. The address of `key` names the declaration.
#define EFFOPS_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::simulator::dynamic_shared())
#define EFFOPS_SHARED(type, name, count)                                                    \
  static char effops_key_of_##name;                                                         \
  type(&name)[count] = ::simulator::shared_array<type, count>(&effops_key_of_##name, #name)

// ------------------------------------------------------------------------------------------- barriers

inline void __syncthreads(simulator::Where where = simulator::Where::current()) {
  simulator::block_collective(simulator::Collective::kSyncThreads, false, where);
}
inline int __syncthreads_count(int predicate, simulator::Where where = simulator::Where::current()) {
  return simulator::block_collective(simulator::Collective::kSyncThreadsCount, predicate != 0, where);
}
inline int __syncthreads_or(int predicate, simulator::Where where = simulator::Where::current()) {
  return __syncthreads_count(predicate, where) != 0;
}
inline int __syncthreads_and(int predicate, simulator::Where where = simulator::Where::current()) {
  return __syncthreads_count(predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simulator::Where where = simulator::Where::current()) {
  simulator::warp_collective(simulator::Collective::kSyncWarp, mask, 0, 0, where);
}
// One fiber runs at a time, so that memory is always consistent.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __nanosleep(unsigned) { simulator::give_way(); }
[[noreturn]] inline void __trap() { simulator::fail("__trap()"); }

// --------------------------------------------------------------------------------------- warp exchange

namespace simulator {

// What CUDA's overloads accept: 4- and 8-byte numbers; smaller integers become int.
template <typename T>
concept Small = std::integral<T> && sizeof(T) < 4;
template <typename T>
concept Word = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Word T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <Word T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <Word T>
T shuffle(unsigned mask, T value, unsigned source, Where where) {
  return from_bits<T>(warp_collective(Collective::kShuffle, mask, to_bits(value), source, where));
}

// The lanes of a warp in segments of `width` lanes.
struct Segment {
  unsigned lane, first, last;
  explicit Segment(int width) : lane(lane_index()) {
    if (width <= 0 || width > warpSize || (width & (width - 1))) fail("shuffle of width %d", width);
    first = lane & ~static_cast<unsigned>(width - 1);
    last = first + static_cast<unsigned>(width) - 1;
  }
};

}  // namespace simulator

template <simulator::Word T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              simulator::Where where = simulator::Where::current()) {
  const simulator::Segment segment(width);
  const unsigned offset = static_cast<unsigned>(source) & static_cast<unsigned>(width - 1);
  return simulator::shuffle(mask, value, segment.first + offset, where);
}
// Where the partner is outside the segment, a lane gets its own value.
template <simulator::Word T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 simulator::Where where = simulator::Where::current()) {
  const simulator::Segment segment(width);
  const bool inside = segment.lane - segment.first >= delta;
  return simulator::shuffle(mask, value, inside ? segment.lane - delta : segment.lane, where);
}
template <simulator::Word T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   simulator::Where where = simulator::Where::current()) {
  const simulator::Segment segment(width);
  const bool inside = segment.last - segment.lane >= delta;
  return simulator::shuffle(mask, value, inside ? segment.lane + delta : segment.lane, where);
}
// Segments below may be read, as on the device.
template <simulator::Word T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  simulator::Where where = simulator::Where::current()) {
  const simulator::Segment segment(width);
  const unsigned partner = segment.lane ^ (static_cast<unsigned>(lane_mask) % warpSize);
  return simulator::shuffle(mask, value, partner <= segment.last ? partner : segment.lane, where);
}

#define EFFOPS_SMALL_SHUFFLE(name, Offset)                              \
  template <simulator::Small T>                                         \
  int name(unsigned mask, T value, Offset offset, int width = warpSize, \
           simulator::Where where = simulator::Where::current()) {      \
    return name(mask, static_cast<int>(value), offset, width, where);   \
  }
EFFOPS_SMALL_SHUFFLE(__shfl_sync, int)
EFFOPS_SMALL_SHUFFLE(__shfl_up_sync, unsigned)
EFFOPS_SMALL_SHUFFLE(__shfl_down_sync, unsigned)
EFFOPS_SMALL_SHUFFLE(__shfl_xor_sync, int)
#undef EFFOPS_SMALL_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simulator::Where where = simulator::Where::current()) {
  const uint64_t lanes =
      simulator::warp_collective(simulator::Collective::kBallot, mask, predicate != 0, 0, where);
  return static_cast<unsigned>(lanes);
}
inline int __any_sync(unsigned mask, int predicate, simulator::Where where = simulator::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simulator::Where where = simulator::Where::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
template <simulator::Word T>
unsigned __match_any_sync(unsigned mask, T value, simulator::Where where = simulator::Where::current()) {
  return static_cast<unsigned>(simulator::warp_collective(simulator::Collective::kMatchAny, mask,
                                                          simulator::to_bits(value), 0, where));
}
inline unsigned __activemask(simulator::Where where = simulator::Where::current()) {
  return simulator::active_mask(where);
}

// -------------------------------------------------------------------------------------------- atomics

namespace simulator {

// Other fibers may run before, none during the access. Not inlined, to know where the kernel calls it;
// kept from the race detector's eyes, which sees atomic_point() instead.
template <typename T, typename Update>
[[gnu::noinline, gnu::no_sanitize_thread]] T atomic_update(T* address, Update update) {
  atomic_point(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = update(old);
  return old;
}

template <typename T, typename... Allowed>
concept OneOf = (std::same_as<T, Allowed> || ...);
template <typename T>
concept Integer = OneOf<T, int, unsigned, unsigned long long>;
template <typename T>
concept WideInteger = Integer<T> || std::same_as<T, long long>;

template <typename T>
T wrapping_add(T a, T b) {
  if constexpr (std::floating_point<T>) {
    return a + b;
  } else {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
  }
}

}  // namespace simulator

template <typename T>
  requires simulator::Integer<T> || std::floating_point<T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [value](T old) { return simulator::wrapping_add(old, value); });
}
template <simulator::OneOf<int, unsigned> T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [value](T old) {
    return static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(value));
  });
}
template <simulator::WideInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [value](T old) { return old < value ? value : old; });
}
template <simulator::WideInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [value](T old) { return value < old ? value : old; });
}
template <simulator::Integer T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [value](T old) { return old & value; });
}
template <simulator::Integer T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [value](T old) { return old | value; });
}
template <simulator::Integer T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [value](T old) { return old ^ value; });
}
template <typename T>
  requires simulator::Integer<T> || std::same_as<T, float>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [value](T) { return value; });
}
template <simulator::Integer T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return simulator::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

#include "cuda_math.h"
