// 3 x 3 convolutions by patches of 2 x 2 outputs (Winograd's F(2, 3) in both directions): 16 products instead of 36.
//
// With the weight's transform taken twice as large in each direction everything is a whole number: a code's transform
// lies within 4 * 255, a weight's within 9 * 128, both in shorts, and a sum is four times the one wanted, which 32 bits
// hold for up to `patches_most_channels` channels. So the result is exact.
#pragma once

#include "convolve.h"
#include "scratch.h"

namespace stepquant {
namespace {

constexpr int64_t positions = 16;  // of a transformed patch
constexpr int64_t patch_vectors = convolve_group / lanes;
typedef STEPQUANT_VECTOR(int16_t, 2 * lanes) Pairs;

STEPQUANT_INLINE Pairs load_pairs(const void* from) {
  Pairs x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// What the transforms of one item work in, position by position; a cache line more lies between them, because in steps
// of whole pages they would share few places in a cache.
struct PatchPlaces {
  PatchPlaces(Scratch& scratch, int64_t channels)
      : code_step(convolve_chunk_patches * channels + 32),
        weight_step(channels * convolve_group + 32),
        codes(scratch.take<int16_t>(positions * code_step)),
        weight(scratch.take<int16_t>(positions * weight_step)),
        sums(scratch.take<int32_t>(positions * sum_step)) {}
  static int64_t bytes(int64_t channels) {
    return 2 * positions * ((convolve_chunk_patches + convolve_group) * channels + 64) + 4 * positions * sum_step;
  }
  static constexpr int64_t sum_step = convolve_chunk_patches * convolve_group + 16;
  int64_t code_step, weight_step;
  int16_t* codes;  // [patch][channel]
  int16_t* weight;  // [word][output][pair]
  int32_t* sums;  // [patch][output]
};

// Where a patch of outputs lies.
struct Patch {
  int64_t sample, y, x;
};

STEPQUANT_INLINE Patch patch_of(const ConvolveTask& task, int64_t index) {
  const int64_t high = (task.out_height + 1) / 2, wide = (task.out_width + 1) / 2;
  return {index / (high * wide), index / wide % high * 2, index % wide * 2};
}

STEPQUANT_INLINE void transform_codes(const ConvolveTask& task, const Patch& patch, int16_t* to, int64_t step) {
  const auto height = static_cast<uint64_t>(task.height << task.doubled);
  const auto width = static_cast<uint64_t>(task.width << task.doubled);
  const uint8_t* from[4][4];
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t y = patch.y - task.top + i, x = patch.x - task.left + j;
      const bool inside = static_cast<uint64_t>(y) < height && static_cast<uint64_t>(x) < width;
      from[i][j] = inside ? task.x + patch.sample * task.image_stride + (y >> task.doubled) * task.row_stride +
              (x >> task.doubled) * task.pixel_stride
                          : task.border;
    }
  }
  for (int64_t c = 0; c < task.channels; c += 2 * lanes) {
    Pairs t[4][4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      Pairs d[4];
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) d[i] = load_pairs(from[i][j] + 2 * c);
      t[0][j] = d[0] - d[2], t[1][j] = d[1] + d[2], t[2][j] = d[2] - d[1], t[3][j] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      const Pairs v[4] = {t[i][0] - t[i][2], t[i][1] + t[i][2], t[i][2] - t[i][1], t[i][1] - t[i][3]};
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) std::memcpy(to + (4 * i + j) * step + c, &v[j], sizeof(Pairs));
    }
  }
}

// Of one group of outputs: 2 G g G' with G = (1 0 0, 1/2 1/2 1/2, 1/2 -1/2 1/2, 0 0 1), doubled once more.
void transform_weight(const int8_t* weight, int64_t count, int16_t* to, int64_t step) {
  for (int64_t n = 0; n < count; n += 2 * lanes) {
    Pairs t[4][3];
#pragma GCC unroll 3
    for (int64_t j = 0; j < 3; ++j) {
      Pairs g[3];
#pragma GCC unroll 3
      for (int64_t i = 0; i < 3; ++i) g[i] = (Pairs)Word::weights(weight + (3 * i + j) * count + n);
      const Pairs ends = g[0] + g[2];
      t[0][j] = g[0] + g[0], t[1][j] = ends + g[1], t[2][j] = ends - g[1], t[3][j] = g[2] + g[2];
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      const Pairs ends = t[i][0] + t[i][2];
      const Pairs u[4] = {t[i][0] + t[i][0], ends + t[i][1], ends - t[i][1], t[i][2] + t[i][2]};
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) std::memcpy(to + (4 * i + j) * step + n, &u[j], sizeof(Pairs));
    }
  }
}

// Products of some patches at one position with one group of outputs.
template <int64_t rows>
void multiply_patches(const int16_t* codes, const int16_t* weight, int64_t channels, int32_t* sums) {
  const uint8_t* pixels[rows];
  for (int64_t r = 0; r < rows; ++r) pixels[r] = reinterpret_cast<const uint8_t*>(codes + r * channels);
  Ints sum[rows][patch_vectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < patch_vectors; ++v) sum[r][v] = Ints{};
  }
  accumulate<rows, patch_vectors>(pixels, channels / 2, weight, sum);
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < patch_vectors; ++v) store(sums + r * convolve_group + v * lanes, sum[r][v]);
  }
}

template <int64_t... r>
void multiply_rows(
    const int16_t* codes, const int16_t* weight, int64_t channels, int64_t rows, int32_t* sums,
    std::integer_sequence<int64_t, r...>) {
  static constexpr void (*of[])(const int16_t*, const int16_t*, int64_t, int32_t*) = {multiply_patches<r + 1>...};
  of[rows - 1](codes, weight, channels, sums);
}

// The 2 x 2 outputs of one patch in one vector of channels.
STEPQUANT_INLINE void emit_patch(const ConvolveTask& task, const Patch& patch, int64_t channel, const int32_t* sums) {
  Words t[2][4];
#pragma GCC unroll 4
  for (int64_t j = 0; j < 4; ++j) {
    Words m[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) m[i] = (Words)load_words(sums + (4 * i + j) * PatchPlaces::sum_step);
    t[0][j] = m[0] + m[1] + m[2], t[1][j] = m[1] - m[2] - m[3];
  }
  const bool pair = patch.x + 1 < task.out_width;
  for (int64_t i = 0; i < 2 && patch.y + i < task.out_height; ++i) {
    const Ints out[2] = {(Ints)(t[i][0] + t[i][1] + t[i][2]) >> 2, (Ints)(t[i][1] - t[i][2] - t[i][3]) >> 2};
    const int64_t pixel = (patch.sample * task.out_height + patch.y + i) * task.out_width + patch.x;
    if (pair) {
      emit_rows<2>(task, pixel, channel, out);
    } else {
      emit_rows<1>(task, pixel, channel, out);
    }
  }
}

// Items are chunks of patches by parts of the groups of outputs; neighbours share their patches.
void convolve_patches(const ConvolveTask& task, int64_t begin, int64_t end) {
  constexpr int64_t most = tile_rows(patch_vectors);
  constexpr auto each = std::make_integer_sequence<int64_t, most>();
  const int64_t channels = task.channels, groups = (task.out_channels + convolve_group - 1) / convolve_group;
  const int64_t parts = (groups + task.part_groups - 1) / task.part_groups;
  Scratch scratch(PatchPlaces::bytes(channels));
  const PatchPlaces places(scratch, channels);
  Patch patches[convolve_chunk_patches];
  int64_t ready = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / parts, first = chunk * convolve_chunk_patches, part = item % parts;
    const int64_t left = task.patches - first, count = left < convolve_chunk_patches ? left : convolve_chunk_patches;
    if (chunk != ready) {
      for (int64_t p = 0; p < count; ++p) {
        patches[p] = patch_of(task, first + p);
        transform_codes(task, patches[p], places.codes + p * channels, places.code_step);
      }
      ready = chunk;
    }
    const int64_t stop = (part + 1) * task.part_groups < groups ? (part + 1) * task.part_groups : groups;
    for (int64_t group = part * task.part_groups; group < stop; ++group) {
      const int64_t tap = channels * convolve_group;
      transform_weight(task.weight + group * 9 * tap, tap, places.weight, places.weight_step);
      for (int64_t at = 0; at < positions; ++at) {
        for (int64_t p = 0; p < count; p += most) {
          multiply_rows(
              places.codes + at * places.code_step + p * channels, places.weight + at * places.weight_step, channels,
              count - p < most ? count - p : most, places.sums + at * places.sum_step + p * convolve_group, each);
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t v = 0; v < convolve_group; v += lanes) {
          const int64_t channel = group * convolve_group + v;
          if (channel < task.out_channels) emit_patch(task, patches[p], channel, places.sums + p * convolve_group + v);
        }
      }
    }
  }
}

}  // namespace
}  // namespace stepquant
