#include "fiber_context.h"

#include <sys/mman.h>

#include <cstdint>

#include "fibers.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(EFFOPS_FIBERS_USE_UCONTEXT)
// Saves what a call must preserve on the old stack, its pointer in *old_stack, and takes up new_stack.
extern "C" void effops_switch_stack(void** old_stack, void* new_stack);
asm(R"(
.text
.globl effops_switch_stack
.type effops_switch_stack, @function
effops_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effops_switch_stack, .-effops_switch_stack
)");
#endif

namespace simulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // reserved, not committed: ASan's frames are large
constexpr size_t kGuardBytes = 64 * 1024;   // a multiple of every page size

}  // namespace

void FiberContext::allocate_stack() {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) fail("no memory for a stack");
  stack_ = static_cast<char*>(memory) + kGuardBytes;
  stack_bytes_ = kStackBytes;
}

void FiberContext::prepare(void (*entry)()) {
  if (!stack_) allocate_stack();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, stack_bytes_);  // the last user of the stack never returned
#endif
  fake_stack_ = nullptr;
#if defined(EFFOPS_FIBERS_USE_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // Upwards from the stack pointer: six registers, where `ret` goes, and a return address of null, with
  // which entry() finds the stack as after a call: 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

void FiberContext::switch_to(FiberContext& from, [[maybe_unused]] bool finished) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack_, stack_, stack_bytes_);
#endif
#if defined(EFFOPS_FIBERS_USE_UCONTEXT)
  swapcontext(&from.context_, &context_);
#else
  effops_switch_stack(&from.stack_pointer_, stack_pointer_);
#endif
  from.finish_switch(*this);  // somebody has switched back to `from`
}

void FiberContext::entered(FiberContext& from) { finish_switch(from); }

void FiberContext::finish_switch([[maybe_unused]] FiberContext& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
  if (!from.stack_) {  // the thread's own stack, which we didn't allocate
    from.stack_ = static_cast<char*>(const_cast<void*>(bottom));
    from.stack_bytes_ = bytes;
  }
#endif
}

}  // namespace simulator
