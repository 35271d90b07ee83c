// Vectors of floats in the compiler's own vector types, so that one source serves every instruction set; intrinsics
// stand only where the compiler's lowering is poor. Everything has internal linkage: no symbol compiled with wide
// instructions may be picked by the linker for code that runs everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace stepquant {
namespace {

#if defined(__AVX512F__)
constexpr int64_t lanes = 16;
#elif defined(__AVX2__)
constexpr int64_t lanes = 8;
#else
constexpr int64_t lanes = 4;
#endif

#define STEPQUANT_VECTOR(type, width) __attribute__((vector_size(sizeof(type) * (width)))) type
typedef STEPQUANT_VECTOR(float, lanes) Floats;
typedef STEPQUANT_VECTOR(int32_t, lanes) Ints;
typedef STEPQUANT_VECTOR(uint32_t, lanes) Words;
typedef STEPQUANT_VECTOR(uint16_t, lanes) Halves;

#define STEPQUANT_INLINE inline __attribute__((always_inline))

STEPQUANT_INLINE Floats splat(float x) {
  return x - Floats{};
}

STEPQUANT_INLINE Ints bits_of(Floats x) {
  return (Ints)x;
}

STEPQUANT_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// The larger; b where a is not a number.
STEPQUANT_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

STEPQUANT_INLINE Ints larger(Ints a, Ints b) {
#if defined(__AVX512F__)
  return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

// Nearest integers, halves to even; on x86 what no integer can hold becomes the lowest, elsewhere it must not occur.
STEPQUANT_INLINE Ints nearest(Floats x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (Ints)_mm_cvtps_epi32((__m128)x);
#else
  const Floats shift = splat(12582912.0f);
  return bits_of(x + shift) - bits_of(shift);
#endif
}

// The sum of the lanes, pairwise.
STEPQUANT_INLINE float total(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
#endif
}

STEPQUANT_INLINE Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

STEPQUANT_INLINE Floats load(const bf16* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  Halves h;
  std::memcpy(&h, from, sizeof(h));
  return (Floats)(__builtin_convertvector(h, Words) << 16);
#endif
}

STEPQUANT_INLINE void store(float* to, Floats x) {
  std::memcpy(to, &x, sizeof(x));
}

STEPQUANT_INLINE void store(int32_t* to, Ints x) {
  std::memcpy(to, &x, sizeof(x));
}

STEPQUANT_INLINE void store(bf16* to, Floats x) {
#if defined(__AVX512BF16__)
  constexpr int subnormal = 0x20;  // which the instruction takes for zero
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, subnormal) == 0, 1)) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    return;
  }
#endif
  const Words w = (Words)x;
  const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  const Words quiet = (w >> 16) | 0x40;  // what is not a number stays so
  const Ints kept = x == x ? (Ints)rounded : (Ints)quiet;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i high = _mm256_extracti128_si256((__m256i)kept, 1);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)kept), high));
#else
  const Halves h = __builtin_convertvector((Words)kept, Halves);
  std::memcpy(to, &h, sizeof(h));
#endif
}

// Shorts of numbers that they hold.
STEPQUANT_INLINE void store(int16_t* to, Ints x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i high = _mm256_extracti128_si256((__m256i)x, 1);
  _mm_storeu_si128((__m128i*)to, _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), high));
#else
  for (int64_t i = 0; i < lanes; ++i) to[i] = static_cast<int16_t>(x[i]);
#endif
}

// Bytes of numbers that lie within 0 to 255; AVX-512 keeps the low byte of others too.
STEPQUANT_INLINE void store(uint8_t* to, Ints x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(halves, halves));
#elif defined(__SSE2__)
  const __m128i halves = _mm_packs_epi32((__m128i)x, (__m128i)x);
  const int32_t word = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
  std::memcpy(to, &word, sizeof(word));
#else
  for (int64_t i = 0; i < lanes; ++i) to[i] = static_cast<uint8_t>(x[i]);
#endif
}

template <class T>
STEPQUANT_INLINE Floats load_first(const T* from, int64_t count) {
#if defined(__AVX512BW__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    return (Floats)_mm512_maskz_loadu_ps(mask, from);
  } else {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
  }
#else
  T part[lanes] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(T));
  return load(part);
#endif
}

template <class T, class Vector>
STEPQUANT_INLINE void store_first(T* to, Vector x, int64_t count) {
#if defined(__AVX512BW__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 1) {
    _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8((__m512i)x));
    return;
  }
#endif
  T part[lanes];
  store(part, x);
  std::memcpy(to, part, static_cast<size_t>(count) * sizeof(T));
}

// The greatest magnitude: bits of magnitudes are ordered as these are, and what is not a number lies above infinity.
template <class T>
STEPQUANT_INLINE float greatest(const T* x, int64_t width) {
  Ints most = {};
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) most = larger(most, bits_of(load(x + i)) & 0x7fffffff);
  if (i < width) most = larger(most, bits_of(load_first(x + i, width - i)) & 0x7fffffff);
  int32_t bits = 0;
  for (int64_t k = 0; k < lanes; ++k) bits = bits < most[k] ? most[k] : bits;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof magnitude);
  return magnitude;
}

// 2^x to 8e-8 relative for x from -126 to 127.
STEPQUANT_INLINE Floats exp2_inside(Floats x) {
#if defined(__AVX512F__)
  const Floats integer = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Floats shift = splat(12582912.0f);
  const Floats shifted = x + shift;
  const Floats integer = shifted - shift;
#endif
  const Floats f = x - integer;
  Floats p = f * 1.3276472454890609e-3f + 9.675541892647743e-3f;
  p = p * f + 5.550713092088699e-2f;
  p = p * f + 2.4022120237350464e-1f;
  p = p * f + 6.931469440460205e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)integer);
#else
  return (Floats)(bits_of(p) + ((bits_of(shifted) - bits_of(shift)) << 23));
#endif
}

// The same; x below -126 counts as -126, x above 127 as 127.
STEPQUANT_INLINE Floats exp2(Floats x) {
#if defined(__AVX512F__)
  return exp2_inside(x);
#else
  return exp2_inside(smaller(larger(x, splat(-126.0f)), splat(127.0f)));
#endif
}

// 2^x for x of at most 0, to 3e-6 relative; x below -100 may count as -100.
STEPQUANT_INLINE Floats exp2_coarse(Floats x) {
#if defined(__AVX512DQ__)
  // The scaling takes the floor of x by itself.
  const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats p = f * 0.013534167781472206f + 0.05201146379113197f;
  p = p * f + 0.2414427548646927f;
  p = p * f + 0.6930038332939148f;
  p = p * f + 1.0000026226043701f;
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const Floats shift = splat(12582912.0f), kept = larger(x, splat(-100.0f)), shifted = kept + shift;
  const Floats f = kept - (shifted - shift);
  Floats p = f * 0.009570102207362652f + 0.05591785907745361f;
  p = p * f + 0.240247443318367f;
  p = p * f + 0.6931217908859253f;
  p = p * f + 0.9999992847442627f;
  // The shift's own bits leave at the top.
  return (Floats)((Words)p + ((Words)shifted << 23));
#endif
}

}  // namespace
}  // namespace stepquant
