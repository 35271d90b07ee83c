// Attention and convolution with AVX-512 VNNI instructions: four products of bytes in each 32-bit lane.
#include "attention.h"
#include "convolve.h"

namespace stepquant {

extern const AttentionKernels avx512vnni_attention = {
    packed_bytes<VectorDot<Bytes>>,
    pack<VectorDot<Bytes>>,
    attend<VectorDot<Bytes>>,
};

void convolve_vnni(const ConvolveTask& task, int64_t begin, int64_t end) {
  convolve(task, begin, end);
}

}  // namespace stepquant
