#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <memory>
#include <vector>

#include "runtime/engine/host_link.h"

namespace passel::engine {

// Slots of staging memory for what leaves for the host ranks: what is under way, or still read by
// one of them, holds its slot.
class StagingRing {
 public:
  StagingRing(HostLink& link, gpu::Device& device, size_t slot_bytes, size_t slots) : link_(link) {
    const size_t step = (slot_bytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::shared_ptr<gpu::Buffer> memory = link.AllocateStaging(device, slots * step);
    for (size_t i = 0; i < slots; ++i) {
      slots_.emplace_back(static_cast<std::byte*>(memory->data()) + i * step,
                          [memory](std::byte*) {});
    }
  }
  bool any_free() const { return std::ranges::any_of(slots_, IsFree); }
  // A slot that nobody holds. Waits for one: what holds them is on its way, or a host is lost,
  // which throws.
  std::shared_ptr<std::byte> Take() {
    while (true) {
      const auto free = std::ranges::find_if(slots_, IsFree);
      if (free != slots_.end()) return *free;
      link_.Pump(std::chrono::milliseconds(5));
    }
  }

 private:
  static constexpr size_t kAlignment = 64;
  static bool IsFree(const std::shared_ptr<std::byte>& slot) { return slot.use_count() == 1; }

  HostLink& link_;
  std::vector<std::shared_ptr<std::byte>> slots_;
};

}  // namespace passel::engine
