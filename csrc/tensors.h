// Tensors as the kernels see them: types, dense rows, and memory for results.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <string_view>
#include <utility>

#include "kernels.h"

namespace stepquant {

using at::Tensor;

constexpr int64_t least_per_thread = 16384;  // numbers; fewer do not repay waking a thread

// Runs f on ranges of items that cost about `cost` numbers each.
template <class F>
void for_items(int64_t items, int64_t cost, const F& f) {
  at::parallel_for(0, items, (least_per_thread + cost - 1) / std::max<int64_t>(cost, 1), f);
}

inline Code to_code(const char* operation, double scale, int64_t zero_point, int64_t low, int64_t high) {
  TORCH_CHECK(
      0 <= low && low <= high && high <= 255, operation, ": codes are bytes: 0 <= low <= high <= 255, got ", low, ", ",
      high);
  TORCH_CHECK(
      0 <= zero_point && zero_point <= 255, operation, ": the zero point of a code is a byte, got ", zero_point);
  TORCH_CHECK(
      scale > 0 && std::isfinite(1.0f / static_cast<float>(scale)), operation,
      ": the scale of a code is positive, got ", scale);
  const auto lowest = static_cast<float>(low - zero_point), highest = static_cast<float>(high - zero_point);
  return {1.0f / static_cast<float>(scale), lowest, highest, static_cast<int32_t>(zero_point)};
}

inline Activation to_activation(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "geglu") return Activation::geglu;
  if (name == "swiglu") return Activation::swiglu;
  if (name == "swiglu_first") return Activation::swiglu_first;
  TORCH_CHECK(
      false, "unknown activation '", name, "'; expected none, silu, gelu, gelu_tanh, geglu, swiglu or swiglu_first");
}

// The tensor in a type that kernels read: bfloat16 stays, all other real numbers become float32.
inline Tensor readable(const Tensor& x) {
  TORCH_CHECK(!x.is_complex(), "complex numbers have no codes, got ", x.scalar_type());
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat ? x : x.to(at::kFloat);
}

inline Type type_of(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? Type::bf16 : Type::f32;
}

// Small per-channel numbers as dense float32; null if there are none.
class Numbers {
 public:
  Numbers(const char* operation, const char* name, const std::optional<Tensor>& x, int64_t rows, int64_t width) {
    if (!x.has_value() || !x->defined()) return;
    TORCH_CHECK(
        (in_rows(*x, rows, width) || in_rows(*x, 1, width)) && !x->is_complex(), operation, ": ", name, ": expected ",
        rows, " rows of ", width, " numbers, got ", x->sizes(), " of ", x->scalar_type());
    kept_ = *x;
    if (x->numel() != rows * width) kept_ = kept_.reshape({1, width}).expand({rows, width});
    if (kept_.scalar_type() != at::kFloat) kept_ = kept_.to(at::kFloat);
    if (!kept_.is_contiguous()) kept_ = kept_.contiguous();
  }
  const float* data() const { return kept_.defined() ? kept_.const_data_ptr<float>() : nullptr; }

 private:
  // Whether these are the sizes, but for dimensions of one.
  static bool in_rows(const Tensor& x, int64_t rows, int64_t width) {
    if (x.numel() != rows * width) return false;
    for (const int64_t size : x.sizes()) {
      if (size == 1) continue;
      if (rows != 1 && size == rows) {
        rows = 1;
      } else if (rows == 1 && size == width) {
        width = 1;
      } else {
        return false;
      }
    }
    return true;
  }

  Tensor kept_;
};

// A tensor as rows along one dimension, copied only if its strides do not allow that.
struct RowView {
  Tensor kept;
  Rows rows;
  int64_t count;
};

inline bool collapses(const Tensor& x, int64_t along, int64_t* stride) {
  if (x.size(along) > 1 && x.stride(along) != 1) return false;
  int64_t expected = -1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == along || x.size(d) == 1) continue;
    if (expected < 0) expected = *stride = x.stride(d);
    if (x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  if (expected < 0) *stride = x.size(along);
  return true;
}

// Rows along `along` (1: channels of (batch, channels, ...); -1: the last dimension), batch-major.
inline RowView rows_of(const Tensor& x, int64_t along) {
  along = along < 0 ? x.dim() - 1 : along;
  RowView view{readable(x), {}, 0};
  int64_t stride = 0;
  if (!collapses(view.kept, along, &stride)) {
    view.kept = view.kept.movedim(along, -1).contiguous();
    stride = x.size(along);
  }
  view.rows = {view.kept.const_data_ptr(), x.size(along), stride};
  view.count = x.numel() / std::max<int64_t>(x.size(along), 1);
  return view;
}

// x and skip, which lie side by side along the channels.
inline void check_beside(const char* operation, const Tensor& x, const Tensor& skip) {
  TORCH_CHECK(x.dim() >= 2, operation, ": x is expected as (batch, channels, ...), got ", x.sizes());
  bool fits = skip.dim() == x.dim();
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = d == 1 || skip.size(d) == x.size(d);
  TORCH_CHECK(
      fits && x.size(1) > 0 && skip.size(1) > 0, operation, ": x and skip differ in more than their channels, ",
      x.sizes(), " and ", skip.sizes());
}

// Memory for (batch, channels, ...) with the channels densest.
inline Tensor empty_channels_last(const Tensor& like, int64_t channels, at::ScalarType type) {
  at::DimVector sizes(like.sizes()), strides(like.dim());
  sizes[1] = channels;
  int64_t step = channels;
  for (int64_t d = like.dim() - 1; d > 1; --d) {
    strides[d] = step;
    step *= sizes[d];
  }
  strides[1] = 1;
  strides[0] = step;
  return at::detail::empty_strided_cpu(sizes, strides, type);
}

}  // namespace stepquant
