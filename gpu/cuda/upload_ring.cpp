#include "gpu/cuda/upload_ring.h"

#include <algorithm>
#include <utility>

#include "gpu/cuda/kernels.h"
#include "runtime/base/checked_math.h"

namespace passel::gpu::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kFirstSegmentBytes = size_t{1} << 20;

}  // namespace

UploadRing::UploadRing(cudaStream_t stream) : stream_(stream) {
  for (cudaEvent_t& event : left_) {
    CheckCuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  Resize(kFirstSegmentBytes);
}

UploadRing::~UploadRing() {
  for (const cudaEvent_t event : left_) cudaEventDestroy(event);
}

void UploadRing::Resize(size_t segment_bytes) {
  CheckCuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  pinned_ = MakePinnedBuffer(segment_bytes * kSegments);
  device_ = MakeDeviceBuffer(nullptr, segment_bytes * kSegments);
  segment_bytes_ = segment_bytes;
  segment_ = 0;
  used_ = 0;
}

void* UploadRing::Upload(const void* host, size_t bytes) {
  const size_t size = RoundUp(bytes, kAlignment);
  if (size > segment_bytes_) {
    retired_.push_back(std::move(device_));
    Resize(RoundUp(std::max(size, 2 * segment_bytes_), kFirstSegmentBytes));
  }
  if (used_ + size > segment_bytes_) {
    CheckCuda(cudaEventRecord(left_[segment_], stream_), "cudaEventRecord");
    segment_ = (segment_ + 1) % kSegments;
    used_ = 0;
    CheckCuda(cudaEventSynchronize(left_[segment_]), "cudaEventSynchronize");
  }
  const size_t at = segment_ * segment_bytes_ + used_;
  used_ += size;
  if (bytes <= kMaxPutBytes) {
    void* to = static_cast<char*>(device_->data()) + at;
    LaunchPut(stream_, to, host, bytes);
    return to;
  }
  char* pinned = static_cast<char*>(pinned_->data()) + at;
  char* device = static_cast<char*>(device_->data()) + at;
  std::memcpy(pinned, host, bytes);
  CheckCuda(cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, stream_),
            "cudaMemcpyAsync");
  return device;
}

}  // namespace passel::gpu::cuda
