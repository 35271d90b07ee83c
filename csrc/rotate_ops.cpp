// rotate_quantize_rows as a torch operation.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <tuple>

#include "tensors.h"

namespace stepquant {
namespace {

bool is_power_of_four(int64_t n) {
  return n > 0 && (n & (n - 1)) == 0 && (n & 0x5555555555555555) != 0;
}

std::tuple<Tensor, Tensor> rotate_quantize_rows(
    const Tensor& x, int64_t group, double scale, int64_t zero_point, int64_t low, int64_t high,
    const std::optional<Tensor>& factors) {
  const at::AutoDispatchBelowAutograd guard;
  const Code code = to_code("rotate_quantize_rows", scale, zero_point, low, high);
  TORCH_CHECK(
      zero_point < high, "rotate_quantize_rows: codes above the zero point are expected, got ", zero_point, " of ",
      high);
  TORCH_CHECK(is_power_of_four(group), "rotate_quantize_rows: groups of a power of four are expected, got ", group);
  TORCH_CHECK(
      x.dim() >= 1 && x.size(-1) > 0 && x.size(-1) % group == 0, "rotate_quantize_rows: rows of whole groups of ",
      group, " are expected, got ", x.sizes());
  const RowView rows = rows_of(x, -1);
  const Numbers balance("rotate_quantize_rows", "factors", factors, 1, x.size(-1));
  at::DimVector sizes(x.sizes());
  sizes.back() = 1;
  Tensor out = at::detail::empty_cpu(x.sizes(), at::kByte), scales = at::detail::empty_cpu(sizes, at::kFloat);
  const RotateTask task{
      rows.rows,
      type_of(rows.kept),
      balance.data(),
      group,
      code.highest,
      code,
      out.mutable_data_ptr<uint8_t>(),
      scales.mutable_data_ptr<float>()};
  for_items(rows.count, rows.rows.width, [&](int64_t begin, int64_t end) { kernels().rotate(task, begin, end); });
  return {out, scales};
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("rotate_quantize_rows", rotate_quantize_rows);
}

}  // namespace
}  // namespace stepquant
