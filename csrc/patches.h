// 3 x 3 convolutions by patches of 4 x 4 outputs (Winograd's F(4, 3) in both directions): 36 products instead of 144.
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
      // Codes count from 128, a constant whose transform is nothing but at the point 1.
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

// Products of some patches at one position with a block of outputs.
template <int64_t rows, int64_t vectors>
void multiply_patches(
    const int16_t* codes, int64_t code_stride, const int16_t* weight, int64_t pairs, int32_t* sums) {
  const uint8_t* pixels[rows];
  for (int64_t r = 0; r < rows; ++r) pixels[r] = reinterpret_cast<const uint8_t*>(codes + r * code_stride);
  Ints sum[rows][vectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sum[r][v] = Ints{};
  }
  accumulate<Shorts, rows, vectors>(pixels, pairs, weight, sum);
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) store(sums + (r * vectors + v) * lanes, sum[r][v]);
  }
}

using MultiplyPatches = void (*)(const int16_t*, int64_t, const int16_t*, int64_t, int32_t*);

template <int64_t vectors, int64_t... r>
MultiplyPatches multiply_of(int64_t rows, std::integer_sequence<int64_t, r...>) {
  static constexpr MultiplyPatches of[] = {multiply_patches<r + 1, vectors>...};
  return of[rows - 1];
}

// What one item works in, within `task.scratch`.
struct PatchPlaces {
  explicit PatchPlaces(const ConvolveTask& task)
      : code_step(patch_step(task.chunk_patches, task.channels)),
        sums(static_cast<int32_t*>(task.scratch)),
        partial(sums + positions * sum_step),
        weights(reinterpret_cast<int16_t*>(partial + side * side * task.chunk_patches * width)),
        codes(weights + positions * patch_step(patches_most_channels, width)) {}
  static constexpr int64_t width = groups_per_block * convolve_group;
  static constexpr int64_t sum_step = patches_at_once * width + cache_line / 4;
  int64_t code_step;
  int32_t* sums;  // [position][patch][output]
  int32_t* partial;  // [patch][output][4][4]: of the channels that came before
  int16_t* weights;  // [position][pair of channels][output][2]
  int16_t* codes;  // [position][patch][channel]
};

int64_t patches_scratch(const ConvolveTask& task) {
  const PatchPlaces places(task);
  const int64_t codes = positions * places.code_step * static_cast<int64_t>(sizeof(int16_t));
  return reinterpret_cast<char*>(places.codes) - static_cast<char*>(task.scratch) + codes;
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

template <int64_t... r>
STEPQUANT_INLINE void emit_line(
    const ConvolveTask& task, int64_t pixel, int64_t channel, const Ints* sums, int64_t count,
    std::integer_sequence<int64_t, r...>) {
  ((count == r + 1 ? emit_rows<r + 1>(task, pixel, channel, sums) : void()), ...);
}

STEPQUANT_INLINE void emit_patch(
    const ConvolveTask& task, const Patch& patch, int64_t channel, const Gathered& gathered) {
  const int64_t wide = task.out_width - patch.x < side ? task.out_width - patch.x : side;
#pragma GCC unroll 4
  for (int64_t i = 0; i < side; ++i) {
    if (patch.y + i >= task.out_height) break;
    const int64_t pixel = (patch.sample * task.out_height + patch.y + i) * task.out_width + patch.x;
    emit_line(task, pixel, channel, gathered.out[i], wide, std::make_integer_sequence<int64_t, side>());
  }
}

// What becomes of the sums of one patch: kept as partial sums, or written as results.
template <int64_t vectors>
void finish_patch(
    const ConvolveTask& task, const Patch& patch, int64_t channel, const int32_t* sums, int64_t step, int32_t* partial,
    bool first, bool last) {
  for (int64_t v = 0; v < vectors && channel < task.out_channels; ++v, channel += lanes, sums += lanes) {
    Gathered gathered;
    gather(sums, step, gathered);
    Ints* out = &gathered.out[0][0];
    for (int64_t k = 0; k < side * side; ++k, partial += lanes) {
      if (!first) out[k] += load_words(partial);
      if (!last) store(partial, out[k]);
    }
    if (last) emit_patch(task, patch, channel, gathered);
  }
}

// Products of all positions of some patches, all in the cache with the weights of `depth` channels.
template <int64_t vectors>
void multiply_positions(
    const ConvolveTask& task, const int16_t* codes, int64_t count, int64_t depth, const PatchPlaces& places) {
  constexpr int64_t most = tile_rows(vectors), width = vectors * lanes;
  constexpr auto each = std::make_integer_sequence<int64_t, most>();
  const int64_t parts = (count + most - 1) / most;
  for (int64_t at = 0; at < positions; ++at) {
    const int16_t* weights = places.weights + at * patch_step(depth, width);
    for (int64_t part = 0; part < parts; ++part) {  // as equal as they can be
      const int64_t first = part * count / parts, rows = (part + 1) * count / parts - first;
      multiply_of<vectors>(rows, each)(
          codes + at * places.code_step + first * task.channels, task.channels, weights, depth / 2,
          places.sums + at * places.sum_step + first * width);
    }
  }
}

template <int64_t vectors>
void convolve_block(
    const ConvolveTask& task, const Patch* patches, int64_t count, int64_t group, const PatchPlaces& places) {
  constexpr int64_t width = vectors * lanes;
  const int8_t* weight = task.weight + group * convolve_group * 9 * task.channels;
  const int64_t slices = task.channels / depth_step, at_once = patches_most_channels / depth_step;
  const int64_t depths = (slices + at_once - 1) / at_once;
  for (int64_t d = 0; d < depths; ++d) {
    const int64_t begin = d * slices / depths * depth_step, depth = (d + 1) * slices / depths * depth_step - begin;
    transform_weights(
        weight + begin * width, task.channels * width, depth, width, places.weights, patch_step(depth, width));
    for (int64_t first = 0; first < count; first += patches_at_once) {
      const int64_t last = first + patches_at_once < count ? first + patches_at_once : count;
      multiply_positions<vectors>(
          task, places.codes + first * task.channels + begin, last - first, depth, places);
      for (int64_t p = first; p < last; ++p) {
        finish_patch<vectors>(
            task, patches[p], group * convolve_group, places.sums + (p - first) * width, places.sum_step,
            places.partial + p * side * side * width, d == 0, d == depths - 1);
      }
    }
  }
}

// Items are (chunk of patches, block of outputs); neighbours share their patches. Each makes the weights that it uses:
// to take them from another processor's cache costs more.
void convolve_patches(const ConvolveTask& given, int64_t begin, int64_t end) {
  ConvolveTask task = given;
  task.zero_point -= 128;  // where the transformed codes count from
  const ConvolveBlocks blocks(task.out_channels, groups_per_block);
  const PatchPlaces places(task);
  Patch patches[patches_most_chunk];
  int64_t ready = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / blocks.count(), block = item % blocks.count();
    const int64_t first = chunk * task.chunk_patches, left = task.patches - first;
    const int64_t count = left < task.chunk_patches ? left : task.chunk_patches;
    if (chunk != ready) {
      for (int64_t p = 0; p < count; ++p) {
        patches[p] = patch_of(task, first + p);
        transform_codes(task, patches[p], places.codes + p * task.channels, places.code_step);
      }
      ready = chunk;
    }
    const int64_t group = blocks.first(block);
    constexpr int64_t vectors = convolve_group / lanes;
    if constexpr (groups_per_block == 1) {
      convolve_block<vectors>(task, patches, count, group, places);
    } else {
      switch (blocks.groups(block)) {
        case 4: convolve_block<4 * vectors>(task, patches, count, group, places); break;
        case 3: convolve_block<3 * vectors>(task, patches, count, group, places); break;
        case 2: convolve_block<2 * vectors>(task, patches, count, group, places); break;
        default: convolve_block<vectors>(task, patches, count, group, places); break;
      }
    }
  }
}

}  // namespace
}  // namespace stepquant
