#include "gpu/staged_collectives.h"

namespace passel::gpu {

std::span<float> StagedCollectives::Staging(size_t place, size_t count) {
  std::unique_ptr<Buffer>& buffer = staging_[place];
  if (!buffer || buffer->bytes() < count * sizeof(float)) {
    buffer.reset();
    buffer = device_.AllocateStaging(count * sizeof(float));
  }
  return {static_cast<float*>(buffer->data()), count};
}

void StagedCollectives::AllReduceSum(std::span<float> data) {
  if (size() == 1) return;
  const std::span<float> staging = Staging(0, data.size());
  device_.CopyToHost(staging.data(), data.data(), data.size_bytes());
  device_.Record()->Wait();
  host_->AllReduceSum(staging);
  // The next call waits for the device before it writes the staging memory again.
  device_.CopyToDevice(data.data(), staging.data(), data.size_bytes());
}

void StagedCollectives::AllGather(std::span<const float> in, std::span<const size_t> counts,
                                  std::span<float> out) {
  const std::span<float> own = Staging(0, in.size()), all = Staging(1, out.size());
  device_.CopyToHost(own.data(), in.data(), in.size_bytes());
  device_.Record()->Wait();
  host_->AllGather(own, counts, all);
  device_.CopyToDevice(out.data(), all.data(), out.size_bytes());
}

}  // namespace passel::gpu
