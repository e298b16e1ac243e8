#include "gpu/cuda/memory.h"

#include <algorithm>
#include <string>
#include <utility>

#include "gpu/cuda/check.h"
#include "runtime/base/error.h"

namespace passel::gpu::cuda {
namespace {

[[noreturn]] void Refused(const char* what, size_t bytes, cudaError_t code) {
  cudaGetLastError();  // reported here
  throw Error(ErrorClass::kMemory, "CUDA device: no " + std::to_string(bytes) + " bytes of " +
                                       what + " memory: " + cudaGetErrorString(code));
}

// What cannot be allocated, as opposed to a fault of earlier work that this call reports.
bool IsRefusal(cudaError_t code) {
  return code == cudaErrorMemoryAllocation || code == cudaErrorInvalidValue;
}

class DeviceBuffer final : public Buffer {
 public:
  DeviceBuffer(std::shared_ptr<Ledger> ledger, size_t bytes)
      : ledger_(std::move(ledger)), bytes_(bytes) {
    if (ledger_) Reserve();
    const cudaError_t code = cudaMalloc(&data_, std::max<size_t>(bytes, 1));
    if (code == cudaSuccess) return;
    if (ledger_) ledger_->used -= bytes_;
    if (IsRefusal(code)) Refused("device", bytes, code);
    CheckCuda(code, "cudaMalloc");
  }
  ~DeviceBuffer() override {
    try {
      if (ledger_ && ledger_->before_free) ledger_->before_free();
    } catch (const Error&) {
      // The device is lost; work issued later says so.
    }
    cudaFree(data_);
    if (ledger_) ledger_->used -= bytes_;
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  void Reserve() {
    uint64_t used = ledger_->used.load();
    do {
      if (bytes_ > ledger_->limit - used) {
        throw Error(ErrorClass::kMemory,
                    "CUDA device: " + std::to_string(bytes_) + " bytes do not fit its limit of " +
                        std::to_string(ledger_->limit) + " bytes, of which " +
                        std::to_string(used) + " are in use (gpu.memory_limit_bytes)");
      }
    } while (!ledger_->used.compare_exchange_weak(used, used + bytes_));
  }

  std::shared_ptr<Ledger> ledger_;
  size_t bytes_;
  void* data_ = nullptr;
};

class PinnedBuffer final : public Buffer {
 public:
  explicit PinnedBuffer(size_t bytes) : bytes_(bytes) {
    const cudaError_t code =
        cudaHostAlloc(&data_, std::max<size_t>(bytes, 1), cudaHostAllocPortable);
    if (IsRefusal(code)) Refused("pinned host", bytes, code);
    CheckCuda(code, "cudaHostAlloc");
  }
  ~PinnedBuffer() override { cudaFreeHost(data_); }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  void* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

class ForeignBuffer final : public Buffer {
 public:
  explicit ForeignBuffer(std::span<std::byte> memory) : memory_(memory) {
    const cudaError_t code =
        cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterPortable);
    if (IsRefusal(code)) Refused("pinned host", memory.size(), code);
    CheckCuda(code, "cudaHostRegister");
  }
  ~ForeignBuffer() override { cudaHostUnregister(memory_.data()); }
  ForeignBuffer(const ForeignBuffer&) = delete;
  ForeignBuffer& operator=(const ForeignBuffer&) = delete;

  void* data() const override { return memory_.data(); }
  size_t bytes() const override { return memory_.size(); }

 private:
  std::span<std::byte> memory_;
};

}  // namespace

std::unique_ptr<Buffer> MakeDeviceBuffer(std::shared_ptr<Ledger> ledger, size_t bytes) {
  return std::make_unique<DeviceBuffer>(std::move(ledger), bytes);
}

std::unique_ptr<Buffer> MakePinnedBuffer(size_t bytes) {
  return std::make_unique<PinnedBuffer>(bytes);
}

std::unique_ptr<Buffer> PinBuffer(std::span<std::byte> memory) {
  return std::make_unique<ForeignBuffer>(memory);
}

void* Scratch::Get(size_t bytes) {
  if (!buffer_ || buffer_->bytes() < bytes) {
    buffer_.reset();
    buffer_ = MakeDeviceBuffer(nullptr, std::max(bytes, size_t{1} << 16));
  }
  return buffer_->data();
}

}  // namespace passel::gpu::cuda
