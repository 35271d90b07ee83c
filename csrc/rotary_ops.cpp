// rms_norm_rotary_quantize and layer_norm_rotary_quantize as torch operations.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "tensors.h"

namespace stepquant {
namespace {

using Optional = std::optional<Tensor>;

// The angles (batch or 1, tokens, pairs) as float32, cosines and sines in steps of the same length.
struct Angles {
  Tensor cosines, sines;

  Angles(const char* name, const Tensor& x, const Tensor& cos, const Tensor& sin) : cosines(cos), sines(sin) {
    const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(3);
    TORCH_CHECK(width % 2 == 0, name, ": pairs need an even number of channels in a head, got ", width);
    for (Tensor* one : {&cosines, &sines}) {
      TORCH_CHECK(
          one->dim() == 3 && !one->is_complex() && (one->size(0) == batch || one->size(0) == 1) &&
              one->size(1) == tokens && one->size(2) == width / 2,
          name, ": angles are expected as (", batch, " or 1, ", tokens, ", ", width / 2, "), got ", one->sizes());
      *one = one->to(at::kFloat).expand({batch, tokens, width / 2});
    }
    if (cosines.strides() != sines.strides()) {
      cosines = cosines.contiguous();
      sines = sines.contiguous();
    }
  }
};

Tensor run_rotary(
    const char* name, const Tensor& x, const Optional& weight, const Optional& bias, double eps, bool across,
    bool centred, const Optional& cos, const Optional& sin, bool halves, const Code& code) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(x.dim() == 4, name, ": x is expected as (batch, tokens, heads, width), got ", x.sizes());
  TORCH_CHECK(cos.has_value() == sin.has_value(), name, ": sines come with cosines");
  Tensor out = at::detail::empty_cpu(x.sizes(), at::kByte);
  const int64_t width = x.size(2) * x.size(3);
  const Numbers weights(name, "weight", weight, 1, across ? width : x.size(3));
  const Numbers biases(name, "bias", bias, 1, across ? width : x.size(3));
  std::optional<Angles> angles;
  if (cos.has_value()) angles.emplace(name, x, *cos, *sin);
  if (out.numel() == 0) return out;
  const RowView rows = rows_of(x.flatten(2), -1);
  RotaryTask task{};
  task.x = rows.rows;
  task.type = type_of(rows.kept);
  task.tokens = x.size(1);
  task.head_width = x.size(3);
  task.across = across;
  task.centred = centred;
  task.eps = static_cast<float>(eps);
  task.weight = weights.data();
  task.bias = biases.data();
  if (angles.has_value()) {
    task.cosines = angles->cosines.const_data_ptr<float>();
    task.sines = angles->sines.const_data_ptr<float>();
    for (int64_t d = 0; d < 3; ++d) task.angle_strides[d] = angles->cosines.stride(d);
  }
  task.halves = halves;
  task.code = code;
  task.out = out.mutable_data_ptr<uint8_t>();
  for_items(rows.count, width, [&](int64_t begin, int64_t end) { kernels().rotary(task, begin, end); });
  return out;
}

Tensor rms_norm_rotary_quantize(
    const Tensor& x, const Optional& weight, double eps, bool across, const Optional& cos, const Optional& sin,
    bool halves, double code_scale, int64_t zero_point, int64_t low, int64_t high) {
  constexpr const char* name = "rms_norm_rotary_quantize";
  const Code code = to_code(name, code_scale, zero_point, low, high);
  return run_rotary(name, x, weight, {}, eps, across, false, cos, sin, halves, code);
}

Tensor layer_norm_rotary_quantize(
    const Tensor& x, const Optional& weight, const Optional& bias, double eps, const Optional& cos, const Optional& sin,
    bool halves, double code_scale, int64_t zero_point, int64_t low, int64_t high) {
  constexpr const char* name = "layer_norm_rotary_quantize";
  const Code code = to_code(name, code_scale, zero_point, low, high);
  return run_rotary(name, x, weight, bias, eps, false, true, cos, sin, halves, code);
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("rms_norm_rotary_quantize", rms_norm_rotary_quantize);
  library.impl("layer_norm_rotary_quantize", layer_norm_rotary_quantize);
}

}  // namespace
}  // namespace stepquant
