// The Python module whose import registers the kernels of torch.ops.stepquant; Python defines the operations.
#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include "kernels.h"

TORCH_LIBRARY_FRAGMENT(stepquant, library) {
  library.def("capability() -> str", [] { return std::string(stepquant::kernels().name); });
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT,
      "_C",
      "The compiled operations of stepquant, built for torch " TORCH_VERSION,
      -1,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
      nullptr};
  return PyModule_Create(&module);
}
