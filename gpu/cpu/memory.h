#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "gpu/device.h"

namespace passel::gpu::cpu {

// What a device has handed out, against its limit. Outlives the device while buffers do.
struct Ledger {
  explicit Ledger(uint64_t limit_bytes) : limit(limit_bytes) {}
  const uint64_t limit;
  std::atomic<uint64_t> used{0};
};

// Physical memory of the machine.
uint64_t MachineMemoryBytes();

// 64-byte aligned memory (huge pages where it is large). `ledger`: null for memory that does not
// count. Throws Error{kMemory} beyond the limit or where the system has none.
std::unique_ptr<Buffer> MakeBuffer(std::shared_ptr<Ledger> ledger, size_t bytes);

}  // namespace passel::gpu::cpu
