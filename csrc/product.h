// The arguments that convolve and linear share: a packed weight with its epilogue, and the checks that keep kernels from
// reading or writing outside of their tensors.
#pragma once

#include <ATen/ops/constant_pad_nd.h>

#include "tensors.h"

namespace stepquant {

using Optional = std::optional<Tensor>;

inline int64_t groups_of(int64_t outs) {
  return (outs + convolve_group - 1) / convolve_group;
}

struct Product {
  const Tensor& weight;
  const Tensor& weight_scale;
  const Tensor& weight_sum;
  const Optional& bias;
  double scale;
  int64_t zero_point;
};

inline void check(const char* name, const Product& product, int64_t taps, int64_t channels, at::ScalarType type) {
  const int64_t outs = product.weight_scale.numel(), padded = groups_of(outs) * convolve_group;
  TORCH_CHECK(channels > 0 && outs > 0, name, ": a product has inputs and outputs, got ", channels, " and ", outs);
  TORCH_CHECK(
      product.weight.numel() == padded * filled(channels) * taps && product.weight.is_contiguous() &&
          product.weight.scalar_type() == at::kChar,
      name, ": weight, as packed, does not fit ", channels, " channels and ", taps, " taps to ", outs);
  TORCH_CHECK(
      product.weight_sum.numel() == padded && product.weight_sum.is_contiguous() &&
          product.weight_sum.scalar_type() == at::kInt,
      name, ": weight_sum is expected as ", padded, " dense sums of 32 bits, got ", product.weight_sum.sizes(), " of ",
      product.weight_sum.scalar_type());
  TORCH_CHECK(
      0 <= product.zero_point && product.zero_point <= 255, name, ": zero_point is a byte, got ", product.zero_point);
  TORCH_CHECK(type == at::kBFloat16 || type == at::kFloat, name, ": dtype is bfloat16 or float32, got ", type);
}

// What is added to the result, in its type.
inline Tensor to_add(const char* name, const Tensor& add, const Tensor& out) {
  TORCH_CHECK(
      add.sizes() == out.sizes() && !add.is_complex(), name, ": add has another shape than the result, ", add.sizes(),
      " of ", add.scalar_type(), " and not ", out.sizes());
  return add.scalar_type() == out.scalar_type() ? add : add.to(out.scalar_type());
}

// One side of a low-rank branch, as packed: numbers of one type in [group of outputs][word][output][number of the word].
inline void check_side(const char* name, const Tensor& side, int64_t outs) {
  const bool wide = side.scalar_type() == at::kFloat;
  TORCH_CHECK(
      side.dim() == 4 && side.is_contiguous() && (wide || side.scalar_type() == at::kBFloat16) && outs > 0 &&
          side.size(0) == groups_of(outs) && side.size(2) == convolve_group && side.size(3) == (wide ? 1 : 2),
      name, ": a side, as packed, does not fit ", outs, " outputs: ", side.sizes(), " of ", side.scalar_type());
}

// Rows as the kernels of a side read them: dense, in its type, with zeros where they do not fill their last word.
inline Tensor in_words(const char* name, const Tensor& x, const Tensor& side) {
  const int64_t words = side.size(1), word = side.size(3);
  TORCH_CHECK(
      x.dim() == 2 && x.size(1) > 0 && (x.size(1) + word - 1) / word == words && !x.is_complex(), name, ": rows of ",
      words, " words of ", word, " numbers are expected for this side, got ", x.sizes(), " of ", x.scalar_type());
  Tensor rows = x.to(side.scalar_type());
  if (rows.size(1) % word) rows = at::constant_pad_nd(rows, {0, 1});
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

// How a kernel walks over an image; more than so many pixels at once is a mistake.
inline void check_walk(const char* name, at::IntArrayRef numbers, size_t count, int64_t least) {
  constexpr int64_t most = 1 << 15;
  bool fits = numbers.size() == count;
  for (const int64_t number : numbers) fits = fits && least <= number && number <= most;
  TORCH_CHECK(fits, "convolve: ", name, " is expected as ", count, " numbers of at least ", least, ", got ", numbers);
}

}  // namespace stepquant
