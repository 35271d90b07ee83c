// The arguments of the kernels: raw pointers and sizes, no torch. Each kernel is compiled once per instruction set and
// called through a table, on a range of items; results do not depend on how items were cut into ranges.
#pragma once

#include <cstdint>

namespace stepquant {

struct bf16 {
  uint16_t bits;
};

enum class Type { bf16, f32, code };
enum class Activation { none, silu, gelu, gelu_tanh, geglu, swiglu, swiglu_first };

// byte = round(clamp(x * inverse, lowest, highest)) + zero_point; the clamp's ends are integers.
struct Code {
  float inverse;
  float lowest;
  float highest;
  int32_t zero_point;
};

// Rows of `width` dense numbers, `stride` numbers apart.
struct Rows {
  const void* data;
  int64_t width;
  int64_t stride;
};

struct QuantizeTask {
  Rows x;
  Type type;
  Activation activation;  // the gated ones read rows of 2 * width of x, values first but in swiglu_first
  Code code;
  uint8_t* out;
  int64_t out_stride;
  const float* factors;  // of the numbers of a row, without an activation; or null
};

struct RotateTask {
  Rows x;
  Type type;
  const float* factors;  // of the numbers of a row, before it is rotated; or null
  int64_t group;  // a power of four, of which rows hold whole ones
  float most;  // what the greatest magnitude of a row becomes
  Code code;  // its inverse is not read
  uint8_t* out;
  float* scales;  // one for each row
};

struct GroupNormTask {
  Rows x;
  Rows skip;  // width 0 if there is none
  Type type;
  Type out_type;
  int64_t pixels;
  int64_t groups;
  int64_t groups_per_item;
  int64_t items_per_sample;
  float eps;
  Activation activation;
  const float* weight;  // per channel, or null
  const float* bias;
  const float* add;  // per sample and channel, or null
  const float* scale;
  const float* shift;
  Code code;
  void* out;
};

struct LayerNormTask {
  Rows x;
  Type type;
  Type out_type;
  int64_t rows_per_sample;
  float eps;
  const float* weight;  // per channel, or null
  const float* bias;
  const float* scale;  // per sample and channel, or null
  const float* shift;
  const float* gate;  // per sample and channel, in place of 1 + scale, or null
  Rows add;  // of the result's type, joined behind the norm; without data there are none
  Code code;  // its inverse is 1 where floats come out
  void* out;
  bool centred;  // a layer norm; otherwise RMS norm
};

// Queries or keys: rows of whole heads, each channel normed with its head or with all, pairs of channels turned.
struct RotaryTask {
  Rows x;
  Type type;
  int64_t tokens;  // of a sample
  int64_t head_width;
  bool across;  // all heads share one norm
  bool centred;  // layer norm, not RMS norm
  float eps;
  const float* weight;  // per channel of what shares a norm, or null
  const float* bias;
  const float* cosines;  // per sample, token and pair, or null
  const float* sines;
  int64_t angle_strides[3];
  bool halves;  // pairs lie half a head apart, not beside each other
  Code code;
  uint8_t* out;
};

struct UpsampleTask {
  const uint8_t* x;
  uint8_t* out;
  int64_t width;
  int64_t channels;
};

// Token rows of one operand of attention: (batch, heads, tokens, width) with dense width.
struct Operand {
  const void* data;
  Type type;  // codes are only queries and keys
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
  Code code;
};

// A bias this low leaves a key out of an attention: no float32 holds its share beside one without bias. Where all biases of a
// query are that low, they count from the greatest of them.
constexpr float out_of_reach = -5000.0f;
constexpr float most_bias = 1 << 29;  // in steps of a score

// A mask that has a row for every query, or one for all of them: its strides, in elements, and what it says of the keys of a
// row, as bools (whether a query reads them) or floats (what is added to their scores).
struct RowMask {
  const void* data;  // null: no such mask
  bool logical;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t query_stride;
};

struct AttentionTask {
  Operand query;
  Operand key;
  Operand value;
  Type type;  // of the result
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t width;
  int64_t block;  // queries per item, as the kernels say
  float step;  // what a score of 1 stands for
  float result_scale;
  Code probabilities;
  // Scales that are found with the numbers: of every query of a head, of its keys and its values, and of the probabilities of a
  // query, whose greatest becomes the greatest code. `step` and `result_scale` then lack them.
  bool by_row;
  float* scales;  // of the keys and the values of every (batch, head)
  // What a mask leaves of the keys of every (batch, head): their places, how many, and what is added to their scores, in
  // whole steps. Without a mask there are none of the three, and all keys are left.
  const int32_t* places;
  const int32_t* counts;
  const int32_t* biases;
  RowMask mask;  // beside which all keys are left
  uint8_t* packed;  // the packed key and value of every (batch, head), packed_bytes each
  int64_t packed_bytes;
  void* out;  // (batch, queries, heads, width)
};

struct AttentionKernels {
  int64_t (*packed_bytes)(int64_t keys, int64_t width);
  void (*pack)(const AttentionTask& task, int64_t begin, int64_t end);  // items are (batch, head)
  void (*attend)(const AttentionTask& task, int64_t begin, int64_t end);  // items are (batch, head, query block)
  int64_t block;  // queries per item of attend
};

// Rows of numbers times one side of a low-rank branch, summed in float32. Numbers come in words of 32 bits, one float32 or two
// bfloat16; the side is packed as [group of outputs][word][output of the group].
struct SideTask {
  const void* x;
  int64_t stride;  // bytes between rows
  int64_t words;  // in a row
  Type type;  // of the numbers, the side and the result
  const void* side;
  int64_t outs;
  void* out;
  int64_t out_stride;  // numbers between rows
};

// A convolution of codes (batch, height, width, channels), as bytes or shorts, with signed bytes, packed by blocks of
// output channels.
struct ConvolveTask {
  const uint8_t* x;
  int64_t image_stride, row_stride, pixel_stride;  // bytes
  int64_t height, width, channels;  // of the input; channels come in whole words
  int64_t doubled;  // 1: every pixel counts twice in both directions, else 0
  int64_t out_height, out_width, out_channels;
  int64_t pixels;  // of the output, of all images
  int64_t patches;  // Winograd's, of 4 x 4 pixels; those at the right and lower edge may be partial
  int64_t chunk_patches;  // in one item
  int64_t chunk_rows;  // in one item of a pointwise convolution
  int64_t first_row;  // which `x` points to
  void* scratch;  // workspace of one item, Winograd or pointwise
  int64_t kernel_height, kernel_width, stride_y, stride_x, top, left, dilation_y, dilation_x;
  const uint8_t* border;  // a pixel of zero points
  const int8_t* weight;
  const float* weight_scale;  // per output channel
  const int32_t* weight_sum;  // per output channel, padded with zeros to whole groups
  const float* bias;  // per output channel, or null
  float scale;
  const float* row_scale;  // per so many pixels, or null
  int64_t row_pixels;
  int32_t zero_point;
  Type type;  // of what is added and of the result
  const void* add;  // or null
  int64_t add_stride;  // numbers between its pixels
  SideTask branch;  // of a pointwise convolution, added after the bias; without numbers there is none
  const float* low;  // what the branch adds to one item, from its first row and output on; or null
  int64_t low_row, low_channel;
  void* out;
  const float*
      gate;  // per sample of so many pixels and output channel, which multiplies before anything is added; or null
  int64_t gate_pixels;
};

constexpr int64_t convolve_chunk_pixels = 24;  // of the output in one item
constexpr int64_t patches_most_chunk = 48;  // of 4 x 4 outputs in one item
constexpr int64_t patches_at_once = 12;  // so few that their sums stay in the cache
constexpr int64_t patches_most_channels = 128;  // at once, for the cache; 9 * 128 * 128 times as much is less than 2^25
constexpr int64_t convolve_group = 16;  // output channels that are packed together, the last filled up
constexpr int64_t rows_most_chunk = 96;  // in one item of a pointwise convolution

namespace {

// Input channels as they are packed: filled up to whole words of every kernel.
inline int64_t filled(int64_t channels) {
  return (channels + 3) / 4 * 4;
}

// Output channels cut into blocks of at most so many groups, nearly equal in size, larger ones first.
class ConvolveBlocks {
 public:
  ConvolveBlocks(int64_t out_channels, int64_t most)
      : total_((out_channels + convolve_group - 1) / convolve_group),
        count_((total_ + most - 1) / most),
        least_(total_ / count_),
        larger_(total_ % count_) {}
  int64_t count() const { return count_; }
  int64_t groups(int64_t block) const { return least_ + (block < larger_ ? 1 : 0); }
  int64_t first(int64_t block) const { return block * least_ + (block < larger_ ? block : larger_); }

 private:
  int64_t total_, count_, least_, larger_;
};

}  // namespace

struct ConvolveKernel {
  int64_t per_word;  // codes in a word of 32 bits: four bytes or two shorts
  int64_t groups_per_block;  // at most
  int64_t least_patches;  // fewer do not repay the transform of the weight
  void (*run)(const ConvolveTask& task, int64_t begin, int64_t end);  // items are (block, chunk)
  // Pointwise: a single tap over contiguous pixels; items are (chunk of rows, block).
  void (*run_rows)(const ConvolveTask& task, int64_t begin, int64_t end);
  void (*multiply_side)(const SideTask& task, int64_t begin, int64_t end);  // items are rows
  // Winograd: 3 x 3 taps without stride or dilation; items are (chunk of patches, block).
  int64_t (*patches_scratch)(const ConvolveTask& task);  // bytes
  void (*run_patches)(const ConvolveTask& task, int64_t begin, int64_t end);
};

// The weight is packed as files pack it: integers from zero up, of 4 or 8 bits, the lowest bits of a byte first.
struct StoredTask {
  const double* x;  // rows of `ins` numbers
  int64_t rows;
  int64_t ins;
  int64_t outs;
  const uint8_t* weight;
  int64_t bits;
  int64_t groups;  // of the inputs of one output, with a scale and a zero point each
  const float* scale;
  const int16_t* zero_point;
  const float* bias;  // per output, or null
  float* out;
};

struct Kernels {
  const char* name;
  void (*quantize)(const QuantizeTask& task, int64_t begin, int64_t end);  // items are rows
  void (*group_norm)(const GroupNormTask& task, int64_t begin, int64_t end);  // items are (sample, groups)
  void (*layer_norm)(const LayerNormTask& task, int64_t begin, int64_t end);  // items are rows
  void (*upsample)(const UpsampleTask& task, int64_t begin, int64_t end);  // items are input rows of all images
  void (*rotate)(const RotateTask& task, int64_t begin, int64_t end);  // items are rows
  void (*rotary)(const RotaryTask& task, int64_t begin, int64_t end);  // items are tokens
  void (*stored_linear)(const StoredTask& task, int64_t begin, int64_t end);  // items are outputs
  AttentionKernels attention;  // integer products of AVX-512 come from files of their own
  ConvolveKernel convolve;
};

extern const Kernels plain_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const AttentionKernels avx512vnni_attention;
extern const AttentionKernels amx_attention;
extern const ConvolveKernel avx512vnni_convolve;
extern const ConvolveKernel avx512bf16_convolve;

const Kernels& kernels();

}  // namespace stepquant
