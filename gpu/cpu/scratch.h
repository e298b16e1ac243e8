#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>

#include "gpu/cpu/memory.h"

namespace passel::gpu::cpu {

// Working memory that grows to the largest size ever asked for. Not counted against the device's
// limit: it is bounded by shapes, not by load.
class Scratch {
 public:
  // At least `bytes` bytes, 64-byte aligned, of any content; the previous answer becomes invalid.
  void* Get(size_t bytes) {
    if (!buffer_ || buffer_->bytes() < bytes) {
      buffer_.reset();
      buffer_ = MakeBuffer(nullptr, std::max(bytes, size_t{4096}));
    }
    return buffer_->data();
  }
  template <typename T>
  T* Get(int64_t count) {
    return static_cast<T*>(Get(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace passel::gpu::cpu
