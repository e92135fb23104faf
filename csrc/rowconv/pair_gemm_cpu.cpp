// Whether this processor multiplies pairs of bfloat16 numbers.
#include "pair_gemm_cpu_kernel.h"

namespace effops::rowconv {

#if defined(EFFOPS_HAVE_X86_ISAS)
namespace isa_avx512_bf16 { extern const MultiplyPairs multiply_pairs_kernel; }

MultiplyPairs multiply_pairs() {
  static const bool available = cpu_capability() == CpuCapability::kAvx512 &&
                                __builtin_cpu_supports("avx512bf16");
  return available ? isa_avx512_bf16::multiply_pairs_kernel : nullptr;
}
#else
MultiplyPairs multiply_pairs() { return nullptr; }
#endif

}  // namespace effops::rowconv
