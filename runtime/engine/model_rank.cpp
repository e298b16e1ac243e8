#include "runtime/engine/model_rank.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <limits>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "runtime/engine/micro_batch_tuner.h"

namespace passel::engine {

ModelRank::ModelRank(const Job& job, gpu::Device& device, const model::Transformer& transformer,
                     Collectives& collectives, transport::Channel* channel,
                     ControlHandler on_control)
    : job_(job),
      device_(device),
      collectives_(collectives),
      link_(channel && job.hosts() > 0
                ? std::make_unique<HostLink>(job, *channel, transformer.slice(),
                                             std::move(on_control))
                : nullptr),
      workspace_{job, device, transformer, link_.get(), job.layer_kinds(), nullptr},
      prefill_activations_(transformer.MakeActivations(job.config.engine().prefill_chunk(),
                                                       /*with_logits=*/true,
                                                       /*logit_rows=*/1)) {
  if (link_ && job.lsh()) {
    const config::Attention& a = job.config.attention();
    device.SetProjections(
        RandomProjections(a.seed(), static_cast<size_t>(job.model.head_dim), a.k(), a.l()),
        job.model.head_dim, static_cast<int32_t>(a.k()), static_cast<int32_t>(a.l()));
  }
  workspace_.pieces = PrefillJob::MakePieces(workspace_);
  logits_row_ = device.AllocateStaging(static_cast<size_t>(job.model.vocab) * sizeof(float));
  chosen_ids_ = device.AllocateStaging(job.config.engine().max_batch() * sizeof(int32_t));
  // What decoding needs is made before the KV pool takes the rest.
  const config::Engine& engine = job.config.engine();
  const uint64_t parts = link_ ? MicroBatchTuner::Most(engine.micro_batches()) : 1;
  for (uint64_t part = 0; part < std::min<uint64_t>(parts, engine.max_batch()); ++part) {
    micro_batches_.push_back(
        std::make_unique<MicroBatch>(workspace_, static_cast<uint16_t>(part), engine.max_batch()));
  }
  CreateKvPool();
  WarmUp();
}

// Attention of a prompt of one token, all zeros: what a library needs seconds for when it is first
// used is not for the first request to wait for.
void ModelRank::WarmUp() {
  const auto cols = static_cast<int64_t>(workspace_.kv_cols());
  const std::vector<bf16> zeros(static_cast<size_t>(gpu::kCausalPadding * cols));
  const auto memory = device_.Allocate(zeros.size() * sizeof(bf16));
  const gpu::Tensor kv{memory->data(), gpu::DType::kBf16, gpu::kCausalPadding, cols, cols};
  model::Activations& a = *prefill_activations_;
  a.Resize(1);
  const std::vector<float> query(static_cast<size_t>(a.q.cols));
  device_.CopyToDevice(kv.data, zeros.data(), memory->bytes());
  device_.CopyToDevice(a.q.data, query.data(), query.size() * sizeof(float));
  device_.CausalAttention(workspace_.transformer.attention_shape(), a.q, kv, kv, 0, 0, a.attention);
  device_.Record()->Wait();
}

void ModelRank::CreateKvPool() {
  const gpu::AttentionShape shape = workspace_.transformer.attention_shape();
  const auto page_bytes = static_cast<uint64_t>(gpu::kKvPageTokens) * 2 * sizeof(bf16) *
                          static_cast<uint64_t>(shape.kv_heads * shape.head_dim);
  const uint64_t max_batch = job_.config.engine().max_batch();
  const auto context = static_cast<uint64_t>(job_.model.context_length);
  const uint64_t budget = device_.info().memory_bytes;
  const auto take = [&](uint64_t from, uint64_t bytes) { return from > bytes ? from - bytes : 0; };
  // A twentieth stays for what kernels allocate for themselves.
  uint64_t left = take(budget, device_.allocated_bytes()) / 20 * 19;
  left = take(left, max_batch * MeansBytes());
  // Prefill holds K and V of a layer of a whole prompt, and the hidden states of a part: of the
  // longest, or as much as half of what is left.
  const PrefillJob::Memory prefill = PrefillJob::MemoryOf(workspace_);
  const uint64_t room = take(left / 2, prefill.fixed);
  const uint64_t part = std::min(context, PartTokens(room, prefill));
  uint64_t prompt = std::min(context, take(room, part * prefill.part_token) / prefill.prompt_token);
  // What rounding leaves over is no reason for a second part.
  if (job_.deterministic() && part == room / (prefill.part_token + prefill.prompt_token)) {
    prompt = std::min(prompt, part);
  }
  left = take(left, prefill.fixed + part * prefill.part_token + prompt * prefill.prompt_token);
  // No more than a full batch of the longest requests needs.
  const uint64_t wanted =
      static_cast<uint64_t>(workspace_.PagesFor(job_.model.context_length)) * max_batch;
  const uint64_t pages =
      std::min({left / page_bytes, wanted, uint64_t{std::numeric_limits<int32_t>::max()}});
  if (pages == 0 || prompt == 0 || part == 0) {
    throw Error(ErrorClass::kMemory, "model rank " + std::to_string(job_.self.value) + ": of " +
                                         std::to_string(budget) +
                                         " bytes of memory, weights and activations take " +
                                         std::to_string(device_.allocated_bytes()) +
                                         "; expected room for a KV cache behind them");
  }
  // Plans are the same on every model rank, and so is what they may ask for.
  total_pages_ = static_cast<int64_t>(LeastOfRanks(pages));
  part_ = static_cast<int64_t>(LeastOfRanks(part));
  max_prompt_ = static_cast<int64_t>(LeastOfRanks(prompt));
  pages_ = KvPages(static_cast<int32_t>(total_pages_));
  device_.CreateKvPool(shape, static_cast<int32_t>(total_pages_));
}

uint64_t ModelRank::PartTokens(uint64_t room, const PrefillJob::Memory& prefill) const {
  const config::Engine& engine = job_.config.engine();
  // Whole prompts; where not all fit, parts of half as many tokens, which leaves K and V more room.
  // Tokens must not depend on memory where they are to be the same anywhere: the mean of keys does.
  const uint64_t whole = room / (prefill.part_token + prefill.prompt_token);
  if (const uint64_t asked = engine.prefill_part(); asked > 0) {
    return std::min<uint64_t>(whole, std::max(asked, uint64_t{engine.prefill_chunk()}));
  }
  const auto context = static_cast<uint64_t>(job_.model.context_length);
  return whole >= context || job_.deterministic() ? whole : whole / 2;
}

uint64_t ModelRank::MeansBytes() const {
  if (!link_) return 0;
  return static_cast<uint64_t>(job_.model.layers) * workspace_.kv_cols() * sizeof(float);
}

uint64_t ModelRank::LeastOfRanks(uint64_t value) const {
  uint64_t least = value;
  for (int32_t rank = 0; rank < collectives_.size(); ++rank) {
    uint64_t theirs = value;
    collectives_.Broadcast(std::as_writable_bytes(std::span(&theirs, 1)), rank);
    least = std::min(least, theirs);
  }
  return least;
}

void ModelRank::BroadcastPlan(cluster::proto::StepPlan& plan) {
  if (collectives_.size() == 1) return;
  std::vector<std::byte> bytes;
  uint64_t size = 0;
  if (collectives_.rank() == 0) {
    bytes.resize(plan.ByteSizeLong());
    plan.SerializeToArray(bytes.data(), static_cast<int>(bytes.size()));
    size = bytes.size();
  }
  collectives_.Broadcast(std::as_writable_bytes(std::span(&size, 1)), 0);
  bytes.resize(size);
  if (size > 0) collectives_.Broadcast(bytes, 0);
  if (collectives_.rank() != 0) {
    Check(plan.ParseFromArray(bytes.data(), static_cast<int>(size)), "rank 0's plan");
  }
}

void ModelRank::Follow() {
  while (true) {
    cluster::proto::StepPlan plan;
    BroadcastPlan(plan);
    if (plan.stop()) return;
    Execute(plan, nullptr);
  }
}

void ModelRank::Execute(const cluster::proto::StepPlan& plan, TokenHandler* handler) {
  for (const uint64_t id : plan.release()) Release(id);
  for (const auto& admit : plan.admit()) Admit(admit);
  if (plan.decode_size() > 0) {
    Decode(plan, handler);
  } else if (plan.prefill_steps() > 0) {
    Prefill(plan.prefill(), plan.prefill_steps(), handler);
  }
}

void ModelRank::Admit(const cluster::proto::StepPlan::Admit& admit) {
  auto s = std::make_unique<Sequence>();
  s->id = RequestId(admit.request());
  s->prompt.assign(admit.prompt().begin(), admit.prompt().end());
  s->max_tokens = admit.max_tokens();
  s->hosted.request = s->id;
  s->hosted.placement = {static_cast<cluster::PlacementMode>(admit.mode()), admit.first_host(),
                         job_.hosts(), static_cast<uint32_t>(job_.model.kv_heads)};
  if (link_) {
    s->hosted.segments = job_.Segments(s->prompt.size(), static_cast<uint64_t>(admit.max_tokens()));
    s->means = device_.Allocate(MeansBytes());
  }
  const auto tokens = static_cast<int64_t>(s->prompt.size()) + s->max_tokens;
  for (int32_t layer = 0; layer < job_.model.layers; ++layer) {
    s->pages.push_back(pages_.Take(workspace_.PagesFor(layer, tokens)));
  }
  sequences_.emplace(admit.request(), Live{std::move(s), nullptr});
}

void ModelRank::Release(uint64_t id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  for (const auto& pages : it->second.sequence->pages) pages_.Return(pages);
  sequences_.erase(it);
}

void ModelRank::Pump(int milliseconds) {
  if (link_) link_->Pump(std::chrono::milliseconds(milliseconds));
}

void ModelRank::Emit(std::span<Sequence* const> sequences, const gpu::Tensor& rows,
                     TokenHandler* handler) {
  if (!handler) return;
  std::vector<gpu::SamplingRule> rules;
  for (const Sequence* s : sequences) rules.push_back(handler->RuleOf(s->id));
  const std::span<int32_t> ids(static_cast<int32_t*>(chosen_ids_->data()), sequences.size());
  device_.Sample(rows, rules, ids);
  device_.Record()->Wait();
  collectives_.ThrowIfFailed();
  for (size_t i = 0; i < sequences.size(); ++i) {
    Check(ids[i] >= 0, "a logit is NaN");
    const std::span<float> row(static_cast<float*>(logits_row_->data()),
                               static_cast<size_t>(job_.model.vocab));
    handler->OnToken(sequences[i]->id,
                     {ids[i], [&] {
                        device_.CopyToHost(row.data(), rows.Rows(static_cast<int64_t>(i), 1).data,
                                           row.size_bytes());
                        device_.Record()->Wait();
                        return std::span<const float>(row);
                      }});
  }
}

void ModelRank::Decode(const cluster::proto::StepPlan& plan, TokenHandler* handler) {
  const auto batch = static_cast<uint64_t>(plan.decode_size());
  const uint64_t parts = std::clamp<uint64_t>(plan.micro_batches(), 1,
                                              std::min<uint64_t>(batch, micro_batches_.size()));
  std::vector<MicroBatch*> running;
  uint64_t begin = 0;
  for (uint64_t part = 0; part < parts; ++part) {
    const uint64_t end = batch * (part + 1) / parts;
    std::vector<Sequence*> sequences;
    std::vector<int32_t> tokens;
    for (; begin < end; ++begin) {
      const auto& d = plan.decode(static_cast<int>(begin));
      sequences.push_back(sequences_.at(d.request()).sequence.get());
      tokens.push_back(d.token());
    }
    running.push_back(micro_batches_[part].get());
    running.back()->Start(sequences, tokens, plan.step());
  }
  // Prefill is spread over the layers, each time behind a query: it has the device while hosts are
  // at work.
  const uint64_t layers = running.size() * static_cast<uint64_t>(job_.model.layers);
  uint64_t finished = 0;
  uint32_t prefilled = 0;
  const auto prefill = [&](MicroBatch& behind) {
    const auto due = static_cast<uint32_t>(plan.prefill_steps() * ++finished / layers);
    if (due == prefilled) return;
    while (!behind.HandedOver()) Pump(0);
    Prefill(plan.prefill(), due - prefilled, handler);
    prefilled = due;
  };
  // Micro-batches finish layers in turn, and prefill has its place between them, so that
  // collectives come in the same order on every rank.
  size_t turn = 0;
  size_t left = running.size();
  while (left > 0) {
    MicroBatch& m = *running[turn % running.size()];
    if (m.done()) {
      ++turn;
      continue;
    }
    const int32_t layer = m.layer();
    m.Advance();
    if (m.layer() == layer) {
      Pump(m.waits_for_hosts() ? 50 : 0);
      continue;
    }
    left -= m.done();
    ++turn;
    prefill(m);
  }
  for (const MicroBatch* m : running) {
    const auto n = static_cast<int64_t>(m->sequences().size());
    Emit(m->sequences(), m->activations().logits.Rows(0, n), handler);
  }
}

void ModelRank::Prefill(uint64_t id, uint32_t steps, TokenHandler* handler) {
  Live& live = sequences_.at(id);
  if (live.sequence->tokens > 0) return;  // done
  // One request prefills at a time, so only one holds a layer's K and V of a whole prompt.
  if (!live.prefill) {
    const auto tokens = static_cast<int64_t>(live.sequence->prompt.size());
    if (tokens > part_ && collectives_.rank() == 0) {
      spdlog::info("request {}: {} tokens are prefilled in parts of {} tokens", id, tokens, part_);
    }
    live.prefill =
        std::make_unique<PrefillJob>(workspace_, *live.sequence, *prefill_activations_, part_);
  }
  for (uint32_t i = 0; i < steps && live.prefill;) {
    Pump(0);
    if (live.prefill->Blocked()) {
      Pump(5);
      continue;
    }
    ++i;
    if (!live.prefill->Step()) continue;
    live.prefill.reset();
    Sequence* const sequence = live.sequence.get();
    Emit(std::span(&sequence, 1), prefill_activations_->logits.Rows(0, 1), handler);
  }
}

}  // namespace passel::engine
