// stored_linear as a torch operation: a weight is multiplied as files hold it.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "tensors.h"

namespace stepquant {
namespace {

void check(
    const Tensor& x, const Tensor& weight, int64_t bits, const Tensor& zero_point, const Tensor& scale,
    const std::optional<Tensor>& bias, at::ScalarType dtype) {
  TORCH_CHECK(bits == 4 || bits == 8, "stored_linear: weights of 4 or 8 bits are expected, got ", bits);
  TORCH_CHECK(
      x.dim() == 2 && scale.dim() == 2 && scale.numel() > 0 && scale.scalar_type() == at::kFloat &&
          zero_point.sizes() == scale.sizes() && zero_point.scalar_type() == at::kShort,
      "stored_linear: rows of numbers are expected, and a float32 scale and an int16 zero point for each output's "
      "groups, got ",
      x.sizes(), ", ", scale.scalar_type(), " ", scale.sizes(), ", ", zero_point.scalar_type(), " ",
      zero_point.sizes());
  const int64_t outs = scale.size(0), groups = scale.size(1), ins = x.size(1), width = ins / groups;
  TORCH_CHECK(
      ins % groups == 0 && width * bits % 8 == 0, "stored_linear: ", groups, " groups of whole bytes are expected of ",
      ins, " inputs of ", bits, " bits");
  TORCH_CHECK(
      weight.scalar_type() == at::kByte && weight.is_contiguous() && weight.numel() == outs * ins * bits / 8,
      "stored_linear: ", outs * ins * bits / 8, " dense bytes of weight are expected, got ", weight.scalar_type(), " ",
      weight.sizes());
  TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == outs), "stored_linear: a bias is expected for each of ", outs,
      " outputs, got ", bias ? bias->sizes() : at::IntArrayRef());
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kBFloat16, "stored_linear: the result is bfloat16 or float32, not ", dtype);
}

Tensor stored_linear(
    const Tensor& x, const Tensor& weight, int64_t bits, const Tensor& zero_point, const Tensor& scale,
    const std::optional<Tensor>& bias, at::ScalarType dtype) {
  const at::AutoDispatchBelowAutograd guard;
  check(x, weight, bits, zero_point, scale, bias, dtype);
  const int64_t rows = x.size(0), ins = x.size(1), outs = scale.size(0), groups = scale.size(1);
  const Tensor numbers = readable(x).to(at::kDouble).contiguous();
  const Tensor scales = scale.contiguous(), zeros = zero_point.contiguous();
  const Numbers added("stored_linear", "bias", bias, 1, outs);
  Tensor out = at::detail::empty_cpu({rows, outs}, at::kFloat);
  const StoredTask task = {
      numbers.const_data_ptr<double>(),
      rows,
      ins,
      outs,
      weight.const_data_ptr<uint8_t>(),
      bits,
      groups,
      scales.const_data_ptr<float>(),
      zeros.const_data_ptr<int16_t>(),
      added.data(),
      out.mutable_data_ptr<float>()};
  for_items(outs, ins * std::max<int64_t>(rows, 1), [&](int64_t begin, int64_t end) {
    kernels().stored_linear(task, begin, end);
  });
  return out.to(dtype);
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("stored_linear", stored_linear);
}

}  // namespace
}  // namespace stepquant
