// Rows of floats to rows of bytes, with an activation in between.
#pragma once

#include "activation.h"
#include "epilogue.h"

namespace stepquant {
namespace {

template <class T, Activation activation>
STEPQUANT_INLINE Floats scaled_first(const T* x, int64_t width, int64_t count, float inverse) {
  constexpr bool behind = activation == Activation::geglu || activation == Activation::swiglu;
  const T* gate = behind ? x + width : x;
  const T* value = behind ? x : x + width;
  Floats y = activate<activation>(count < lanes ? load_first(gate, count) : load(gate));
  if constexpr (is_gated(activation)) y = y * (count < lanes ? load_first(value, count) : load(value));
  return y * inverse;
}

template <class T, Activation activation>
void quantize_row(const T* x, int64_t width, const Code& code, uint8_t* out) {
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    Floats y[4];
    for (int64_t v = 0; v < 4; ++v) y[v] = scaled_first<T, activation>(x + i + v * lanes, width, lanes, code.inverse);
    emit_block(out + i, y, code);
  }
  for (; i + lanes <= width; i += lanes) {
    emit(out + i, scaled_first<T, activation>(x + i, width, lanes, code.inverse), code);
  }
  if (i < width) {
    emit_first(out + i, scaled_first<T, activation>(x + i, width, width - i, code.inverse), code, width - i);
  }
}

// Numbers are multiplied by their factor and then by the inverse: two roundings, as where it is defined.
template <class T>
void quantize_balanced_row(const T* x, const float* factors, int64_t width, const Code& code, uint8_t* out) {
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes) {
    Floats y[4];
    for (int64_t v = 0; v < 4; ++v) y[v] = load(x + i + v * lanes) * load(factors + i + v * lanes) * code.inverse;
    emit_block(out + i, y, code);
  }
  for (; i + lanes <= width; i += lanes) emit(out + i, load(x + i) * load(factors + i) * code.inverse, code);
  if (i < width) {
    const int64_t rest = width - i;
    emit_first(out + i, load_first(x + i, rest) * load_first(factors + i, rest) * code.inverse, code, rest);
  }
}

template <class T>
void quantize_balanced_rows(const QuantizeTask& task, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(task.x.data);
  for (int64_t row = begin; row < end; ++row) {
    quantize_balanced_row(
        x + row * task.x.stride, task.factors, task.x.width, task.code, task.out + row * task.out_stride);
  }
}

template <class T, Activation activation>
void quantize_rows(const QuantizeTask& task, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(task.x.data);
  for (int64_t row = begin; row < end; ++row) {
    quantize_row<T, activation>(x + row * task.x.stride, task.x.width, task.code, task.out + row * task.out_stride);
  }
}

template <class T>
void quantize_rows(const QuantizeTask& task, int64_t begin, int64_t end) {
  if (task.factors) return quantize_balanced_rows<T>(task, begin, end);
  switch (task.activation) {
    case Activation::none: return quantize_rows<T, Activation::none>(task, begin, end);
    case Activation::silu: return quantize_rows<T, Activation::silu>(task, begin, end);
    case Activation::gelu: return quantize_rows<T, Activation::gelu>(task, begin, end);
    case Activation::gelu_tanh: return quantize_rows<T, Activation::gelu_tanh>(task, begin, end);
    case Activation::geglu: return quantize_rows<T, Activation::geglu>(task, begin, end);
    case Activation::swiglu: return quantize_rows<T, Activation::swiglu>(task, begin, end);
    case Activation::swiglu_first: return quantize_rows<T, Activation::swiglu_first>(task, begin, end);
  }
}

void quantize(const QuantizeTask& task, int64_t begin, int64_t end) {
  if (task.type == Type::bf16) return quantize_rows<bf16>(task, begin, end);
  quantize_rows<float>(task, begin, end);
}

}  // namespace
}  // namespace stepquant
