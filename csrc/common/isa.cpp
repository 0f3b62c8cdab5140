#include "isa.h"

#ifdef FM_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#ifdef _OPENMP
#include <omp.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fused_margins {
namespace {

#ifdef FM_X86
// LZCNT, MOVBE and F16C, which x86-64-v3 includes and __builtin_cpu_supports does not name in every compiler.
bool has_small_extensions() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_MOVBE) || !(c & bit_F16C)) return false;
  return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & bit_LZCNT);
}

// The matrix unit and bfloat16 conversions; the system hands out the unit's registers on request.
bool has_amx() {
#if defined(FM_HAS_AMX) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24))) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

Isa detected() {
#ifdef FM_X86
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && has_small_extensions();
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 && has_amx() ? Isa::amx : v4 ? Isa::v4 : v3 ? Isa::v3 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa chosen() {
  const Isa best = detected();
  const char* wish = std::getenv("FUSED_MARGINS_ISA");
  if (!wish || !*wish) return best;
  const std::string name = wish;
  if (name != "baseline" && name != "v3" && name != "v4" && name != "amx")
    throw std::invalid_argument("FUSED_MARGINS_ISA: expected baseline, v3, v4 or amx, got " + name);
  const Isa asked = name == "amx" ? Isa::amx : name == "v4" ? Isa::v4 : name == "v3" ? Isa::v3 : Isa::baseline;
  if (asked > best) throw std::invalid_argument("FUSED_MARGINS_ISA: this processor does not have " + name);
  return asked;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

namespace {

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
// A fork copies one thread: the runtime's others, which the child would wait for, stay with the parent.
bool forked = false;
const int fork_is_watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#else
constexpr bool forked = false;
#endif

}  // namespace

int max_threads() {
#ifdef _OPENMP
  return forked ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

const char* isa_name() {
  switch (isa()) {
    case Isa::amx:
      return "x86-64-v4 with AMX";
    case Isa::v4:
      return "x86-64-v4";
    case Isa::v3:
      return "x86-64-v3";
    default:
      return "baseline";
  }
}

}  // namespace fused_margins
