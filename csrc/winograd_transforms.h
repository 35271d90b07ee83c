// The transforms of Winograd's F(4, 3) in both directions: of codes, of weights, and back to 4 x 4 outputs.
//
// Everything is a whole number. A transformed code, counted from 128, lies within 100 * 128 and a transformed weight, taken
// 24 times as large in each direction or by a divisor of it, within 49 * 128: shorts hold both. Sums may wrap around, because
// what comes out at last is known to be 9 * 2^shift times the result, which fits: modulo 2^32, nine has an inverse, and at most
// six bits are shifted out. So as many channels as `patches_most_channels` are summed at once, and the result is exact.
#pragma once

#include "convolve.h"

namespace stepquant {
namespace {

constexpr int64_t positions = 36;  // of a transformed patch
constexpr int64_t side = 4;  // of a patch of outputs; its inputs have two more
constexpr int64_t depth_step = 16;  // channels whose transform is made at once
constexpr int64_t cache_line = 64;
typedef STEPQUANT_VECTOR(int16_t, 2 * lanes) Pairs;  // of the channels of one word, for a vector of outputs
typedef STEPQUANT_VECTOR(int16_t, depth_step) Depths;
typedef STEPQUANT_VECTOR(uint8_t, depth_step) DepthCodes;

// Where a patch of outputs lies.
struct Patch {
  int64_t sample, y, x;
};

STEPQUANT_INLINE Patch patch_of(const ConvolveTask& task, int64_t index) {
  const int64_t high = (task.out_height + side - 1) / side, wide = (task.out_width + side - 1) / side;
  return {index / (high * wide), index / wide % high * side, index % wide * side};
}

// Rows at the points 0, 1, -1, 2, -2 and infinity: B' d of Lavin and Gray 2016 (arXiv:1509.09308), the second negated.
STEPQUANT_INLINE void transform_line(const Depths (&d)[6], Depths (&t)[6]) {
  const Depths a = (d[2] << 2) - d[4], b = (d[1] << 2) - d[3], c = d[4] - d[2], e = d[3] - d[1], twice = e + e;
  t[0] = ((d[0] - d[2]) << 2) + c;
  t[1] = a + b, t[2] = b - a;
  t[3] = c + twice, t[4] = c - twice;
  t[5] = d[5] - d[3] - (twice + twice);
}

STEPQUANT_INLINE Depths load_codes(const uint8_t* from) {
  DepthCodes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
#if defined(__AVX2__)
  return (Depths)_mm256_cvtepu8_epi16((__m128i)bytes);
#else
  return __builtin_convertvector(bytes, Depths);
#endif
}

// B' d B for all channels of one patch, `step` shorts from position to position.
void transform_codes(const ConvolveTask& task, const Patch& patch, int16_t* to, int64_t step) {
  const auto height = static_cast<uint64_t>(task.height << task.doubled);
  const auto width = static_cast<uint64_t>(task.width << task.doubled);
  const uint8_t* from[6][6];
  for (int64_t i = 0; i < 6; ++i) {
    for (int64_t j = 0; j < 6; ++j) {
      const int64_t y = patch.y - task.top + i, x = patch.x - task.left + j;
      const bool inside = static_cast<uint64_t>(y) < height && static_cast<uint64_t>(x) < width;
      from[i][j] = inside ? task.x + patch.sample * task.image_stride + (y >> task.doubled) * task.row_stride +
              (x >> task.doubled) * task.pixel_stride
                          : task.border;
    }
  }
  for (int64_t c = 0; c < task.channels; c += depth_step) {
    Depths columns[6][6];  // [place][position]
    for (int64_t j = 0; j < 6; ++j) {
      Depths d[6];
#pragma GCC unroll 6
      for (int64_t i = 0; i < 6; ++i) d[i] = load_codes(from[i][j] + c);
      transform_line(d, columns[j]);
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < 6; ++i) {
      Depths d[6], t[6];
#pragma GCC unroll 6
      for (int64_t j = 0; j < 6; ++j) d[j] = columns[j][i];
      transform_line(d, t);
      // 128 is subtracted from every code; the transform of a constant is zero except at the point 1.
      if (i == 1) t[1] -= 36 * 128;
#pragma GCC unroll 6
      for (int64_t j = 0; j < 6; ++j) std::memcpy(to + (6 * i + j) * step + c, &t[j], sizeof(Depths));
    }
  }
}

// G g with its rows 24, 6, 6, 24, 24 and 6 times as large.
STEPQUANT_INLINE void transform_taps(const Pairs (&g)[3], Pairs (&u)[6]) {
  const Pairs ends = g[0] + g[2], outer = g[0] + (g[2] << 2), twice = g[1] + g[1];
  u[0] = g[0] * 6, u[5] = g[2] * 6;
  u[1] = ends + g[1], u[2] = g[1] - ends;
  u[3] = outer + twice, u[4] = outer - twice;
}

// The first or second pair of channels of the words at `from`, as shorts.
template <int64_t half>
STEPQUANT_INLINE Pairs load_weights(const int8_t* from) {
#if defined(__AVX512VNNI__)
  constexpr int32_t places = half ? static_cast<int32_t>(0x03800280u) : static_cast<int32_t>(0x01800080u);
  const __m512i order = _mm512_add_epi32(
      _mm512_set1_epi32(places), _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00)));
  return (Pairs)_mm512_srai_epi16(_mm512_shuffle_epi8(_mm512_loadu_si512(from), order), 8);
#else
  return (Pairs)Word::weights(from);
#endif
}

template <int64_t half>
STEPQUANT_INLINE void transform_words(const int8_t* from, int64_t tap, int16_t* to, int64_t step) {
  Pairs columns[3][6];
#pragma GCC unroll 3
  for (int64_t j = 0; j < 3; ++j) {
    Pairs g[3];
#pragma GCC unroll 3
    for (int64_t i = 0; i < 3; ++i) g[i] = load_weights<half>(from + (3 * i + j) * tap);
    transform_taps(g, columns[j]);
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < 6; ++i) {
    const Pairs g[3] = {columns[0][i], columns[1][i], columns[2][i]};
    Pairs u[6];
    transform_taps(g, u);
#pragma GCC unroll 6
    for (int64_t j = 0; j < 6; ++j) std::memcpy(to + (6 * i + j) * step, &u[j], sizeof(Pairs));
  }
}

// From position to position a cache line more than fits: in steps of whole pages they would share few places in a cache.
STEPQUANT_INLINE int64_t patch_step(int64_t rows, int64_t width) {
  return rows * width + cache_line / static_cast<int64_t>(sizeof(int16_t));
}

// G g G' of a block's weights for `depth` channels, from the first that `from` points to.
void transform_weights(const int8_t* from, int64_t tap, int64_t depth, int64_t width, int16_t* to, int64_t step) {
  constexpr int64_t per_word = Word::per_word;
  for (int64_t c = 0; c < depth; c += per_word) {
    for (int64_t out = 0; out < width; out += lanes, from += lanes * per_word) {
      transform_words<0>(from, tap, to + c * width + 2 * out, step);
      if constexpr (per_word == 4) transform_words<1>(from, tap, to + (c + 2) * width + 2 * out, step);
    }
  }
}

// A' m, but for a factor of 24, 12, 6 and 6.
STEPQUANT_INLINE void gather_line(const Words (&m)[6], Words (&o)[4]) {
  const Words p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
  o[0] = m[0] + (p << 2) + r, o[1] = q + q + s, o[2] = p + r, o[3] = q + s + s + m[5];
}

// One vector of outputs of one patch.
struct Gathered {
  Ints out[side][side];
};

STEPQUANT_INLINE void gather(const int32_t* sums, int64_t step, Gathered& gathered) {
  constexpr int32_t shift[side] = {3, 2, 1, 1};
  constexpr uint32_t ninth = 954437177;  // 9 * ninth = 1 modulo 2^32
  Words columns[6][4];
#pragma GCC unroll 6
  for (int64_t j = 0; j < 6; ++j) {
    Words m[6];
#pragma GCC unroll 6
    for (int64_t i = 0; i < 6; ++i) m[i] = (Words)load_words(sums + (6 * i + j) * step);
    gather_line(m, columns[j]);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < side; ++i) {
    const Words m[6] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i], columns[4][i], columns[5][i]};
    Words o[4];
    gather_line(m, o);
#pragma GCC unroll 4
    for (int64_t j = 0; j < side; ++j) gathered.out[i][j] = (Ints)(o[j] * ninth) >> (shift[i] + shift[j]);
  }
}

}  // namespace
}  // namespace stepquant
