// Instruction sets. Every op's cpu.cpp is compiled once per instruction set, into the namespace FM_ISA that setup.py
// names; the best one that the processor has (or FUSED_MARGINS_ISA asks for) is chosen at run time.
#pragma once

#if defined(__x86_64__)
#define FM_X86 1
#endif

namespace fused_margins {

// v4_bf16: v4 and products of bfloat16 pairs; amx: that and the matrix unit.
enum class Isa { baseline, v3, v4, v4_bf16, amx };

Isa isa();               // chosen once, at first use
int max_threads();       // that a kernel may use when called from the present thread; 1 in a forked child
const char* isa_name();  // "baseline", "x86-64-v3", "x86-64-v4", "x86-64-v4 with AVX512_BF16", "x86-64-v4 with AMX"

}  // namespace fused_margins

#define FM_DECLARE(isa, name, Args) \
  namespace isa {                   \
  void name(const Args&);           \
  }

// Declares `name` in every instruction set's namespace, and a dispatcher of that name outside them.
#ifdef FM_X86
#define FM_DECLARE_ALL(name, Args) \
  FM_DECLARE(baseline, name, Args) \
  FM_DECLARE(v3, name, Args)       \
  FM_DECLARE(v4, name, Args)
#define FM_DISPATCH(name, args)    \
  switch (isa()) {                 \
    case Isa::amx:                 \
    case Isa::v4_bf16:             \
    case Isa::v4:                  \
      return v4::name(args);       \
    case Isa::v3:                  \
      return v3::name(args);       \
    default:                       \
      return baseline::name(args); \
  }
#else
#define FM_DECLARE_ALL(name, Args) FM_DECLARE(baseline, name, Args)
#define FM_DISPATCH(name, args) return baseline::name(args);
#endif
#define FM_KERNEL(name, Args)          \
  FM_DECLARE_ALL(name, Args)           \
  inline void name(const Args& args) { \
    FM_DISPATCH(name, args)            \
  }

// The same for a kernel that the levels of bfloat16 have as well, for arguments that suit them.
#ifdef FM_HAS_BF16
#define FM_BF16_KERNEL(name, Args, suits)                                 \
  FM_DECLARE_ALL(name, Args)                                              \
  FM_DECLARE(v4_bf16, name, Args)                                         \
  FM_DECLARE(amx, name, Args)                                             \
  inline void name(const Args& args) {                                    \
    if (isa() == Isa::amx && suits(args)) return amx::name(args);         \
    if (isa() == Isa::v4_bf16 && suits(args)) return v4_bf16::name(args); \
    FM_DISPATCH(name, args)                                               \
  }
#else
#define FM_BF16_KERNEL(name, Args, suits) FM_KERNEL(name, Args)
#endif
