// Operations recorded as CUDA graphs.

#include <memory>
#include <utility>

#include "gpu/cuda/cuda_device.h"
#include "runtime/base/error.h"

namespace passel::gpu::cuda {
namespace {

class CudaRecording final : public Recording {
 public:
  CudaRecording() = default;
  ~CudaRecording() override {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  CudaRecording(const CudaRecording&) = delete;
  CudaRecording& operator=(const CudaRecording&) = delete;

  bool never = false;  // a chain of products, which is one kernel and takes turns
  cudaGraphExec_t graph = nullptr;
  std::weak_ptr<CudaWeight> last;  // multiplied
};

}  // namespace

void CudaDevice::SetCublasStream(cudaStream_t stream) {
  constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what cuBLAS asks for on Hopper
  CheckCublas(cublasSetStream(cublas_, stream), "cublasSetStream");
  CheckCublas(cublasSetWorkspace(cublas_, workspace_.Get(kWorkspaceBytes), kWorkspaceBytes),
              "cublasSetWorkspace");
}

cudaGraphExec_t CudaDevice::RecordGraph(const std::function<void()>& issue) {
  IssueTo();
  // What other threads do to the device's stream meanwhile is not recorded: this is another one.
  CheckCuda(cudaStreamBeginCapture(recording_stream_.get, cudaStreamCaptureModeThreadLocal),
            "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  const auto end = [&] {
    recording_ = false;
    const cudaError_t code = cudaStreamEndCapture(recording_stream_.get, &graph);
    SetCublasStream(stream_.get);
    return code;
  };
  recording_ = true;
  try {
    SetCublasStream(recording_stream_.get);
    issue();
  } catch (...) {
    end();
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  CheckCuda(end(), "cudaStreamEndCapture");
  cudaGraphExec_t ready = nullptr;
  const cudaError_t code = cudaGraphInstantiate(&ready, graph, 0);
  cudaGraphDestroy(graph);
  CheckCuda(code, "cudaGraphInstantiate");
  return ready;
}

// The first time, weights learn what follows them and libraries load what they need.
void CudaDevice::Replay(std::unique_ptr<Recording>& recording, Collectives& ranks,
                        const std::function<void()>& issue) {
  auto* known = static_cast<CudaRecording*>(recording.get());
  if (known == nullptr) {
    auto first = std::make_unique<CudaRecording>();
    put_off_since_ = false;
    issue();
    // Scratch memory, which deterministic products have, may move.
    first->never = put_off_since_ || deterministic_ || (ranks.size() > 1 && !ranks.recordable());
    recording = std::move(first);
    return;
  }
  if (known->never) return issue();
  if (known->graph == nullptr) {
    known->graph = RecordGraph(issue);
    known->last = last_weight_;
  }
  ranks.ThrowIfFailed();
  CheckCuda(cudaGraphLaunch(known->graph, IssueTo()), "cudaGraphLaunch");
  last_weight_ = known->last;
  if (ranks.size() > 1) ranks.IssuedAgain();
}

}  // namespace passel::gpu::cuda
