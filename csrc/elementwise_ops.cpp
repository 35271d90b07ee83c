// quantize, move_codes, quantize_concat, activation_quantize, upsample_nearest2x as torch operations.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "tensors.h"

namespace stepquant {
namespace {

QuantizeTask task_of(const RowView& x, const Code& code, Activation activation, uint8_t* out, int64_t out_stride) {
  return {x.rows, type_of(x.kept), activation, code, out, out_stride};
}

// Dense memory in any order is treated as one long row, which threads share out anywhere.
Tensor quantize_dense(const Tensor& x, const Code& code, Activation activation) {
  Tensor out = at::detail::empty_strided_cpu(x.sizes(), x.strides(), at::kByte);
  const Type type = type_of(x);
  const int64_t size = type == Type::bf16 ? 2 : 4;
  const char* data = static_cast<const char*>(x.const_data_ptr());
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  for_items(x.numel(), 1, [&](int64_t begin, int64_t end) {
    const int64_t width = end - begin;
    kernels().quantize({{data + begin * size, width, width}, type, activation, code, to + begin, width}, 0, 1);
  });
  return out;
}

// Rows as long as the dense run of the input; the result has the memory order that torch gives a tensor like it.
Tensor quantize_any(const Tensor& x, const Code& code, Activation activation) {
  const Tensor source = readable(x);
  if (source.is_non_overlapping_and_dense()) return quantize_dense(source, code, activation);
  Tensor out = at::empty_like(source, at::kByte);
  int64_t along = -1;
  for (int64_t d = 0; d < source.dim(); ++d) {
    if (source.stride(d) == 1 && out.stride(d) == 1) along = d;
  }
  int64_t stride = 0, out_stride = 0;
  const bool rows_in_order = along == 1 ? out.movedim(1, -1).is_contiguous() : along == source.dim() - 1;
  if (!rows_in_order || !collapses(source, along, &stride) || !collapses(out, along, &out_stride)) {
    return quantize_dense(at::empty_like(source).copy_(source), code, activation);
  }
  const RowView rows = rows_of(source, along);
  const QuantizeTask task = task_of(rows, code, activation, out.mutable_data_ptr<uint8_t>(), out_stride);
  for_items(rows.count, rows.rows.width, [&](int64_t begin, int64_t end) { kernels().quantize(task, begin, end); });
  return out;
}

Tensor quantize_balanced(const Tensor& x, const Code& code, const std::optional<Tensor>& factors) {
  TORCH_CHECK(x.dim() >= 1, "quantize: factors are for the numbers of a row, got ", x.sizes());
  const RowView rows = rows_of(x, -1);
  const Numbers balance("quantize", "factors", factors, 1, x.size(-1));
  Tensor out = at::detail::empty_cpu(x.sizes(), at::kByte);
  QuantizeTask task = task_of(rows, code, Activation::none, out.mutable_data_ptr<uint8_t>(), rows.rows.width);
  task.factors = balance.data();
  for_items(rows.count, rows.rows.width, [&](int64_t begin, int64_t end) { kernels().quantize(task, begin, end); });
  const Tensor like = at::empty_like(x, at::kByte);
  return like.strides() == out.strides() ? out : like.copy_(out);
}

Tensor quantize(
    const Tensor& x, double scale, int64_t zero_point, int64_t low, int64_t high,
    const std::optional<Tensor>& factors) {
  const at::AutoDispatchBelowAutograd guard;
  const Code code = to_code("quantize", scale, zero_point, low, high);
  const bool balanced = factors.has_value() && factors->defined();
  return balanced ? quantize_balanced(x, code, factors) : quantize_any(x, code, Activation::none);
}

Tensor move_codes(const Tensor& codes, const Tensor& table) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(
      codes.scalar_type() == at::kByte && table.scalar_type() == at::kByte && table.dim() == 1 && table.size(0) == 256,
      "move_codes: bytes and a table of 256 bytes are expected, got ", codes.scalar_type(), " and ",
      table.scalar_type(), " ", table.sizes());
  const Tensor from = codes.is_non_overlapping_and_dense() ? codes : codes.contiguous(), to = table.contiguous();
  Tensor out = at::empty_like(from);
  const uint8_t* places = from.const_data_ptr<uint8_t>();
  const uint8_t* values = to.const_data_ptr<uint8_t>();
  uint8_t* moved = out.mutable_data_ptr<uint8_t>();
  for_items(codes.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) moved[i] = values[places[i]];
  });
  const Tensor like = at::empty_like(codes);
  return like.strides() == out.strides() ? out : like.copy_(out);
}

Tensor quantize_concat(
    const Tensor& x, const Tensor& skip, double scale, int64_t zero_point, int64_t low, int64_t high) {
  const at::AutoDispatchBelowAutograd guard;
  const Code code = to_code("quantize_concat", scale, zero_point, low, high);
  check_beside("quantize_concat", x, skip);
  const RowView first = rows_of(x, 1), second = rows_of(skip, 1);
  const int64_t width = first.rows.width + second.rows.width;
  Tensor out = empty_channels_last(x, width, at::kByte);
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  const QuantizeTask left = task_of(first, code, Activation::none, to, width);
  const QuantizeTask right = task_of(second, code, Activation::none, to + first.rows.width, width);
  for_items(first.count, width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += 32) {  // both halves of a pixel meet in one cache line
      kernels().quantize(left, row, std::min(row + 32, end));
      kernels().quantize(right, row, std::min(row + 32, end));
    }
  });
  return out;
}

Tensor activation_quantize(
    const Tensor& x, c10::string_view activation_name, double scale, int64_t zero_point, int64_t low, int64_t high) {
  const at::AutoDispatchBelowAutograd guard;
  const Code code = to_code("activation_quantize", scale, zero_point, low, high);
  const Activation activation = to_activation(activation_name);
  if (activation < Activation::geglu) return quantize_any(x, code, activation);
  TORCH_CHECK(
      x.dim() >= 1 && x.size(-1) % 2 == 0,
      "activation_quantize: a gated activation halves the last dimension of x, got ", x.sizes());
  RowView rows = rows_of(x, -1);
  at::DimVector sizes(x.sizes());
  sizes.back() /= 2;
  rows.rows.width /= 2;
  Tensor out = at::detail::empty_cpu(sizes, at::kByte);
  const QuantizeTask task = task_of(rows, code, activation, out.mutable_data_ptr<uint8_t>(), rows.rows.width);
  for_items(rows.count, rows.rows.width, [&](int64_t begin, int64_t end) { kernels().quantize(task, begin, end); });
  return out;
}

Tensor upsample_nearest2x(const Tensor& x) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(
      x.dim() == 4 && x.scalar_type() == at::kByte,
      "upsample_nearest2x: x is expected as bytes (batch, channels, height, width), got ", x.sizes(), " of ",
      x.scalar_type());
  const Tensor pixels = x.contiguous(at::MemoryFormat::ChannelsLast);
  Tensor out = at::detail::empty_cpu(
      {x.size(0), x.size(1), 2 * x.size(2), 2 * x.size(3)}, at::kByte, false, at::MemoryFormat::ChannelsLast);
  const UpsampleTask task{pixels.const_data_ptr<uint8_t>(), out.mutable_data_ptr<uint8_t>(), x.size(3), x.size(1)};
  for_items(x.size(0) * x.size(2), x.size(3) * x.size(1), [&](int64_t begin, int64_t end) {
    kernels().upsample(task, begin, end);
  });
  return out;
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("quantize", quantize);
  library.impl("move_codes", move_codes);
  library.impl("quantize_concat", quantize_concat);
  library.impl("activation_quantize", activation_quantize);
  library.impl("upsample_nearest2x", upsample_nearest2x);
}

}  // namespace
}  // namespace stepquant
