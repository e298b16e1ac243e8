#include <algorithm>
#include <utility>

#include "runtime/base/error.h"
#include "runtime/engine/executor.h"

namespace passel::engine {
namespace {

// Layers whose leaving tokens may be under way to the hosts.
constexpr size_t kEvictedSlots = 4;

template <typename T>
gpu::Tensor Matrix(std::unique_ptr<gpu::Buffer>& memory, gpu::DType type, int64_t rows,
                   int64_t cols, size_t offset = 0) {
  return {static_cast<T*>(memory->data()) + offset, type, rows, cols, cols};
}

// Pages and slots that address one token of each sequence.
struct TokenPlaces {
  std::vector<int32_t> pages;
  std::vector<int64_t> slots;

  void Add(const std::vector<int32_t>& sequence_pages, int64_t slot) {
    pages.push_back(sequence_pages[static_cast<size_t>(slot / gpu::kKvPageTokens)]);
    slots.push_back(static_cast<int64_t>(slots.size()) * gpu::kKvPageTokens +
                    slot % gpu::kKvPageTokens);
  }
};

}  // namespace

MicroBatch::MicroBatch(Workspace& workspace, uint16_t number, int64_t max_rows)
    : w_(workspace),
      number_(number),
      a_(workspace.transformer.MakeActivations(max_rows, /*with_logits=*/true)) {
  const gpu::AttentionShape shape = w_.transformer.attention_shape();
  const int64_t heads = shape.heads;
  const auto cols = static_cast<int64_t>(w_.kv_cols());
  const auto n = static_cast<size_t>(max_rows);
  const size_t per_row = static_cast<size_t>(heads * (shape.head_dim + 2));
  partial_memory_ = w_.device.Allocate(n * per_row * sizeof(float));
  const size_t scalars = n * static_cast<size_t>(heads);
  partials_.max = Matrix<float>(partial_memory_, gpu::DType::kF32, max_rows, heads);
  partials_.den = Matrix<float>(partial_memory_, gpu::DType::kF32, max_rows, heads, scalars);
  partials_.num = Matrix<float>(partial_memory_, gpu::DType::kF32, max_rows, heads * shape.head_dim,
                                2 * scalars);
  if (!w_.link) return;
  queries_->q = w_.link->AllocateStaging(
      w_.device, n * static_cast<size_t>(heads * shape.head_dim) * sizeof(bf16));
  evicted_memory_ = w_.device.Allocate(2 * n * static_cast<size_t>(cols) * sizeof(bf16));
  evicted_k_ = Matrix<bf16>(evicted_memory_, gpu::DType::kBf16, max_rows, cols);
  evicted_v_ = Matrix<bf16>(evicted_memory_, gpu::DType::kBf16, max_rows, cols,
                            n * static_cast<size_t>(cols));
  const int64_t l = w_.job.wire_shape().l;
  evicted_ring_ = std::make_unique<StagingRing>(
      *w_.link, w_.device,
      n * (2 * static_cast<size_t>(cols) * sizeof(bf16) +
           static_cast<size_t>(shape.kv_heads * l) * sizeof(uint16_t)),
      kEvictedSlots);
  if (l == 0) return;
  means_memory_ = w_.device.Allocate(n * static_cast<size_t>(cols) * sizeof(float));
  evicted_means_ = Matrix<float>(means_memory_, gpu::DType::kF32, max_rows, cols);
  queries_->codes =
      w_.link->AllocateStaging(w_.device, n * static_cast<size_t>(heads * l) * sizeof(uint16_t));
  codes_ = Matrix<uint16_t>(queries_->codes, gpu::DType::kU16, max_rows, heads * l);
}

void MicroBatch::Start(std::span<Sequence* const> sequences, std::span<const int32_t> tokens,
                       uint64_t step) {
  Check(sequences.size() == tokens.size() && !sequences.empty(), "a micro-batch of other sizes");
  sequences_.assign(sequences.begin(), sequences.end());
  step_ = step;
  layer_ = 0;
  positions_.clear();
  rows_.clear();
  for (uint32_t row = 0; row < sequences_.size(); ++row) {
    Sequence& s = *sequences_[row];
    positions_.push_back(s.tokens);
    ++s.tokens;
    const uint64_t offloaded = w_.job.Offloaded(static_cast<uint64_t>(s.tokens));
    // Short contexts are attended exactly.
    const bool exact = w_.job.config.attention().estimator() == config::FULL ||
                       offloaded < w_.job.config.attention().exact_below();
    rows_.push_back({&s.hosted, offloaded, exact, row});
  }
  if (w_.link) Plan();
  w_.transformer.Embed(*a_, tokens);
  w_.transformer.SetPositions(*a_, positions_);
  w_.transformer.Between(0, *a_);
  state_ = State::kLayer;
  BeginLayer();
}

// Which frames ask the hosts, and room for what they answer.
void MicroBatch::Plan() {
  plan_ = w_.link->Plan(rows_);
  const size_t floats = w_.link->ReplyFloats(plan_);
  box_.values = {};
  if (floats == 0) return;
  if (!reply_memory_ || reply_memory_->bytes() < floats * sizeof(float)) {
    reply_memory_ = w_.device.AllocateStaging(floats * sizeof(float));
  }
  box_.values = {static_cast<float*>(reply_memory_->data()), floats};
}

void MicroBatch::Advance() {
  if (!HandedOver() || state_ != State::kHosts || !box_.complete()) return;
  FinishLayer();
  if (state_ == State::kLayer) BeginLayer();
}

bool MicroBatch::HandedOver() {
  if (state_ == State::kHandOver && event_->Done()) HandOver();
  return state_ != State::kHandOver;
}

void MicroBatch::BeginLayer() {
  const auto n = static_cast<int64_t>(sequences_.size());
  const auto layer = static_cast<size_t>(layer_);
  TokenPlaces places;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    places.Add(sequences_[i]->pages[layer], w_.SlotOf(layer_, positions_[i]));
  }
  w_.device.StoreKv(places.pages, places.slots, a_->k.Rows(0, n), a_->v.Rows(0, n));

  const bool hosted = w_.kinds[layer] != Job::LayerKind::kResident;
  if (hosted) {
    const gpu::Tensor q = a_->q.Rows(0, n);
    w_.device.Convert(q, Matrix<bf16>(queries_->q, gpu::DType::kBf16, n, q.cols));
    if (Sampled() && w_.job.lsh()) {
      w_.device.HashCodes(q, {}, codes_.Rows(0, n));
    }
    event_ = w_.device.Record();
  }
  // Exact attention over what is here runs while the hosts answer.
  std::vector<gpu::KvView> views;
  for (const Sequence* s : sequences_) {
    views.push_back({s->pages[layer], w_.SlotsOf(layer_, s->tokens)});
  }
  const gpu::Partials partials{partials_.max.Rows(0, n), partials_.den.Rows(0, n),
                               partials_.num.Rows(0, n)};
  if (hosted && event_->Done()) HandOver();
  w_.device.DecodeAttention(a_->q.Rows(0, n), views, partials);
  SendEvicted();  // of the layer before: a GPU has work now, and the hosts have none yet
  if (hosted) GatherEvicted();
  if (state_ == State::kLayer) state_ = hosted ? State::kHandOver : State::kHosts;
}

void MicroBatch::HandOver() {
  // Dense layers are attended exactly.
  w_.link->SendQuery(number_, layer_, step_, plan_, !Sampled(),
                     static_cast<const bf16*>(queries_->q->data()),
                     static_cast<const uint16_t*>(codes_.data), queries_, &box_);
  state_ = State::kHosts;
}

// The tokens that the next step will find offloaded: their K, V and codes on the way to host
// memory, behind the attention over what is here.
void MicroBatch::GatherEvicted() {
  const auto layer = static_cast<size_t>(layer_);
  const auto sinks = static_cast<int64_t>(w_.job.config.attention().sinks());
  TokenPlaces places;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const Sequence& s = *sequences_[i];
    if (w_.job.Offloaded(static_cast<uint64_t>(s.tokens) + 1) == 0) continue;
    const auto position = sinks + static_cast<int64_t>(rows_[i].offloaded_tokens);
    places.Add(s.pages[layer], w_.SlotOf(layer_, position));
    leaving_.push_back(i);
  }
  if (leaving_.empty()) return;
  const auto n = static_cast<int64_t>(leaving_.size());
  const gpu::Tensor k = evicted_k_.Rows(0, n), v = evicted_v_.Rows(0, n);
  w_.device.LoadKv(places.pages, places.slots, k, v);
  const gpu::AttentionShape shape = w_.transformer.attention_shape();
  const int64_t rows = n * shape.kv_heads;
  evicted_host_ = evicted_ring_->Take();
  w_.device.PackKv(k, v,
                   {evicted_host_.get(), gpu::DType::kBf16, rows, 2 * int64_t{shape.head_dim},
                    2 * int64_t{shape.head_dim}});
  if (Sampled() && w_.job.lsh()) {
    const gpu::Tensor means = evicted_means_.Rows(0, n);
    for (int64_t i = 0; i < n; ++i) {
      const size_t row = leaving_[static_cast<size_t>(i)];
      w_.device.CopyToDevice(means.Rows(i, 1).data, w_.Means(*sequences_[row], layer_).data,
                             static_cast<size_t>(means.cols) * sizeof(float));
    }
    const int64_t l = w_.job.wire_shape().l;
    const size_t bytes = static_cast<size_t>(2 * n * k.cols) * sizeof(bf16);
    w_.device.HashCodes(k, means, {evicted_host_.get() + bytes, gpu::DType::kU16, rows, l, l});
  }
  leaving_layer_ = layer_;
  evicted_event_ = w_.device.Record();
}

// They leave behind their layer's query, and before the next step's.
void MicroBatch::SendEvicted() {
  if (leaving_.empty()) return;
  evicted_event_->Wait();
  const size_t n = leaving_.size();
  const auto* kv = reinterpret_cast<const bf16*>(evicted_host_.get());
  const auto* codes = reinterpret_cast<const uint16_t*>(kv + 2 * n * w_.kv_cols());
  const bool hashed =
      w_.kinds[static_cast<size_t>(leaving_layer_)] == Job::LayerKind::kSampled && w_.job.lsh();
  std::vector<KvRun> runs;
  for (size_t i = 0; i < n; ++i) {
    const size_t row = leaving_[i];
    runs.push_back({&sequences_[row]->hosted, rows_[row].offloaded_tokens, 1, i});
  }
  w_.link->SendKv(leaving_layer_, runs, n, kv, hashed ? codes : nullptr,
                  std::exchange(evicted_host_, nullptr));
  leaving_.clear();
}

void MicroBatch::FinishLayer() {
  const auto n = static_cast<int64_t>(sequences_.size());
  MergeReplies();
  const gpu::Partials partials{partials_.max.Rows(0, n), partials_.den.Rows(0, n),
                               partials_.num.Rows(0, n)};
  w_.device.NormalizePartials(partials, a_->attention.Rows(0, n));
  w_.transformer.Between(++layer_, *a_);
  if (layer_ < w_.job.model.layers) {
    state_ = State::kLayer;
    return;
  }
  w_.transformer.Logits(*a_, 0, n);
  SendEvicted();
  state_ = State::kDone;
}

// Window first, then the hosts' partials by segment: the same order whoever answered first.
void MicroBatch::MergeReplies() {
  const std::vector<ReceivedPartial>& got = box_.partials;
  if (w_.kinds[static_cast<size_t>(layer_)] == Job::LayerKind::kResident || got.empty()) return;
  const gpu::AttentionShape shape = w_.transformer.attention_shape();
  const model::TensorSlice& slice = w_.transformer.slice();
  const auto group = static_cast<int64_t>(w_.job.group());
  const auto d = static_cast<int64_t>(shape.head_dim);
  const auto entries = static_cast<int64_t>(got.size());
  const auto stride = static_cast<int64_t>(w_.link->PartialFloats());
  float* values = box_.values.data();
  gpu::Partials from;
  from.max = {values, gpu::DType::kF32, entries, group, stride};
  from.den = {values + group, gpu::DType::kF32, entries, group, stride};
  from.num = {values + 2 * group, gpu::DType::kBf16, entries, group * d, 2 * stride};
  std::vector<int32_t> rows, heads;
  for (const ReceivedPartial& p : got) {
    rows.push_back(static_cast<int32_t>(p.key.row));
    heads.push_back((static_cast<int32_t>(p.key.kv_head) - slice.first_kv_head) *
                    static_cast<int32_t>(group));
    if (SampledRow(p.key.row)) sequences_[p.key.row]->sampled += p.sampled_tokens;
  }
  for (const QueryRow& row : rows_) {
    if (SampledRow(row.row)) {
      sequences_[row.row]->asked +=
          row.offloaded_tokens * static_cast<uint64_t>(slice.kv_heads) * w_.job.group();
    }
  }
  w_.device.MergePartials(partials_, from, rows, heads);
}

}  // namespace passel::engine
