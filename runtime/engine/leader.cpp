#include "runtime/engine/leader.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <set>

#include "runtime/base/error.h"
#include "runtime/engine/sampler.h"

namespace passel::engine {
namespace {

cluster::PlacementMode ModeOf(config::Placement placement) {
  switch (placement) {
    case config::REQUEST:
      return cluster::PlacementMode::kRequest;
    case config::HEAD:
      return cluster::PlacementMode::kHead;
    case config::SEQUENCE:
      return cluster::PlacementMode::kSequence;
    default:
      return cluster::PlacementMode::kAuto;
  }
}

std::vector<uint64_t> HostBudgets(const Job& job) {
  std::vector<uint64_t> budgets;
  for (const auto& r : job.ranks) {
    if (r.role == cluster::Role::kHost) budgets.push_back(r.memory_bytes);
  }
  return budgets;
}

// Prefill chunks of a layer where nobody waits for a next token.
constexpr uint32_t kPrefillStepsAlone = 32;

}  // namespace

Leader::Leader(const Job& job, ModelRank& rank, const Tokenizer& tokenizer, RequestSource& source,
               ResultSink& sink, Report& report)
    : job_(job),
      rank_(rank),
      tokenizer_(tokenizer),
      source_(source),
      sink_(sink),
      report_(report),
      shard_map_(ModeOf(job.config.cluster().placement()), HostBudgets(job)),
      tuner_(rank.link() ? job.config.engine().micro_batches() : 1) {}

void Leader::Run() {
  report_.Start();
  sink_.Started();
  while (true) {
    ReadAhead();
    cluster::proto::StepPlan plan;
    if (!MakePlan(&plan)) {
      if (active_.empty() && queue_.empty() && source_.exhausted()) break;
      if (rank_.link()) rank_.link()->Pump(std::chrono::milliseconds(20));
      continue;
    }
    rank_.BroadcastPlan(plan);
    const auto start = Clock::now();
    rank_.Execute(plan, this);
    if (plan.decode_size() > 0 && plan.prefill_steps() == 0) {
      tuner_.Took(plan.micro_batches(),
                  std::chrono::duration<double>(Clock::now() - start).count());
    }
    std::erase_if(active_, [](const auto& a) { return a.second.state == State::kDone; });
    double partly = 0;
    for (const auto& [id, a] : active_) {
      partly +=
          static_cast<double>(a.result.tokens.size()) / static_cast<double>(a.request.max_tokens);
    }
    report_.Progress(active_.size() + queue_.size(), partly, source_.remaining());
  }
  cluster::proto::StepPlan stop;
  stop.set_stop(true);
  rank_.BroadcastPlan(stop);
}

void Leader::ReadAhead() {
  while (active_.size() + queue_.size() < job_.config.engine().max_inflight()) {
    auto request = source_.Next();
    if (!request) break;
    request->id = RequestId(next_id_++);
    if (request->error) {
      Fail(*request, 400, *request->error);
    } else {
      queue_.push_back(std::move(*request));
    }
  }
  while (!queue_.empty() && active_.size() < job_.config.engine().max_batch()) {
    if (!TryAdmit(queue_.front())) break;
    queue_.pop_front();
  }
}

void Leader::Fail(const Request& request, int status, const std::string& message) {
  sink_.Failed(request, status, message);
  report_.RequestDone(false);
}

cluster::RequestDemand Leader::Demand(const Request& request) const {
  cluster::RequestDemand demand;
  demand.kv_heads = static_cast<uint32_t>(job_.model.kv_heads);
  const auto kinds = job_.layer_kinds();
  const auto layers = static_cast<uint64_t>(std::count_if(
      kinds.begin(), kinds.end(), [](Job::LayerKind k) { return k != Job::LayerKind::kResident; }));
  const host::Options options = job_.host_options(0);
  for (const host::SegmentSpec& s :
       job_.Segments(request.prompt.size(), static_cast<uint64_t>(request.max_tokens))) {
    demand.segment_bytes.push_back(layers * host::SegmentBytes(options, s));
  }
  return demand;
}

// False where the request has to wait for others to end. True: it is on its way, or has failed.
bool Leader::TryAdmit(Request& request) {
  if (static_cast<int64_t>(request.prompt.size()) > rank_.max_prompt()) {
    Fail(request, 507,
         "the prompt has " + std::to_string(request.prompt.size()) +
             " tokens; the memory of the model ranks holds a layer of at most " +
             std::to_string(rank_.max_prompt()));
    return true;
  }
  const int64_t pages =
      rank_.PagesFor(static_cast<int64_t>(request.prompt.size()) + request.max_tokens);
  if (pages > rank_.total_pages()) {
    Fail(request, 507,
         "the request needs " + std::to_string(pages) +
             " KV pages of the model rank's device; it "
             "has " +
             std::to_string(rank_.total_pages()));
    return true;
  }
  if (pages + pages_promised_ > rank_.free_pages()) return false;
  Active active;
  if (rank_.link()) {
    const auto segments =
        job_.Segments(request.prompt.size(), static_cast<uint64_t>(request.max_tokens));
    if (job_.config.engine().deterministic() && !FitsReply(job_.wire_shape(), segments.size())) {
      Fail(request, 400,
           "the request has " + std::to_string(segments.size()) +
               " blocks, more than a reply can hold block by block; expected a larger "
               "host.block_tokens, or engine.deterministic off");
      return true;
    }
    switch (shard_map_.Place(request.id, Demand(request), &active.placement)) {
      case cluster::ShardMap::Verdict::kWait:
        return false;
      case cluster::ShardMap::Verdict::kNever:
        Fail(request, 507, "the request's KV cache does not fit the host ranks' memory budgets");
        return true;
      case cluster::ShardMap::Verdict::kPlaced:
        break;
    }
  }
  active.request = std::move(request);
  active.admitted = Clock::now();
  active.detokenizer = std::make_unique<Detokenizer>(tokenizer_);
  active.state = State::kOpened;
  pages_promised_ += pages;
  const uint64_t id = active.request.id.value;
  Active& a = active_.emplace(id, std::move(active)).first->second;
  const auto hosts = HostsOf(a);
  if (!hosts.empty()) {
    cluster::proto::Control message;
    auto& open = *message.mutable_open();
    open.set_request(id);
    open.set_prompt_tokens(a.request.prompt.size());
    open.set_max_tokens(static_cast<uint64_t>(a.request.max_tokens));
    open.set_mode(static_cast<uint32_t>(a.placement.mode));
    open.set_first_host(a.placement.first_host);
    a.state = State::kOpening;
    a.replies_due = static_cast<uint32_t>(hosts.size());
    for (const uint32_t host : hosts) rank_.link()->SendControl(host, message);
  }
  return true;
}

std::vector<uint32_t> Leader::HostsOf(const Active& a) const {
  if (!rank_.link()) return {};
  const auto segments =
      job_.Segments(a.request.prompt.size(), static_cast<uint64_t>(a.request.max_tokens));
  if (segments.empty()) return {};
  return a.placement.HostsFor(0, a.placement.kv_heads, static_cast<uint32_t>(segments.size()));
}

void Leader::OnControl(RankId from, const cluster::proto::Control& message) {
  if (message.has_open_reply()) {
    const auto it = active_.find(message.open_reply().request());
    if (it == active_.end() || it->second.state != State::kOpening || it->second.replies_due == 0) {
      return;
    }
    Active& a = it->second;
    if (!message.open_reply().accepted()) {
      a.refusal = "host rank " + std::to_string(from.value) + ": " + message.open_reply().reason();
    }
    if (--a.replies_due == 0) a.state = State::kOpened;
  } else if (message.has_stats_reply() && stats_due_ > 0) {
    --stats_due_;
    report_.Host({from, message.stats_reply().kv_bytes(), message.stats_reply().table_bytes()});
    if (message.stats_reply().dropped_frames() > 0) {
      spdlog::warn("host rank {} dropped {} frames", from.value,
                   message.stats_reply().dropped_frames());
    }
  }
}

bool Leader::MakePlan(cluster::proto::StepPlan* plan) {
  plan->set_step(++step_);
  for (const uint64_t id : release_) plan->add_release(id);
  release_.clear();
  Active* prefill = nullptr;
  for (auto& [id, a] : active_) {
    if (a.state == State::kOpened) {
      pages_promised_ -=
          rank_.PagesFor(static_cast<int64_t>(a.request.prompt.size()) + a.request.max_tokens);
      if (!a.refusal.empty()) {
        Fail(a.request, 507, a.refusal);
        Release(a);
        continue;
      }
      auto& admit = *plan->add_admit();
      admit.set_request(id);
      admit.mutable_prompt()->Add(a.request.prompt.begin(), a.request.prompt.end());
      admit.set_max_tokens(a.request.max_tokens);
      admit.set_mode(static_cast<uint32_t>(a.placement.mode));
      admit.set_first_host(a.placement.first_host);
      a.state = State::kPrefill;
      report_.Event("prefill_start", job_.self.value, a.request.id);
    }
    if (a.state == State::kPrefill && !prefill) prefill = &a;
    if (a.state == State::kDecode) {
      auto& decode = *plan->add_decode();
      decode.set_request(id);
      decode.set_token(a.next_token);
    }
  }
  std::erase_if(active_, [](const auto& a) { return a.second.state == State::kDone; });
  plan->set_micro_batches(tuner_.Choose(static_cast<uint64_t>(plan->decode_size())));
  if (prefill) {
    plan->set_prefill(prefill->request.id.value);
    // One behind each layer of the others' decode step: a chunk of the prompt a step.
    plan->set_prefill_steps(plan->decode_size() > 0 ? static_cast<uint32_t>(job_.model.layers)
                                                    : kPrefillStepsAlone);
  }
  return plan->admit_size() + plan->release_size() + plan->decode_size() > 0 || prefill;
}

gpu::SamplingRule Leader::RuleOf(RequestId id) {
  const Active& a = active_.at(id.value);
  return RuleFor(a.request.sampling, a.result.tokens.size());
}

void Leader::OnToken(RequestId id, const ModelRank::NextToken& next) {
  Active& a = active_.at(id.value);
  const auto now = Clock::now();
  if (a.state == State::kPrefill) {
    a.state = State::kDecode;
    a.first_token = now;
    a.result.ttft_s = std::chrono::duration<double>(now - a.admitted).count();
    report_.Event("decode_start", job_.self.value, id);
  }
  const int32_t token = next.id;
  const auto stops = tokenizer_.stop_ids();
  const bool ends =
      !a.request.ignore_eos && std::find(stops.begin(), stops.end(), token) != stops.end();
  report_.Generated(1);
  a.result.tokens.push_back(token);
  if (const int32_t top = a.request.sampling.top_logprobs; top >= 0) {
    a.result.logprobs.push_back(ComputeLogprobs(next.logits(), token, top));
  }
  if (ends) {
    a.result.text += a.detokenizer->Flush();
    return Finish(a, FinishReason::kStop);
  }
  const size_t before = a.result.text.size();
  a.result.text += a.detokenizer->Push(token);
  const size_t stop = FindStop(a.result.text, before, a.request.stop);
  if (stop != std::string::npos) {
    a.result.text.resize(stop);
    return Finish(a, FinishReason::kStop);
  }
  if (static_cast<int64_t>(a.result.tokens.size()) >= a.request.max_tokens) {
    a.result.text += a.detokenizer->Flush();
    return Finish(a, FinishReason::kLength);
  }
  a.next_token = token;
}

void Leader::Finish(Active& a, FinishReason reason) {
  const Sequence& s = rank_.sequence(a.request.id);
  a.result.finish = reason;
  a.result.decode_s = std::chrono::duration<double>(Clock::now() - a.first_token).count();
  if (s.asked > 0) {
    a.result.sampled_fraction = static_cast<double>(s.sampled) / static_cast<double>(s.asked);
  }
  report_.Sampled(s.sampled, s.asked);
  sink_.Done(a.request, a.result);
  report_.RequestDone(true);
  report_.Event("request_done", job_.self.value, a.request.id);
  release_.push_back(a.request.id.value);
  Release(a);
}

void Leader::Release(Active& a) {
  if (rank_.link()) {
    cluster::proto::Control message;
    message.mutable_release()->set_request(a.request.id.value);
    for (const uint32_t host : HostsOf(a)) rank_.link()->SendControl(host, message);
    shard_map_.Release(a.request.id);
  }
  a.state = State::kDone;
}

void Leader::CollectHostStats() {
  if (!rank_.link()) return;
  cluster::proto::Control message;
  message.mutable_stats_query();
  stats_due_ = rank_.link()->hosts();
  rank_.link()->SendControlToAll(message);
  const auto deadline = Clock::now() + std::chrono::seconds(1) * rank_.link()->hosts();
  while (stats_due_ > 0 && Clock::now() < deadline) {
    rank_.link()->Pump(std::chrono::milliseconds(20));
  }
}

}  // namespace passel::engine
