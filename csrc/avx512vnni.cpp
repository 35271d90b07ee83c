// Attention and convolution with AVX-512 VNNI instructions: four products of bytes in each 32-bit lane.
#include "attention.h"
#include "winograd.h"
#include "pointwise.h"

namespace stepquant {

extern const AttentionKernels avx512vnni_attention = {
    packed_bytes<VectorDot<Bytes>>,
    pack<VectorDot<Bytes>>,
    attend<VectorDot<Bytes>>,
    VectorDot<Bytes>::block,
};

extern const ConvolveKernel avx512vnni_convolve = {
    4, groups_per_block, least_patches, convolve, convolve_rows, multiply_side, patches_scratch, convolve_patches};

}  // namespace stepquant
