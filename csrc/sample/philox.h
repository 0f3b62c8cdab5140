// Random numbers of counters: Philox 2x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
#pragma once

#include "../cpu/isa.h"
#include "../cpu/simd.h"

#ifdef FM_X86
#include <immintrin.h>
#endif

namespace fused_margins {
namespace FM_ISA {

typedef uint64_t Counters __attribute__((vector_size(FM_VECTOR_BYTES), aligned(4), may_alias));
constexpr int64_t WORDS = FM_VECTOR_BYTES / 4;  // made at a time

// The low halves of the lanes times Philox's multiplier.
inline Counters philox_products(Counters a) {
  constexpr int64_t multiplier = 0xD256D193;
#if defined(__AVX512F__)
  // All lanes: of the product without a mask gcc 12 warns that it reads what nobody has set.
  return (Counters)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(multiplier));
#elif defined(__AVX2__)
  return (Counters)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(multiplier));
#elif defined(__SSE2__)
  return (Counters)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(multiplier));
#else
  return (a & 0xffffffffu) * uint64_t(multiplier);
#endif
}

// out (WORDS,): the first words of the counters (row, column), (row, column + 1), ... A lane's upper half holds
// whatever the rounds leave there: no product reads it.
inline void philox(uint32_t row, uint32_t column, uint32_t key, uint32_t* out) {
  Counters even = {};
  for (int64_t l = 0; l < WORDS / 2; ++l) even[l] = uint64_t(2 * l);
  Counters a[2] = {even * 0 + row, even * 0 + row}, b[2] = {even + column, even + column + 1};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (int odd = 0; odd < 2; ++odd) {
      const Counters product = philox_products(a[odd]);
      a[odd] = (product >> 32) ^ b[odd] ^ uint64_t(key);
      b[odd] = product;
    }
    key += 0x9E3779B9u;
  }
  *reinterpret_cast<Counters*>(out) = (a[0] & 0xffffffffu) | (a[1] << 32);
}

}  // namespace FM_ISA
}  // namespace fused_margins
