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

bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && has_small_extensions();
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_v4_bf16() {
#ifdef FM_HAS_BF16
  unsigned a, b, c, d;
  return has_v4() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
#else
  return false;
#endif
}

// The system hands out the registers of the matrix unit on request.
bool has_amx() {
#if defined(FM_HAS_BF16) && defined(__linux__)
  unsigned a, b, c, d;
  if (!has_v4_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24)))
    return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// Instructions that multiply pairs of bfloat16 start as often as those of float32 on AMD's processors (Zen 4), a
// quarter as often on Intel's (Sapphire Rapids).
bool gains_by_bf16() {
  return __builtin_cpu_is("amd");
}
#endif

struct Level {
  Isa isa;
  const char *name, *description;
};
constexpr Level levels[] = {{Isa::baseline, "baseline", "baseline"},
                            {Isa::v3, "v3", "x86-64-v3"},
                            {Isa::v4, "v4", "x86-64-v4"},
                            {Isa::v4_bf16, "v4-bf16", "x86-64-v4 with AVX512_BF16"},
                            {Isa::amx, "amx", "x86-64-v4 with AMX"}};

bool has(Isa level) {
#ifdef FM_X86
  __builtin_cpu_init();
  switch (level) {
    case Isa::amx:
      return has_amx();
    case Isa::v4_bf16:
      return has_v4_bf16();
    case Isa::v4:
      return has_v4();
    case Isa::v3:
      return has_v3();
    default:
      return true;
  }
#else
  return level == Isa::baseline;
#endif
}

Isa best() {
#ifdef FM_X86
  if (has(Isa::amx)) return Isa::amx;
  if (has(Isa::v4_bf16) && gains_by_bf16()) return Isa::v4_bf16;
  return has(Isa::v4) ? Isa::v4 : has(Isa::v3) ? Isa::v3 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa chosen() {
  const char* wish = std::getenv("FUSED_MARGINS_ISA");
  if (!wish || !*wish) return best();
  const std::string name = wish;
  for (const Level& level : levels) {
    if (name != level.name) continue;
#ifndef FM_HAS_BF16
    if (level.isa > Isa::v4) throw std::invalid_argument("FUSED_MARGINS_ISA: this build does not have " + name);
#endif
    if (!has(level.isa)) throw std::invalid_argument("FUSED_MARGINS_ISA: this processor does not have " + name);
    return level.isa;
  }
  throw std::invalid_argument("FUSED_MARGINS_ISA: expected baseline, v3, v4, v4-bf16 or amx, got " + name);
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
  return levels[int(isa())].description;
}

}  // namespace fused_margins
