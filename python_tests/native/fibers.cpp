#include "fibers.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fiber_context.h"
#include "race_detector.h"
#include "ready_set.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kNobody = ~0u;

// What a fiber waits for.
struct Request {
  Collective kind = Collective::kNone;
  unsigned mask = 0;
  uint64_t value = 0;
  unsigned source = 0;
  Where where;
};

enum class State : uint8_t { kReady, kWaiting, kDone };

struct Fiber {
  FiberContext context;
  uint3 index;
  State state;
  Request request;
  uint64_t answer;
};

Schedule schedule;
FiberContext scheduler_context;
std::vector<std::unique_ptr<Fiber>> fibers;  // grows, and keeps its stacks from block to block
ReadySet ready;
unsigned num_threads = 0, num_done = 0, num_in_barrier = 0;
unsigned running = kNobody;
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;

// ------------------------------------------------------------------------------------------- messages

const char* name_of(Collective kind) {
  constexpr const char* kNames[] = {"nothing",          "__syncthreads", "__syncthreads_count/and/or",
                                    "__syncwarp",       "__shfl_sync",   "a vote (__ballot/any/all_sync)",
                                    "__match_any_sync", "__activemask"};
  return kNames[static_cast<int>(kind)];
}

std::string describe(unsigned thread) {
  const Fiber& fiber = *fibers[thread];
  char text[512];
  int length =
      std::snprintf(text, sizeof(text), "thread (%u,%u,%u)", fiber.index.x, fiber.index.y, fiber.index.z);
  if (fiber.state == State::kDone) return std::string(text) + " has exited";
  if (fiber.state == State::kReady) return text;
  const Request& request = fiber.request;
  length += std::snprintf(text + length, sizeof(text) - length, " waits in %s at %s:%u",
                          name_of(request.kind), request.where.file_name(),
                          static_cast<unsigned>(request.where.line()));
  if (request.kind >= Collective::kSyncWarp && request.kind != Collective::kActiveMask) {
    std::snprintf(text + length, sizeof(text) - length, " with mask 0x%08x", request.mask);
  }
  return text;
}

// -------------------------------------------------------------------------------------------- fibers

void make_ready(unsigned thread) {
  fibers[thread]->state = State::kReady;
  ready.add(thread);
}

void resume(unsigned thread) {
  ready.remove(thread);
  running = thread;
  threadIdx = fibers[thread]->index;
  races::set_thread(thread);
  fibers[thread]->context.switch_to(scheduler_context);
  running = kNobody;
}

void suspend() { scheduler_context.switch_to(fibers[running]->context); }

// A barrier can't complete any more once a thread of the block, or a lane of its mask, has exited.
void check_exit(unsigned thread) {
  if (num_done + ready.size() + 1 == num_threads) return;  // nobody waits
  for (unsigned other = 0; other < num_threads; ++other) {
    const Fiber& fiber = *fibers[other];
    if (fiber.state != State::kWaiting) continue;
    const Request& request = fiber.request;
    if (request.kind == Collective::kSyncThreads || request.kind == Collective::kSyncThreadsCount) {
      fail("divergent barrier: this thread exits, but %s", describe(other).c_str());
    }
    if (other / kWarp == thread / kWarp && request.kind != Collective::kActiveMask &&
        (request.mask >> (thread % kWarp) & 1)) {
      fail("lane %u exits, but %s, which names it", thread % kWarp, describe(other).c_str());
    }
  }
}

void run_fiber() {
  fibers[running]->context.entered(scheduler_context);
  kernel_body(kernel_context);
  check_exit(running);
  fibers[running]->state = State::kDone;
  ++num_done;
  scheduler_context.switch_to(fibers[running]->context, /*finished=*/true);
}

// ----------------------------------------------------------------------------------------- collectives

// Puts the running fiber to sleep over a request; complete() may wake it, and others, at once.
template <typename Complete>
uint64_t wait_for(const Request& request, const Complete& complete) {
  Fiber& fiber = *fibers[running];
  fiber.request = request;
  fiber.state = State::kWaiting;
  complete();
  suspend();
  fiber.request.kind = Collective::kNone;
  return fiber.answer;
}

bool same_place(const Request& a, const Request& b) {
  return a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
         std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

void complete_block() {
  if (num_done > 0) {
    for (unsigned thread = 0; thread < num_threads; ++thread) {
      if (fibers[thread]->state != State::kDone) continue;
      fail("divergent barrier: %s, but %s", describe(running).c_str(), describe(thread).c_str());
    }
  }
  if (++num_in_barrier < num_threads) return;
  num_in_barrier = 0;
  uint64_t count = 0;
  const Request& first = fibers[0]->request;
  for (unsigned thread = 0; thread < num_threads; ++thread) {
    const Request& request = fibers[thread]->request;
    if (request.kind != first.kind || !same_place(request, first)) {
      fail("divergent barrier: %s, but %s", describe(0).c_str(), describe(thread).c_str());
    }
    count += request.value;
  }
  for (unsigned thread = 0; thread < num_threads; ++thread) {
    fibers[thread]->answer = count;
    make_ready(thread);
  }
  races::order_block();
}

uint64_t warp_answer(unsigned warp_start, unsigned lane) {
  const Request& request = fibers[warp_start + lane]->request;
  uint64_t lanes = 0;
  switch (request.kind) {
    case Collective::kShuffle:
      // CUDA leaves the answer open; all bits set is NaN, and a wrong integer.
      if (!(request.mask >> request.source & 1)) return ~uint64_t{0};
      return fibers[warp_start + request.source]->request.value;
    case Collective::kBallot:
    case Collective::kMatchAny:
      for (unsigned other = 0; other < kWarp; ++other) {
        if (!(request.mask >> other & 1)) continue;
        const uint64_t value = fibers[warp_start + other]->request.value;
        const bool counts = request.kind == Collective::kBallot ? value != 0 : value == request.value;
        lanes |= uint64_t{counts} << other;
      }
      return lanes;
    default: return 0;
  }
}

// Wakes the lanes of the mask once all of them wait in the same collective with the same mask.
void complete_warp(unsigned warp_start, const Request& request) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(request.mask >> lane & 1)) continue;
    const unsigned thread = warp_start + lane;
    if (thread >= num_threads) {
      fail("%s, which names lane %u, but the block has %u threads", describe(running).c_str(), lane,
           num_threads);
    }
    const Fiber& fiber = *fibers[thread];
    if (fiber.state == State::kDone) {
      fail("%s, which names lane %u, but %s", describe(running).c_str(), lane, describe(thread).c_str());
    }
    const Request& other = fiber.request;
    if (fiber.state != State::kWaiting || other.kind != request.kind || other.mask != request.mask) return;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (request.mask >> lane & 1) fibers[warp_start + lane]->answer = warp_answer(warp_start, lane);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (request.mask >> lane & 1) make_ready(warp_start + lane);
  }
  if (request.kind == Collective::kSyncWarp) races::order_lanes(warp_start / kWarp, request.mask);
}

// When nobody can run: the lanes of a warp that wait in __activemask() are together, so they are the
// active ones; under the random schedule, only some of them. Returns whether anybody was woken.
bool release_active_masks() {
  bool released = false;
  for (unsigned start = 0; start < num_threads; start += kWarp) {
    unsigned group = 0;
    for (unsigned thread = start; thread < std::min(start + kWarp, num_threads); ++thread) {
      const Fiber& fiber = *fibers[thread];
      const bool here = fiber.state == State::kWaiting && fiber.request.kind == Collective::kActiveMask;
      group |= unsigned{here} << (thread - start);
    }
    if (schedule.order() == Order::kRandom) {
      const unsigned part = group & static_cast<unsigned>(schedule.random());
      if (part) group = part;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(group >> lane & 1)) continue;
      fibers[start + lane]->answer = group;
      make_ready(start + lane);
      released = true;
    }
  }
  return released;
}

[[noreturn]] void report_deadlock() {
  std::string text;
  const Request* shown[4] = {};
  unsigned num_shown = 0;
  for (unsigned thread = 0; thread < num_threads && num_shown < 4; ++thread) {
    const Request& request = fibers[thread]->request;
    const bool repeats = std::any_of(shown, shown + num_shown, [&](const Request* other) {
      return other->kind == request.kind && other->mask == request.mask && same_place(*other, request);
    });
    if (fibers[thread]->state != State::kWaiting || repeats) continue;
    shown[num_shown++] = &request;
    text += "\n  " + describe(thread);
  }
  fail("deadlock, nobody can run; among those that wait:%s", text.c_str());
}

// --------------------------------------------------------------------------------------------- blocks

void start_block(size_t shared_bytes) {
  begin_shared_memory(shared_bytes);
  races::begin_block(num_threads);
  num_done = num_in_barrier = 0;
  for (unsigned thread = 0; thread < num_threads; ++thread) {
    fibers[thread]->request = {};
    fibers[thread]->context.prepare(run_fiber);
    make_ready(thread);
  }
}

void run_block(size_t shared_bytes) {
  start_block(shared_bytes);
  while (num_done < num_threads) {
    if (ready.size() > 0) {
      resume(ready.pick(schedule));
    } else if (!release_active_masks()) {
      report_deadlock();
    }
  }
  end_shared_memory();
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  constexpr size_t kMostShared = 227 * 1024;  // sm_90; smaller devices are the launch code's business
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    fail("invalid block (%u,%u,%u)", block.x, block.y, block.z);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("invalid grid (%u,%u,%u)", grid.x, grid.y, grid.z);
  }
  if (shared_bytes > kMostShared) fail("%zu bytes of dynamic shared memory", shared_bytes);
}

}  // namespace

// ------------------------------------------------------------------------------------------ interface

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "simulator: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  report_place();
#if defined(__SANITIZE_ADDRESS__)
  if (running != kNobody) __sanitizer_print_stack_trace();
#endif
  std::fflush(stderr);
  std::_Exit(1);
}

void report_place() {
  if (num_threads == 0) return;
  std::fprintf(stderr, "  in block (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
  if (running != kNobody) std::fprintf(stderr, " thread (%u,%u,%u)", threadIdx.x, threadIdx.y, threadIdx.z);
  std::fprintf(stderr, " of grid (%u,%u,%u) block size (%u,%u,%u)\n", gridDim.x, gridDim.y, gridDim.z,
               blockDim.x, blockDim.y, blockDim.z);
}

void set_schedule(Order order, uint64_t seed) { schedule = Schedule(order, seed); }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
  check_launch(grid, block, shared_bytes);
  if (num_threads != 0) fail("a launch inside a kernel");
  kernel_body = body;
  kernel_context = context;
  gridDim = grid;
  blockDim = block;
  num_threads = block.x * block.y * block.z;
  ready.reset(num_threads);
  while (fibers.size() < num_threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < num_threads; ++i) {
    fibers[i]->index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  races::begin_launch();
  for (const uint64_t i : schedule.block_order(uint64_t{grid.x} * grid.y * grid.z)) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  races::end_launch();
  num_threads = 0;
}

int block_collective(Collective kind, bool predicate, Where where) {
  return static_cast<int>(wait_for({kind, 0, predicate, 0, where}, complete_block));
}

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, unsigned source, Where where) {
  if (!(mask >> lane_index() & 1)) {
    fail("%s at %s:%u: the mask 0x%08x lacks the calling lane %u", name_of(kind), where.file_name(),
         static_cast<unsigned>(where.line()), mask, lane_index());
  }
  const unsigned warp_start = running / kWarp * kWarp;
  const Request request{kind, mask, value, source, where};
  return wait_for(request, [&] { complete_warp(warp_start, request); });
}

unsigned active_mask(Where where) {
  return static_cast<unsigned>(wait_for({Collective::kActiveMask, 0, 0, 0, where}, [] {}));
}

unsigned lane_index() { return running % kWarp; }

void give_way() {
  if (schedule.order() != Order::kRandom || schedule.random() % 2) return;
  make_ready(running);
  suspend();
}

void atomic_point(const void* address, size_t bytes, const void* code) {
  give_way();
  races::on_atomic(address, bytes, code);
}

}  // namespace simulator
