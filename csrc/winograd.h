// 3 x 3 convolutions by patches of 4 x 4 outputs: 36 products, each of a transformed code and weight, instead of 144.
#pragma once

#include "winograd_transforms.h"

namespace stepquant {
namespace {

// With VNNI, direct products of bytes are twice as fast as Winograd's products of shorts.
constexpr int64_t least_patches = Word::per_word == 4 ? 6 : 2;

// Products of some patches at one position with a block of outputs.
template <int64_t rows, int64_t vectors>
void multiply_patches(const int16_t* codes, int64_t code_stride, const int16_t* weight, int64_t pairs, int32_t* sums) {
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

// The workspace of one item, within `task.scratch`.
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
  constexpr int64_t width = PatchPlaces::width;
  const int64_t ints = positions * PatchPlaces::sum_step + side * side * task.chunk_patches * width;
  const int64_t steps = patch_step(patches_most_channels, width) + patch_step(task.chunk_patches, task.channels);
  return 4 * ints + 2 * positions * steps;
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

// The output transform of one patch, added to the partial sums of earlier channels, or finished and written.
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
      multiply_positions<vectors>(task, places.codes + first * task.channels + begin, last - first, depth, places);
      for (int64_t p = first; p < last; ++p) {
        finish_patch<vectors>(
            task, patches[p], group * convolve_group, places.sums + (p - first) * width, places.sum_step,
            places.partial + p * side * side * width, d == 0, d == depths - 1);
      }
    }
  }
}

// Items are (chunk of patches, block of outputs); neighbours share their patches. Each item transforms the weights that it
// uses: reading them from another core's cache would cost more.
void convolve_patches(const ConvolveTask& given, int64_t begin, int64_t end) {
  ConvolveTask task = given;
  task.zero_point -= 128;  // transformed codes are those of code - 128
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
