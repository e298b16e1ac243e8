// Which way the model ranks' collectives go.

#include <algorithm>
#include <array>
#include <cstring>

#include "gpu/cuda/cuda_device.h"
#include "gpu/staged_collectives.h"
#ifdef PASSEL_NCCL
#include "gpu/cuda/nccl_collectives.h"
#endif

namespace passel::gpu::cuda {

#ifdef PASSEL_NCCL
namespace {

// Whether no two ranks are on the same GPU, which NCCL does not take. The same answer on every
// rank.
bool OneGpuEach(Collectives& host) {
  int device = 0;
  cudaDeviceProp properties{};
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  using Uuid = std::array<std::byte, sizeof properties.uuid>;
  std::vector<Uuid> uuids(static_cast<size_t>(host.size()));
  std::memcpy(uuids[static_cast<size_t>(host.rank())].data(), &properties.uuid, sizeof(Uuid));
  for (int r = 0; r < host.size(); ++r) host.Broadcast(uuids[static_cast<size_t>(r)], r);
  std::sort(uuids.begin(), uuids.end());
  return std::adjacent_find(uuids.begin(), uuids.end()) == uuids.end();
}

}  // namespace
#endif

std::unique_ptr<Collectives> CudaDevice::MakeCollectives(std::unique_ptr<Collectives> host) {
  peers_ = nullptr;
  if (host->size() == 1) return host;
#ifdef PASSEL_NCCL
  if (OneGpuEach(*host)) {
    peers_ = PeerMemory::Join(
        *host, !deterministic_ && local_ranks_ == host->size() && ServesProductChains());
    return std::make_unique<NcclCollectives>(
        *this, [this] { return IssueTo(); }, std::move(host), deterministic_, peer_timeout_,
        peers_);
  }
#endif
  return std::make_unique<StagedCollectives>(*this, std::move(host));
}

}  // namespace passel::gpu::cuda
