#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "cluster/control.pb.h"
#include "runtime/base/collectives.h"
#include "runtime/engine/executor.h"

namespace passel::engine {

// The executing part of a model rank: does what a StepPlan says, the same on every model rank.
class ModelRank {
 public:
  using ControlHandler = std::function<void(RankId, const cluster::proto::Control&)>;

  // Creates the KV pool out of what the device has left. `channel`: null without host ranks.
  ModelRank(const Job& job, gpu::Device& device, const model::Transformer& transformer,
            Collectives& collectives, transport::Channel* channel, ControlHandler on_control);

  // Runs the plan to its end. `logits(request, row)` is called for each sequence that has a new
  // token to choose, with [vocab] f32 in host memory.
  void Execute(const cluster::proto::StepPlan& plan,
               const std::function<void(RequestId, std::span<const float>)>& logits);
  // Follows the plans that rank 0 broadcasts until one says stop.
  void Follow();
  void BroadcastPlan(cluster::proto::StepPlan& plan);

  HostLink* link() { return workspace_.link; }
  const Sequence& sequence(RequestId id) const { return *sequences_.at(id.value).sequence; }
  int64_t free_pages() const { return pages_.free(); }
  int64_t total_pages() const { return total_pages_; }
  int64_t PagesFor(int64_t tokens) const { return workspace_.PagesFor(tokens); }

 private:
  struct Live {
    std::unique_ptr<Sequence> sequence;
    std::unique_ptr<PrefillJob> prefill;
  };
  using LogitsHandler = std::function<void(RequestId, std::span<const float>)>;

  void Admit(const cluster::proto::StepPlan::Admit& admit);
  void Release(uint64_t id);
  void Decode(const cluster::proto::StepPlan& plan, const LogitsHandler& logits);
  void Prefill(uint64_t id, uint32_t steps, const LogitsHandler& logits);
  void Emit(const Sequence& sequence, const gpu::Tensor& row, const LogitsHandler& logits);
  void Pump(int milliseconds);

  const Job& job_;
  gpu::Device& device_;
  Collectives& collectives_;
  std::unique_ptr<HostLink> link_;
  Workspace workspace_;
  std::unique_ptr<model::Activations> prefill_activations_;
  std::vector<std::unique_ptr<MicroBatch>> micro_batches_;
  int64_t total_pages_ = 0;
  KvPages pages_{0};
  std::map<uint64_t, Live> sequences_;
  std::vector<float> logits_row_;
};

}  // namespace passel::engine
