#include "transport/buffer_pool.h"

#include <algorithm>
#include <bit>
#include <new>
#include <utility>

#include "runtime/base/error.h"

namespace passel::transport {

size_t BufferPool::ClassOf(uint64_t bytes) {
  const uint64_t rounded = std::bit_ceil(std::max(bytes, kSmallest));
  return static_cast<size_t>(std::countr_zero(rounded) - std::countr_zero(kSmallest));
}

BufferPool::Buffer BufferPool::TryAcquire(uint64_t bytes) {
  const uint64_t size = kSmallest << ClassOf(bytes);
  if (size > limit_bytes_ || used_bytes_ > limit_bytes_ - size) return {};
  return Acquire(bytes);
}

BufferPool::Buffer BufferPool::Acquire(uint64_t bytes) {
  const size_t c = ClassOf(bytes);
  Check(c < kClasses, "receive buffer above 16 MiB");
  const uint64_t size = kSmallest << c;
  Buffer buffer;
  if (!free_[c].empty()) {
    buffer = std::move(free_[c].back());
    free_[c].pop_back();
    kept_bytes_ -= size;
  } else {
    buffer.data.reset(static_cast<std::byte*>(std::aligned_alloc(64, size)));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = size;
  }
  used_bytes_ += size;
  return buffer;
}

void BufferPool::Release(Buffer buffer) {
  if (buffer.data == nullptr) return;
  used_bytes_ -= buffer.bytes;
  if (kept_bytes_ + buffer.bytes > keep_bytes_) return;
  kept_bytes_ += buffer.bytes;
  const size_t c = ClassOf(buffer.bytes);
  free_[c].push_back(std::move(buffer));
}

}  // namespace passel::transport
