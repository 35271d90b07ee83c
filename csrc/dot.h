// Integer products: rows of words by columns of words, summed in 32 bits.
//
// Those of attention: `scores` multiplies rows of the query by tiles of 64 packed keys and remembers each row's largest; `products`
// multiplies rows of probabilities by packed values. Rows come in multiples of `rows`, a block of queries has `block`.
#pragma once

#include "epilogue.h"

namespace stepquant {
namespace {

STEPQUANT_INLINE Ints load_words(const void* from) {
  Ints x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

STEPQUANT_INLINE Ints repeat_word(const void* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word - Ints{};
}

STEPQUANT_INLINE int32_t largest_of(Ints x) {
  int32_t largest = x[0];
  for (int64_t i = 1; i < lanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

#if defined(__AVX512VNNI__)
// Words of four bytes.
struct Bytes {
  using Element = uint8_t;
  static constexpr int64_t per_word = 4;
  static constexpr int32_t ones = 0x01010101;

  static STEPQUANT_INLINE Ints place(Ints code, int64_t k) { return (Ints)(((Words)code & 0xff) << (uint32_t)(8 * k)); }
  static STEPQUANT_INLINE Ints store_probabilities(uint8_t* to, const Floats (&p)[4], const Code& code) {
    emit_block(to, p, code);
    const __m512i ones = _mm512_set1_epi8(1);
    return (Ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(to), ones);
  }
  static STEPQUANT_INLINE Ints key_dot(Ints sum, Ints query, Ints keys) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)keys, (__m512i)query);
  }
  static STEPQUANT_INLINE Ints value_dot(Ints sum, Ints probabilities, Ints values) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)probabilities, (__m512i)values);
  }
  // A vector of words from signed bytes.
  static STEPQUANT_INLINE Ints weights(const int8_t* from) { return load_words(from); }
};

#endif

// Words of two shorts: every x86, and plain vectors elsewhere.
struct Shorts {
  using Element = int16_t;
  static constexpr int64_t per_word = 2;
  static constexpr int32_t ones = 0x00010001;

  static STEPQUANT_INLINE Ints place(Ints code, int64_t k) {
    return (Ints)(((Words)code & 0xffff) << (uint32_t)(16 * k));
  }
  // Writes the codes of four vectors of probabilities; returns lanes that add up to their sum.
  static STEPQUANT_INLINE Ints store_probabilities(int16_t* to, const Floats (&p)[4], const Code& code) {
    Ints sum{};
    for (int64_t v = 0; v < 4; ++v) {
      const Ints q = nearest(smaller(p[v], splat(code.highest)));
      store(to + v * lanes, q);
      sum += q;
    }
    return sum;
  }
  static STEPQUANT_INLINE Ints key_dot(Ints sum, Ints query, Ints keys) { return value_dot(sum, query, keys); }
  // Sums wrap around.
  static STEPQUANT_INLINE Ints value_dot(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + (Ints)((Words)a << 16) / 65536 * ((Ints)((Words)b << 16) / 65536) + (a >> 16) * (b >> 16);
#endif
  }
  static STEPQUANT_INLINE Ints weights(const int16_t* from) { return load_words(from); }
  static STEPQUANT_INLINE Ints weights(const int8_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Ints)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX512BW__)
    return (Ints)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#else
    STEPQUANT_VECTOR(int8_t, 2 * lanes) bytes;
    typedef STEPQUANT_VECTOR(int16_t, 2 * lanes) Wide;
    std::memcpy(&bytes, from, sizeof(bytes));
    return (Ints) __builtin_convertvector(bytes, Wide);
#endif
  }
};

template <class Word>
struct VectorDot : Word {
  // Rows and vectors whose sums fill 32 registers, or 16.
  static constexpr int64_t rows = lanes == 16 ? 4 : 6;
  static constexpr int64_t columns = lanes == 16 ? 4 : 2;
  static constexpr int64_t block = lanes == 16 ? 16 : 18;

  // What must be switched on around the products; nothing here.
  struct Setup {
    explicit Setup(int64_t) {}
  };

  static void scores(
      const int32_t* query, int64_t words, const int32_t* keys, const int32_t* correction, int64_t key_count,
      int64_t row_count, int32_t* scores, int32_t* largest) {
    for (int64_t row = 0; row < row_count; row += rows) {
      Ints high[rows];
      for (int64_t r = 0; r < rows; ++r) high[r] = Ints{} - (1 << 30);
      for (int64_t key = 0; key < key_count; key += columns * lanes) {
        const int32_t* tile = keys + key / 64 * 64 * words + key % 64;
        Ints sum[rows][columns];
#pragma GCC unroll 6
        for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (int64_t c = 0; c < columns; ++c) sum[r][c] = load_words(correction + key + c * lanes);
        }
        for (int64_t w = 0; w < words; ++w) {
          Ints k[columns];
#pragma GCC unroll 4
          for (int64_t c = 0; c < columns; ++c) k[c] = load_words(tile + w * 64 + c * lanes);
#pragma GCC unroll 6
          for (int64_t r = 0; r < rows; ++r) {
            const Ints q = repeat_word(query + (row + r) * words + w);
#pragma GCC unroll 4
            for (int64_t c = 0; c < columns; ++c) sum[r][c] = Word::key_dot(sum[r][c], q, k[c]);
          }
        }
#pragma GCC unroll 6
        for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (int64_t c = 0; c < columns; ++c) {
            store(scores + (row + r) * key_count + key + c * lanes, sum[r][c]);
            high[r] = larger(high[r], sum[r][c]);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) largest[row + r] = largest_of(high[r]);
    }
  }

  static void products(
      const typename Word::Element* probabilities, int64_t key_count, const int32_t* values, int64_t width,
      int64_t row_count, int32_t* products) {
    for (int64_t row = 0; row < row_count; row += rows) {
      int64_t c = 0;
      for (; c + columns * lanes <= width; c += columns * lanes) {
        multiply<columns>(probabilities, key_count, values, width, row, c, products);
      }
      if constexpr (columns > 2) {
        if (width - c == 3 * lanes) multiply<3>(probabilities, key_count, values, width, row, c, products);
        if (width - c == 2 * lanes) multiply<2>(probabilities, key_count, values, width, row, c, products);
      }
      if (width - c == 1 * lanes) multiply<1>(probabilities, key_count, values, width, row, c, products);
    }
  }

  template <int64_t vectors>
  static void multiply(
      const typename Word::Element* probabilities, int64_t key_count, const int32_t* values, int64_t width, int64_t row,
      int64_t column, int32_t* products) {
    constexpr int64_t step = Word::per_word;
    Ints sum[rows][vectors] = {};
    const int32_t* line = values + column;
    for (int64_t key = 0; key < key_count; key += step, line += width) {
      Ints x[vectors];
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) x[v] = load_words(line + v * lanes);
#pragma GCC unroll 6
      for (int64_t r = 0; r < rows; ++r) {
        const Ints p = repeat_word(probabilities + (row + r) * key_count + key);
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) sum[r][v] = Word::value_dot(sum[r][v], p, x[v]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < vectors; ++v) store(products + (row + r) * width + column + v * lanes, sum[r][v]);
    }
  }
};

}  // namespace
}  // namespace stepquant
