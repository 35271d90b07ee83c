// A few rows of numbers times a weight as files hold it: every weight is read once, in 4 or 8 bits.
#pragma once

#include "vector.h"

namespace stepquant {
namespace {

constexpr int64_t pair_lanes = lanes / 2;
typedef STEPQUANT_VECTOR(double, pair_lanes) Doubles;

STEPQUANT_INLINE Doubles load(const double* from) {
  Doubles x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

STEPQUANT_INLINE double total(Doubles x) {
  for (int64_t half = pair_lanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

// One stored integer; of 4 bits, the lower half of a byte comes first.
template <int64_t bits>
STEPQUANT_INLINE int32_t stored(const uint8_t* weight, int64_t i) {
  return bits == 8 ? weight[i] : (weight[i / 2] >> (i % 2 * 4)) & 15;
}

// As many stored integers as a vector holds, from an even place on, less their zero point.
template <int64_t bits>
STEPQUANT_INLINE Doubles centred(const uint8_t* weight, int64_t i, int32_t zero) {
#if defined(__AVX2__)
  __m128i bytes;
  if constexpr (bits == 8) {
    bytes = lanes == 16 ? _mm_loadl_epi64((const __m128i*)(weight + i)) : _mm_loadu_si32(weight + i);
  } else {
    bytes = lanes == 16 ? _mm_loadu_si32(weight + i / 2) : _mm_loadu_si16(weight + i / 2);
    const __m128i low = _mm_set1_epi8(15);
    bytes = _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
  }
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtepi32_pd(_mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(zero)));
#else
  return (Doubles)_mm256_cvtepi32_pd(_mm_sub_epi32(_mm_cvtepu8_epi32(bytes), _mm_set1_epi32(zero)));
#endif
#else
  Doubles x;
  for (int64_t k = 0; k < pair_lanes; ++k) x[k] = stored<bits>(weight, i + k) - zero;
  return x;
#endif
}

// The products of `count` weights with so many rows, added to sums times `scale`. A product of a float and a byte is
// exact in float64, and what the order of its sums changes lies far below the float that they are rounded to.
template <int64_t bits, int64_t rows>
void add_products(
    const uint8_t* weight, int64_t from, int64_t count, int32_t zero, double scale, const double* x, int64_t stride,
    double* sums) {
  constexpr int64_t apart = rows == 1 ? 4 : 2;  // sums that hide the latency of an addition
  Doubles partial[rows][apart] = {};
  int64_t i = 0;
  for (; i + apart * pair_lanes <= count; i += apart * pair_lanes) {
    for (int64_t v = 0; v < apart; ++v) {
      const int64_t at = i + v * pair_lanes;
      const Doubles w = centred<bits>(weight, from + at, zero);
      for (int64_t row = 0; row < rows; ++row) partial[row][v] += w * load(x + row * stride + at);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t v = 0; v < apart; ++v) sum += total(partial[row][v]);
    for (int64_t k = i; k < count; ++k) sum += (stored<bits>(weight, from + k) - zero) * x[row * stride + k];
    sums[row] += sum * scale;
  }
}

template <int64_t bits, int64_t rows>
void stored_output(const StoredTask& task, int64_t output, int64_t first) {
  const int64_t width = task.ins / task.groups;
  double sums[rows] = {};
  for (int64_t group = 0; group < task.groups; ++group) {
    const int64_t place = output * task.groups + group;
    const double* x = task.x + first * task.ins + group * width;
    add_products<bits, rows>(
        task.weight, place * width, width, task.zero_point[place], task.scale[place], x, task.ins, sums);
  }
  const double bias = task.bias ? task.bias[output] : 0;
  for (int64_t row = 0; row < rows; ++row) {
    task.out[(first + row) * task.outs + output] = static_cast<float>(sums[row] + bias);
  }
}

template <int64_t bits>
void stored_outputs(const StoredTask& task, int64_t begin, int64_t end) {
  for (int64_t output = begin; output < end; ++output) {
    int64_t row = 0;
    for (; row + 4 <= task.rows; row += 4) stored_output<bits, 4>(task, output, row);
    if (row + 2 <= task.rows) {
      stored_output<bits, 2>(task, output, row);
      row += 2;
    }
    if (row < task.rows) stored_output<bits, 1>(task, output, row);
  }
}

void stored_linear(const StoredTask& task, int64_t begin, int64_t end) {
  if (task.bits == 8) return stored_outputs<8>(task, begin, end);
  stored_outputs<4>(task, begin, end);
}

}  // namespace
}  // namespace stepquant
