// Activations of vectors of floats.
#pragma once

#include "vector.h"

namespace stepquant {
namespace {

constexpr float log2_of_e = 1.4426950408889634f;

STEPQUANT_INLINE Floats silu(Floats x) {
  return x / (1.0f + exp2(x * -log2_of_e));
}

// x * Phi(x); Phi(-m) = t * polynomial(t) * exp(-m^2 / 2) with t = 1 / (1 + 0.3 m) to 2e-7 relative, so that the
// tail keeps its relative accuracy. What is not a number stays so.
STEPQUANT_INLINE Floats gelu(Floats x) {
  const Floats m = smaller(splat(13.0f), (Floats)(bits_of(x) & 0x7fffffff));
  const Floats t = 1.0f / (1.0f + m * 0.3f);
  Floats p = t * 3.6168246455001565e-2f - 1.592666744547057e-1f;
  p = p * t + 2.099244289750336e-1f;
  p = p * t - 5.6987022672655284e-2f;
  p = p * t + 1.3031985833543927e-1f;
  p = p * t + 9.937683848856482e-2f;
  p = p * t + 1.2084068212288115e-1f;
  p = p * t + 1.1962358571610493e-1f;
  return larger(x, Floats{}) - m * (p * t) * exp2_inside(m * m * (-0.5f * log2_of_e));
}

STEPQUANT_INLINE Floats gelu_tanh(Floats x) {
  const Floats inner = -1.5957691216057308f * log2_of_e * (x + 0.044715f * (x * x * x));
  return x / (1.0f + exp2(inner));
}

template <Activation activation>
STEPQUANT_INLINE Floats activate(Floats x) {
  if constexpr (
      activation == Activation::silu || activation == Activation::swiglu || activation == Activation::swiglu_first) {
    return silu(x);
  } else if constexpr (activation == Activation::gelu || activation == Activation::geglu) {
    return gelu(x);
  } else if constexpr (activation == Activation::gelu_tanh) {
    return gelu_tanh(x);
  } else {
    return x;
  }
}

constexpr bool is_gated(Activation activation) {
  return activation == Activation::geglu || activation == Activation::swiglu || activation == Activation::swiglu_first;
}

}  // namespace
}  // namespace stepquant
