// Memory that a kernel's range of items works in.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace stepquant {
namespace {

// Cache lines, handed out in order and freed together.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(static_cast<char*>(data_) + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }

 private:
  void* data_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace stepquant
