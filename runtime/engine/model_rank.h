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

  // A sequence's logits: the likeliest token (the lowest of equal ones; −1 where a logit is NaN),
  // and all, [vocab] f32, which have yet to be fetched from the device.
  struct NextLogits {
    int32_t best = -1;
    std::function<std::span<const float>()> fetch;  // valid until the next call
  };
  using LogitsHandler = std::function<void(RequestId, const NextLogits&)>;

  // Runs the plan to its end. `logits` is called for each sequence that has a new token to choose.
  void Execute(const cluster::proto::StepPlan& plan, const LogitsHandler& logits);
  // Follows the plans that rank 0 broadcasts until one says stop.
  void Follow();
  void BroadcastPlan(cluster::proto::StepPlan& plan);

  HostLink* link() { return workspace_.link; }
  const Sequence& sequence(RequestId id) const { return *sequences_.at(id.value).sequence; }
  int64_t free_pages() const { return pages_.free(); }
  int64_t total_pages() const { return total_pages_; }
  // Tokens of the longest prompt whose prefill fits the memory of every model rank.
  int64_t max_prompt() const { return max_prompt_; }
  int64_t PagesFor(int64_t tokens) const { return workspace_.PagesFor(tokens); }

 private:
  struct Live {
    std::unique_ptr<Sequence> sequence;
    std::unique_ptr<PrefillJob> prefill;
  };

  void CreateKvPool();
  uint64_t MeansBytes() const;
  uint64_t LeastOfRanks(uint64_t value) const;
  void Admit(const cluster::proto::StepPlan::Admit& admit);
  void Release(uint64_t id);
  void Decode(const cluster::proto::StepPlan& plan, const LogitsHandler& logits);
  void Prefill(uint64_t id, uint32_t steps, const LogitsHandler& logits);
  // Calls `logits` for the sequences whose logits are the rows of `rows`.
  void Emit(std::span<Sequence* const> sequences, const gpu::Tensor& rows,
            const LogitsHandler& logits);
  void Pump(int milliseconds);

  const Job& job_;
  gpu::Device& device_;
  Collectives& collectives_;
  std::unique_ptr<HostLink> link_;
  Workspace workspace_;
  std::unique_ptr<model::Activations> prefill_activations_;
  std::vector<std::unique_ptr<MicroBatch>> micro_batches_;
  int64_t total_pages_ = 0;
  int64_t max_prompt_ = 0;
  KvPages pages_{0};
  std::map<uint64_t, Live> sequences_;
  std::unique_ptr<gpu::Buffer> logits_row_, best_ids_;  // staging
};

}  // namespace passel::engine
