// Rows times factors and regular Hadamard matrices, group by group, then to bytes over a scale for each row.
#pragma once

#include <limits>

#include "epilogue.h"
#include "scratch.h"

namespace stepquant {
namespace {

// Four numbers times H4, with the additions in the order in which the operation is defined.
template <class V>
STEPQUANT_INLINE void butterfly(V& a, V& b, V& c, V& d) {
  const V s = a + b, t = c + d, u = a - b, v = c - d;
  a = s + v;
  b = s - v;
  c = u + t;
  d = t - u;
}

// The levels that couple neighbours, and after it those of four apart, if groups have them.
STEPQUANT_INLINE void couple_near(float* x, int64_t width, bool four_apart) {
  int64_t i = 0;
#if defined(__SSE2__)
  for (; i + 16 <= width; i += 16) {
    __m128 part[4];
    for (int64_t k = 0; k < 4; ++k) part[k] = _mm_loadu_ps(x + i + 4 * k);
    _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
    butterfly(part[0], part[1], part[2], part[3]);
    _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
    if (four_apart) butterfly(part[0], part[1], part[2], part[3]);
    for (int64_t k = 0; k < 4; ++k) _mm_storeu_ps(x + i + 4 * k, part[k]);
  }
#endif
  for (int64_t j = i; j < width; j += 4) butterfly(x[j], x[j + 1], x[j + 2], x[j + 3]);
  if (!four_apart) return;
  for (; i < width; i += 16) {
    for (int64_t j = i; j < i + 4; ++j) butterfly(x[j], x[j + 4], x[j + 8], x[j + 12]);
  }
}

// One more level: numbers so far apart, a multiple of sixteen.
STEPQUANT_INLINE void couple_far(float* x, int64_t width, int64_t apart) {
  for (int64_t first = 0; first < width; first += 4 * apart) {
    for (int64_t i = first; i < first + apart; i += lanes) {
      Floats part[4];
      for (int64_t k = 0; k < 4; ++k) part[k] = load(x + i + k * apart);
      butterfly(part[0], part[1], part[2], part[3]);
      for (int64_t k = 0; k < 4; ++k) store(x + i + k * apart, part[k]);
    }
  }
}

// Up to a vector's length of zeros behind it, in float32.
template <class T>
STEPQUANT_INLINE void copy_row(const T* x, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) store(out + i, load(x + i));
  if (i < width) store(out + i, load_first(x + i, width - i));
}

STEPQUANT_INLINE void multiply_row(float* row, const float* factors, int64_t width) {
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) store(row + i, load(row + i) * load(factors + i));
  if (i < width) store(row + i, load(row + i) * load_first(factors + i, width - i));
}

STEPQUANT_INLINE void encode_row(const float* x, int64_t width, float factor, const Code& code, uint8_t* out) {
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    Floats y[4];
    for (int64_t v = 0; v < 4; ++v) y[v] = load(x + i + v * lanes) * factor * code.inverse;
    emit_block(out + i, y, code);
  }
  for (; i + lanes <= width; i += lanes) emit(out + i, load(x + i) * factor * code.inverse, code);
  if (i < width) emit_first(out + i, load(x + i) * factor * code.inverse, code, width - i);
}

template <class T>
void rotate_rows(const RotateTask& task, int64_t begin, int64_t end) {
  const int64_t width = task.x.width;
  Scratch scratch((width + lanes) * 4 + 64);
  float* row = scratch.take<float>(width + lanes);
  float factor = 1.0f;  // a power of two: exact
  for (int64_t size = 1; size < task.group; size *= 4) factor *= 0.5f;
  for (int64_t r = begin; r < end; ++r) {
    copy_row(static_cast<const T*>(task.x.data) + r * task.x.stride, width, row);
    if (task.factors) multiply_row(row, task.factors, width);
    if (task.group > 1) couple_near(row, width, task.group > 4);
    for (int64_t apart = 16; apart < task.group; apart *= 4) couple_far(row, width, apart);
    const float scale = greatest(row, width) * factor / task.most;
    task.scales[r] = scale <= std::numeric_limits<float>::min() ? 1.0f : scale;
    Code mine = task.code;
    mine.inverse = 1.0f / task.scales[r];
    encode_row(row, width, factor, mine, task.out + r * width);
  }
}

void rotate(const RotateTask& task, int64_t begin, int64_t end) {
  if (task.type == Type::bf16) return rotate_rows<bf16>(task, begin, end);
  rotate_rows<float>(task, begin, end);
}

}  // namespace
}  // namespace stepquant
