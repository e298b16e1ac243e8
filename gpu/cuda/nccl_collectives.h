#pragma once

#include <cuda_runtime.h>
#include <nccl.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "gpu/cuda/peer_memory.h"
#include "gpu/device.h"
#include "runtime/base/collectives.h"

namespace passel::gpu::cuda {

// Collectives by NCCL on the device's stream. The id comes from rank 0 through `host`, which also
// broadcasts what is host memory.
//
// A watchdog thread asks NCCL for errors of its own and follows the last collective issued: where
// it is not through after `timeout`, or NCCL reports an error, it aborts the communicator, which
// frees the stream; every later call then throws Error{kCluster}.
class NcclCollectives final : public Collectives {
 public:
  // The device's stream, as work is to be issued to it.
  using Stream = std::function<cudaStream_t()>;
  // `deterministic`: sums in rank order. `peers`: what else the ranks wait for each other in, which
  // the watchdog follows too; may be null. Throws Error{kCluster} where NCCL fails or takes longer
  // than `timeout`.
  NcclCollectives(Device& device, Stream stream, std::unique_ptr<Collectives> host,
                  bool deterministic, std::chrono::milliseconds timeout,
                  std::shared_ptr<PeerMemory> peers = nullptr);
  ~NcclCollectives() override;

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::string_view name() const override { return peers_ ? "NCCL and peer memory" : "NCCL"; }
  void AllReduceSum(std::span<float> data) override;
  void AllGather(std::span<const float> in, std::span<const size_t> counts,
                 std::span<float> out) override;
  void Broadcast(std::span<std::byte> host_data, int root) override;
  void ThrowIfFailed() override;
  bool recordable() const override { return true; }
  void IssuedAgain() override { Watch(); }

 private:
  // Notes that work was issued, for the watchdog to follow; not what is only recorded.
  void Watch();
  void WatchdogLoop(const std::stop_token& stop);

  Device& device_;
  Stream stream_;
  std::unique_ptr<Collectives> host_;
  bool deterministic_;
  std::chrono::milliseconds timeout_;
  std::shared_ptr<PeerMemory> peers_;
  ncclComm_t comm_ = nullptr;
  std::unique_ptr<Buffer> gathered_;  // [size, n] f32, for sums in rank order

  std::mutex mutex_;
  std::condition_variable_any wake_;
  cudaEvent_t issued_ = nullptr;
  cudaStream_t watched_ = nullptr;
  bool pending_ = false;  // `issued_` was recorded and has not been seen done
  bool more_ = false;     // was issued since
  std::chrono::steady_clock::time_point issued_at_;
  std::string failure_;  // empty: none
  std::jthread watchdog_;
};

}  // namespace passel::gpu::cuda
