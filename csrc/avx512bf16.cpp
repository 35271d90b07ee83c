// Convolution with AVX-512 VNNI, and instructions that round to bfloat16: half of what becomes of a sum is its rounding.
#include "winograd.h"
#include "pointwise.h"

namespace stepquant {

extern const ConvolveKernel avx512bf16_convolve = {
    4, groups_per_block, least_patches, convolve, convolve_rows, patches_scratch, convolve_patches};

}  // namespace stepquant
