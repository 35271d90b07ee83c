// The kernels with AVX-512 instructions; integer products need more of them.
#include "group_norm.h"
#include "layer_norm.h"
#include "quantize.h"
#include "upsample.h"

namespace stepquant {

extern const Kernels avx512_kernels = {
    "avx512", quantize, group_norm, layer_norm, upsample, {}, {},
};

}  // namespace stepquant
