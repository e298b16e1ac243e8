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

uint64_t PrefillJob::BytesPerToken(const Workspace& w) {
  const uint64_t layers = Offloads(w) ? 2 : 1;
  return static_cast<uint64_t>(w.job.model.hidden) * sizeof(float) + layers * KvBytes(w);
}

uint64_t PrefillJob::FixedBytes(const Workspace& w) {
  const uint64_t padding = static_cast<uint64_t>(gpu::kCausalPadding) * 2 * KvBytes(w);
  if (!Offloads(w)) return padding;
  return padding + static_cast<uint64_t>(PieceRows(w)) * (KvBytes(w) + CodeBytes(w));
}

std::unique_ptr<StagingRing> PrefillJob::MakePieces(const Workspace& w) {
  if (!Offloads(w)) return nullptr;
  const size_t bytes =
      w.kv_cols() * sizeof(float) + static_cast<size_t>(PieceRows(w)) * (KvBytes(w) + CodeBytes(w));
  return std::make_unique<StagingRing>(*w.link, w.device, bytes,
                                       std::clamp(kRingBytes / bytes, kLeastPieces, kMostPieces));
}

PrefillJob::PrefillJob(Workspace& workspace, Sequence& sequence, model::Activations& activations)
    : w_(workspace), sequence_(sequence), a_(activations) {
  const auto n = static_cast<int64_t>(sequence_.prompt.size());
  const auto cols = static_cast<int64_t>(w_.kv_cols());
  const int64_t hidden = w_.job.model.hidden;
  hidden_memory_ = w_.device.Allocate(static_cast<size_t>(n * hidden) * sizeof(float));
  hidden_ = Matrix(hidden_memory_->data(), gpu::DType::kF32, n, hidden);
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
  if (!Offloads(w_)) return;
  const gpu::AttentionShape shape = w_.transformer.attention_shape();
  const int64_t piece = std::min(n, PieceRows(w_));
  packed_memory_ = w_.device.Allocate(static_cast<size_t>(piece) * KvBytes(w_));
  packed_ = Matrix(packed_memory_->data(), gpu::DType::kBf16, piece * shape.kv_heads,
                   2 * int64_t{shape.head_dim});
  if (!w_.job.lsh()) return;
  codes_memory_ = w_.device.Allocate(static_cast<size_t>(piece) * CodeBytes(w_));
  codes_ = Matrix(codes_memory_->data(), gpu::DType::kU16, piece * shape.kv_heads,
                  w_.job.wire_shape().l);
}

bool PrefillJob::Blocked() const { return w_.pieces && !w_.pieces->any_free(); }

bool PrefillJob::Step() {
  if (Blocked()) return false;
  const auto n = static_cast<int64_t>(sequence_.prompt.size());
  const int64_t count = std::min<int64_t>(w_.job.config.engine().prefill_chunk(), n - next_);
  Chunk(next_, count);
  NextPiece();
  next_ += count;
  if (next_ < n) return false;
  FinishLayer();
  next_ = 0;
  if (++layer_ < w_.job.model.layers) return false;
  while (offload_.open || piece_.copied) NextPiece();
  w_.transformer.Logits(a_, a_.n - 1, 1);
  sequence_.tokens = n;
  return true;
}

void PrefillJob::Chunk(int64_t start, int64_t count) {
  std::vector<int64_t> positions(static_cast<size_t>(count));
  std::iota(positions.begin(), positions.end(), start);
  a_.hidden = hidden_.Rows(start, count);
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
  if (last_layer && start + count < static_cast<int64_t>(sequence_.prompt.size())) return;
  w_.device.CausalAttention(w_.transformer.attention_shape(), a_.q.Rows(0, count), kv.k, kv.v,
                            start, w_.job.model.sliding_window, a_.attention.Rows(0, count));
  w_.transformer.AfterAttention(layer_, a_);
}

void PrefillJob::FinishLayer() {
  const auto n = static_cast<int64_t>(sequence_.prompt.size());
  const auto layer = static_cast<size_t>(layer_);
  const LayerKv& kv = Kv(layer_);
  std::vector<int64_t> slots;
  int64_t first = 0;  // positions [0, sinks) and [first, n) stay on the device
  int64_t sinks = 0;
  if (w_.kinds[layer] != Job::LayerKind::kResident) {
    sinks = std::min<int64_t>(n, w_.job.config.attention().sinks());
    first = std::max(sinks, n - w_.job.config.attention().window());
  } else if (w_.job.sliding()) {
    first = std::max<int64_t>(0, n - w_.job.model.sliding_window);
  }
  for (const auto& [begin, end] : {std::pair{int64_t{0}, sinks}, std::pair{first, n}}) {
    if (begin == end) continue;
    slots.clear();
    for (int64_t p = begin; p < end; ++p) slots.push_back(w_.SlotOf(layer_, p));
    w_.device.StoreKv(sequence_.pages[layer], slots, kv.k.Rows(begin, end - begin),
                      kv.v.Rows(begin, end - begin));
  }
  while (offload_.open) NextPiece();  // of the layer before
  if (w_.kinds[layer] != Job::LayerKind::kResident) BeginOffload();
}

void PrefillJob::BeginOffload() {
  const auto n = static_cast<uint64_t>(sequence_.prompt.size());
  // What the first decode step needs on the hosts: one token more than the prompt offloads.
  offload_ = {layer_, static_cast<int64_t>(w_.job.Offloaded(n + 1)), 0,
              w_.kinds[static_cast<size_t>(layer_)] == Job::LayerKind::kSampled && w_.job.lsh(),
              false};
  if (!offload_.codes) {
    offload_.open = offload_.tokens > 0;
    return;
  }
  offload_.open = !sequence_.hosted.segments.empty();
  if (!offload_.open) return;
  const gpu::Tensor mean = w_.Means(sequence_, layer_);
  if (const auto prompt = static_cast<int64_t>(w_.job.Offloaded(n)); prompt > 0) {
    const auto sinks = static_cast<int64_t>(w_.job.config.attention().sinks());
    w_.device.ColumnMean(Kv(layer_).k.Rows(sinks, prompt), mean);
  } else {
    const std::vector<float> zeros(w_.kv_cols());
    w_.device.CopyToDevice(mean.data, zeros.data(), zeros.size() * sizeof(float));
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
