// Rows of numbers times one side of a low-rank branch: a small GEMM of words of 32 bits, whose sums are float32.
#pragma once

#include <utility>

#include "dot.h"

namespace stepquant {
namespace {

// Words of two bfloat16. The order of sums is that of the words, whatever else is in a tile.
struct TwoHalves {
  static STEPQUANT_INLINE Floats add_product(Floats sum, Ints a, Ints b) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Floats)(a << 16) * (Floats)(b << 16);
    return sum + (Floats)(a & -65536) * (Floats)(b & -65536);
#endif
  }
};

// Words of one float32.
struct OneFloat {
  static STEPQUANT_INLINE Floats add_product(Floats sum, Ints a, Ints b) { return sum + (Floats)a * (Floats)b; }
};

constexpr int64_t side_vectors = convolve_group / lanes;  // in a group of outputs
constexpr int64_t side_most_groups = lanes == 16 ? 4 : 1;  // at once

// How many rows of sums fit the registers beside so many groups; more than eight would meet in one set of the cache where
// rows lie a power of two apart.
constexpr int64_t side_rows(int64_t groups) {
  if (lanes < 16) return 8 / side_vectors;
  return groups == 4 ? 6 : 8;
}

template <class Word, int64_t rows, int64_t groups>
void side_tile(const SideTask& task, int64_t row, int64_t group, float* out, int64_t out_stride) {
  constexpr int64_t vectors = groups * side_vectors;
  Floats sum[rows][vectors];
  const char* x[rows];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
    x[r] = static_cast<const char*>(task.x) + (row + r) * task.stride;
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sum[r][v] = Floats{};
  }
  const int32_t* side = static_cast<const int32_t*>(task.side) + group * task.words * convolve_group;
  constexpr int64_t line = 16;  // words
  for (int64_t w = 0; w < task.words; ++w, side += convolve_group) {
    if (w % line == 0) {  // the next tile's rows come from memory while this one is multiplied
#pragma GCC unroll 8
      for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(x[r] + rows * task.stride + 4 * w, 0, 2);
    }
    Ints b[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) {
      b[v] = load_words(side + v / side_vectors * task.words * convolve_group + v % side_vectors * lanes);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
      const Ints a = repeat_word(x[r] + 4 * w);
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sum[r][v] = Word::add_product(sum[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) store(out + r * out_stride + v * lanes, sum[r][v]);
  }
}

using SideTile = void (*)(const SideTask&, int64_t, int64_t, float*, int64_t);

template <class Word, int64_t groups, int64_t... r>
SideTile side_tile_of(int64_t rows, std::integer_sequence<int64_t, r...>) {
  static constexpr SideTile tiles[] = {side_tile<Word, r + 1, groups>...};
  return tiles[rows - 1];
}

template <class Word, int64_t groups>
void side_tiles(const SideTask& task, int64_t first, int64_t count, int64_t group, float* out, int64_t out_stride) {
  constexpr int64_t most = side_rows(groups);
  for (int64_t row = 0; row < count; row += most) {
    const int64_t rows = count - row < most ? count - row : most;
    side_tile_of<Word, groups>(rows, std::make_integer_sequence<int64_t, most>())(
        task, first + row, group, out + row * out_stride, out_stride);
  }
}

template <class Word>
void multiply_groups_of(
    const SideTask& task, int64_t first, int64_t count, int64_t group, int64_t groups, float* out, int64_t out_stride) {
  if constexpr (side_most_groups > 1) {
    if (groups == 4) return side_tiles<Word, 4>(task, first, count, group, out, out_stride);
    if (groups == 3) return side_tiles<Word, 3>(task, first, count, group, out, out_stride);
    if (groups == 2) return side_tiles<Word, 2>(task, first, count, group, out, out_stride);
  }
  side_tiles<Word, 1>(task, first, count, group, out, out_stride);
}

// So many rows times at most `side_most_groups` groups of outputs, in float32.
void multiply_groups(
    const SideTask& task, int64_t first, int64_t count, int64_t group, int64_t groups, float* out, int64_t out_stride) {
  if (task.type == Type::bf16) {
    multiply_groups_of<TwoHalves>(task, first, count, group, groups, out, out_stride);
  } else {
    multiply_groups_of<OneFloat>(task, first, count, group, groups, out, out_stride);
  }
}

template <class T>
void store_rows(const float* from, int64_t rows, int64_t width, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += side_most_groups * convolve_group, to += stride) {
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) store(to + i, load(from + i));
    if (i < width) store_first(to + i, load(from + i), width - i);
  }
}

void multiply_side(const SideTask& task, int64_t begin, int64_t end) {
  constexpr int64_t chunk = 24, most = side_most_groups, width = most * convolve_group;
  const int64_t groups = (task.outs + convolve_group - 1) / convolve_group;
  alignas(64) float sums[chunk * width];
  for (int64_t row = begin; row < end; row += chunk) {
    const int64_t rows = end - row < chunk ? end - row : chunk;
    for (int64_t group = 0; group < groups; group += most) {
      const int64_t first = group * convolve_group, at = row * task.out_stride + first;
      const int64_t left = task.outs - first < width ? task.outs - first : width;
      multiply_groups(task, row, rows, group, groups - group < most ? groups - group : most, sums, width);
      if (task.type == Type::bf16) {
        store_rows(sums, rows, left, static_cast<bf16*>(task.out) + at, task.out_stride);
      } else {
        store_rows(sums, rows, left, static_cast<float*>(task.out) + at, task.out_stride);
      }
    }
  }
}

}  // namespace
}  // namespace stepquant
