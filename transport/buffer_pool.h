#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

namespace passel::transport {

// Receive buffers in size classes of powers of two, aligned to 64 bytes. What TryAcquire hands out
// never exceeds `limit_bytes`; what is kept for reuse never exceeds `keep_bytes`. One thread.
class BufferPool {
 public:
  BufferPool(uint64_t limit_bytes, uint64_t keep_bytes)
      : limit_bytes_(limit_bytes), keep_bytes_(keep_bytes) {}

  // A buffer on loan; give it back with Release.
  struct Buffer {
    struct Free {
      void operator()(std::byte* p) const { std::free(p); }
    };
    std::unique_ptr<std::byte, Free> data;
    uint64_t bytes = 0;
  };
  // At least `bytes` bytes, at most 16 MiB; empty where the limit would be passed.
  Buffer TryAcquire(uint64_t bytes);
  // The same regardless of the limit, for data that is in memory already and must be moved.
  Buffer Acquire(uint64_t bytes);
  void Release(Buffer buffer);

  uint64_t used_bytes() const { return used_bytes_; }
  uint64_t kept_bytes() const { return kept_bytes_; }

 private:
  static constexpr uint64_t kSmallest = 4096;
  static constexpr size_t kClasses = 13;  // 4 KiB … 16 MiB
  static size_t ClassOf(uint64_t bytes);

  uint64_t limit_bytes_;
  uint64_t keep_bytes_;
  uint64_t used_bytes_ = 0;
  uint64_t kept_bytes_ = 0;
  std::array<std::vector<Buffer>, kClasses> free_;
};

}  // namespace passel::transport
