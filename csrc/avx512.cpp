// The kernels with AVX-512 instructions; integer products of bytes need more of them.
#include "attention.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "pointwise.h"
#include "quantize.h"
#include "rotary.h"
#include "rotate.h"
#include "stored.h"
#include "upsample.h"
#include "winograd.h"

namespace stepquant {

extern const Kernels avx512_kernels = {
    "avx512",
    quantize,
    group_norm,
    layer_norm,
    upsample,
    rotate,
    rotary,
    stored_linear,
    {packed_bytes<VectorDot<Shorts>>, pack<VectorDot<Shorts>>, attend<VectorDot<Shorts>>, VectorDot<Shorts>::block},
    {2, groups_per_block, least_patches, convolve, convolve_rows, multiply_side, patches_scratch, convolve_patches},
};

}  // namespace stepquant
