// Finds data races and reads of uninitialised memory, in shared memory and in tensors.
//
// The kernels are compiled a second time with -fsanitize=thread, which puts a call before every memory
// access; race_detector.cpp answers these calls instead of the TSan runtime. It keeps the last accesses
// of every byte and asks of each new one whether a barrier orders it after them:
//   __syncthreads() orders the block, __syncwarp() the lanes in its mask, the end of a launch everything;
//   shuffles and votes order nothing, as in CUDA; atomics race with plain accesses only.
// In the ASan build all of this is empty.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simulator::races {

#if defined(EFFOPS_SIMULATOR_RACES)
void watch(const void* begin, size_t bytes, const char* name, bool initialised);
void forget(const void* begin);

void begin_launch();
void end_launch();
void begin_block(unsigned threads);
void set_thread(unsigned thread);
void order_block();
void order_lanes(unsigned warp, unsigned mask);
void on_atomic(const void* address, size_t bytes, const void* code);
#else
inline void watch(const void*, size_t, const char*, bool) {}
inline void forget(const void*) {}
inline void begin_launch() {}
inline void end_launch() {}
inline void begin_block(unsigned) {}
inline void set_thread(unsigned) {}
inline void order_block() {}
inline void order_lanes(unsigned, unsigned) {}
inline void on_atomic(const void*, size_t, const void*) {}
#endif

}  // namespace simulator::races
