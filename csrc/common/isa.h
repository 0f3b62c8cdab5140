// Instruction sets. Every op's cpu.cpp is compiled once per instruction set, into the namespace FM_ISA that setup.py
// names; the best one that the processor has (or FUSED_MARGINS_ISA asks for) is chosen at run time.
#pragma once

#if defined(__x86_64__)
#define FM_X86 1
#endif

namespace fused_margins {

enum class Isa { baseline, v3, v4 };

Isa isa();               // chosen once, at first use
int max_threads();       // that a kernel may use when called from the present thread
const char* isa_name();  // "baseline", "x86-64-v3", "x86-64-v4"

}  // namespace fused_margins

// Declares `name` in every instruction set's namespace, and a dispatcher of that name outside them.
#ifdef FM_X86
#define FM_KERNEL(name, Args)          \
  namespace baseline {                 \
  void name(const Args&);              \
  }                                    \
  namespace v3 {                       \
  void name(const Args&);              \
  }                                    \
  namespace v4 {                       \
  void name(const Args&);              \
  }                                    \
  inline void name(const Args& args) { \
    switch (isa()) {                   \
      case Isa::v4:                    \
        return v4::name(args);         \
      case Isa::v3:                    \
        return v3::name(args);         \
      default:                         \
        return baseline::name(args);   \
    }                                  \
  }
#else
#define FM_KERNEL(name, Args)          \
  namespace baseline {                 \
  void name(const Args&);              \
  }                                    \
  inline void name(const Args& args) { \
    baseline::name(args);              \
  }
#endif
