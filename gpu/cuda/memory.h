#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "gpu/device.h"

namespace passel::gpu::cuda {

// What a device has handed out, against its limit. Outlives the device while buffers do.
struct Ledger {
  explicit Ledger(uint64_t limit_bytes) : limit(limit_bytes) {}
  const uint64_t limit;
  std::atomic<uint64_t> used{0};
  // Before memory goes: issues the work that uses it, where the device has put some off.
  std::function<void()> before_free;
};

// Device memory. `ledger`: null for memory that does not count. Freeing waits for the device, so
// work already issued may still use it. Throws Error{kMemory} beyond the limit or the device.
std::unique_ptr<Buffer> MakeDeviceBuffer(std::shared_ptr<Ledger> ledger, size_t bytes);
// Pinned host memory, readable by kernels under the same address. Throws Error{kMemory}.
std::unique_ptr<Buffer> MakePinnedBuffer(size_t bytes);
// The same of memory that is there.
std::unique_ptr<Buffer> PinBuffer(std::span<std::byte> memory);

// Device memory that grows to the largest size ever asked for. Not counted against the limit: it is
// bounded by shapes, not by load.
class Scratch {
 public:
  // At least `bytes` bytes of any content; the previous answer becomes invalid for new work.
  void* Get(size_t bytes);

 private:
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace passel::gpu::cuda
