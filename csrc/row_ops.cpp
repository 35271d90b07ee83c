// row_scales, quantize_rows, scale_rows as torch operations: a scale for each row, or image, of an input.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <limits>

#include "tensors.h"

namespace stepquant {
namespace {

// The input in memory where whatever shares a scale lies together, in the order of the scales.
struct Blocks {
  Tensor kept;
  int64_t count;
  int64_t size;
};

Blocks blocks_of(const Tensor& x, int64_t first) {
  int64_t count = 1;
  for (int64_t d = 0; d < first; ++d) count *= x.size(d);
  const int64_t size = count ? x.numel() / count : 0;
  const Tensor source = readable(x);
  // A dense image may have its pixels in any order.
  const bool together =
      source.is_contiguous() || (first == 1 && source.is_non_overlapping_and_dense() && source.stride(0) == size);
  return {together ? source : source.contiguous(), count, size};
}

// Magnitudes of floats are ordered as their bits are, and NaN lies above infinity.
int32_t greatest(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  return most;
}

int32_t greatest(const int16_t* x, int64_t count) {
  int16_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max<int16_t>(most, x[i] & 0x7fff);
  return static_cast<int32_t>(most) << 16;
}

Tensor row_scales(const Tensor& x, int64_t first, int64_t qmax) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(
      -x.dim() <= first && first < x.dim() && x.numel() > 0 && qmax > 0,
      "row_scales: numbers, a dimension of theirs and a positive integer are expected, got ", x.sizes(), ", ", first,
      ", ", qmax);
  first = first < 0 ? first + x.dim() : first;
  const Blocks blocks = blocks_of(x, first);
  at::DimVector sizes(x.sizes());
  std::fill(sizes.begin() + first, sizes.end(), 1);
  Tensor out = at::detail::empty_cpu(sizes, at::kFloat);
  float* scales = out.mutable_data_ptr<float>();
  const bool wide = blocks.kept.scalar_type() == at::kFloat;
  const void* data = blocks.kept.const_data_ptr();
  for_items(blocks.count, blocks.size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * blocks.size;
      const int32_t bits = wide ? greatest(static_cast<const float*>(data) + at, blocks.size)
                                : greatest(static_cast<const int16_t*>(data) + at, blocks.size);
      float most;
      std::memcpy(&most, &bits, sizeof most);
      const float scale = most / static_cast<float>(qmax);
      scales[row] = scale <= std::numeric_limits<float>::min() ? 1.0f : scale;
    }
  });
  return out;
}

Tensor quantize_rows(
    const Tensor& x, const Tensor& scales, double scale, int64_t zero_point, int64_t low, int64_t high) {
  const at::AutoDispatchBelowAutograd guard;
  const Code code = to_code("quantize_rows", scale, zero_point, low, high);
  int64_t first = 0;
  while (first < x.dim() && scales.dim() == x.dim() && scales.size(first) == x.size(first)) ++first;
  bool fits = scales.dim() == x.dim() && scales.scalar_type() == at::kFloat;
  for (int64_t d = first; fits && d < x.dim(); ++d) fits = scales.size(d) == 1;
  TORCH_CHECK(
      fits, "quantize_rows: scales are expected as float32 with size 1 from some dimension of x on, got ",
      scales.scalar_type(), " ", scales.sizes(), " for ", x.sizes());
  const Blocks blocks = blocks_of(x, first);
  const Tensor dense = scales.contiguous();
  Tensor out = at::empty_like(blocks.kept, at::kByte);
  const Type type = type_of(blocks.kept);
  const int64_t number = type == Type::bf16 ? 2 : 4;
  const char* data = static_cast<const char*>(blocks.kept.const_data_ptr());
  const float* own = dense.const_data_ptr<float>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  for_items(x.numel(), 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / blocks.size, width = std::min(end, (row + 1) * blocks.size) - begin;
      Code mine = code;
      mine.inverse = 1.0f / own[row];
      kernels().quantize(
          {{data + begin * number, width, width}, type, Activation::none, mine, to + begin, width}, 0, 1);
      begin += width;
    }
  });
  const Tensor like = at::empty_like(x, at::kByte);
  return like.strides() == out.strides() ? out : like.copy_(out);
}

void store(float* out, float y) {
  *out = y;
}

// To the nearest, in integers, which compilers turn into vectors.
void store(uint16_t* out, float y) {
  uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <class T>
void scale_row(const float* sums, float scale, const float* bias, int64_t width, T* out) {
  if (bias == nullptr) {
    for (int64_t i = 0; i < width; ++i) store(out + i, sums[i] * scale);
    return;
  }
  for (int64_t i = 0; i < width; ++i) {
    const float product = sums[i] * scale;  // rounded before the bias is added, as where it is defined
    store(out + i, product + bias[i]);
  }
}

Tensor scale_rows(
    const Tensor& sums, const Tensor& scales, const std::optional<Tensor>& bias, int64_t channels,
    at::ScalarType dtype) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(
      sums.scalar_type() == at::kFloat && scales.scalar_type() == at::kFloat && sums.dim() == scales.dim() &&
          -sums.dim() <= channels && channels < sums.dim() && (dtype == at::kFloat || dtype == at::kBFloat16),
      "scale_rows: float32 sums and scales of as many dimensions are expected, and bfloat16 or float32 as result, got ",
      sums.scalar_type(), " ", sums.sizes(), ", ", scales.scalar_type(), " ", scales.sizes(), ", ", dtype);
  channels = channels < 0 ? channels + sums.dim() : channels;
  int64_t first = 0;
  while (first < sums.dim() && scales.size(first) == sums.size(first)) ++first;
  for (int64_t d = first; d < sums.dim(); ++d) {
    TORCH_CHECK(scales.size(d) == 1, "scale_rows: ", scales.sizes(), " is no scale for each row of ", sums.sizes());
  }
  const int64_t width = sums.size(channels), rows = width ? sums.numel() / width : 0;
  TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == width), "scale_rows: a bias is expected for each of ", width,
      " channels, got ", bias ? bias->sizes() : at::IntArrayRef());
  TORCH_CHECK(
      first <= channels || sums.numel() == scales.numel() || width == 1,
      "scale_rows: channels of one row share its scale, got ", scales.sizes());
  const Tensor x = sums.movedim(channels, -1).contiguous();
  const Tensor own = scales.movedim(channels, -1).expand_as(x).select(-1, 0).contiguous();
  const Tensor added = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  Tensor out = at::empty_like(x, dtype);
  const float *from = x.const_data_ptr<float>(), *scale = own.const_data_ptr<float>();
  const float* more = bias ? added.const_data_ptr<float>() : nullptr;
  void* to = out.mutable_data_ptr();
  for_items(rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * width;
      if (dtype == at::kFloat) {
        scale_row(from + at, scale[row], more, width, static_cast<float*>(to) + at);
      } else {
        scale_row(from + at, scale[row], more, width, static_cast<uint16_t*>(to) + at);
      }
    }
  });
  const Tensor there = out.movedim(-1, channels), like = at::empty_like(sums, dtype);
  return like.strides() == there.strides() ? there : like.copy_(there);
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("row_scales", row_scales);
  library.impl("quantize_rows", quantize_rows);
  library.impl("scale_rows", scale_rows);
}

}  // namespace
}  // namespace stepquant
