// Every pixel of a channels-last image of bytes twice in both directions.
#pragma once

#include "vector.h"

namespace stepquant {
namespace {

void upsample(const UpsampleTask& task, int64_t begin, int64_t end) {
  const size_t bytes = static_cast<size_t>(task.channels);
  const int64_t row_bytes = 2 * task.width * task.channels;
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* from = task.x + row * task.width * task.channels;
    uint8_t* to = task.out + row * 2 * row_bytes;
    for (int64_t pixel = 0; pixel < task.width; ++pixel) {
      std::memcpy(to + 2 * pixel * task.channels, from + pixel * task.channels, bytes);
      std::memcpy(to + (2 * pixel + 1) * task.channels, from + pixel * task.channels, bytes);
    }
    std::memcpy(to + row_bytes, to, static_cast<size_t>(row_bytes));
  }
}

}  // namespace
}  // namespace stepquant
