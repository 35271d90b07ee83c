// The kernels with AVX-512 instructions; attention needs more of them and has its own files.
#include "convolve.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "quantize.h"
#include "upsample.h"

namespace stepquant {

extern const Kernels avx512_kernels = {
    "avx512",
    quantize,
    group_norm,
    layer_norm,
    upsample,
    {},
    convolve_kernel,
};

}  // namespace stepquant
