#pragma once

#include <memory>
#include <span>
#include <vector>

#include "gpu/device.h"
#include "runtime/base/collectives.h"

namespace passel::gpu {

// Collectives over a device's memory through pinned host memory and `host`: for ranks that share a
// GPU, and for builds without NCCL. Each call waits for the device, so the sum's order is `host`'s.
class StagedCollectives final : public Collectives {
 public:
  // `device` must outlive this.
  StagedCollectives(Device& device, std::unique_ptr<Collectives> host)
      : device_(device), host_(std::move(host)) {}

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::string_view name() const override { return "MPI through host memory"; }
  void AllReduceSum(std::span<float> data) override;
  void AllGather(std::span<const float> in, std::span<const size_t> counts,
                 std::span<float> out) override;
  void Broadcast(std::span<std::byte> host_data, int root) override {
    host_->Broadcast(host_data, root);
  }

 private:
  // Pinned memory of `count` floats in one of two places.
  std::span<float> Staging(size_t place, size_t count);

  Device& device_;
  std::unique_ptr<Collectives> host_;
  std::unique_ptr<Buffer> staging_[2];
};

}  // namespace passel::gpu
