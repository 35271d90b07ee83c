// Activations of vectors of floats.
#pragma once

#include "vector.h"

namespace stepquant {
namespace {

constexpr float log2_of_e = 1.4426950408889634f;

STEPQUANT_INLINE Floats silu(Floats x) {
  return x / (1.0f + exp2(x * -log2_of_e));
}

// x * Phi(x); erfc(z) = t * polynomial(t) * exp(-z^2) with t = 1 / (1 + 0.4 z) to 3e-7 relative, so that the
// tail keeps its relative accuracy.
STEPQUANT_INLINE Floats gelu(Floats x) {
  const Floats magnitude = (Floats)(bits_of(x) & 0x7fffffff);
  const Floats z = smaller(magnitude * 0.70710678118654752f, splat(9.2f));
  const Floats t = 1.0f / (1.0f + z * 0.4f);
  Floats p = t * 5.016240105032921e-2f - 1.8245147168636322e-1f;
  p = p * t + 1.6823704540729523e-1f;
  p = p * t - 4.741532262414694e-3f;
  p = p * t + 1.4091309905052185e-1f;
  p = p * t + 1.687258929014206e-1f;
  p = p * t + 2.078055590391159e-1f;
  p = p * t + 2.2567342221736908e-1f;
  p = p * t + 2.2567571699619293e-1f;
  const Floats tail = 0.5f * magnitude * (p * t) * exp2(z * z * -log2_of_e);
  return larger(x, Floats{}) - tail;
}

STEPQUANT_INLINE Floats gelu_tanh(Floats x) {
  const Floats inner = -1.5957691216057308f * log2_of_e * (x + 0.044715f * (x * x * x));
  return x / (1.0f + exp2(inner));
}

template <Activation activation>
STEPQUANT_INLINE Floats activate(Floats x) {
  if constexpr (activation == Activation::silu || activation == Activation::swiglu) {
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
  return activation == Activation::geglu || activation == Activation::swiglu;
}

}  // namespace
}  // namespace stepquant
