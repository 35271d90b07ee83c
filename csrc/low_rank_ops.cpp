// multiply_side as a torch operation.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "product.h"

namespace stepquant {
namespace {

Tensor multiply_side(const Tensor& x, const Tensor& side, int64_t outs) {
  const at::AutoDispatchBelowAutograd guard;
  check_side("multiply_side", side, outs);
  const Tensor rows = in_words("multiply_side", x, side);
  const int64_t words = side.size(1), size = side.element_size();
  Tensor out = at::detail::empty_cpu({rows.size(0), outs}, side.scalar_type());
  const SideTask task{
      rows.const_data_ptr(),
      rows.stride(0) * size,
      words,
      type_of(side),
      side.const_data_ptr(),
      outs,
      out.mutable_data_ptr(),
      outs};
  for_items(rows.size(0), words * outs / 8, [&](int64_t begin, int64_t end) {
    kernels().convolve.multiply_side(task, begin, end);
  });
  return out;
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("multiply_side", multiply_side);
}

}  // namespace
}  // namespace stepquant
