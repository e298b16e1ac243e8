#include "gpu/cuda/peer_memory.h"

#include "gpu/cuda/check.h"

namespace passel::gpu::cuda {
namespace {

// Whether it was done; where not, the error counts as seen.
bool Done(cudaError_t code) {
  if (code != cudaSuccess) cudaGetLastError();
  return code == cudaSuccess;
}

bool OnAll(Collectives& host, bool own) {
  bool all = true;
  for (int r = 0; r < host.size(); ++r) {
    bool its = own;
    host.Broadcast(std::as_writable_bytes(std::span(&its, 1)), r);
    all = all && its;
  }
  return all;
}

}  // namespace

// Every number is the one that says that no sum is there.
bool PeerMemory::MakeInbox(int ranks, cudaIpcMemHandle_t* handle) {
  void* data = nullptr;
  const size_t bytes = PeerInboxBytes(ranks);
  if (!Done(cudaMalloc(&data, bytes))) return false;
  inboxes_.of[inboxes_.rank] = static_cast<float*>(data);
  return Done(cudaMemset(data, 0xff, bytes)) && Done(cudaDeviceSynchronize()) &&
         Done(cudaIpcGetMemHandle(handle, data));
}

std::shared_ptr<PeerMemory> PeerMemory::Join(Collectives& host, bool able) {
  if (!OnAll(host, able && host.size() <= kMaxPeers)) return nullptr;
  std::shared_ptr<PeerMemory> peers(new PeerMemory);
  peers->abandoned_ = MakePinnedBuffer(sizeof(uint32_t));
  PeerInboxes& inboxes = peers->inboxes_;
  inboxes.ranks = host.size();
  inboxes.rank = host.rank();
  inboxes.abandoned = static_cast<uint32_t*>(peers->abandoned_->data());
  *static_cast<uint32_t*>(peers->abandoned_->data()) = 0;
  cudaIpcMemHandle_t own{};
  if (!OnAll(host, peers->MakeInbox(host.size(), &own))) return nullptr;
  bool opened = true;
  for (int r = 0; r < host.size(); ++r) {
    cudaIpcMemHandle_t handle = own;
    host.Broadcast(std::as_writable_bytes(std::span(&handle, 1)), r);
    if (r == host.rank() || !opened) continue;
    void* data = nullptr;
    opened = Done(cudaIpcOpenMemHandle(&data, handle, cudaIpcMemLazyEnablePeerAccess));
    if (!opened) continue;
    peers->opened_.push_back(data);
    inboxes.of[r] = static_cast<float*>(data);
  }
  return OnAll(host, opened) ? peers : nullptr;
}

// The inbox itself goes with the process: others may still have it open.
PeerMemory::~PeerMemory() {
  for (void* data : opened_) cudaIpcCloseMemHandle(data);
}

void PeerMemory::Abandon() { *static_cast<volatile uint32_t*>(abandoned_->data()) = 1; }

}  // namespace passel::gpu::cuda
