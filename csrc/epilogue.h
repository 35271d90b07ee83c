// Stores results: as codes or as floats, a block of four vectors, one vector, or part of one at a time.
#pragma once

#include "vector.h"

namespace stepquant {
namespace {

// Integers of scaled numbers; what is not a number becomes the lowest.
STEPQUANT_INLINE Ints encode(Floats scaled, const Code& code) {
  return nearest(smaller(larger(scaled, splat(code.lowest)), splat(code.highest))) + code.zero_point;
}

// Four vectors at once: the conversion saturates to shorts and then to bytes, so that fewer clamps are needed.
STEPQUANT_INLINE void emit_block(uint8_t* to, const Floats (&scaled)[4], const Code& code) {
#if defined(__SSE2__)
  Ints q[4];
  for (int64_t v = 0; v < 4; ++v) q[v] = nearest(smaller(splat(code.highest), scaled[v]));
  const auto zero_point = static_cast<int16_t>(code.zero_point);
  const auto low = static_cast<char>(code.lowest + static_cast<float>(code.zero_point));
#if defined(__AVX512BW__)
  const __m512i zero = _mm512_set1_epi16(zero_point);
  const __m512i left = _mm512_adds_epi16(_mm512_packs_epi32((__m512i)q[0], (__m512i)q[1]), zero);
  const __m512i right = _mm512_adds_epi16(_mm512_packs_epi32((__m512i)q[2], (__m512i)q[3]), zero);
  const __m512i bytes = _mm512_max_epu8(_mm512_packus_epi16(left, right), _mm512_set1_epi8(low));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
#elif defined(__AVX2__)
  const __m256i zero = _mm256_set1_epi16(zero_point);
  const __m256i left = _mm256_adds_epi16(_mm256_packs_epi32((__m256i)q[0], (__m256i)q[1]), zero);
  const __m256i right = _mm256_adds_epi16(_mm256_packs_epi32((__m256i)q[2], (__m256i)q[3]), zero);
  const __m256i bytes = _mm256_max_epu8(_mm256_packus_epi16(left, right), _mm256_set1_epi8(low));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(bytes, order));
#else
  const __m128i zero = _mm_set1_epi16(zero_point);
  const __m128i left = _mm_adds_epi16(_mm_packs_epi32((__m128i)q[0], (__m128i)q[1]), zero);
  const __m128i right = _mm_adds_epi16(_mm_packs_epi32((__m128i)q[2], (__m128i)q[3]), zero);
  _mm_storeu_si128((__m128i*)to, _mm_max_epu8(_mm_packus_epi16(left, right), _mm_set1_epi8(low)));
#endif
#else
  for (int64_t v = 0; v < 4; ++v) store(to + v * lanes, encode(scaled[v], code));
#endif
}

template <class T>
STEPQUANT_INLINE void emit_block(T* to, const Floats (&x)[4], const Code&) {
  for (int64_t v = 0; v < 4; ++v) store(to + v * lanes, x[v]);
}

// Up to one vector, in the type of the output; bytes come from numbers already scaled.
template <class T>
STEPQUANT_INLINE void emit_first(T* to, Floats x, const Code& code, int64_t count) {
  if constexpr (sizeof(T) == 1) {
    store_first(to, encode(x, code), count);
  } else {
    store_first(to, x, count);
  }
}

template <class T>
STEPQUANT_INLINE void emit(T* to, Floats x, const Code& code) {
  if constexpr (sizeof(T) == 1) {
    store(to, encode(x, code));
  } else {
    store(to, x);
  }
}

}  // namespace
}  // namespace stepquant
