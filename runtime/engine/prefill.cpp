#include <algorithm>
#include <numeric>
#include <utility>

#include "runtime/base/error.h"
#include "runtime/engine/executor.h"

namespace passel::engine {
namespace {

// Of all pieces under way and of one, at most; and pieces at least and at most.
constexpr size_t kRingBytes = size_t{64} << 20, kPieceBytes = size_t{32} << 20;
constexpr size_t kLeastPieces = 2, kMostPieces = 8;

gpu::Tensor Matrix(void* data, gpu::DType type, int64_t rows, int64_t cols) {
  return {data, type, rows, cols, cols};
}

// Rows of K and V: whole tiles of a GPU's attention.
int64_t Padded(int64_t rows) {
  return (rows + gpu::kCausalPadding - 1) / gpu::kCausalPadding * gpu::kCausalPadding;
}

bool Offloads(const Workspace& w) {
  return w.link && std::ranges::any_of(w.kinds, [](Job::LayerKind kind) {
           return kind != Job::LayerKind::kResident;
         });
}

// Bytes of K and V, and of codes, of a token.
size_t KvBytes(const Workspace& w) { return 2 * w.kv_cols() * sizeof(bf16); }
size_t CodeBytes(const Workspace& w) {
  if (!w.job.lsh()) return 0;
  return w.job.wire_shape().l * static_cast<size_t>(w.transformer.attention_shape().kv_heads) *
         sizeof(uint16_t);
}

// Rows hashed and copied off the device at a time: a piece for every chunk, where it fits one.
int64_t PieceRows(const Workspace& w) {
  const auto fit = static_cast<int64_t>(kPieceBytes / (KvBytes(w) + CodeBytes(w)));
  return std::clamp<int64_t>(
      fit, 1, std::min<int64_t>(w.job.config.engine().prefill_chunk(), w.job.model.context_length));
}

}  // namespace

PrefillJob::Memory PrefillJob::MemoryOf(const Workspace& w) {
  const uint64_t layers = Offloads(w) ? 2 : 1;
  Memory m{static_cast<uint64_t>(w.job.model.hidden) * sizeof(float), layers * KvBytes(w),
           static_cast<uint64_t>(gpu::kCausalPadding) * 2 * KvBytes(w)};
  if (Offloads(w)) m.fixed += static_cast<uint64_t>(PieceRows(w)) * (KvBytes(w) + CodeBytes(w));
  return m;
}

std::unique_ptr<StagingRing> PrefillJob::MakePieces(const Workspace& w) {
  if (!Offloads(w)) return nullptr;
  const size_t bytes =
      w.kv_cols() * sizeof(float) + static_cast<size_t>(PieceRows(w)) * (KvBytes(w) + CodeBytes(w));
  return std::make_unique<StagingRing>(*w.link, w.device, bytes,
                                       std::clamp(kRingBytes / bytes, kLeastPieces, kMostPieces));
}

PrefillJob::PrefillJob(Workspace& workspace, Sequence& sequence, model::Activations& activations,
                       int64_t part)
    : w_(workspace), sequence_(sequence), a_(activations), part_(part) {
  const int64_t n = tokens();
  const auto cols = static_cast<int64_t>(w_.kv_cols());
  const int64_t hidden = w_.job.model.hidden, most = std::min(n, part_);
  hidden_memory_ = w_.device.Allocate(static_cast<size_t>(most * hidden) * sizeof(float));
  hidden_ = Matrix(hidden_memory_->data(), gpu::DType::kF32, most, hidden);
  const int64_t rows = Padded(n);
  kv_.resize(Offloads(w_) ? 2 : 1);
  kv_memory_ = w_.device.Allocate(2 * kv_.size() * static_cast<size_t>(rows * cols) * sizeof(bf16));
  auto* memory = static_cast<bf16*>(kv_memory_->data());
  for (LayerKv& kv : kv_) {
    for (gpu::Tensor* t : {&kv.k, &kv.v}) {
      *t = Matrix(memory, gpu::DType::kBf16, rows, cols);
      memory += rows * cols;
    }
  }
  end_ = most;
  if (!Offloads(w_)) return;
  const gpu::AttentionShape shape = w_.transformer.attention_shape();
  const int64_t piece = std::min(n, PieceRows(w_));
  packed_memory_ = w_.device.Allocate(static_cast<size_t>(piece) * KvBytes(w_));
  packed_ = Matrix(packed_memory_->data(), gpu::DType::kBf16, piece * shape.kv_heads,
                   2 * int64_t{shape.head_dim});
  if (n > part_) {
    reader_ = std::make_unique<LayerReader>(*w_.link, w_.device, sequence_.hosted, shape, piece);
  }
  if (!w_.job.lsh()) return;
  codes_memory_ = w_.device.Allocate(static_cast<size_t>(piece) * CodeBytes(w_));
  codes_ = Matrix(codes_memory_->data(), gpu::DType::kU16, piece * shape.kv_heads,
                  w_.job.wire_shape().l);
}

bool PrefillJob::Blocked() {
  if (w_.pieces && !w_.pieces->any_free()) return true;
  return reader_ && next_ == begin_ && !reader_->Advance();
}

bool PrefillJob::Step() {
  if (Blocked()) return false;
  if (next_ == begin_ && begin_ > 0) BeginLayer();
  const int64_t count = std::min<int64_t>(w_.job.config.engine().prefill_chunk(), end_ - next_);
  Chunk(next_, count);
  if (reader_) reader_->Advance();
  NextPiece();
  next_ += count;
  if (next_ < end_) return false;
  FinishLayer();
  next_ = begin_;
  if (++layer_ < w_.job.model.layers) return false;
  while (offload_.open || piece_.copied) NextPiece();
  if (end_ < tokens()) {
    BeginPart(end_);
    return false;
  }
  w_.transformer.Logits(a_, a_.n - 1, 1);
  sequence_.tokens = tokens();
  return true;
}

// The first decode step needs one token more on the hosts than the prompt offloads.
int64_t PrefillJob::OffloadedBefore(int64_t position) const {
  const auto sinks = static_cast<int64_t>(w_.job.config.attention().sinks());
  const auto all = static_cast<int64_t>(w_.job.Offloaded(static_cast<uint64_t>(tokens()) + 1));
  return std::clamp<int64_t>(position - sinks, 0, all);
}

void PrefillJob::BeginPart(int64_t begin) {
  begin_ = next_ = begin;
  end_ = std::min(tokens(), begin + part_);
  layer_ = 0;
  if (reader_) ReadBack(0);
}

// Rows [sinks, …) of the layer's K and V, as far as hosts have them.
void PrefillJob::ReadBack(int32_t layer) {
  const int64_t count = Resident(layer) || !Attends(layer) ? 0 : OffloadedBefore(begin_);
  const LayerKv& kv = Kv(layer);
  const int64_t first = count > 0 ? int64_t{w_.job.config.attention().sinks()} : 0;
  reader_->Begin(layer, count, kv.k.Rows(first, count), kv.v.Rows(first, count));
}

// What of earlier parts is on the device comes from its pages; what hosts have is here, and the
// next layer's is asked for.
void PrefillJob::BeginLayer() {
  const LayerKv& kv = Kv(layer_);
  const auto layer = static_cast<size_t>(layer_);
  std::vector<int64_t> slots;
  for (const auto& [begin, end] : w_.Kept(layer_, begin_, tokens())) {
    if (begin == end || !Attends(layer_)) continue;
    slots.clear();
    for (int64_t p = begin; p < end; ++p) slots.push_back(w_.SlotOf(layer_, p));
    w_.device.LoadKv(sequence_.pages[layer], slots, kv.k.Rows(begin, end - begin),
                     kv.v.Rows(begin, end - begin));
  }
  if (reader_ && layer_ + 1 < w_.job.model.layers) ReadBack(layer_ + 1);
}

void PrefillJob::Chunk(int64_t start, int64_t count) {
  std::vector<int64_t> positions(static_cast<size_t>(count));
  std::iota(positions.begin(), positions.end(), start);
  a_.hidden = hidden_.Rows(start - begin_, count);
  if (layer_ == 0) {
    w_.transformer.Embed(a_, std::span(sequence_.prompt)
                                 .subspan(static_cast<size_t>(start), static_cast<size_t>(count)));
  }
  a_.n = count;
  w_.transformer.SetPositions(a_, positions);
  w_.transformer.BeforeAttention(layer_, a_);
  const LayerKv& kv = Kv(layer_);
  w_.device.Convert(a_.k.Rows(0, count), kv.k.Rows(start, count));
  w_.device.Convert(a_.v.Rows(0, count), kv.v.Rows(start, count));
  // Of the last layer only the last position is read on.
  const bool last_layer = layer_ + 1 == w_.job.model.layers;
  if (last_layer && start + count < tokens()) return;
  w_.device.CausalAttention(w_.transformer.attention_shape(), a_.q.Rows(0, count), kv.k, kv.v,
                            start, w_.job.model.sliding_window, a_.attention.Rows(0, count));
  w_.transformer.AfterAttention(layer_, a_);
}

void PrefillJob::FinishLayer() {
  const auto layer = static_cast<size_t>(layer_);
  const LayerKv& kv = Kv(layer_);
  std::vector<int64_t> slots;
  for (const auto& [from, end] : w_.Kept(layer_, end_, tokens())) {
    const int64_t begin = std::max(from, begin_);
    if (begin >= end) continue;
    slots.clear();
    for (int64_t p = begin; p < end; ++p) slots.push_back(w_.SlotOf(layer_, p));
    w_.device.StoreKv(sequence_.pages[layer], slots, kv.k.Rows(begin, end - begin),
                      kv.v.Rows(begin, end - begin));
  }
  while (offload_.open) NextPiece();  // of the layer before
  if (!Resident(layer_)) BeginOffload();
}

void PrefillJob::BeginOffload() {
  const bool codes =
      w_.kinds[static_cast<size_t>(layer_)] == Job::LayerKind::kSampled && w_.job.lsh();
  offload_ = {layer_, OffloadedBefore(end_), OffloadedBefore(begin_), codes, false};
  // The mean goes before the first token, and where there is none yet, for those of decode.
  const bool mean = codes && offload_.done == 0 && !sequence_.hosted.segments.empty() &&
                    (offload_.tokens > 0 || end_ == tokens());
  offload_.open = mean || offload_.done < offload_.tokens;
  if (!mean) return;
  const gpu::Tensor to = w_.Means(sequence_, layer_);
  const int64_t keys = std::min(
      offload_.tokens, static_cast<int64_t>(w_.job.Offloaded(static_cast<uint64_t>(tokens()))));
  if (keys > 0) {
    const auto sinks = static_cast<int64_t>(w_.job.config.attention().sinks());
    w_.device.ColumnMean(Kv(layer_).k.Rows(sinks, keys), to);
  } else {
    const std::vector<float> zeros(w_.kv_cols());
    w_.device.CopyToDevice(to.data, zeros.data(), zeros.size() * sizeof(float));
    w_.device.Record()->Wait();
  }
}

// The piece before is sent while the device is at work on what was issued behind it; then the next
// one is copied, behind that.
void PrefillJob::NextPiece() {
  SendPiece();
  if (offload_.open) IssuePiece();
}

void PrefillJob::IssuePiece() {
  piece_.layer = offload_.layer;
  piece_.first = offload_.done;
  piece_.rows = std::min(PieceRows(w_), offload_.tokens - offload_.done);
  piece_.codes = offload_.codes;
  offload_.done += piece_.rows;
  offload_.open = offload_.done < offload_.tokens;
  piece_.memory = w_.pieces->Take();
  std::byte* host = piece_.memory.get();
  if (piece_.codes && piece_.first == 0) {
    w_.device.CopyToHost(host, w_.Means(sequence_, piece_.layer).data,
                         w_.kv_cols() * sizeof(float));
  }
  if (piece_.rows > 0) {
    host += w_.kv_cols() * sizeof(float);
    const int64_t first = piece_.first + w_.job.config.attention().sinks();
    const LayerKv& kv = Kv(piece_.layer);
    const gpu::Tensor k = kv.k.Rows(first, piece_.rows);
    const int64_t rows = piece_.rows * w_.transformer.attention_shape().kv_heads;
    const gpu::Tensor packed = packed_.Rows(0, rows);
    const size_t bytes = static_cast<size_t>(piece_.rows) * KvBytes(w_);
    w_.device.PackKv(k, kv.v.Rows(first, piece_.rows), packed);
    w_.device.CopyToHost(host, packed.data, bytes);
    if (piece_.codes) {
      const gpu::Tensor codes = codes_.Rows(0, rows);
      w_.device.HashCodes(k, w_.Means(sequence_, piece_.layer), codes);
      w_.device.CopyToHost(host + bytes, codes.data,
                           static_cast<size_t>(piece_.rows) * CodeBytes(w_));
    }
  }
  piece_.copied = w_.device.Record();
}

void PrefillJob::SendPiece() {
  if (!piece_.copied) return;
  piece_.copied->Wait();
  piece_.copied.reset();
  const auto memory = std::exchange(piece_.memory, nullptr);
  const auto* mean = reinterpret_cast<const float*>(memory.get());
  if (piece_.codes && piece_.first == 0) {
    w_.link->SendKeyMean(sequence_.hosted, piece_.layer, mean);
  }
  const auto rows = static_cast<uint64_t>(piece_.rows);
  const auto* kv = reinterpret_cast<const bf16*>(mean + w_.kv_cols());
  const auto* codes = reinterpret_cast<const uint16_t*>(kv + rows * 2 * w_.kv_cols());
  const KvRun run{&sequence_.hosted, static_cast<uint64_t>(piece_.first), rows, 0};
  w_.link->SendKv(piece_.layer, {&run, 1}, rows, kv, piece_.codes ? codes : nullptr, memory);
}

}  // namespace passel::engine
