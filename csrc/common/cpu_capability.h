// The instruction set that the CPU kernels run with: the best that was built and that the processor
// has, capped by the environment variable EFFOPS_CPU_CAPABILITY (default, avx2, avx512).
#pragma once

namespace effops {

enum class CpuCapability { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

CpuCapability cpu_capability();

// Picks one of the tables that a kernel file exports, one per instruction set.
template <typename Table>
const Table& select_table(const Table& base, [[maybe_unused]] const Table& avx2,
                          [[maybe_unused]] const Table& avx512) {
  switch (cpu_capability()) {
    case CpuCapability::kAvx512: return avx512;
    case CpuCapability::kAvx2: return avx2;
    default: return base;
  }
}

// Declares the tables of a kernel file and `name()`, which returns the chosen one.
#if defined(EFFOPS_HAVE_X86_ISAS)
#define EFFOPS_DECLARE_KERNEL_TABLE(Table, name)                                                    \
  namespace isa_default { extern const Table name; }                                                \
  namespace isa_avx2 { extern const Table name; }                                                   \
  namespace isa_avx512 { extern const Table name; }                                                 \
  inline const Table& name() {                                                                      \
    static const Table& chosen = select_table(isa_default::name, isa_avx2::name, isa_avx512::name); \
    return chosen;                                                                                  \
  }
#else
#define EFFOPS_DECLARE_KERNEL_TABLE(Table, name)           \
  namespace isa_default { extern const Table name; }       \
  inline const Table& name() { return isa_default::name; }
#endif

}  // namespace effops
