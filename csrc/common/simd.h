// Vectors of the instruction set being compiled, an exponential that vectorises, and loads and stores that convert.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "matrix.h"

#ifndef FM_ISA
#error "compile with -DFM_ISA=<namespace of the instruction set>"
#endif

#if defined(__AVX512F__)
#define FM_VECTOR_BYTES 64
#define FM_TILE_ROWS 12  // 12 x 2 accumulators, 2 columns, 1 row: 27 of 32 registers
#elif defined(__AVX__)
#define FM_VECTOR_BYTES 32
#define FM_TILE_ROWS 6  // 15 of 16 registers
#elif defined(__aarch64__)
#define FM_VECTOR_BYTES 16
#define FM_TILE_ROWS 12
#else
#define FM_VECTOR_BYTES 16
#define FM_TILE_ROWS 6
#endif

namespace fused_margins {
namespace FM_ISA {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FM_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t lanes = FM_VECTOR_BYTES / sizeof(T);
};

template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// e^x to about one unit in the last place; 0 far below, infinity far above, NaN for NaN; no branch, so loops vectorise.
// x = n ln 2 + r with |r| <= ln 2 / 2; Taylor polynomial in r; 2^n in two factors, so that subnormal results come out
// right.
inline float exponential(float x) {
  x = x < -106.0f ? -106.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t e = bits<int32_t>(shifted) - bits<int32_t>(magic);
  const int32_t half = e >> 1;
  return p * bits<float>((half + 127) << 23) * bits<float>((e - half + 127) << 23);
}

inline double exponential(double x) {
  x = x < -750.0 ? -750.0 : x;
  x = x > 710.0 ? 710.0 : x;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.44269504088896340736 + magic;
  const double n = shifted - magic;
  const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const int64_t e = bits<int64_t>(shifted) - bits<int64_t>(magic);
  const int64_t half = e >> 1;
  return p * bits<double>((half + 1023) << 52) * bits<double>((e - half + 1023) << 52);
}

inline float from_bfloat16(uint16_t value) {
  return bits<float>(uint32_t(value) << 16);
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t u = bits<uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t value) {
  // Moving the exponent field up by a multiplication also makes subnormals come out right.
  float magnitude = bits<float>(uint32_t(value & 0x7fffu) << 13) * 0x1p112f;
  if ((value & 0x7c00u) == 0x7c00u) magnitude = bits<float>(0x7f800000u | uint32_t(value & 0x3ffu) << 13);
  return value & 0x8000u ? -magnitude : magnitude;
}

inline uint16_t to_float16(float value) {
  const uint32_t u = bits<uint32_t>(value), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u)                                    // below 2^-14: the sum rounds at 2^-24
    return uint16_t(sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

template <class T, class Stored, class Convert>
inline void load_as(const Matrix& m, int64_t row, T* out, Convert convert) {
  const Stored* p = static_cast<const Stored*>(m.data) + row * m.row_stride;
  if (m.column_stride == 1)
    for (int64_t d = 0; d < m.width; ++d) out[d] = T(convert(p[d]));
  else
    for (int64_t d = 0; d < m.width; ++d) out[d] = T(convert(p[d * m.column_stride]));
}

// Row `row` of m, converted to T: out (width,).
template <class T>
inline void load_row(const Matrix& m, int64_t row, T* out) {
  switch (m.dtype) {
    case DType::float64:
      return load_as<T, double>(m, row, out, [](double v) { return v; });
    case DType::float32:
      return load_as<T, float>(m, row, out, [](float v) { return v; });
    case DType::bfloat16:
      return load_as<T, uint16_t>(m, row, out, from_bfloat16);
    case DType::float16:
      return load_as<T, uint16_t>(m, row, out, from_float16);
  }
}

// Writes `count` values into a contiguous buffer of dtype, from element `first` on.
template <class T>
inline void store(void* data, DType dtype, int64_t first, const T* values, int64_t count) {
  switch (dtype) {
    case DType::float64:
      for (int64_t d = 0; d < count; ++d) static_cast<double*>(data)[first + d] = double(values[d]);
      return;
    case DType::float32:
      for (int64_t d = 0; d < count; ++d) static_cast<float*>(data)[first + d] = float(values[d]);
      return;
    case DType::bfloat16:
      for (int64_t d = 0; d < count; ++d) static_cast<uint16_t*>(data)[first + d] = to_bfloat16(float(values[d]));
      return;
    case DType::float16:
      for (int64_t d = 0; d < count; ++d) static_cast<uint16_t*>(data)[first + d] = to_float16(float(values[d]));
      return;
  }
}

template <class T>
inline T dot(const T* a, const T* b, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < count; ++d) sum += a[d] * b[d];
  return sum;
}

template <class T>
inline T squared_distance(const T* a, const T* b, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < count; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

template <class T>
inline void add_scaled(T* out, T factor, const T* values, int64_t count) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) out[d] += factor * values[d];
}

}  // namespace FM_ISA
}  // namespace fused_margins
