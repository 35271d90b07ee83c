// convolve, linear and the packing of their weights as torch operations.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "product.h"

namespace stepquant {
namespace {

constexpr int64_t patches_cache = 4 << 20;  // bytes of transformed codes in one item
constexpr int64_t rows_cache = 64 << 10;  // bytes of rows in one item
constexpr int64_t rows_least_chunk = 24;  // rows in one item where there are many

// Signed bytes (out, in, height, width) as [block][tap][word of inputs][output of the block][byte].
Tensor pack_weight(const Tensor& weight) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == at::kChar && weight.numel() > 0,
      "pack_weight: weight is expected as signed bytes (out, in, height, width), got ", weight.sizes(), " of ",
      weight.scalar_type());
  const ConvolveKernel& kernel = kernels().convolve;
  const Tensor dense = weight.contiguous();
  const int64_t outs = dense.size(0), ins = dense.size(1), taps = dense.size(2) * dense.size(3), depth = filled(ins);
  const ConvolveBlocks blocks(outs, kernel.groups_per_block);
  Tensor packed = at::detail::empty_cpu({groups_of(outs) * convolve_group * depth * taps}, at::kChar);
  int8_t* to = packed.mutable_data_ptr<int8_t>();
  const int8_t* from = dense.const_data_ptr<int8_t>();
  for (int64_t block = 0; block < blocks.count(); ++block) {
    const int64_t first = blocks.first(block) * convolve_group, width = blocks.groups(block) * convolve_group;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t in = 0; in < depth; in += kernel.per_word) {
        for (int64_t out = first; out < first + width; ++out) {
          for (int64_t k = in; k < in + kernel.per_word; ++k) {
            *to++ = out < outs && k < ins ? from[(out * ins + k) * taps + tap] : int8_t{0};
          }
        }
      }
    }
  }
  return packed;
}

template <class T>
void copy_pixels(const ConvolveTask& task, T* to, int64_t begin, int64_t end) {
  const int64_t plane = task.height * task.width, depth = filled(task.channels);
  int64_t sample = begin / plane, row = begin % plane / task.width, column = begin % task.width;
  for (to += begin * depth; begin < end; ++begin, to += depth) {
    const uint8_t* from = task.x + sample * task.image_stride + row * task.row_stride + column * task.pixel_stride;
    for (int64_t c = 0; c < task.channels; ++c) to[c] = from[c];
    for (int64_t c = task.channels; c < depth; ++c) to[c] = 0;
    if (++column == task.width) {
      column = 0;
      if (++row == task.height) row = 0, ++sample;
    }
  }
}

// Makes the task read full words of channels; returns the padded copy where one is needed, to keep it alive.
Tensor to_words(ConvolveTask& task, int64_t images) {
  const int64_t depth = filled(task.channels), size = 4 / kernels().convolve.per_word;
  if (size == 1 && depth == task.channels) return {};
  const int64_t pixels = images * task.height * task.width;
  Tensor words = at::detail::empty_cpu({pixels * depth}, size == 1 ? at::kByte : at::kShort);
  for_items(pixels, depth, [&](int64_t begin, int64_t end) {
    if (size == 1) {
      copy_pixels(task, static_cast<uint8_t*>(words.mutable_data_ptr()), begin, end);
    } else {
      copy_pixels(task, static_cast<int16_t*>(words.mutable_data_ptr()), begin, end);
    }
  });
  task.x = static_cast<const uint8_t*>(words.const_data_ptr());
  task.channels = depth;
  task.pixel_stride = depth * size;
  task.row_stride = task.width * task.pixel_stride;
  task.image_stride = task.height * task.row_stride;
  return words;
}

// A pixel of zero points, as bytes or as shorts.
Tensor border_of(int64_t channels, int64_t zero_point, bool bytes) {
  Tensor border = at::detail::empty_cpu({channels}, bytes ? at::kByte : at::kShort);
  if (bytes) {
    std::memset(border.mutable_data_ptr(), static_cast<int>(zero_point), static_cast<size_t>(channels));
  } else {
    std::fill_n(static_cast<int16_t*>(border.mutable_data_ptr()), channels, static_cast<int16_t>(zero_point));
  }
  return border;
}

int64_t patches_of(const ConvolveTask& task, int64_t images) {
  return images * ((task.out_height + 3) / 4) * ((task.out_width + 3) / 4);
}

// Whether Winograd pays: 3 x 3 taps at stride 1, and enough patches to repay the transform of the weight.
bool in_patches(const ConvolveTask& task, int64_t images) {
  if (task.kernel_height != 3 || task.kernel_width != 3 || task.stride_y != 1 || task.stride_x != 1 ||
      task.dilation_y != 1 || task.dilation_x != 1 || task.channels % 16 || task.out_channels < 16) {
    return false;
  }
  const int64_t patches = patches_of(task, images);
  return patches >= kernels().convolve.least_patches && task.pixels >= 10 * patches;
}

// The size of a chunk of `total` rows or patches, at most `most`. Chunks are equal in size, and chunks times blocks of
// outputs, the items, share out evenly among the threads.
int64_t chunk_of(int64_t total, int64_t most, int64_t blocks) {
  const int64_t threads = at::get_num_threads();
  int64_t chunks = (total + most - 1) / most;
  while (chunks < total && chunks * blocks < 4 * threads && chunks * blocks % threads) ++chunks;
  return (total + chunks - 1) / chunks;
}

// A workspace that all calls on this thread share: touching fresh pages costs as much as Winograd saves.
char* workspace(int64_t bytes) {
  thread_local Tensor kept;
  if (!kept.defined() || kept.numel() < bytes) {
    kept = Tensor();
    kept = at::detail::empty_cpu({bytes}, at::kByte);
  }
  return static_cast<char*>(kept.mutable_data_ptr());
}

// Runs a kernel that needs `each` bytes of workspace on every thread.
void run_with_scratch(
    const ConvolveTask& task, int64_t items, int64_t cost, int64_t each,
    void (*run)(const ConvolveTask&, int64_t, int64_t)) {
  const int64_t threads = at::get_num_threads();
  char* place = workspace(threads * each);
  for_items(items, cost, [&](int64_t begin, int64_t end) {
    ConvolveTask part = task;
    part.scratch = place + std::min<int64_t>(at::get_thread_num(), threads - 1) * each;
    run(part, begin, end);
  });
}

void run_patches(ConvolveTask& task, int64_t images) {
  const ConvolveKernel& kernel = kernels().convolve;
  const ConvolveBlocks blocks(task.out_channels, kernel.groups_per_block);
  task.patches = patches_of(task, images);
  const int64_t most = std::clamp<int64_t>(patches_cache / (72 * task.channels), 12, patches_most_chunk);
  task.chunk_patches = chunk_of(task.patches, most, blocks.count());
  const int64_t items = (task.patches + task.chunk_patches - 1) / task.chunk_patches * blocks.count();
  const int64_t cost = task.pixels * task.out_channels / items * task.channels / 8;
  run_with_scratch(task, items, cost, kernel.patches_scratch(task), kernel.run_patches);
}

// Whether the convolution is pointwise over contiguous pixels, and so a GEMM.
bool in_rows(const ConvolveTask& task, int64_t images) {
  return task.kernel_height == 1 && task.kernel_width == 1 && task.out_height == task.height &&
      task.out_width == task.width && task.stride_y == 1 && task.stride_x == 1 && task.top == 0 && task.left == 0 &&
      (task.height == 1 || task.row_stride == task.width * task.pixel_stride) &&
      (images == 1 || task.image_stride == task.height * task.width * task.pixel_stride);
}

void run_rows(ConvolveTask& task) {
  const ConvolveKernel& kernel = kernels().convolve;
  const int64_t blocks = ConvolveBlocks(task.out_channels, kernel.groups_per_block).count();
  const int64_t row = filled(task.channels) * 4 / kernel.per_word;
  const int64_t most = std::clamp<int64_t>(rows_cache / row, rows_least_chunk, rows_most_chunk);
  const int64_t chunk = task.chunk_rows = chunk_of(task.pixels, most, blocks);
  const int64_t items = (task.pixels + chunk - 1) / chunk * blocks;
  const int64_t cost = task.pixels * task.out_channels / items * task.channels / 16, lines = (chunk * row + 63) / 64;
  run_with_scratch(task, items, cost, 64 * lines, kernel.run_rows);
}

void run(
    const char* name, ConvolveTask& task, const Product& product, int64_t images, at::ScalarType type, Tensor& out) {
  const int64_t outs = task.out_channels;
  const Numbers scales(name, "weight_scale", product.weight_scale, 1, outs),
      biases(name, "bias", product.bias, 1, outs);
  task.weight = product.weight.const_data_ptr<int8_t>();
  task.weight_scale = scales.data();
  task.weight_sum = product.weight_sum.const_data_ptr<int32_t>();
  task.bias = biases.data();
  task.scale = static_cast<float>(product.scale);
  task.zero_point = static_cast<int32_t>(product.zero_point);
  task.type = type == at::kBFloat16 ? Type::bf16 : Type::f32;
  task.out = out.mutable_data_ptr();
  if (in_rows(task, images)) return run_rows(task);
  const bool patches = in_patches(task, images);
  const Tensor words = patches ? Tensor() : to_words(task, images);
  const Tensor border = border_of(task.channels, product.zero_point, patches || kernels().convolve.per_word == 4);
  task.border = static_cast<const uint8_t*>(border.const_data_ptr());
  if (patches) return run_patches(task, images);
  const int64_t chunks = (task.pixels + convolve_chunk_pixels - 1) / convolve_chunk_pixels;
  const int64_t blocks = ConvolveBlocks(outs, kernels().convolve.groups_per_block).count();
  const int64_t depth = product.weight.numel() / std::max<int64_t>(outs, 1);
  // A word of four products costs about as much as a quarter of a number elsewhere.
  for_items(blocks * chunks, task.pixels * outs / (blocks * chunks) * depth / 16, [&](int64_t begin, int64_t end) {
    kernels().convolve.run(task, begin, end);
  });
}

Tensor convolve(
    const Tensor& codes, double scale, int64_t zero_point, const Tensor& weight, const Tensor& weight_scale,
    const Tensor& weight_sum, const Optional& bias, at::IntArrayRef kernel, at::IntArrayRef stride,
    at::IntArrayRef sides, at::IntArrayRef dilation, bool doubled, at::ScalarType type, const Optional& add,
    const Optional& row_scale) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(
      codes.dim() == 4 && codes.scalar_type() == at::kByte && (codes.size(0) == 0 || codes.numel() > 0),
      "convolve: codes are expected as bytes (batch, channels, height, width), got ", codes.sizes(), " of ",
      codes.scalar_type());
  check_walk("kernel", kernel, 2, 1);
  check_walk("stride", stride, 2, 1);
  check_walk("sides", sides, 4, 0);
  check_walk("dilation", dilation, 2, 1);
  const Tensor x =
      codes.stride(1) == 1 || codes.size(1) == 1 ? codes : codes.contiguous(at::MemoryFormat::ChannelsLast);
  const Product product{weight, weight_scale, weight_sum, bias, scale, zero_point};
  check("convolve", product, kernel[0] * kernel[1], x.size(1), type);
  ConvolveTask task{};
  task.x = x.const_data_ptr<uint8_t>();
  task.image_stride = x.stride(0), task.row_stride = x.stride(2), task.pixel_stride = x.stride(3);
  task.height = x.size(2), task.width = x.size(3), task.channels = x.size(1);
  task.doubled = doubled;
  task.kernel_height = kernel[0], task.kernel_width = kernel[1];
  task.stride_y = stride[0], task.stride_x = stride[1];
  task.dilation_y = dilation[0], task.dilation_x = dilation[1];
  task.left = sides[0], task.top = sides[2];
  const int64_t high = (task.height << task.doubled) + sides[2] + sides[3] - task.dilation_y * (kernel[0] - 1) - 1;
  const int64_t wide = (task.width << task.doubled) + sides[0] + sides[1] - task.dilation_x * (kernel[1] - 1) - 1;
  TORCH_CHECK(high >= 0 && wide >= 0, "convolve: the kernel is larger than the padded image");
  task.out_height = high / task.stride_y + 1, task.out_width = wide / task.stride_x + 1;
  task.out_channels = weight_scale.numel();
  task.pixels = x.size(0) * task.out_height * task.out_width;
  Tensor out = at::detail::empty_cpu(
      {x.size(0), task.out_channels, task.out_height, task.out_width}, type, false, at::MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  Tensor added;
  if (add.has_value()) {
    added = to_add("convolve", *add, out).contiguous(at::MemoryFormat::ChannelsLast);
    task.add = added.const_data_ptr(), task.add_stride = task.out_channels;
  }
  const Numbers rows("convolve", "row_scale", row_scale, 1, x.size(0));
  task.row_scale = rows.data(), task.row_pixels = task.out_height * task.out_width;
  run("convolve", task, product, x.size(0), type, out);
  return out;
}

Tensor linear(
    const Tensor& codes, double scale, int64_t zero_point, const Tensor& weight, const Tensor& weight_scale,
    const Tensor& weight_sum, const Optional& bias, at::ScalarType type, const Optional& add, const Optional& gate,
    const Optional& row_scale, const Optional& low, const Optional& up) {
  const at::AutoDispatchBelowAutograd guard;
  TORCH_CHECK(
      codes.dim() == 2 && codes.scalar_type() == at::kByte, "linear: codes are expected as bytes (rows, inputs), got ",
      codes.sizes(), " of ", codes.scalar_type());
  const Tensor x = codes.stride(1) == 1 || codes.size(1) == 1 ? codes : codes.contiguous();
  const Product product{weight, weight_scale, weight_sum, bias, scale, zero_point};
  check("linear", product, 1, x.size(1), type);
  ConvolveTask task{};
  task.x = x.const_data_ptr<uint8_t>();
  task.pixel_stride = x.stride(0);
  task.height = 1, task.width = x.size(0), task.channels = x.size(1);
  task.kernel_height = task.kernel_width = task.stride_y = task.stride_x = task.dilation_y = task.dilation_x = 1;
  task.out_height = 1, task.out_width = task.pixels = x.size(0);
  task.out_channels = weight_scale.numel();
  Tensor out = at::detail::empty_cpu({task.pixels, task.out_channels}, type);
  if (out.numel() == 0) return out;
  Tensor added;
  if (add.has_value()) {
    added = to_add("linear", *add, out);
    if (added.stride(1) != 1 && added.size(1) != 1) added = added.contiguous();
    task.add = added.const_data_ptr(), task.add_stride = added.stride(0);
  }
  const bool gated = gate.has_value() && gate->defined();
  const int64_t samples = gated && gate->dim() == 2 ? gate->size(0) : 1;
  TORCH_CHECK(
      !gated || (gate->dim() == 2 && samples > 0 && task.pixels % samples == 0),
      "linear: gate is expected as (samples, outputs) with as many rows of codes for each sample, got ", gate->sizes(),
      " for ", task.pixels, " rows");
  const Numbers gates("linear", "gate", gate, samples, task.out_channels);
  task.gate = gates.data(), task.gate_pixels = task.pixels / samples;
  const Numbers rows("linear", "row_scale", row_scale, 1, task.pixels);
  task.row_scale = rows.data(), task.row_pixels = 1;
  TORCH_CHECK(low.has_value() == up.has_value(), "linear: low and up are the factors of one branch");
  Tensor few;
  if (low.has_value()) {
    check_side("linear", *up, task.out_channels);
    few = in_words("linear: low", *low, *up);
    TORCH_CHECK(few.size(0) == task.pixels, "linear: low has ", few.size(0), " rows for ", task.pixels, " of codes");
    const int64_t words = up->size(1), stride = few.stride(0) * few.element_size();
    task.branch = {few.const_data_ptr(), stride,  words, type_of(*up), up->const_data_ptr(),
                   task.out_channels,    nullptr, 0};
  }
  run("linear", task, product, 1, type, out);
  return out;
}

TORCH_LIBRARY_IMPL(stepquant, CPU, library) {
  library.impl("pack_weight", pack_weight);
  library.impl("convolve", convolve);
  library.impl("linear", linear);
}

}  // namespace
}  // namespace stepquant
