#include "cpu_capability.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace effops {
namespace {

CpuCapability detected() {
#if defined(EFFOPS_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return CpuCapability::kAvx512;
  if (avx2) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kDefault;
}

// Python refuses any other value of the variable when effops is imported.
CpuCapability cap_from_environment() {
  const char* value = std::getenv("EFFOPS_CPU_CAPABILITY");
  if (value != nullptr && std::strcmp(value, "default") == 0) return CpuCapability::kDefault;
  if (value != nullptr && std::strcmp(value, "avx2") == 0) return CpuCapability::kAvx2;
  return CpuCapability::kAvx512;
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = std::min(detected(), cap_from_environment());
  return capability;
}

}  // namespace effops

extern "C" __attribute__((visibility("default"))) int effops_cpu_capability() {
  return static_cast<int>(effops::cpu_capability());
}
