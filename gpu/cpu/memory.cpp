#include "gpu/cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"

namespace passel::gpu::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;

class HostBuffer final : public Buffer {
 public:
  HostBuffer(std::shared_ptr<Ledger> ledger, size_t bytes)
      : ledger_(std::move(ledger)), bytes_(bytes) {
    if (ledger_) Reserve();
    const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
    const size_t size = bytes > std::numeric_limits<size_t>::max() - alignment
                            ? 0
                            : RoundUp(std::max<size_t>(bytes, 1), alignment);
    data_ = size == 0 ? nullptr : std::aligned_alloc(alignment, size);
    if (data_ == nullptr) {
      if (ledger_) ledger_->used -= bytes_;
      throw Error(ErrorClass::kMemory,
                  "CPU device: the system refused " + std::to_string(bytes) + " bytes");
    }
    // Advice only: a kernel without huge pages refuses it and small ones serve.
    if (alignment == kHugePage) madvise(data_, size, MADV_HUGEPAGE);
  }
  ~HostBuffer() override {
    std::free(data_);
    if (ledger_) ledger_->used -= bytes_;
  }
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  void* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  void Reserve() {
    uint64_t used = ledger_->used.load();
    do {
      if (bytes_ > ledger_->limit - used) {
        throw Error(ErrorClass::kMemory,
                    "CPU device: " + std::to_string(bytes_) + " bytes do not fit its limit of " +
                        std::to_string(ledger_->limit) + " bytes, of which " +
                        std::to_string(used) + " are in use (gpu.memory_limit_bytes)");
      }
    } while (!ledger_->used.compare_exchange_weak(used, used + bytes_));
  }

  std::shared_ptr<Ledger> ledger_;
  size_t bytes_;
  void* data_ = nullptr;
};

}  // namespace

uint64_t MachineMemoryBytes() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<uint64_t>(sysconf(_SC_PAGE_SIZE));
}

std::unique_ptr<Buffer> MakeBuffer(std::shared_ptr<Ledger> ledger, size_t bytes) {
  return std::make_unique<HostBuffer>(std::move(ledger), bytes);
}

}  // namespace passel::gpu::cpu
