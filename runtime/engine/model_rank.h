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

  // A sequence's next token, and the logits it was chosen from, [vocab] f32, which have yet to be
  // fetched from the device.
  struct NextToken {
    int32_t id = 0;
    std::function<std::span<const float>()> logits;  // valid until the next call
  };
  // Who decides how tokens are chosen, and takes them.
  class TokenHandler {
   public:
    virtual ~TokenHandler() = default;
    virtual gpu::SamplingRule RuleOf(RequestId request) = 0;
    virtual void OnToken(RequestId request, const NextToken& next) = 0;
  };

  // Runs the plan to its end. `handler` hears of each sequence that has a new token; null on ranks
  // that choose none. Throws Error{kBug} where a logit is NaN.
  void Execute(const cluster::proto::StepPlan& plan, TokenHandler* handler);
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
  void WarmUp();
  // Tokens of a prompt that prefill takes through the layers at a time.
  uint64_t PartTokens(uint64_t room, const PrefillJob::Memory& prefill) const;
  uint64_t MeansBytes() const;
  uint64_t LeastOfRanks(uint64_t value) const;
  void Admit(const cluster::proto::StepPlan::Admit& admit);
  void Release(uint64_t id);
  void Decode(const cluster::proto::StepPlan& plan, TokenHandler* handler);
  void Prefill(uint64_t id, uint32_t steps, TokenHandler* handler);
  // Chooses the next tokens of the sequences whose logits are the rows of `rows`.
  void Emit(std::span<Sequence* const> sequences, const gpu::Tensor& rows, TokenHandler* handler);
  void Pump(int milliseconds);

  const Job& job_;
  gpu::Device& device_;
  Collectives& collectives_;
  std::unique_ptr<HostLink> link_;
  Workspace workspace_;
  std::unique_ptr<model::Activations> prefill_activations_;
  std::vector<std::unique_ptr<MicroBatch>> micro_batches_;
  int64_t total_pages_ = 0;
  int64_t part_ = 0;  // see PartTokens
  int64_t max_prompt_ = 0;
  KvPages pages_{0};
  std::map<uint64_t, Live> sequences_;
  std::unique_ptr<gpu::Buffer> logits_row_, chosen_ids_;  // staging
};

}  // namespace passel::engine
