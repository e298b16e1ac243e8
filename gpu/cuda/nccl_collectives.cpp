#include "gpu/cuda/nccl_collectives.h"

#include <algorithm>
#include <future>
#include <memory>
#include <thread>
#include <utility>

#include "gpu/cuda/check.h"
#include "gpu/cuda/kernels.h"
#include "gpu/cuda/memory.h"
#include "runtime/base/error.h"

namespace passel::gpu::cuda {
namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void Fail(const std::string& what) {
  throw Error(ErrorClass::kCluster, "NCCL among the model ranks: " + what);
}

void CheckNccl(ncclResult_t code, const char* call) {
  if (code == ncclSuccess) return;
  Fail(std::string(call) + ": " + ncclGetErrorString(code) + " (" + ncclGetLastError(nullptr) +
       ")");
}

// Joins the communicator on a thread of its own, so that the wait has an end. A non-blocking
// communicator would have one too, but starts a thread for every collective: 150 µs each.
ncclComm_t Join(const ncclUniqueId& id, int rank, int size, std::chrono::milliseconds timeout) {
  struct Joining {
    ncclComm_t comm = nullptr;
    ncclResult_t code = ncclSuccess;
    std::promise<void> joined;
  };
  const auto joining = std::make_shared<Joining>();
  auto joined = joining->joined.get_future();
  int gpu = 0;
  CheckCuda(cudaGetDevice(&gpu), "cudaGetDevice");
  // Detached: where it does not come back, the process ends without it.
  std::thread([joining, id, rank, size, gpu] {
    cudaSetDevice(gpu);
    joining->code = ncclCommInitRank(&joining->comm, size, id, rank);
    joining->joined.set_value();
  }).detach();
  if (joined.wait_for(timeout) != std::future_status::ready) {
    Fail("ncclCommInitRank took longer than " + std::to_string(timeout.count()) + " ms");
  }
  CheckNccl(joining->code, "ncclCommInitRank");
  return joining->comm;
}

}  // namespace

NcclCollectives::NcclCollectives(Device& device, Stream stream, std::unique_ptr<Collectives> host,
                                 bool deterministic, std::chrono::milliseconds timeout,
                                 std::shared_ptr<PeerMemory> peers)
    : device_(device),
      stream_(std::move(stream)),
      host_(std::move(host)),
      deterministic_(deterministic),
      timeout_(timeout),
      peers_(std::move(peers)) {
  ncclUniqueId id{};
  ncclResult_t code = ncclSuccess;
  if (host_->rank() == 0) code = ncclGetUniqueId(&id);
  // Also where it failed: the others must not wait for it.
  host_->Broadcast(std::as_writable_bytes(std::span(&code, 1)), 0);
  if (code != ncclSuccess) Fail(std::string("ncclGetUniqueId: ") + ncclGetErrorString(code));
  host_->Broadcast(std::as_writable_bytes(std::span(&id, 1)), 0);
  comm_ = Join(id, rank(), size(), timeout_);
  CheckCuda(cudaEventCreateWithFlags(&issued_, cudaEventDisableTiming), "cudaEventCreate");
  int gpu = 0;
  CheckCuda(cudaGetDevice(&gpu), "cudaGetDevice");
  watchdog_ = std::jthread([this, gpu](const std::stop_token& stop) {
    cudaSetDevice(gpu);
    WatchdogLoop(stop);
  });
  if (peers_) peers_->issued = [this] { Watch(); };
}

NcclCollectives::~NcclCollectives() {
  watchdog_ = {};  // stops and joins
  if (peers_) {
    peers_->issued = nullptr;
    peers_->Abandon();
  }
  if (comm_ != nullptr && failure_.empty()) {
    // Peers may be gone already: no waiting for them.
    ncclCommAbort(comm_);
  }
  if (issued_ != nullptr) cudaEventDestroy(issued_);
}

void NcclCollectives::ThrowIfFailed() {
  const std::lock_guard lock(mutex_);
  if (!failure_.empty()) Fail(failure_);
}

void NcclCollectives::Watch() {
  cudaStream_t stream = stream_();
  cudaStreamCaptureStatus recorded = cudaStreamCaptureStatusNone;
  CheckCuda(cudaStreamIsCapturing(stream, &recorded), "cudaStreamIsCapturing");
  if (recorded != cudaStreamCaptureStatusNone) return;
  const std::lock_guard lock(mutex_);
  watched_ = stream;
  if (pending_) {  // one event at a time; the watchdog records it again
    more_ = true;
    return;
  }
  CheckCuda(cudaEventRecord(issued_, watched_), "cudaEventRecord");
  pending_ = true;
  issued_at_ = Clock::now();
  wake_.notify_one();
}

void NcclCollectives::WatchdogLoop(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (!stop.stop_requested() && failure_.empty()) {
    if (!pending_) {
      wake_.wait(lock, stop, [this] { return pending_; });
      continue;
    }
    ncclResult_t state = ncclSuccess;
    const ncclResult_t code = ncclCommGetAsyncError(comm_, &state);
    const cudaError_t done = cudaEventQuery(issued_);
    if (code != ncclSuccess || (state != ncclSuccess && state != ncclInProgress)) {
      failure_ = ncclGetErrorString(code != ncclSuccess ? code : state);
    } else if (done != cudaErrorNotReady) {
      pending_ = std::exchange(more_, false) && cudaEventRecord(issued_, watched_) == cudaSuccess;
      issued_at_ = Clock::now();
      continue;
    } else if (Clock::now() - issued_at_ > timeout_) {
      failure_ = "a collective was not through after " + std::to_string(timeout_.count()) +
                 " ms: a model rank is lost or far behind";
    } else {
      wake_.wait_for(lock, stop, std::chrono::milliseconds(5), [] { return false; });
      continue;
    }
    // Aborting waits until graphs with collectives are gone, whose owners must hear of the failure.
    lock.unlock();
    if (peers_) peers_->Abandon();
    ncclCommAbort(comm_);
    return;
  }
}

void NcclCollectives::AllReduceSum(std::span<float> data) {
  ThrowIfFailed();
  if (deterministic_) {
    const size_t bytes = data.size_bytes() * static_cast<size_t>(size());
    if (!gathered_ || gathered_->bytes() < bytes) {
      gathered_.reset();
      gathered_ = MakeDeviceBuffer(nullptr, bytes);
    }
    auto* all = static_cast<float*>(gathered_->data());
    CheckNccl(ncclAllGather(data.data(), all, data.size(), ncclFloat32, comm_, stream_()),
              "ncclAllGather");
    LaunchSumRows(stream_(), all, size(), static_cast<int64_t>(data.size()), data.data());
  } else {
    CheckNccl(ncclAllReduce(data.data(), data.data(), data.size(), ncclFloat32, ncclSum, comm_,
                            stream_()),
              "ncclAllReduce");
  }
  Watch();
}

void NcclCollectives::AllGather(std::span<const float> in, std::span<const size_t> counts,
                                std::span<float> out) {
  ThrowIfFailed();
  size_t total = 0;
  for (const size_t count : counts) total += count;
  Check(counts.size() == static_cast<size_t>(size()) && total == out.size() &&
            counts[static_cast<size_t>(rank())] == in.size(),
        "AllGather: in, counts and out disagree");
  if (std::ranges::all_of(counts, [&](size_t count) { return count == in.size(); })) {
    CheckNccl(ncclAllGather(in.data(), out.data(), in.size(), ncclFloat32, comm_, stream_()),
              "ncclAllGather");
    return Watch();
  }
  CheckNccl(ncclGroupStart(), "ncclGroupStart");
  float* to = out.data();
  for (int r = 0; r < size(); ++r) {
    const size_t count = counts[static_cast<size_t>(r)];
    const void* from = r == rank() ? static_cast<const void*>(in.data()) : to;
    CheckNccl(ncclBroadcast(from, to, count, ncclFloat32, r, comm_, stream_()), "ncclBroadcast");
    to += count;
  }
  CheckNccl(ncclGroupEnd(), "ncclGroupEnd");
  Watch();
}

void NcclCollectives::Broadcast(std::span<std::byte> host_data, int root) {
  ThrowIfFailed();
  host_->Broadcast(host_data, root);
}

}  // namespace passel::gpu::cuda
