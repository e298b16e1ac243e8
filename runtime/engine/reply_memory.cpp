#include "runtime/engine/reply_memory.h"

#include <algorithm>
#include <bit>

namespace passel::engine {

std::shared_ptr<float> ReplyMemory::Take(size_t floats) {
  const size_t bytes = std::bit_ceil(std::max(floats * sizeof(float), limits_.smallest));
  const auto in = [](const std::shared_ptr<transport::SharedMemory>& block) {
    return std::shared_ptr<float>(block, reinterpret_cast<float*>(block->bytes().data()));
  };
  std::shared_ptr<transport::SharedMemory>* small = nullptr;
  for (auto& block : blocks_) {
    if (block.use_count() > 1) continue;
    if (block->bytes().size() >= bytes) return in(block);
    small = &block;
  }
  if (bytes <= limits_.largest && (blocks_.size() < limits_.most || small != nullptr)) {
    if (auto block = channel_.ShareMemory(bytes, readers_)) {
      if (blocks_.size() < limits_.most) small = &blocks_.emplace_back();
      *small = std::move(block);
      return in(*small);
    }
  }
  return {new float[floats], std::default_delete<float[]>()};
}

}  // namespace passel::engine
