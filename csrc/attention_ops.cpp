// attention as a torch operation.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "tensors.h"

namespace stepquant {
namespace {

Tensor operand_tensor(const char* name, const Tensor& x, at::ScalarType type) {
  TORCH_CHECK(
      x.dim() == 4 && !x.is_complex(), "attention: ", name, " is expected as (batch, heads, tokens, width), got ",
      x.sizes(), " of ", x.scalar_type());
  const Tensor typed = x.scalar_type() == type ? x : x.to(type);
  return typed.stride(3) == 1 ? typed : typed.contiguous();
}

Operand operand_of(const Tensor& x, const Code& code) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), code};
}

Tensor attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale, double query_scale, int64_t query_zero,
    int64_t query_low, int64_t query_high, double key_scale, int64_t key_zero, int64_t key_low, int64_t key_high,
    double value_scale, int64_t value_zero, int64_t value_low, int64_t value_high, double probabilities_scale,
    int64_t probabilities_zero, int64_t probabilities_low, int64_t probabilities_high) {
  const at::AutoDispatchBelowAutograd guard;
  const at::ScalarType type = query.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  const Tensor q = operand_tensor("query", query, type), k = operand_tensor("key", key, type);
  const Tensor v = operand_tensor("value", value, type);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), width = q.size(3);
  TORCH_CHECK(
      k.sizes() == v.sizes() && k.size(0) == batch && k.size(1) == heads && k.size(3) == width && keys > 0,
      "attention: query, key and value do not fit: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK(probabilities_zero == 0 && probabilities_low == 0, "attention: probabilities have zero point 0");
  const auto single = [](double x) { return static_cast<float>(x); };
  AttentionTask task{};
  task.query = operand_of(q, to_code("attention", query_scale, query_zero, query_low, query_high));
  task.key = operand_of(k, to_code("attention", key_scale, key_zero, key_low, key_high));
  task.value = operand_of(v, to_code("attention", value_scale, value_zero, value_low, value_high));
  task.type = type_of(q);
  task.heads = heads;
  task.queries = queries;
  task.keys = keys;
  task.width = width;
  task.factor = single(query_scale) * single(key_scale) * single(scale) * 1.4426950408889634f;
  task.result_scale = single(probabilities_scale) * single(value_scale);
  task.probabilities = to_code("attention", probabilities_scale, 0, 0, probabilities_high);
  const AttentionKernels& kernel = kernels().attention;
  task.block = kernel.block;
  const Tensor out = at::detail::empty_cpu({batch, queries, heads, width}, type);
  if (out.numel() == 0) return out.to(query.scalar_type()).transpose(1, 2);
  task.packed_bytes = kernel.packed_bytes(keys, width);
  const Tensor packed = at::detail::empty_cpu({batch * heads * task.packed_bytes}, at::kByte);
  task.packed = packed.mutable_data_ptr<uint8_t>();
  task.out = out.mutable_data_ptr();
  const int64_t blocks = (queries + kernel.block - 1) / kernel.block;
  for_items(batch * heads, keys * width, [&](int64_t begin, int64_t end) { kernel.pack(task, begin, end); });
  // A score costs about as much as (width + 32) / 32 numbers elsewhere.
  for_items(batch * heads * blocks, kernel.block * keys * (width + 32) / 32, [&](int64_t begin, int64_t end) {
    kernel.attend(task, begin, end);
  });
  return (type == query.scalar_type() ? out : out.to(query.scalar_type())).transpose(1, 2);
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("attention", attention);
}

}  // namespace
}  // namespace stepquant
