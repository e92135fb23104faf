// The scheduler of the CUDA host simulator: every CUDA thread is a fiber on one CPU thread.
//
// Blocks run one after another. Inside a block a fiber runs until it waits (barrier, warp collective),
// gives way (atomics, under the random schedule) or ends; the schedule then says who runs next. Kernels
// don't include this file: cuda_on_host.h turns CUDA's names into the calls declared here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

// The built-in variables of a kernel; the scheduler sets them before it resumes a fiber.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace simulator {

using Where = std::source_location;

// Ends the process with a message that names the running block and thread, if there is one.
[[noreturn]] [[gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Writes the running block and thread, if there is one, to stderr.
void report_place();

enum class Order { kForward, kReverse, kRandom };
void set_schedule(Order order, uint64_t seed);

// Runs body(context) once per thread of the grid, with exactly shared_bytes of dynamic shared memory.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

// Calls kernel(arguments...) in every thread, as `kernel<<<grid, block, shared_bytes>>>(arguments...)`.
template <typename Kernel, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, const Kernel& kernel, const Arguments&... arguments) {
  auto body = [&] { kernel(arguments...); };
  run_grid(
      grid, block, shared_bytes, [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

// Memory of the running block. Each array is its own heap allocation, so that ASan guards its ends, and
// is filled with 0xff: NaN as any float type, -1 as any integer.
void begin_shared_memory(size_t dynamic_bytes);
void end_shared_memory();
void* dynamic_shared();
void* static_shared(const void* key, const char* name, size_t bytes, size_t alignment);

// One array per declaration (and per template instance) and block, whichever thread comes first.
template <typename T, size_t kCount>
T (&shared_array(const void* key, const char* name))
[kCount] {
  constexpr size_t kAlignment = alignof(T) > 16 ? alignof(T) : 16;
  return *static_cast<T(*)[kCount]>(static_shared(key, name, sizeof(T) * kCount, kAlignment));
}

enum class Collective : uint8_t {
  kNone,
  // Of a block.
  kSyncThreads,
  kSyncThreadsCount,
  // Of the lanes in a mask.
  kSyncWarp,
  kShuffle,
  kBallot,
  kMatchAny,
  // Of the lanes that happen to be here.
  kActiveMask,
};

// Waits for the whole block; returns in how many threads the predicate holds.
int block_collective(Collective kind, bool predicate, Where where);

// Waits for the lanes in mask. kShuffle: the value of lane `source`. kBallot: the lanes with value != 0.
// kMatchAny: the lanes with the same value.
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source, Where where);

// Lanes of the warp that meet here; any subset that holds the caller is a legal answer.
unsigned active_mask(Where where);

unsigned lane_index();

// To be called before an atomic access, with the kernel's code address: another fiber may run first, and
// the race detector is told.
void atomic_point(const void* address, size_t bytes, const void* code);
// Lets another fiber run first, if the schedule is random.
void give_way();

}  // namespace simulator
