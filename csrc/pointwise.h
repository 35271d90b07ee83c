// Pointwise convolutions over contiguous pixels, and linears: a GEMM. A chunk of rows stays in the cache while all outputs
// are computed from it; it is copied where codes are widened to shorts, or where the channels do not fill words.
#pragma once

#include "convolve.h"
#include "low_rank.h"

namespace stepquant {
namespace {

struct OneTap {
  template <int64_t rows, int64_t vectors>
  static STEPQUANT_INLINE void add(
      const ConvolveTask& task, const int8_t* weight, int64_t row, Ints (&sum)[rows][vectors]) {
    const uint8_t* codes[rows];
    const uint8_t* place = task.x + (row - task.first_row) * task.pixel_stride;
    for (int64_t r = 0; r < rows; ++r, place += task.pixel_stride) codes[r] = place;
    accumulate<Word, rows, vectors>(codes, task.channels / Word::per_word, weight, sum);
  }
};

// Rows of `from` as rows of `depth` elements, of which those beyond the channels are zero.
template <class T>
void copy_rows(const ConvolveTask& from, int64_t first, int64_t count, T* to, int64_t depth) {
  constexpr int64_t step = 16;
  typedef STEPQUANT_VECTOR(uint8_t, step) Codes;
  typedef STEPQUANT_VECTOR(T, step) Elements;
  const uint8_t* row = from.x + first * from.pixel_stride;
  for (; count > 0; --count, row += from.pixel_stride, to += depth) {
    int64_t c = 0;
    for (; c + step <= from.channels; c += step) {
      Codes codes;
      std::memcpy(&codes, row + c, sizeof(codes));
      const Elements elements = __builtin_convertvector(codes, Elements);
      std::memcpy(to + c, &elements, sizeof(elements));
    }
    for (; c < from.channels; ++c) to[c] = row[c];
    for (; c < depth; ++c) to[c] = 0;
  }
}

// Items are (chunk of rows, block of outputs); neighbours share their rows.
void convolve_rows(const ConvolveTask& given, int64_t begin, int64_t end) {
  using Element = Word::Element;
  const ConvolveBlocks blocks(given.out_channels, groups_per_block);
  const int64_t depth = filled(given.channels);
  const bool copies = sizeof(Element) > 1 || depth != given.channels;
  ConvolveTask task = given;
  if (copies) {
    task.x = static_cast<const uint8_t*>(given.scratch);
    task.channels = depth, task.pixel_stride = depth * static_cast<int64_t>(sizeof(Element));
  }
  alignas(64) float low[rows_most_chunk * block_width];
  int64_t ready = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / blocks.count(), first = chunk * task.chunk_rows, left = task.pixels - first;
    const int64_t count = left < task.chunk_rows ? left : task.chunk_rows;
    if (copies && chunk != ready) {
      copy_rows(given, first, count, static_cast<Element*>(given.scratch), depth);
      task.first_row = first;
      ready = chunk;
    }
    const int64_t block = item % blocks.count();
    if (task.branch.x) {
      multiply_groups(task.branch, first, count, blocks.first(block), blocks.groups(block), low, block_width);
      task.low = low, task.low_row = first, task.low_channel = blocks.first(block) * convolve_group;
    }
    convolve_part<OneTap>(task, blocks, block, first, first + count);
  }
}

}  // namespace
}  // namespace stepquant
