// What a mask says of the scores of one query: which keys it reads, or what is added to them.
#pragma once

#include "dot.h"

namespace stepquant {
namespace {

constexpr int32_t never = -(1 << 30);  // the score of a key that is left out, or only fills the last step
constexpr float swallowing = -1e30f;  // a greatest bias, beside which no score counts

STEPQUANT_INLINE float greatest_bias(const float* x, int64_t count) {
  Floats high = splat(-INFINITY);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) high = larger(load(x + i), high);
  float found = -INFINITY;
  for (; i < count; ++i) found = x[i] > found ? x[i] : found;
  for (int64_t k = 0; k < lanes; ++k) found = high[k] > found ? high[k] : found;
  return found;
}

// A bias in steps of a score.
STEPQUANT_INLINE Ints rounded_steps(Floats bias, float step) {
  const Floats steps = smaller(larger(bias / step, splat(-most_bias)), splat(most_bias));
#if defined(__SSE2__)
  return nearest(steps);
#else
  Ints found;
  for (int64_t k = 0; k < lanes; ++k) found[k] = static_cast<int32_t>(std::nearbyint(steps[k]));
  return found;
#endif
}

// Adds a row of floats to the scores, in whole steps; returns the largest, `never` where nothing is left.
STEPQUANT_INLINE int32_t add_bias(const float* bias, float step, int64_t count, int32_t* scores) {
  const float top = greatest_bias(bias, count), from = top <= out_of_reach && top > -INFINITY ? top : 0.0f;
  const Ints kept = top <= swallowing ? Ints{} : Ints{} - 1;
  Ints high = Ints{} + never;
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t rest = count - i;
    const Floats added = (rest < lanes ? load_first(bias + i, rest) : load(bias + i)) - from;
    const Ints sum = (load_words(scores + i) & kept) + rounded_steps(added, step);
    const Ints score = added > out_of_reach ? sum : Ints{} + never;
    store(scores + i, score);
    if (rest < lanes) {
      for (int64_t k = rest; k < lanes; ++k) scores[i + k] = never;
      for (int64_t k = 0; k < rest; ++k) high[k] = score[k] > high[k] ? score[k] : high[k];
    } else {
      high = larger(high, score);
    }
  }
  return largest_of(high);
}

// The same for bools.
STEPQUANT_INLINE int32_t leave_out(const bool* read, int64_t count, int32_t* scores) {
  int32_t high = never;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t score = read[i] ? scores[i] : never;
    scores[i] = score;
    high = score > high ? score : high;
  }
  return high;
}

}  // namespace
}  // namespace stepquant
