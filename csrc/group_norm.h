// Group norm over channels-last pixels, fused with an addition, a concatenation, a modulation, SiLU and quantizing:
// statistics of a slice of channels first, then its output while it is still in the cache.
#pragma once

#include "activation.h"
#include "epilogue.h"
#include "scratch.h"

namespace stepquant {
namespace {

constexpr int64_t chunk_pixels = 64;  // summed in float before they join the sums in double
constexpr int64_t block_vectors = 4;  // channels whose sums stay in registers
constexpr double far_pivot = 32;  // squared distance of pivot and mean, in deviations, from which squares lose bits
constexpr double far_mean = 4;  // distance of zero and mean, in deviations, from which slope * x + offset loses bits

// Sums of one slice of channels around a pivot per channel: the pivot keeps the squares from cancelling.
struct Moments {
  float* pivot;
  double* sum;
  double* square;
};

// What the second visit computes per channel: value = d * slope + offset in steps of the code, and for silu the exponent
// of 2 in its denominator, d * steepness + lift. d is x, or x - center where a mean is far from zero.
struct Affine {
  float* center;
  float* slope;
  float* offset;
  float* steepness;
  float* lift;
};

// Consecutive channels of x, or of skip, that lie inside an item's slice.
template <class T>
struct Piece {
  const T* x;
  int64_t stride;
  int64_t channels;
  int64_t first;  // its first channel, counted within the slice
};

template <int64_t vectors, class T>
STEPQUANT_INLINE void sum_chunk(const T* x, int64_t stride, int64_t pixels, int64_t count, float* pivots, float* sums) {
  Floats pivot[vectors], sum[vectors], square[vectors];
  for (int64_t v = 0; v < vectors; ++v) pivot[v] = load(pivots + v * lanes), sum[v] = square[v] = Floats{};
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t v = 0; v < vectors; ++v) {
      const T* from = x + p * stride + v * lanes;
      const Floats d = (count < lanes ? load_first(from, count) : load(from)) - pivot[v];
      sum[v] += d;
      square[v] += d * d;
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    store(sums + v * lanes, sum[v]);
    store(sums + (vectors + v) * lanes, square[v]);
  }
}

template <int64_t vectors, class T>
void add_chunk(const Piece<T>& piece, int64_t channel, int64_t pixel, int64_t pixels, int64_t count, Moments& moments) {
  alignas(64) float sums[2 * vectors * lanes];
  const int64_t slot = piece.first + channel;
  sum_chunk<vectors>(piece.x + pixel * piece.stride + channel, piece.stride, pixels, count, moments.pivot + slot, sums);
  for (int64_t c = 0; c < (count < lanes ? count : vectors * lanes); ++c) {
    moments.sum[slot + c] += sums[c];
    moments.square[slot + c] += sums[vectors * lanes + c];
  }
}

// The first pixel as the pivots.
template <class T>
void set_pivots(const Piece<T>& piece, Moments& moments) {
  for (int64_t c = 0; c < piece.channels; c += lanes) {
    const int64_t rest = piece.channels - c;
    store(moments.pivot + piece.first + c, rest < lanes ? load_first(piece.x + c, rest) : load(piece.x + c));
  }
}

template <class T>
void sum_piece(const Piece<T>& piece, int64_t pixels, Moments& moments) {
  for (int64_t p = 0; p < pixels; p += chunk_pixels) {
    const int64_t chunk = pixels - p < chunk_pixels ? pixels - p : chunk_pixels;
    int64_t c = 0;
    for (; c + block_vectors * lanes <= piece.channels; c += block_vectors * lanes) {
      add_chunk<block_vectors>(piece, c, p, chunk, lanes, moments);
    }
    for (; c + lanes <= piece.channels; c += lanes) add_chunk<1>(piece, c, p, chunk, lanes, moments);
    if (c < piece.channels) add_chunk<1>(piece, c, p, chunk, piece.channels - c, moments);
  }
}

// Per-channel numbers of one slice; a constant fills them where there are none, so that loops need no branches.
STEPQUANT_INLINE const float* numbers_or(const float* numbers, int64_t first, const float* constant) {
  return numbers ? numbers + first : constant;
}

// Mean and inverse deviation of each group, spread over its channels: means into `sum`, deviations into `square`. Returns
// whether a pivot was too far from the mean of its channel; the pivots are then those means, to sum again.
bool finish_groups(const GroupNormTask& task, int64_t width, int64_t group_width, const float* add, Moments& moments) {
  const double count = static_cast<double>(task.pixels), share = 1.0 / count;
  bool far = false;
  for (int64_t start = 0; start < width; start += group_width) {
    double mean = 0, spread = 0, farthest = 0;
    for (int64_t c = start; c < start + group_width; ++c) {
      const double distance = moments.sum[c] * share;
      moments.square[c] -= moments.sum[c] * distance;
      moments.sum[c] = distance + static_cast<double>(moments.pivot[c]) + static_cast<double>(add[c]);
      farthest = distance * distance > farthest ? distance * distance : farthest;
      mean += moments.sum[c];
    }
    mean /= static_cast<double>(group_width);
    for (int64_t c = start; c < start + group_width; ++c) {
      const double distance = moments.sum[c] - mean;
      spread += moments.square[c] + count * distance * distance;
    }
    const double variance = spread / (count * static_cast<double>(group_width));
    const double kept = (variance > 0 ? variance : 0) + static_cast<double>(task.eps);
    const double inverse = 1.0 / std::sqrt(kept);
    far = far || farthest > far_pivot * kept;
    for (int64_t c = start; c < start + group_width; ++c) {
      moments.pivot[c] = static_cast<float>(moments.sum[c] - static_cast<double>(add[c]));
      moments.sum[c] = mean, moments.square[c] = inverse;
    }
  }
  return far;
}

// The affine map of each channel of the slice, from the means and everything affine around the norm. Returns whether some
// mean is far from zero; x is then centered, because slope and offset would cancel.
bool fold(
    const GroupNormTask& task, int64_t sample, int64_t first, int64_t width, const float* zeros, const float* ones,
    const Moments& moments, const Affine& affine) {
  const int64_t channels = task.x.width + task.skip.width, modulated = sample * channels + first;
  const double step = task.out_type == Type::code ? static_cast<double>(task.code.inverse) : 1.0;
  const double bend = -static_cast<double>(log2_of_e);
  const float* add = numbers_or(task.add, modulated, zeros);
  const float* scale = numbers_or(task.scale, modulated, zeros);
  const float* shift = numbers_or(task.shift, modulated, zeros);
  const float* weight = numbers_or(task.weight, first, ones);
  const float* bias = numbers_or(task.bias, first, zeros);
  bool far = false;
  for (int64_t c = 0; c < width; ++c) {
    const double reach = static_cast<double>(moments.pivot[c]) * moments.square[c];
    far = far || reach * reach > far_mean * far_mean;
  }
  for (int64_t c = 0; c < width; ++c) {
    affine.center[c] = far ? moments.pivot[c] : 0.0f;
    const double gain = 1.0 + static_cast<double>(scale[c]);
    const double slope = moments.square[c] * static_cast<double>(weight[c]);
    const double distance = static_cast<double>(affine.center[c]) + static_cast<double>(add[c]) - moments.sum[c];
    const double lifted = distance * slope + static_cast<double>(bias[c]);
    const double offset = lifted * gain + static_cast<double>(shift[c]);
    affine.slope[c] = static_cast<float>(slope * gain * step);
    affine.offset[c] = static_cast<float>(offset * step);
    affine.steepness[c] = static_cast<float>(slope * gain * bend);
    affine.lift[c] = static_cast<float>(offset * bend);
  }
  return far;
}

template <Activation activation, bool centered>
STEPQUANT_INLINE Floats apply(Floats x, const Affine& affine, int64_t slot) {
  if constexpr (centered) x -= load(affine.center + slot);
  const Floats y = x * load(affine.slope + slot) + load(affine.offset + slot);
  if constexpr (activation == Activation::none) return y;
  return y / (1.0f + exp2(x * load(affine.steepness + slot) + load(affine.lift + slot)));
}

template <class T, class Out, Activation activation, bool centered>
void write_piece(
    const Piece<T>& piece, int64_t pixels, const Affine& affine, const Code& code, Out* out, int64_t out_stride) {
  for (int64_t p = 0; p < pixels; ++p) {
    const T* x = piece.x + p * piece.stride;
    Out* to = out + p * out_stride + piece.first;
    int64_t c = 0;
    for (; c + 4 * lanes <= piece.channels; c += 4 * lanes) {
      Floats y[4];
      for (int64_t v = 0; v < 4; ++v) {
        y[v] = apply<activation, centered>(load(x + c + v * lanes), affine, piece.first + c + v * lanes);
      }
      emit_block(to + c, y, code);
    }
    for (; c + lanes <= piece.channels; c += lanes) {
      emit(to + c, apply<activation, centered>(load(x + c), affine, piece.first + c), code);
    }
    if (const int64_t rest = piece.channels - c; rest) {
      emit_first(to + c, apply<activation, centered>(load_first(x + c, rest), affine, piece.first + c), code, rest);
    }
  }
}

// The runs of channels of an item's slice: one, or two where it straddles the boundary between x and skip.
template <class T>
int64_t cut(const GroupNormTask& task, int64_t sample, int64_t first, int64_t width, Piece<T>* pieces) {
  int64_t count = 0;
  const int64_t boundary = task.x.width;
  if (first < boundary) {
    const T* x = static_cast<const T*>(task.x.data) + sample * task.pixels * task.x.stride + first;
    pieces[count++] = {x, task.x.stride, (first + width < boundary ? first + width : boundary) - first, 0};
  }
  if (first + width > boundary) {
    const int64_t start = first > boundary ? first : boundary;
    const T* x = static_cast<const T*>(task.skip.data) + sample * task.pixels * task.skip.stride + start - boundary;
    pieces[count++] = {x, task.skip.stride, first + width - start, start - first};
  }
  return count;
}

template <class T, class Out, Activation activation>
void group_norm_items(const GroupNormTask& task, int64_t begin, int64_t end) {
  const int64_t channels = task.x.width + task.skip.width;
  const int64_t group_width = channels / task.groups;
  const int64_t room = task.groups_per_item * group_width + 2 * block_vectors * lanes;
  Scratch scratch(room * (8 * 4 + 2 * 8) + 10 * 64);
  Moments moments{scratch.take<float>(room), scratch.take<double>(room), scratch.take<double>(room)};
  const Affine affine{
      scratch.take<float>(room), scratch.take<float>(room), scratch.take<float>(room), scratch.take<float>(room),
      scratch.take<float>(room)};
  for (float* row : {affine.center, affine.slope, affine.offset, affine.steepness, affine.lift, moments.pivot}) {
    for (int64_t c = 0; c < room; ++c) row[c] = 0;
  }
  float* zeros = scratch.take<float>(room);
  float* ones = scratch.take<float>(room);
  for (int64_t c = 0; c < room; ++c) zeros[c] = 0, ones[c] = 1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / task.items_per_sample;
    const int64_t group = item % task.items_per_sample * task.groups_per_item;
    const int64_t groups = task.groups - group < task.groups_per_item ? task.groups - group : task.groups_per_item;
    const int64_t first = group * group_width, width = groups * group_width;
    Piece<T> pieces[2];
    const int64_t count = cut(task, sample, first, width, pieces);
    const auto far_from_pivots = [&] {
      for (int64_t c = 0; c < width; ++c) moments.sum[c] = moments.square[c] = 0;
      for (int64_t i = 0; i < count; ++i) sum_piece(pieces[i], task.pixels, moments);
      const float* add = numbers_or(task.add, sample * channels + first, zeros);
      return finish_groups(task, width, group_width, add, moments);
    };
    for (int64_t i = 0; i < count; ++i) set_pivots(pieces[i], moments);
    if (far_from_pivots()) far_from_pivots();
    const bool far = fold(task, sample, first, width, zeros, ones, moments, affine);
    Out* out = static_cast<Out*>(task.out) + sample * task.pixels * channels + first;
    for (int64_t i = 0; i < count; ++i) {
      const auto write = far ? write_piece<T, Out, activation, true> : write_piece<T, Out, activation, false>;
      write(pieces[i], task.pixels, affine, task.code, out, channels);
    }
  }
}

template <class T, class Out>
void group_norm_items(const GroupNormTask& task, int64_t begin, int64_t end) {
  if (task.activation == Activation::silu) return group_norm_items<T, Out, Activation::silu>(task, begin, end);
  group_norm_items<T, Out, Activation::none>(task, begin, end);
}

void group_norm(const GroupNormTask& task, int64_t begin, int64_t end) {
  const bool half = task.type == Type::bf16;
  if (task.out_type == Type::code && half) return group_norm_items<bf16, uint8_t>(task, begin, end);
  if (task.out_type == Type::code) return group_norm_items<float, uint8_t>(task, begin, end);
  if (half) return group_norm_items<bf16, bf16>(task, begin, end);
  group_norm_items<float, float>(task, begin, end);
}

}  // namespace
}  // namespace stepquant
