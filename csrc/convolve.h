// Integer convolution without an im2col: rows of output pixels by vectors of output channels stay in registers while
// the taps and the words of four or two input channels pass by. Pixels are found through pointers, so stride, dilation,
// borders and doubled pixels cost nothing in memory. A linear layer is a convolution of 1 x 1.
//
// Activations are unsigned codes with zero point z, weights signed bytes: sum (q - z) w = sum q w - z sum w.
#pragma once

#include <utility>

#include "dot.h"

namespace stepquant {
namespace {

#if defined(__AVX512VNNI__)
using Word = Bytes;
#else
using Word = Shorts;
#endif

constexpr int64_t groups_per_block = lanes == 16 ? 4 : 1;
constexpr int64_t block_width = groups_per_block * convolve_group;  // outputs in a block, at most

// How many rows of sums fit the registers beside that many vectors of weights; divides the pixels of an item.
constexpr int64_t tile_rows(int64_t vectors) {
  if (lanes < 16) return 12 / vectors;
  return vectors == 4 ? 6 : 8;
}

// Keeps the compiler from fusing the multiplication before with the addition after: the specification rounds both.
STEPQUANT_INLINE Floats rounded(Floats x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

// The output pixels of one tile: where the first tap of each lies, in the image and in memory.
struct Tile {
  int64_t y[8], x[8];
  const uint8_t* image[8];
  const uint8_t* origin[8];  // of the first tap, if it is inside
  bool inside;  // no tap of any row meets a border
};

STEPQUANT_INLINE void locate(const ConvolveTask& task, int64_t first, int64_t rows, Tile& tile) {
  const int64_t plane = task.out_height * task.out_width;
  int64_t sample = first / plane, row = first % plane / task.out_width, column = first % task.out_width;
  const int64_t last_y = task.height - 1 - (task.kernel_height - 1) * task.dilation_y;
  const int64_t last_x = task.width - 1 - (task.kernel_width - 1) * task.dilation_x;
  int64_t outside = 0;  // negative as soon as one difference is
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = row * task.stride_y - task.top, x = column * task.stride_x - task.left;
    tile.y[r] = y, tile.x[r] = x;
    tile.image[r] = task.x + sample * task.image_stride;
    tile.origin[r] = tile.image[r] + y * task.row_stride + x * task.pixel_stride;
    outside |= y | x | (last_y - y) | (last_x - x);
    if (++column == task.out_width) {
      column = 0;
      if (++row == task.out_height) row = 0, ++sample;
    }
  }
  tile.inside = outside >= 0 && !task.doubled;
}

// Pointers to the pixels under one tap; beyond the border lie zero points.
template <int64_t rows>
STEPQUANT_INLINE void point(
    const ConvolveTask& task, const Tile& tile, int64_t dy, int64_t dx, const uint8_t** pixels) {
  const int64_t move = dy * task.row_stride + dx * task.pixel_stride;
  if (tile.inside) {
    for (int64_t r = 0; r < rows; ++r) pixels[r] = tile.origin[r] + move;
    return;
  }
  const auto height = static_cast<uint64_t>(task.height << task.doubled);
  const auto width = static_cast<uint64_t>(task.width << task.doubled);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = tile.y[r] + dy, x = tile.x[r] + dx;
    const uint8_t* place = task.doubled ? tile.image[r] + (y >> 1) * task.row_stride + (x >> 1) * task.pixel_stride
                                        : tile.origin[r] + move;
    pixels[r] = static_cast<uint64_t>(y) < height && static_cast<uint64_t>(x) < width ? place : task.border;
  }
}

template <class Word, int64_t rows, int64_t vectors, class Weight>
STEPQUANT_INLINE void accumulate(
    const uint8_t* const* pixels, int64_t words, const Weight* weight, Ints (&sum)[rows][vectors]) {
  constexpr int64_t size = lanes * Word::per_word;  // of a vector of weights
  const uint8_t* from[rows];
  for (int64_t r = 0; r < rows; ++r) from[r] = pixels[r];
  for (int64_t w = 0; w < words; ++w) {
    Ints b[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) b[v] = Word::weights(weight + (w * vectors + v) * size);
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
      const Ints a = repeat_word(from[r] + 4 * w);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sum[r][v] = Word::value_dot(sum[r][v], a, b[v]);
    }
  }
}

// The epilogue: sums minus zero point times the weight's sum, times the scales, plus bias, plus the branch, times the gate,
// plus the added tensor.
template <class T, int64_t rows>
STEPQUANT_INLINE void emit_sums(const ConvolveTask& task, int64_t pixel, int64_t channel, const Ints* sums) {
  const int64_t rest = task.out_channels - channel, width = task.out_channels;
  const bool full = rest >= lanes;
  const float* scales = task.weight_scale + channel;
  const Floats factor = (full ? load(scales) : load_first(scales, rest)) * task.scale;
  Floats bias = Floats{};
  if (task.bias) bias = full ? load(task.bias + channel) : load_first(task.bias + channel, rest);
  Ints share;
  std::memcpy(&share, task.weight_sum + channel, sizeof(share));  // padded to whole vectors
  share *= task.zero_point;
  Floats y[rows];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
    y[r] = rounded(__builtin_convertvector(sums[r] - share, Floats) * factor);
    if (task.row_scale) y[r] = rounded(y[r] * splat(task.row_scale[(pixel + r) / task.row_pixels]));
    y[r] += bias;
  }
  if (task.low) {
    const float* low = task.low + (pixel - task.low_row) * block_width + channel - task.low_channel;
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r, low += block_width) y[r] += load(low);  // padded to whole vectors
  }
  if (task.gate) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
      const float* gate = task.gate + (pixel + r) / task.gate_pixels * width + channel;
      y[r] = rounded(y[r] * (full ? load(gate) : load_first(gate, rest)));
    }
  }
  if (task.add) {
    const T* add = static_cast<const T*>(task.add) + pixel * task.add_stride + channel;
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r, add += task.add_stride) y[r] += full ? load(add) : load_first(add, rest);
  }
  T* out = static_cast<T*>(task.out) + pixel * width + channel;
  if (full) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) store(out + r * width, y[r]);
  } else {
    for (int64_t r = 0; r < rows; ++r) store_first(out + r * width, y[r], rest);
  }
}

template <int64_t rows>
STEPQUANT_INLINE void emit_rows(const ConvolveTask& task, int64_t pixel, int64_t channel, const Ints* sums) {
  if (task.type == Type::bf16) {
    emit_sums<bf16, rows>(task, pixel, channel, sums);
  } else {
    emit_sums<float, rows>(task, pixel, channel, sums);
  }
}

// The general source of a tile's sums: any taps, at any place.
struct AllTaps {
  template <int64_t rows, int64_t vectors>
  static STEPQUANT_INLINE void add(
      const ConvolveTask& task, const int8_t* weight, int64_t pixel, Ints (&sum)[rows][vectors]) {
    Tile tile;
    locate(task, pixel, rows, tile);
    const uint8_t* pixels[rows];
    const int64_t words = task.channels / Word::per_word;
    for (int64_t ky = 0; ky < task.kernel_height; ++ky) {
      for (int64_t kx = 0; kx < task.kernel_width; ++kx) {
        point<rows>(task, tile, ky * task.dilation_y, kx * task.dilation_x, pixels);
        accumulate<Word, rows, vectors>(pixels, words, weight, sum);
        weight += task.channels * vectors * lanes;
      }
    }
  }
};

template <class Sums, int64_t rows, int64_t vectors>
void convolve_tile(const ConvolveTask& task, const int8_t* weight, int64_t pixel, int64_t channel) {
  Ints sum[rows][vectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sum[r][v] = Ints{};
  }
  Sums::add(task, weight, pixel, sum);
#pragma GCC unroll 4
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = channel + v * lanes;
    if (c >= task.out_channels) break;
    Ints sums[rows];
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) sums[r] = sum[r][v];
    emit_rows<rows>(task, pixel, c, sums);
  }
}

using ConvolveTile = void (*)(const ConvolveTask&, const int8_t*, int64_t, int64_t);

template <class Sums, int64_t vectors, int64_t... r>
ConvolveTile tile_of(int64_t rows, std::integer_sequence<int64_t, r...>) {
  static constexpr ConvolveTile tiles[] = {convolve_tile<Sums, r + 1, vectors>...};
  return tiles[rows - 1];
}

template <class Sums, int64_t vectors>
void convolve_chunk(const ConvolveTask& task, const int8_t* weight, int64_t begin, int64_t end, int64_t channel) {
  constexpr int64_t most = tile_rows(vectors);
  for (int64_t pixel = begin; pixel < end; pixel += most) {
    const int64_t rows = end - pixel < most ? end - pixel : most;
    tile_of<Sums, vectors>(rows, std::make_integer_sequence<int64_t, most>())(task, weight, pixel, channel);
  }
}

// The pixels from `first` to `last` in one block of output channels.
template <class Sums>
void convolve_part(const ConvolveTask& task, const ConvolveBlocks& blocks, int64_t block, int64_t first, int64_t last) {
  const int64_t group = blocks.first(block), channel = group * convolve_group;
  const int8_t* weight = task.weight + channel * task.kernel_height * task.kernel_width * task.channels;
  constexpr int64_t vectors = convolve_group / lanes;
  if constexpr (groups_per_block == 1) {
    convolve_chunk<Sums, vectors>(task, weight, first, last, channel);
  } else {
    switch (blocks.groups(block)) {
      case 4: convolve_chunk<Sums, 4 * vectors>(task, weight, first, last, channel); break;
      case 3: convolve_chunk<Sums, 3 * vectors>(task, weight, first, last, channel); break;
      case 2: convolve_chunk<Sums, 2 * vectors>(task, weight, first, last, channel); break;
      default: convolve_chunk<Sums, vectors>(task, weight, first, last, channel); break;
    }
  }
}

// Items are chunks of pixels, within blocks of output channels: neighbours share their weights.
void convolve(const ConvolveTask& task, int64_t begin, int64_t end) {
  const int64_t chunks = (task.pixels + convolve_chunk_pixels - 1) / convolve_chunk_pixels;
  const ConvolveBlocks blocks(task.out_channels, groups_per_block);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % chunks * convolve_chunk_pixels, left = task.pixels - first;
    const int64_t count = left < convolve_chunk_pixels ? left : convolve_chunk_pixels;
    convolve_part<AllTaps>(task, blocks, item / chunks, first, first + count);
  }
}

}  // namespace
}  // namespace stepquant
