// RMS or layer norm and rotary embedding of queries and keys, to bytes: one visit of each token.
#pragma once

#include "layer_norm.h"

namespace stepquant {
namespace {

// Every number in the place of its neighbour: 1, 0, 3, 2 and so on.
STEPQUANT_INLINE Floats neighbours(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permute_ps((__m512)x, 0xb1);
#elif defined(__AVX2__)
  return (Floats)_mm256_permute_ps((__m256)x, 0xb1);
#elif defined(__SSE2__)
  return (Floats)_mm_shuffle_ps((__m128)x, (__m128)x, 0xb1);
#else
  Floats y;
  for (int64_t i = 0; i < lanes; ++i) y[i] = x[i ^ 1];
  return y;
#endif
}

// What becomes of one head: its norm, the affine map behind that with the scale of the code, and the angles of its token, for
// each channel where pairs are neighbours (those of the first with a minus in the sines), for each pair otherwise.
struct Turn {
  float mean;
  float inverse;
  const float* slope;
  const float* offset;
  const float* cosines;
  const float* sines;

  STEPQUANT_INLINE Floats normed(Floats x, int64_t at) const {
    return (x - mean) * inverse * load(slope + at) + load(offset + at);
  }
};

// The angles of one token as `Turn` has them.
void angles_of(const RotaryTask& task, int64_t row, float* cosines, float* sines) {
  const int64_t sample = row / task.tokens, token = row % task.tokens;
  const int64_t from = sample * task.angle_strides[0] + token * task.angle_strides[1], step = task.angle_strides[2];
  for (int64_t pair = 0; pair < task.head_width / 2; ++pair) {
    const float cosine = task.cosines[from + pair * step], sine = task.sines[from + pair * step];
    if (task.halves) {
      cosines[pair] = cosine;
      sines[pair] = sine;
    } else {
      cosines[2 * pair] = cosines[2 * pair + 1] = cosine;
      sines[2 * pair] = -sine;
      sines[2 * pair + 1] = sine;
    }
  }
}

template <bool turned>
STEPQUANT_INLINE Floats turn_neighbours(Floats x, const Turn& by, int64_t at) {
  const Floats y = by.normed(x, at);
  if constexpr (!turned) return y;
  return y * load(by.cosines + at) + neighbours(y) * load(by.sines + at);
}

// A head whose pairs are neighbours, or that nothing turns.
template <bool turned, class T>
void encode_head(const T* x, int64_t width, const Turn& by, const Code& code, uint8_t* out) {
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    Floats y[4];
    for (int64_t v = 0; v < 4; ++v) {
      y[v] = turn_neighbours<turned>(load(x + i + v * lanes), by, i + v * lanes);
    }
    emit_block(out + i, y, code);
  }
  for (; i < width; i += lanes) {
    const int64_t count = width - i < lanes ? width - i : lanes;
    const Floats read = count < lanes ? load_first(x + i, count) : load(x + i);
    const Floats y = turn_neighbours<turned>(read, by, i);
    count < lanes ? emit_first(out + i, y, code, count) : emit(out + i, y, code);
  }
}

// A head whose pairs lie half of it apart.
template <class T>
void encode_halves(const T* x, int64_t width, const Turn& by, const Code& code, uint8_t* out) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += lanes) {
    const int64_t count = half - i < lanes ? half - i : lanes;
    const auto read = [&](int64_t at) {
      return by.normed(count < lanes ? load_first(x + at, count) : load(x + at), at);
    };
    const Floats first = read(i), second = read(half + i), cosine = load(by.cosines + i), sine = load(by.sines + i);
    emit_first(out + i, first * cosine - second * sine, code, count);
    emit_first(out + half + i, second * cosine + first * sine, code, count);
  }
}

template <class T>
void rotary_rows(const RotaryTask& task, int64_t begin, int64_t end) {
  const int64_t width = task.x.width, head = task.head_width, normed = task.across ? width : head;
  Scratch scratch((2 * normed + 2 * head + 4 * lanes) * 4 + 4 * 64);
  float* slope = scratch.take<float>(normed + lanes);
  float* offset = scratch.take<float>(normed + lanes);
  float* cosines = scratch.take<float>(head + lanes);
  float* sines = scratch.take<float>(head + lanes);
  for (int64_t c = 0; c < normed + lanes; ++c) {
    slope[c] = c < normed ? (task.weight ? task.weight[c] : 1.0f) * task.code.inverse : 0.0f;
    offset[c] = c < normed && task.bias ? task.bias[c] * task.code.inverse : 0.0f;
  }
  for (int64_t c = 0; c < head + lanes; ++c) cosines[c] = sines[c] = 0;
  Turn by{0.0f, 0.0f, slope, offset, cosines, sines};
  const float count = static_cast<float>(normed);
  const auto find = [&](const T* x) {
    by.mean = task.centred ? row_sum<false>(x, normed, 0.0f) / count : 0.0f;
    by.inverse = 1.0f / std::sqrt(row_sum<true>(x, normed, by.mean) / count + task.eps);
  };
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(task.x.data) + row * task.x.stride;
    if (task.cosines) angles_of(task, row, cosines, sines);
    for (int64_t first = 0; first < width; first += head) {
      if (!task.across || first == 0) find(x + first);
      if (task.across) by.slope = slope + first, by.offset = offset + first;
      uint8_t* out = task.out + row * width + first;
      if (!task.cosines) {
        encode_head<false>(x + first, head, by, task.code, out);
      } else if (task.halves) {
        encode_halves(x + first, head, by, task.code, out);
      } else {
        encode_head<true>(x + first, head, by, task.code, out);
      }
    }
  }
}

void rotary(const RotaryTask& task, int64_t begin, int64_t end) {
  if (task.type == Type::bf16) return rotary_rows<bf16>(task, begin, end);
  rotary_rows<float>(task, begin, end);
}

}  // namespace
}  // namespace stepquant
