// group_norm, group_norm_quantize, layer_norm_quantize, rms_norm, rms_norm_quantize as torch operations.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "tensors.h"

namespace stepquant {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t slice_bytes = 256 * 1024;  // of input, so that the second visit finds it in the second-level cache

// How many groups one item takes: full vectors of channels, slices that stay in the cache, and items for every thread.
int64_t groups_per_item(int64_t samples, int64_t groups, int64_t group_width, int64_t pixel_bytes) {
  const int64_t threads = at::get_num_threads();
  int64_t taken = 1;
  while (taken < groups && (taken * group_width < 32 || taken * group_width % 16)) ++taken;
  // Partial vectors of channels cost less than threads without work.
  if (samples * ((groups + taken - 1) / taken) < threads) taken = std::max<int64_t>(1, samples * groups / threads);
  for (int64_t next = 2 * taken; next <= groups; next *= 2) {
    const int64_t items = samples * ((groups + next - 1) / next);
    const bool balanced = items >= 4 * threads || (items >= threads && items % threads == 0);
    if (!balanced || next * group_width * pixel_bytes > slice_bytes) break;
    taken = next;
  }
  return taken;
}

Tensor run_group_norm(
    const char* name, const Tensor& x, const Optional& skip, const Optional& weight, const Optional& bias,
    int64_t groups, double eps, c10::string_view activation_name, const Optional& add, const Optional& scale,
    const Optional& shift, const Code* code) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(x.dim() >= 2, name, ": x is expected as (batch, channels, ...), got ", x.sizes());
  const Activation activation = to_activation(activation_name);
  TORCH_CHECK(activation <= Activation::silu, name, ": activation is 'none' or 'silu', got '", activation_name, "'");
  const RowView first = rows_of(x, 1);
  RowView second{};
  if (skip.has_value()) {
    check_beside(name, x, *skip);
    TORCH_CHECK(!skip->is_complex(), name, ": skip is complex");
    second = rows_of(skip->to(first.kept.scalar_type()), 1);
  }
  const int64_t channels = first.rows.width + second.rows.width, samples = x.size(0);
  TORCH_CHECK(
      groups > 0 && channels % groups == 0, name, ": ", groups, " groups do not divide ", channels, " channels");
  const Numbers weights(name, "weight", weight, 1, channels), biases(name, "bias", bias, 1, channels);
  const Numbers adds(name, "add", add, samples, channels), scales(name, "scale", scale, samples, channels);
  const Numbers shifts(name, "shift", shift, samples, channels);
  const at::ScalarType out_type = code ? at::kByte : first.kept.scalar_type();
  Tensor out = empty_channels_last(x, channels, out_type);
  if (out.numel() == 0) return out;
  GroupNormTask task{};
  task.x = first.rows;
  task.skip = second.rows;
  task.type = type_of(first.kept);
  task.out_type = code ? Type::code : task.type;
  task.pixels = first.count / samples;
  task.groups = groups;
  task.groups_per_item =
      groups_per_item(samples, groups, channels / groups, task.pixels * (task.type == Type::bf16 ? 2 : 4));
  task.items_per_sample = (groups + task.groups_per_item - 1) / task.groups_per_item;
  task.eps = static_cast<float>(eps);
  task.activation = activation;
  task.weight = weights.data();
  task.bias = biases.data();
  task.add = adds.data();
  task.scale = scales.data();
  task.shift = shifts.data();
  if (code) task.code = *code;
  task.out = out.mutable_data_ptr();
  for_items(
      samples * task.items_per_sample, out.numel() / (samples * task.items_per_sample),
      [&](int64_t begin, int64_t end) { kernels().group_norm(task, begin, end); });
  return out.scalar_type() == x.scalar_type() || code ? out : out.to(x.scalar_type());
}

Tensor group_norm(
    const Tensor& x, const Optional& weight, const Optional& bias, int64_t groups, double eps,
    c10::string_view activation, const Optional& add, const Optional& scale, const Optional& shift,
    const Optional& skip) {
  return run_group_norm("group_norm", x, skip, weight, bias, groups, eps, activation, add, scale, shift, nullptr);
}

Tensor group_norm_quantize(
    const Tensor& x, const Optional& weight, const Optional& bias, int64_t groups, double eps, double code_scale,
    int64_t zero_point, int64_t low, int64_t high, c10::string_view activation, const Optional& add,
    const Optional& scale, const Optional& shift, const Optional& skip) {
  constexpr const char* name = "group_norm_quantize";
  const Code code = to_code(name, code_scale, zero_point, low, high);
  return run_group_norm(name, x, skip, weight, bias, groups, eps, activation, add, scale, shift, &code);
}

Tensor run_layer_norm(
    const char* name, const Tensor& x, const Optional& weight, const Optional& bias, double eps, const Code& code,
    const Optional& scale, const Optional& shift, bool centred, at::ScalarType type = at::kByte,
    const Optional& gate = {}, const Optional& add = {}) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(x.dim() >= 2, name, ": x is expected as (batch, ..., width), got ", x.sizes());
  const RowView rows = rows_of(x, -1);
  const int64_t width = rows.rows.width, samples = x.size(0);
  const Numbers weights(name, "weight", weight, 1, width), biases(name, "bias", bias, 1, width);
  const Numbers scales(name, "scale", scale, samples, width), shifts(name, "shift", shift, samples, width);
  const Numbers gates(name, "gate", gate, samples, width);
  Tensor out = at::detail::empty_cpu(x.sizes(), type);
  if (out.numel() == 0) return out;
  LayerNormTask task{};
  task.x = rows.rows;
  task.type = type_of(rows.kept);
  task.out_type = type == at::kByte ? Type::code : type_of(out);
  std::optional<RowView> added;
  if (add.has_value()) {
    TORCH_CHECK(add->sizes() == x.sizes() && !add->is_complex(), name, ": add is expected as x, got ", add->sizes());
    added.emplace(rows_of(add->to(type), -1));
    task.add = added->rows;
  }
  const bool modulated = scale.has_value() || shift.has_value() || gate.has_value();
  task.rows_per_sample = modulated ? rows.count / samples : rows.count;  // one affine map for all rows
  task.eps = static_cast<float>(eps);
  task.weight = weights.data();
  task.bias = biases.data();
  task.scale = scales.data();
  task.shift = shifts.data();
  task.gate = gates.data();
  task.code = code;
  task.out = out.mutable_data_ptr();
  task.centred = centred;
  for_items(rows.count, width, [&](int64_t begin, int64_t end) { kernels().layer_norm(task, begin, end); });
  return out;
}

Tensor layer_norm_quantize(
    const Tensor& x, const Optional& weight, const Optional& bias, double eps, double code_scale, int64_t zero_point,
    int64_t low, int64_t high, const Optional& scale, const Optional& shift) {
  constexpr const char* name = "layer_norm_quantize";
  const Code code = to_code(name, code_scale, zero_point, low, high);
  return run_layer_norm(name, x, weight, bias, eps, code, scale, shift, true);
}

Tensor rms_norm(
    const Tensor& x, const Optional& weight, double eps, at::ScalarType type, const Optional& gate,
    const Optional& add) {
  TORCH_CHECK(type == at::kBFloat16 || type == at::kFloat, "rms_norm: dtype is bfloat16 or float32, got ", type);
  return run_layer_norm("rms_norm", x, weight, {}, eps, {1.0f, 0.0f, 0.0f, 0}, {}, {}, false, type, gate, add);
}

Tensor rms_norm_quantize(
    const Tensor& x, const Optional& weight, double eps, double code_scale, int64_t zero_point, int64_t low,
    int64_t high, const Optional& scale, const Optional& shift) {
  constexpr const char* name = "rms_norm_quantize";
  const Code code = to_code(name, code_scale, zero_point, low, high);
  return run_layer_norm(name, x, weight, {}, eps, code, scale, shift, false);
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("group_norm", group_norm);
  library.impl("group_norm_quantize", group_norm_quantize);
  library.impl("layer_norm_quantize", layer_norm_quantize);
  library.impl("rms_norm", rms_norm);
  library.impl("rms_norm_quantize", rms_norm_quantize);
}

}  // namespace
}  // namespace stepquant
