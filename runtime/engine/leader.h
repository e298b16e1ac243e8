#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cluster/shard_map.h"
#include "runtime/engine/micro_batch_tuner.h"
#include "runtime/engine/model_rank.h"
#include "runtime/engine/report.h"
#include "runtime/engine/request.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel::engine {

// Model rank 0's part beyond executing: takes requests in, admits them as memory allows, decides
// each step, chooses tokens, and hands results out.
class Leader final : private ModelRank::TokenHandler {
 public:
  Leader(const Job& job, ModelRank& rank, const Tokenizer& tokenizer, RequestSource& source,
         ResultSink& sink, Report& report);

  // Runs until every request has its result. Throws what ends the job early.
  void Run();
  // For ModelRank's control handler.
  void OnControl(RankId from, const cluster::proto::Control& message);
  // Asks the host ranks for their memory figures and waits for them, for at most a second each.
  void CollectHostStats();

 private:
  using Clock = std::chrono::steady_clock;
  enum class State : uint8_t { kOpening, kOpened, kPrefill, kDecode, kDone };
  struct Active {
    Request request;
    State state = State::kOpening;
    cluster::RequestPlacement placement;
    uint32_t replies_due = 0;
    std::string refusal;
    std::unique_ptr<Detokenizer> detokenizer;
    Result result;
    int32_t next_token = 0;
    Clock::time_point admitted, first_token;
  };

  void ReadAhead();
  bool TryAdmit(Request& request);
  cluster::RequestDemand Demand(const Request& request) const;
  std::vector<uint32_t> HostsOf(const Active& active) const;
  bool MakePlan(cluster::proto::StepPlan* plan);
  gpu::SamplingRule RuleOf(RequestId id) override;
  void OnToken(RequestId id, const ModelRank::NextToken& next) override;
  void Finish(Active& active, FinishReason reason);
  void Release(Active& active);
  void Fail(const Request& request, int status, const std::string& message);

  const Job& job_;
  ModelRank& rank_;
  const Tokenizer& tokenizer_;
  RequestSource& source_;
  ResultSink& sink_;
  Report& report_;
  cluster::ShardMap shard_map_;
  MicroBatchTuner tuner_;
  uint64_t next_id_ = 1;
  std::deque<Request> queue_;
  std::map<uint64_t, Active> active_;
  int64_t pages_promised_ = 0;  // to requests opened but not admitted yet
  std::vector<uint64_t> release_;
  uint64_t step_ = 0;
  uint32_t stats_due_ = 0;
};

}  // namespace passel::engine
