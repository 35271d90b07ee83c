// Layer norm and RMS norm over dense rows with adaptive modulation, to bytes or to floats.
#pragma once

#include "epilogue.h"
#include "scratch.h"

namespace stepquant {
namespace {

// Sums of x - center, or of its square, with as many partial sums as hide the latency of an addition.
template <bool squares, class T>
STEPQUANT_INLINE float row_sum(const T* x, int64_t width, float center) {
  const auto term = [&](Floats v) {
    const Floats d = v - center;
    return squares ? d * d : d;
  };
  Floats sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    for (int64_t v = 0; v < 4; ++v) sum[v] += term(load(x + i + v * lanes));
  }
  for (; i + lanes <= width; i += lanes) sum[0] += term(load(x + i));
  float rest = 0;
  for (; i < width; ++i) rest += term(load_first(x + i, 1))[0];
  return total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

// A row that is normed and joins another one.
template <class T, class Out>
void normalize_onto(
    const T* x, int64_t width, float mean, float inverse, const float* slope, const Out* add, Out* out) {
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    store(out + i, (load(x + i) - mean) * inverse * load(slope + i) + load(add + i));
  }
  if (i < width) {
    const Floats x_rest = (load_first(x + i, width - i) - mean) * inverse;
    store_first(out + i, x_rest * load(slope + i) + load_first(add + i, width - i), width - i);
  }
}

template <class T, class Out>
void normalize_row(
    const T* x, int64_t width, float mean, float inverse, const float* slope, const float* offset, const Code& code,
    Out* out) {
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    Floats y[4];
    for (int64_t v = 0; v < 4; ++v) {
      const int64_t c = i + v * lanes;
      y[v] = (load(x + c) - mean) * inverse * load(slope + c) + load(offset + c);
    }
    emit_block(out + i, y, code);
  }
  for (; i + lanes <= width; i += lanes) {
    emit(out + i, (load(x + i) - mean) * inverse * load(slope + i) + load(offset + i), code);
  }
  if (i < width) {
    const Floats x_rest = (load_first(x + i, width - i) - mean) * inverse;
    emit_first(out + i, x_rest * load(slope + i) + load(offset + i), code, width - i);
  }
}

// The affine map after the norm, with the scale of the code.
void fold_modulation(const LayerNormTask& task, int64_t sample, float* slope, float* offset) {
  for (int64_t c = 0; c < task.x.width; ++c) {
    const int64_t at = sample * task.x.width + c;
    const float gain = task.gate ? task.gate[at] : task.scale ? 1.0f + task.scale[at] : 1.0f;
    const float shift = task.shift ? task.shift[at] : 0.0f;
    slope[c] = (task.weight ? task.weight[c] : 1.0f) * gain * task.code.inverse;
    offset[c] = ((task.bias ? task.bias[c] : 0.0f) * gain + shift) * task.code.inverse;
  }
}

template <class T, class Out>
void layer_norm_rows(const LayerNormTask& task, int64_t begin, int64_t end) {
  const int64_t width = task.x.width;
  const float share = 1.0f / static_cast<float>(width);
  Scratch scratch(2 * (width + lanes) * 4 + 2 * 64);
  float* slope = scratch.take<float>(width + lanes);
  float* offset = scratch.take<float>(width + lanes);
  for (int64_t c = 0; c < width + lanes; ++c) slope[c] = offset[c] = 0;
  int64_t folded = -1;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / task.rows_per_sample;
    if (sample != folded) fold_modulation(task, folded = sample, slope, offset);
    const T* x = static_cast<const T*>(task.x.data) + row * task.x.stride;
    const float mean = task.centred ? row_sum<false>(x, width, 0.0f) * share : 0.0f;
    const float inverse = 1.0f / std::sqrt(row_sum<true>(x, width, mean) * share + task.eps);
    Out* out = static_cast<Out*>(task.out) + row * width;
    if constexpr (sizeof(Out) > 1) {
      if (task.add.data) {
        normalize_onto(
            x, width, mean, inverse, slope, static_cast<const Out*>(task.add.data) + row * task.add.stride, out);
        continue;
      }
    }
    normalize_row(x, width, mean, inverse, slope, offset, task.code, out);
  }
}

template <class T>
void layer_norm_rows(const LayerNormTask& task, int64_t begin, int64_t end) {
  switch (task.out_type) {
    case Type::code: return layer_norm_rows<T, uint8_t>(task, begin, end);
    case Type::bf16: return layer_norm_rows<T, bf16>(task, begin, end);
    case Type::f32: return layer_norm_rows<T, float>(task, begin, end);
  }
}

void layer_norm(const LayerNormTask& task, int64_t begin, int64_t end) {
  if (task.type == Type::bf16) return layer_norm_rows<bf16>(task, begin, end);
  layer_norm_rows<float>(task, begin, end);
}

}  // namespace
}  // namespace stepquant
