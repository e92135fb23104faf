// Stacks of fibers and the switch between them, told to ASan.
//
// x86-64 has its own switch: ASan intercepts swapcontext, and there forgets the red zones of the stack
// that is switched to. Other processors use swapcontext all the same (also with EFFOPS_FIBERS_UCONTEXT).
#pragma once

#include <cstddef>
#if !defined(__x86_64__) || defined(EFFOPS_FIBERS_UCONTEXT)
#define EFFOPS_FIBERS_USE_UCONTEXT
#include <ucontext.h>
#endif

namespace simulator {

// An execution that is suspended, or the one that runs. The scheduler's own stack is one, too.
class FiberContext {
 public:
  FiberContext() = default;
  FiberContext(const FiberContext&) = delete;
  FiberContext& operator=(const FiberContext&) = delete;

  // Makes the next switch_to() call entry() on this context's stack; entry never returns.
  void prepare(void (*entry)());

  // Suspends `from`, which runs, and resumes *this. `finished`: `from` will never be resumed.
  void switch_to(FiberContext& from, bool finished = false);

  // To be called first thing in entry().
  void entered(FiberContext& from);

 private:
  void allocate_stack();
  void finish_switch(FiberContext& from);

  char* stack_ = nullptr;  // lowest address; of the scheduler's context learnt at the first switch
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // ASan's
#if defined(EFFOPS_FIBERS_USE_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace simulator
