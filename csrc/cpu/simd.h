// Vectors of the instruction set being compiled, an exponential that vectorises, and loads and stores that convert.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#include "../matrix.h"

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
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T type __attribute__((vector_size(FM_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  typedef Int int_type __attribute__((vector_size(FM_VECTOR_BYTES), aligned(alignof(Int)), may_alias));
  static constexpr int64_t lanes = FM_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vector = typename VectorOf<T>::type;

// Less than every similarity: of what there is none.
template <class T>
constexpr T none = -std::numeric_limits<T>::infinity();

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}
template <class T>
inline void save(T* p, Vector<T> v) {
  *reinterpret_cast<Vector<T>*>(p) = v;
}

template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// What e^x is made of: x = n ln 2 + r with |r| <= ln 2 / 2, a Taylor polynomial in r, and 2^n as 2 * 2^(n-1), which
// reaches the largest results. Below `least`, about twice the smallest normal number, the result is 0 (subnormal
// numbers are slow and no weight needs them), above `most` infinity.
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float least = -86.6f, most = 88.7228317f;
  static constexpr float magic = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723e-6f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float inverse_factorial[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24,
                                                1.0f / 6,    0.5f,       1.0f,       1.0f};
};
template <>
struct Exponential<double> {
  static constexpr double least = -707.6, most = 709.782712893383973;
  static constexpr double magic = 6755399441055744;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double inverse_factorial[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
};

// e^x of a vector, to about one unit in the last place; NaN for NaN.
template <class T>
inline Vector<T> exponentials(Vector<T> x) {
  using V = Vector<T>;
  using I = typename VectorOf<T>::int_type;
  using E = Exponential<T>;
  const V least = V{} + E::least, most = V{} + E::most, magic = V{} + E::magic;
  const V within = x < least ? least : x > most ? most : x;
  const V shifted = within * T(1.44269504088896340736) + magic;
  const V n = shifted - magic;
  const V r = (within - n * E::ln2_high) - n * E::ln2_low;
  V p = V{} + E::inverse_factorial[0];
  for (size_t k = 1; k < std::size(E::inverse_factorial); ++k) p = p * r + E::inverse_factorial[k];
  const I e = (I)shifted - (I)magic;
  const V result = (p + p) * (V)((e + (E::bias - 1)) << E::mantissa);
  return x < least ? V{} : x > most ? V{} + std::numeric_limits<T>::infinity() : result;
}

// e^x of one value; no branch, so loops vectorise.
template <class T>
inline T exponential(T x) {
  using I = typename VectorOf<T>::Int;
  using E = Exponential<T>;
  const T within = x < E::least ? E::least : x > E::most ? E::most : x;
  const T shifted = within * T(1.44269504088896340736) + E::magic;
  const T n = shifted - E::magic;
  const T r = (within - n * E::ln2_high) - n * E::ln2_low;
  T p = E::inverse_factorial[0];
  for (size_t k = 1; k < std::size(E::inverse_factorial); ++k) p = p * r + E::inverse_factorial[k];
  const I e = bits<I>(shifted) - bits<I>(E::magic);
  const T result = (p + p) * bits<T>(std::make_unsigned_t<I>(e + (E::bias - 1)) << E::mantissa);  // e of NaN: anything
  return x < E::least ? T(0) : x > E::most ? std::numeric_limits<T>::infinity() : result;
}

// What log x is made of: x = 2^e m with m in [sqrt 1/2, sqrt 2), and log m = 2 artanh r, r = (m - 1) / (m + 1), a
// series in r^2 < 0.0295. `root` has the bits of sqrt 1/2.
template <class T>
struct Logarithm;
template <>
struct Logarithm<float> {
  static constexpr int32_t root = 0x3f3504f3;
  static constexpr int terms = 5;
};
template <>
struct Logarithm<double> {
  static constexpr int64_t root = 0x3fe6a09e667f3bcd;
  static constexpr int terms = 11;
};

// log x of a positive normal number, to a few units in the last place of the larger of it and 1; no branch.
template <class T>
inline T logarithm(T x) {
  using I = typename VectorOf<T>::Int;
  using L = Logarithm<T>;
  using E = Exponential<T>;
  const I above = bits<I>(x) - L::root;
  const I fraction = (above & ((I(1) << E::mantissa) - 1)) + L::root;
  const T m = bits<T>(fraction), r = (m - 1) / (m + 1), square = r * r;
  T series = 0;
#pragma GCC unroll 16
  for (int n = L::terms; n > 0; --n) series = series * square + T(1) / T(2 * n - 1);
  return T(above >> E::mantissa) * T(0.69314718055994530942) + 2 * r * series;
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

// Sum of term(d) over d < count, of term's vectors where whole ones fit; four at a time hide the latency of additions.
template <class T, class OfVector, class OfValue>
inline T sum_terms(int64_t count, OfVector of_vector, OfValue of_value) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  Vector<T> sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * lanes <= count; d += 4 * lanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] += of_vector(d + v * lanes);
  for (; d + lanes <= count; d += lanes) sums[0] += of_vector(d);
  T lane[lanes], sum = 0;
  save(lane, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  for (; d < count; ++d) sum += of_value(d);
  return lane[0] + sum;
}

template <class T>
inline T dot(const T* a, const T* b, int64_t count) {
  return sum_terms<T>(
      count, [=](int64_t d) { return load(a + d) * load(b + d); }, [=](int64_t d) { return a[d] * b[d]; });
}

// |a|^2: in single precision where its sum can neither overflow nor lose small terms to underflow, else in double.
template <class T>
inline double sum_of_squares(const T* a, int64_t count) {
  const double sum = double(dot(a, a, count));
  if (sizeof(T) == 8 || (sum > 1e-24 && sum < 1e37)) return sum;
  double exact = 0;
#pragma omp simd reduction(+ : exact)
  for (int64_t d = 0; d < count; ++d) exact += double(a[d]) * double(a[d]);
  return exact;
}

template <class T>
inline T squared_distance(const T* a, const T* b, int64_t count) {
  return sum_terms<T>(
      count,
      [=](int64_t d) {
        const Vector<T> difference = load(a + d) - load(b + d);
        return difference * difference;
      },
      [=](int64_t d) { return (a[d] - b[d]) * (a[d] - b[d]); });
}

template <class T>
inline void add_scaled(T* out, T factor, const T* values, int64_t count) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) out[d] += factor * values[d];
}

// out = factor * values; the two may be the same.
template <class T>
inline void scale(T* out, T factor, const T* values, int64_t count) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) out[d] = factor * values[d];
}

// out = a * b, value by value; out may be either.
template <class T>
inline void multiply(T* out, const T* a, const T* b, int64_t count) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) out[d] = a[d] * b[d];
}

// out = factor * (sum + weight * values); out may be sum.
template <class T>
inline void combine(T* out, T factor, const T* sum, T weight, const T* values, int64_t count) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) out[d] = factor * (sum[d] + weight * values[d]);
}

}  // namespace FM_ISA
}  // namespace fused_margins
