#pragma once

#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "gpu/cuda/check.h"
#include "gpu/cuda/memory.h"

namespace passel::gpu::cuda {

// Small host arrays (ids, positions, page tables) on their way to kernels. The smallest travel as
// an argument of a kernel, which keeps the stream free of copies; others are copied to pinned
// memory, so that the caller's array may go at once, and from there to device memory by the stream.
// The pinned side is reused only when its copies are done; the device side is reused by later
// copies of the same stream, so behind the kernels that read it. Used by the issuing thread.
class UploadRing {
 public:
  explicit UploadRing(cudaStream_t stream);
  ~UploadRing();
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;

  // Device address of a copy of `bytes` bytes, 256-byte aligned, for work issued before the ring
  // has come around: kernels must be launched before half a ring of further uploads.
  void* Upload(const void* host, size_t bytes);
  // Two arrays as one upload.
  template <typename T, typename U>
  std::pair<const T*, const U*> Upload(std::span<const T> first, std::span<const U> second) {
    const size_t begin = (first.size_bytes() + alignof(U) - 1) / alignof(U) * alignof(U);
    both_.resize(begin + second.size_bytes());
    if (!first.empty()) std::memcpy(both_.data(), first.data(), first.size_bytes());
    if (!second.empty()) std::memcpy(both_.data() + begin, second.data(), second.size_bytes());
    const auto* device = static_cast<const std::byte*>(Upload(both_.data(), both_.size()));
    return {reinterpret_cast<const T*>(device), reinterpret_cast<const U*>(device + begin)};
  }
  template <typename T>
  const T* Upload(std::span<const T> host) {
    return static_cast<const T*>(Upload(host.data(), host.size_bytes()));
  }

 private:
  static constexpr size_t kSegments = 4;
  void Resize(size_t segment_bytes);

  cudaStream_t stream_;
  size_t segment_bytes_ = 0;
  size_t segment_ = 0;                         // the one being filled
  size_t used_ = 0;                            // bytes of it
  std::array<cudaEvent_t, kSegments> left_{};  // copies of a segment, recorded on leaving it
  std::vector<std::byte> both_;
  std::unique_ptr<Buffer> pinned_;
  std::unique_ptr<Buffer> device_;
  // Device sides before growths: an operation may hold addresses in them. Each is at most half as
  // large as the next.
  std::vector<std::unique_ptr<Buffer>> retired_;
};

}  // namespace passel::gpu::cuda
