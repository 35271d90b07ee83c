// The schemas of torch.ops.stepquant, and the Python module whose import registers them.
#include <Python.h>
#include <torch/library.h>

#include "kernels.h"

#define STEPQUANT_CODE "float code_scale, int zero_point, int low, int high"
#define STEPQUANT_CODE_OF(name) "float " name "_scale, int " name "_zero_point, int " name "_low, int " name "_high"
#define STEPQUANT_AFFINE "Tensor? weight, Tensor? bias"
#define STEPQUANT_PRODUCT \
  "Tensor codes, float code_scale, int zero_point, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor? bias"
#define STEPQUANT_AROUND "str activation=\"none\", Tensor? add=None, Tensor? scale=None, Tensor? shift=None, Tensor? skip=None"

TORCH_LIBRARY(stepquant, library) {
  library.def("quantize(Tensor x, " STEPQUANT_CODE ") -> Tensor");
  library.def("quantize_concat(Tensor x, Tensor skip, " STEPQUANT_CODE ") -> Tensor");
  library.def("group_norm(Tensor x, " STEPQUANT_AFFINE ", int groups, float eps, " STEPQUANT_AROUND ") -> Tensor");
  library.def(
      "group_norm_quantize(Tensor x, " STEPQUANT_AFFINE ", int groups, float eps, " STEPQUANT_CODE
      ", " STEPQUANT_AROUND ") -> Tensor");
  library.def(
      "layer_norm_quantize(Tensor x, " STEPQUANT_AFFINE ", float eps, " STEPQUANT_CODE
      ", Tensor? scale=None, Tensor? shift=None) -> Tensor");
  library.def("activation_quantize(Tensor x, str activation, " STEPQUANT_CODE ") -> Tensor");
  library.def("upsample_nearest2x(Tensor x) -> Tensor");
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, float scale, " STEPQUANT_CODE_OF("query")
      ", " STEPQUANT_CODE_OF("key") ", " STEPQUANT_CODE_OF("value") ", " STEPQUANT_CODE_OF("probabilities")
      ") -> Tensor");
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def(
      "convolve(" STEPQUANT_PRODUCT ", int[] kernel, int[] stride, int[] sides, int[] dilation, bool doubled, "
      "ScalarType dtype, Tensor? add=None) -> Tensor");
  library.def("linear(" STEPQUANT_PRODUCT ", ScalarType dtype, Tensor? add=None) -> Tensor");
  library.def("capability() -> str", [] { return std::string(stepquant::kernels().name); });
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The compiled operations of stepquant.", -1, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
