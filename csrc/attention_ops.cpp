// attention as a torch operation.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace stepquant {
namespace {

constexpr int64_t most_keys_by_row = 65536;  // as many probabilities of 255 times values of 127

Tensor operand_tensor(const char* name, const Tensor& x, at::ScalarType type) {
  TORCH_CHECK(
      x.dim() == 4 && !x.is_complex(), "attention: ", name, " is expected as (batch, heads, tokens, width), got ",
      x.sizes(), " of ", x.scalar_type());
  const Tensor typed = x.scalar_type() == type ? x : x.to(type);
  return typed.stride(3) == 1 ? typed : typed.contiguous();
}

Operand operand_of(const Tensor& x, const Code& code) {
  const Type type = x.scalar_type() == at::kByte ? Type::code : type_of(x);
  return {x.const_data_ptr(), type, x.stride(0), x.stride(1), x.stride(2), code};
}

// A mask as the kernels read it: the keys that it leaves for every (batch, head) where it is the same for all queries, or a row
// for each of these.
struct Shown {
  Tensor all, places, counts, biases;
  RowMask rows{};

  // Where every query has a step of its own, `step` is 0, and what is added is told as floats.
  Shown(const Tensor& mask, int64_t batch, int64_t heads, int64_t queries, int64_t keys, float step) {
    const auto fits = [&](int64_t axis, int64_t size) { return mask.size(axis) == 1 || mask.size(axis) == size; };
    TORCH_CHECK(
        mask.dim() == 4 && mask.size(3) == keys && fits(0, batch) && fits(1, heads) && fits(2, queries),
        "attention: a mask is expected as (batch or 1, heads or 1, queries or 1, keys), got ", mask.sizes());
    const bool logical = mask.scalar_type() == at::kBool;
    all = logical || mask.scalar_type() == at::kFloat ? mask : mask.to(at::kFloat);
    if (keys > 1 && all.stride(3) != 1) all = all.contiguous();
    if (mask.size(2) > 1 || (!logical && (step == 0 || is_far()))) {
      const auto stride = [&](int64_t axis) { return all.size(axis) == 1 ? 0 : all.stride(axis); };
      rows = {all.const_data_ptr(), logical, stride(0), stride(1), stride(2)};
      return;
    }
    all = all.expand({batch, heads, 1, keys}).contiguous();
    places = at::detail::empty_cpu({batch * heads * keys}, at::kInt);
    counts = at::detail::empty_cpu({batch * heads}, at::kInt);
    biases = at::detail::empty_cpu({logical ? 0 : batch * heads * keys}, at::kInt);
    for (int64_t item = 0; item < batch * heads; ++item) keep(item, keys, logical, step);
  }

  // Whether all that is added to the scores of some (batch, head) is out of reach, and finite.
  bool is_far() const {
    const Tensor dense = all.contiguous();
    const float* row = dense.const_data_ptr<float>();
    const int64_t keys = dense.size(3);
    for (const float* end = row + dense.numel(); row < end; row += keys) {
      const float top = *std::max_element(row, row + keys);
      if (top <= out_of_reach && top > -INFINITY) return true;
    }
    return false;
  }

  // The keys that are left of one (batch, head).
  void keep(int64_t item, int64_t keys, bool logical, float step) {
    int32_t* place = places.mutable_data_ptr<int32_t>() + item * keys;
    int32_t count = 0;
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t at = item * keys + key;
      const float added = logical ? 0.0f : all.const_data_ptr<float>()[at];
      if (logical ? !all.const_data_ptr<bool>()[at] : !(added > out_of_reach)) continue;
      if (!logical) {
        const float steps = std::min(std::max(std::nearbyint(added / step), -most_bias), most_bias);
        biases.mutable_data_ptr<int32_t>()[item * keys + count] = static_cast<int32_t>(steps);
      }
      place[count++] = static_cast<int32_t>(key);
    }
    counts.mutable_data_ptr<int32_t>()[item] = count;
  }
};

// All but the codes and scales of the operands is in `task`, which the numbers are added to.
Tensor attend(
    AttentionTask& task, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& mask) {
  const at::ScalarType given = query.scalar_type() == at::kByte ? value.scalar_type() : query.scalar_type();
  const at::ScalarType type = given == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  const auto read = [&](const Tensor& x) { return x.scalar_type() == at::kByte ? at::kByte : type; };
  TORCH_CHECK(value.scalar_type() != at::kByte, "attention: value is expected as numbers, got bytes");
  const Tensor q = operand_tensor("query", query, read(query)), k = operand_tensor("key", key, read(key));
  const Tensor v = operand_tensor("value", value, type);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), width = q.size(3);
  TORCH_CHECK(
      k.sizes() == v.sizes() && k.size(0) == batch && k.size(1) == heads && k.size(3) == width && keys > 0,
      "attention: query, key and value do not fit: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  task.query = operand_of(q, task.query.code);
  task.key = operand_of(k, task.key.code);
  task.value = operand_of(v, task.value.code);
  task.type = type_of(v);
  task.heads = heads;
  task.queries = queries;
  task.keys = keys;
  task.width = width;
  const AttentionKernels& kernel = kernels().attention;
  task.block = kernel.block;
  const Tensor out = at::detail::empty_cpu({batch, queries, heads, width}, type);
  if (out.numel() == 0) return out.to(given).transpose(1, 2);
  std::optional<Shown> shown;
  if (mask.has_value()) {
    shown.emplace(*mask, batch, heads, queries, keys, task.by_row ? 0.0f : task.step);
    task.mask = shown->rows;
  }
  if (shown && !task.mask.data) {
    task.places = shown->places.const_data_ptr<int32_t>();
    task.counts = shown->counts.const_data_ptr<int32_t>();
    task.biases = shown->biases.numel() ? shown->biases.const_data_ptr<int32_t>() : nullptr;
  }
  const Tensor scales = at::detail::empty_cpu({task.by_row ? 2 * batch * heads : 0}, at::kFloat);
  task.scales = scales.mutable_data_ptr<float>();
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
  return (type == given ? out : out.to(given)).transpose(1, 2);
}

Tensor attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale, double query_scale, int64_t query_zero,
    int64_t query_low, int64_t query_high, double key_scale, int64_t key_zero, int64_t key_low, int64_t key_high,
    double value_scale, int64_t value_zero, int64_t value_low, int64_t value_high, double probabilities_scale,
    int64_t probabilities_zero, int64_t probabilities_low, int64_t probabilities_high,
    const std::optional<Tensor>& mask) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(probabilities_zero == 0 && probabilities_low == 0, "attention: probabilities have zero point 0");
  const auto single = [](double x) { return static_cast<float>(x); };
  AttentionTask task{};
  task.query.code = to_code("attention", query_scale, query_zero, query_low, query_high);
  task.key.code = to_code("attention", key_scale, key_zero, key_low, key_high);
  task.value.code = to_code("attention", value_scale, value_zero, value_low, value_high);
  task.step = single(query_scale) * single(key_scale) * single(scale);
  task.result_scale = single(probabilities_scale) * single(value_scale);
  task.probabilities = to_code("attention", probabilities_scale, 0, 0, probabilities_high);
  return attend(task, query, key, value, mask);
}

Tensor attention_by_row(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale, int64_t most, int64_t most_probability,
    const std::optional<Tensor>& mask) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(
      query.scalar_type() != at::kByte && key.scalar_type() != at::kByte && 0 < most && most < 128 &&
          0 < most_probability && most_probability < 256,
      "attention_by_row: numbers are expected, and integers of a byte for them, got ", query.scalar_type(), ", ",
      key.scalar_type(), ", ", most, ", ", most_probability);
  TORCH_CHECK(
      key.dim() != 4 || key.size(2) <= most_keys_by_row, "attention_by_row: sums over more than ", most_keys_by_row,
      " keys do not fit 32 bits, got ", key.sizes());
  AttentionTask task{};
  task.by_row = true;
  task.query.code = task.key.code = task.value.code = to_code("attention_by_row", 1.0, 128, 128 - most, 128 + most);
  task.step = static_cast<float>(scale);
  task.probabilities = to_code("attention_by_row", 1.0, 0, 0, most_probability);
  return attend(task, query, key, value, mask);
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("attention", attention);
  library.impl("attention_by_row", attention_by_row);
}

}  // namespace
}  // namespace stepquant
