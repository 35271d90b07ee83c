// Convolution with AVX-512 VNNI where the processor also converts to bfloat16 (avx512_bf16): rounding in software is half
// of the epilogue's instructions.
#include "winograd.h"
#include "pointwise.h"

namespace stepquant {

extern const ConvolveKernel avx512bf16_convolve = {
    4, groups_per_block, least_patches, convolve, convolve_rows, multiply_side, patches_scratch, convolve_patches};

}  // namespace stepquant
