// Integer attention: scores and products are integer sums, the softmax is exact over whole rows of a block of queries.
//
// Operands are packed into 32-bit words of 4 bytes (or 2 shorts) so that one instruction multiplies a word of one row by a
// word of 16 (or 8, or 4) columns. Keys are unsigned codes, queries and values are codes - 128; with zero points z,
//   sum (q - zq)(k - zk) = sum (q - 128) k - (zq - 128) sum k + a constant of the row,
// which the softmax cancels. The products are corrected by (zv - 128) sum p.
#pragma once

#include <limits>

#include "activation.h"
#include "dot.h"
#include "row_mask.h"
#include "scratch.h"

namespace stepquant {
namespace {

constexpr int64_t tile_keys = 64;
constexpr int64_t step_keys = 4 * lanes;  // what the softmax takes at once; divides a tile

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Sizes of the packed operands of one (batch, head); counts are in words unless they say otherwise.
template <class Dot>
struct Layout {
  int64_t keys;  // rounded up to whole steps, of which there is at least one
  int64_t score_words;  // per token, along the width
  int64_t value_words;  // per group of Dot::per_word keys, one for each (padded) channel

  Layout(int64_t key_count, int64_t width)
      : keys(round_up(key_count > 0 ? key_count : 1, step_keys)),
        score_words(round_up(width, Dot::per_word) / Dot::per_word),
        value_words(round_up(width, lanes)) {}

  int64_t key_bytes() const { return round_up(keys, tile_keys) * score_words * 4; }
  int64_t correction_bytes() const { return keys * 4; }
  int64_t value_bytes() const { return keys / Dot::per_word * value_words * 4; }
  int64_t bytes() const { return round_up(key_bytes() + correction_bytes() + value_bytes(), 64); }
};

// The keys of one (batch, head) that a mask leaves.
struct Left {
  const int32_t* places;
  const int32_t* biases;
  int64_t count;

  Left(const AttentionTask& task, int64_t item)
      : places(task.places ? task.places + item * task.keys : nullptr),
        biases(task.biases ? task.biases + item * task.keys : nullptr),
        count(task.counts ? task.counts[item] : task.keys) {}

  int64_t operator[](int64_t key) const { return places ? places[key] : key; }
};

template <class T>
const T* token(const Operand& operand, int64_t batch, int64_t head, int64_t index) {
  return static_cast<const T*>(operand.data) + batch * operand.batch_stride + head * operand.head_stride +
      index * operand.token_stride;
}

// The scale by which the greatest magnitude becomes the greatest integer.
inline float scale_of(float most, const Code& code) {
  const float scale = most / code.highest;
  return scale <= std::numeric_limits<float>::min() ? 1.0f : scale;
}

inline Code scaled_by(Code code, float scale) {
  code.inverse = 1.0f / scale;
  return code;
}

// Of all tokens of one (batch, head).
template <class T>
float scale_of_tokens(const Operand& operand, int64_t batch, int64_t head, int64_t tokens, int64_t width) {
  float most = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const float own = greatest(token<T>(operand, batch, head, i), width);
    most = own > most || own != own ? own : most;
  }
  return scale_of(most, operand.code);
}

// The codes of one row less `center`; what lies beyond the width is left alone.
template <class T, class Element>
STEPQUANT_INLINE void encode_row(const T* x, int64_t width, const Code& code, int32_t center, Element* to) {
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) store(to + i, encode(load(x + i) * code.inverse, code) - center);
  if (i < width) {
    store_first(to + i, encode(load_first(x + i, width - i) * code.inverse, code) - center, width - i);
  }
}

// Codes that were made before.
template <class Element>
STEPQUANT_INLINE void encode_row(const uint8_t* x, int64_t width, const Code&, int32_t center, Element* to) {
  for (int64_t i = 0; i < width; ++i) to[i] = static_cast<Element>(x[i] - center);
}

template <class Dot, class T>
void pack_keys(
    const AttentionTask& task, const Code& code, int64_t batch, int64_t head, const Left& left,
    const Layout<Dot>& layout, uint8_t* packed) {
  int32_t* words = reinterpret_cast<int32_t*>(packed);
  Scratch scratch(layout.score_words * 4);
  int32_t* row = scratch.take<int32_t>(layout.score_words);
  std::memset(row, 0, static_cast<size_t>(layout.score_words * 4));
  std::memset(words, 0, static_cast<size_t>(layout.key_bytes()));
  for (int64_t key = 0; key < left.count; ++key) {
    const T* x = token<T>(task.key, batch, head, left[key]);
    encode_row(x, task.width, code, 0, reinterpret_cast<typename Dot::Element*>(row));
    int32_t* to = words + key / tile_keys * layout.score_words * tile_keys + key % tile_keys;
    for (int64_t w = 0; w < layout.score_words; ++w) to[w * tile_keys] = row[w];
  }
}

// The part of each key's scores that its own codes, the query's zero point and its bias make.
template <class Dot>
void correct_keys(const AttentionTask& task, const Left& left, const Layout<Dot>& layout, uint8_t* packed) {
  const int32_t* words = reinterpret_cast<const int32_t*>(packed);
  int32_t* correction = reinterpret_cast<int32_t*>(packed + layout.key_bytes());
  const Ints ones = Dot::ones - Ints{};
  for (int64_t key = 0; key < layout.keys; key += lanes) {
    const int32_t* tile = words + key / tile_keys * tile_keys * layout.score_words + key % tile_keys;
    Ints sum{};
    for (int64_t w = 0; w < layout.score_words; ++w) sum = Dot::key_dot(sum, ones, load_words(tile + w * tile_keys));
    store(correction + key, sum * -(task.query.code.zero_point - 128));
  }
  for (int64_t key = 0; left.biases && key < left.count; ++key) correction[key] += left.biases[key];
  for (int64_t key = left.count; key < layout.keys; ++key) correction[key] = never;
}

template <class Dot, class T>
void pack_values(
    const AttentionTask& task, const Code& code, int64_t batch, int64_t head, const Left& left,
    const Layout<Dot>& layout, uint8_t* packed) {
  int32_t* words = reinterpret_cast<int32_t*>(packed + layout.key_bytes() + layout.correction_bytes());
  for (int64_t key = 0; key < layout.keys; key += Dot::per_word) {
    for (int64_t i = 0; i < layout.value_words; i += lanes) {
      const int64_t rest = task.width - i;
      Ints word{};
      for (int64_t k = 0; k < Dot::per_word && key + k < left.count; ++k) {
        const T* x = token<T>(task.value, batch, head, left[key + k]) + i;
        const Floats scaled = (rest < lanes ? load_first(x, rest) : load(x)) * code.inverse;
        word |= Dot::place(encode(scaled, code) - 128, k);
      }
      store(words + key / Dot::per_word * layout.value_words + i, word);
    }
  }
}

inline float scale_of_operand(const Operand& operand, int64_t batch, int64_t head, int64_t tokens, int64_t width) {
  return operand.type == Type::bf16 ? scale_of_tokens<bf16>(operand, batch, head, tokens, width)
                                    : scale_of_tokens<float>(operand, batch, head, tokens, width);
}

template <class Dot>
void pack(const AttentionTask& task, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t batch = item / task.heads, head = item % task.heads;
    const Left left(task, item);
    const Layout<Dot> layout(left.count, task.width);
    uint8_t* packed = task.packed + item * task.packed_bytes;
    Code key = task.key.code, value = task.value.code;
    if (task.by_row) {
      float* scales = task.scales + 2 * item;
      scales[0] = scale_of_operand(task.key, batch, head, task.keys, task.width);
      scales[1] = scale_of_operand(task.value, batch, head, task.keys, task.width);
      key = scaled_by(key, scales[0]), value = scaled_by(value, scales[1]);
    }
    switch (task.key.type) {
      case Type::code: pack_keys<Dot, uint8_t>(task, key, batch, head, left, layout, packed); break;
      case Type::bf16: pack_keys<Dot, bf16>(task, key, batch, head, left, layout, packed); break;
      case Type::f32: pack_keys<Dot, float>(task, key, batch, head, left, layout, packed); break;
    }
    if (task.value.type == Type::bf16) {
      pack_values<Dot, bf16>(task, value, batch, head, left, layout, packed);
    } else {
      pack_values<Dot, float>(task, value, batch, head, left, layout, packed);
    }
    correct_keys(task, left, layout, packed);
  }
}

// 2^((score - largest) * factor) in place of the scores; returns their sum. The rounding of largest * factor is the same
// for the whole row, so it cancels when the row is divided by its sum. Keys that are left out, or pad the last step, get exactly
// 0, however small the factor is.
template <bool masked>
STEPQUANT_INLINE float exponentiate(int32_t* scores, int64_t keys, int64_t filled, int32_t largest, float factor) {
  const float top = static_cast<float>(largest) * factor;
  Floats sum[4] = {};
  for (int64_t i = 0; i < keys; i += step_keys) {
    for (int64_t v = 0; v < 4; ++v) {
      int32_t* at = scores + i + v * lanes;
      float* to = reinterpret_cast<float*>(at);
      const Ints score = load_words(at);
      const Floats raised = exp2_coarse(__builtin_convertvector(score, Floats) * factor - top);
      Floats e = raised;
      if constexpr (masked) e = score == never ? Floats{} : raised;
      store(to, e);
      const int64_t left = filled - (i + v * lanes);
      if (left >= lanes) {
        sum[v] += e;
        continue;
      }
      for (int64_t k = left > 0 ? left : 0; k < lanes; ++k) to[k] = 0;
      sum[v] += load(to);
    }
  }
  return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The codes of exponentials / sum; returns the codes' sum.
template <class Dot>
STEPQUANT_INLINE int32_t
normalize(const int32_t* scores, int64_t keys, float factor, const Code& code, typename Dot::Element* probabilities) {
  const float* exponentials = reinterpret_cast<const float*>(scores);
  Ints sum{};
  for (int64_t i = 0; i < keys; i += step_keys) {
    Floats p[4];
    for (int64_t v = 0; v < 4; ++v) p[v] = load(exponentials + i + v * lanes) * factor;
    sum += Dot::store_probabilities(probabilities + i, p, code);
  }
  int32_t total = 0;
  for (int64_t i = 0; i < lanes; ++i) total += sum[i];
  return total;
}

// What one block of queries passes through, and where its (batch, head) keeps the packed operands.
template <class Dot>
struct Block {
  const AttentionTask& task;
  Layout<Dot> layout;  // of the keys that are left
  Scratch scratch;
  int32_t* query;
  int32_t* scores;  // then the exponentials
  typename Dot::Element* probabilities;
  int32_t* products;
  int32_t* largest;  // score of each row
  int32_t* sums;  // of the codes of each row's probabilities
  float* steps;  // of the scores of each row
  float* result_scales;  // of each row
  int64_t batch = 0, head = 0, first = 0, rows = 0, filled = 0;
  const uint8_t* packed = nullptr;
  float key_scale = 1.0f, value_scale = 1.0f;  // where they were found with the numbers

  explicit Block(const AttentionTask& attention)
      : task(attention), layout(attention.keys, attention.width), scratch(bytes()) {
    query = scratch.template take<int32_t>(task.block * layout.score_words);
    scores = scratch.template take<int32_t>(task.block * layout.keys);
    probabilities = scratch.template take<typename Dot::Element>(task.block * layout.keys);
    products = scratch.template take<int32_t>(task.block * layout.value_words);
    largest = scratch.template take<int32_t>(task.block);
    sums = scratch.template take<int32_t>(task.block);
    steps = scratch.template take<float>(task.block);
    result_scales = scratch.template take<float>(task.block);
    for (int64_t i = 0; i < task.block * layout.score_words; ++i) query[i] = 0;
  }

  int64_t bytes() const {
    const int64_t row = layout.score_words * 4 + layout.keys * (4 + 4 / Dot::per_word) + layout.value_words * 4 + 16;
    return task.block * row + 9 * 64;
  }
  const int32_t* keys() const { return reinterpret_cast<const int32_t*>(packed); }
  const int32_t* correction() const { return reinterpret_cast<const int32_t*>(packed + layout.key_bytes()); }
  const int32_t* values() const {
    return reinterpret_cast<const int32_t*>(packed + layout.key_bytes() + layout.correction_bytes());
  }

  void move_to(int64_t item) {
    const int64_t blocks = (task.queries + task.block - 1) / task.block, slab = item / blocks;
    batch = slab / task.heads;
    head = slab % task.heads;
    first = item % blocks * task.block;
    rows = task.queries - first < task.block ? task.queries - first : task.block;
    packed = task.packed + slab * task.packed_bytes;
    if (task.by_row) key_scale = task.scales[2 * slab], value_scale = task.scales[2 * slab + 1];
    filled = Left(task, slab).count;
    layout = Layout<Dot>(filled, task.width);
  }
};

template <class Dot, class T>
void pack_queries(Block<Dot>& block) {
  const AttentionTask& task = block.task;
  for (int64_t row = 0; row < block.rows; ++row) {
    const T* x = token<T>(task.query, block.batch, block.head, block.first + row);
    auto* to = reinterpret_cast<typename Dot::Element*>(block.query + row * block.layout.score_words);
    block.steps[row] = task.step, block.result_scales[row] = task.result_scale;
    Code code = task.query.code;
    if constexpr (sizeof(T) > 1) {  // codes have their scale
      if (task.by_row) {
        const float scale = scale_of(greatest(x, task.width), code);
        code = scaled_by(code, scale);
        block.steps[row] = scale * block.key_scale * task.step;
      }
    }
    encode_row(x, task.width, code, 128, to);
  }
}

template <class Dot>
void pack_queries(Block<Dot>& block) {
  switch (block.task.query.type) {
    case Type::code: return pack_queries<Dot, uint8_t>(block);
    case Type::bf16: return pack_queries<Dot, bf16>(block);
    case Type::f32: return pack_queries<Dot, float>(block);
  }
}

// What the mask leaves of the scores of one query; returns the largest, `never` where that is nothing.
template <class Dot>
int32_t apply_mask(const Block<Dot>& block, int64_t row, int32_t* scores) {
  const RowMask& mask = block.task.mask;
  const int64_t place =
      block.batch * mask.batch_stride + block.head * mask.head_stride + (block.first + row) * mask.query_stride;
  if (mask.logical) return leave_out(static_cast<const bool*>(mask.data) + place, block.filled, scores);
  return add_bias(static_cast<const float*>(mask.data) + place, block.steps[row], block.filled, scores);
}

template <class Dot>
void softmax(Block<Dot>& block) {
  const int64_t keys = block.layout.keys;
  for (int64_t row = 0; row < block.rows; ++row) {
    int32_t* scores = block.scores + row * keys;
    if (block.task.mask.data) block.largest[row] = apply_mask(block, row, scores);
    if (block.filled == 0 ||
        block.largest[row] == never) {  // nothing to read: no shares, where 0 would be divided by 0
      std::memset(block.probabilities + row * keys, 0, static_cast<size_t>(keys) * sizeof(typename Dot::Element));
      block.sums[row] = 0;
      if (block.task.by_row) block.result_scales[row] = 0;
      continue;
    }
    const auto exponentials = block.task.mask.data ? exponentiate<true> : exponentiate<false>;
    const float sum = exponentials(scores, keys, block.filled, block.largest[row], block.steps[row] * log2_of_e);
    const Code& code = block.task.probabilities;
    const float gain = block.task.by_row ? code.highest : code.inverse / sum;
    if (block.task.by_row) block.result_scales[row] = block.value_scale / (code.highest * sum);
    block.sums[row] = normalize<Dot>(scores, keys, gain, code, block.probabilities + row * keys);
  }
}

template <class Dot, class T>
void write_result(const Block<Dot>& block) {
  const AttentionTask& task = block.task;
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t place = (block.batch * task.queries + block.first + row) * task.heads + block.head;
    T* out = static_cast<T*>(task.out) + place * task.width;
    const int32_t* products = block.products + row * block.layout.value_words;
    const int32_t offset = (task.value.code.zero_point - 128) * block.sums[row];
    for (int64_t i = 0; i < task.width; i += lanes) {
      const Floats result =
          __builtin_convertvector(load_words(products + i) - offset, Floats) * block.result_scales[row];
      const int64_t rest = task.width - i;
      rest < lanes ? store_first(out + i, result, rest) : store(out + i, result);
    }
  }
}

template <class Dot, class T>
void attend_blocks(const AttentionTask& task, int64_t begin, int64_t end) {
  Block<Dot> block(task);
  const Layout<Dot>& layout = block.layout;
  const typename Dot::Setup setup(layout.score_words);
  for (int64_t item = begin; item < end; ++item) {
    block.move_to(item);
    const int64_t rows = round_up(block.rows, Dot::rows);
    pack_queries(block);
    Dot::scores(
        block.query, layout.score_words, block.keys(), block.correction(), layout.keys, rows, block.scores,
        block.largest);
    softmax(block);
    Dot::products(block.probabilities, layout.keys, block.values(), layout.value_words, rows, block.products);
    write_result<Dot, T>(block);
  }
}

template <class Dot>
void attend(const AttentionTask& task, int64_t begin, int64_t end) {
  if (task.type == Type::bf16) return attend_blocks<Dot, bf16>(task, begin, end);
  attend_blocks<Dot, float>(task, begin, end);
}

template <class Dot>
int64_t packed_bytes(int64_t keys, int64_t width) {
  return Layout<Dot>(keys, width).bytes();
}

}  // namespace
}  // namespace stepquant
