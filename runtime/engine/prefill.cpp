#include <algorithm>
#include <numeric>

#include "runtime/base/error.h"
#include "runtime/engine/executor.h"

namespace passel::engine {
namespace {

// Bytes to one host beyond which prefill waits.
constexpr uint64_t kMaxPendingBytes = 64u << 20;
// Rows hashed and copied off the device at a time.
constexpr int64_t kOffloadRows = 2048;

gpu::Tensor Matrix(void* data, gpu::DType type, int64_t rows, int64_t cols) {
  return {data, type, rows, cols, cols};
}

}  // namespace

uint64_t PrefillJob::BytesPerToken(const Workspace& w) {
  return static_cast<uint64_t>(w.job.model.hidden) * sizeof(float) + 2 * w.kv_cols() * sizeof(bf16);
}

uint64_t PrefillJob::CodeBytes(const Workspace& w) {
  if (!w.link || !w.job.lsh()) return 0;
  const uint64_t codes = uint64_t{w.job.wire_shape().l} *
                         static_cast<uint64_t>(w.transformer.attention_shape().kv_heads);
  return static_cast<uint64_t>(kOffloadRows) * codes * sizeof(uint16_t);
}

PrefillJob::PrefillJob(Workspace& workspace, Sequence& sequence, model::Activations& activations)
    : w_(workspace), sequence_(sequence), a_(activations) {
  const auto n = static_cast<int64_t>(sequence.prompt.size());
  const auto cols = static_cast<int64_t>(w_.kv_cols());
  const int64_t hidden = w_.job.model.hidden;
  hidden_memory_ = w_.device.Allocate(static_cast<size_t>(n * hidden) * sizeof(float));
  hidden_ = Matrix(hidden_memory_->data(), gpu::DType::kF32, n, hidden);
  kv_memory_ = w_.device.Allocate(static_cast<size_t>(2 * n * cols) * sizeof(bf16));
  k_ = Matrix(kv_memory_->data(), gpu::DType::kBf16, n, cols);
  v_ = Matrix(static_cast<bf16*>(kv_memory_->data()) + n * cols, gpu::DType::kBf16, n, cols);
  if (w_.link && w_.job.lsh()) {
    const auto codes =
        static_cast<int64_t>(w_.job.wire_shape().l) * w_.transformer.attention_shape().kv_heads;
    const int64_t rows = std::min(n, kOffloadRows);
    codes_memory_ = w_.device.Allocate(static_cast<size_t>(rows * codes) * sizeof(uint16_t));
    codes_ = Matrix(codes_memory_->data(), gpu::DType::kU16, rows, codes);
  }
}

bool PrefillJob::Blocked() const { return w_.link && w_.link->pending_bytes() > kMaxPendingBytes; }

bool PrefillJob::Step() {
  if (Blocked()) return false;
  const auto n = static_cast<int64_t>(sequence_.prompt.size());
  const int64_t count = std::min<int64_t>(w_.job.config.engine().prefill_chunk(), n - next_);
  Chunk(next_, count);
  next_ += count;
  if (next_ < n) return false;
  FinishLayer();
  next_ = 0;
  if (++layer_ < w_.job.model.layers) return false;
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
  w_.transformer.BeforeAttention(layer_, a_, positions);
  w_.device.Convert(a_.k.Rows(0, count), k_.Rows(start, count));
  w_.device.Convert(a_.v.Rows(0, count), v_.Rows(start, count));
  // Of the last layer only the last position is read on.
  const bool last_layer = layer_ + 1 == w_.job.model.layers;
  if (last_layer && start + count < static_cast<int64_t>(sequence_.prompt.size())) return;
  w_.device.CausalAttention(w_.transformer.attention_shape(), a_.q.Rows(0, count), k_, v_, start,
                            w_.job.model.sliding_window, a_.attention.Rows(0, count));
  w_.transformer.AfterAttention(layer_, a_);
}

void PrefillJob::FinishLayer() {
  const auto n = static_cast<int64_t>(sequence_.prompt.size());
  const auto layer = static_cast<size_t>(layer_);
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
    w_.device.StoreKv(sequence_.pages[layer], slots, k_.Rows(begin, end - begin),
                      v_.Rows(begin, end - begin));
  }
  if (w_.kinds[layer] == Job::LayerKind::kResident) return;
  // What the first decode step needs on the hosts: one token more than the prompt offloads.
  const uint64_t tokens = w_.job.Offloaded(static_cast<uint64_t>(n) + 1);
  SendLayer(tokens);
}

void PrefillJob::SendLayer(uint64_t tokens) {
  const auto n = static_cast<uint64_t>(sequence_.prompt.size());
  const auto sinks = static_cast<int64_t>(w_.job.config.attention().sinks());
  const auto prompt = static_cast<int64_t>(w_.job.Offloaded(n));
  const bool codes =
      w_.kinds[static_cast<size_t>(layer_)] == Job::LayerKind::kSampled && w_.job.lsh();
  if (codes && sequence_.hosted.segments.empty()) return;
  gpu::Tensor mean;
  std::vector<float> mean_host(w_.kv_cols());
  if (codes) {
    mean = w_.Means(sequence_, layer_);
    if (prompt > 0) {
      w_.device.ColumnMean(k_.Rows(sinks, prompt), mean);
    } else {
      w_.device.CopyToDevice(mean.data, mean_host.data(), mean_host.size() * sizeof(float));
    }
    w_.device.CopyToHost(mean_host.data(), mean.data, mean_host.size() * sizeof(float));
    w_.device.Record()->Wait();
    w_.link->SendKeyMean(sequence_.hosted, layer_, mean_host.data());
  }
  std::vector<bf16> k, v;
  std::vector<uint16_t> code;
  for (int64_t done = 0; done < static_cast<int64_t>(tokens);) {
    const int64_t rows = std::min(kOffloadRows, static_cast<int64_t>(tokens) - done);
    const size_t size = static_cast<size_t>(rows) * w_.kv_cols();
    k.resize(size);
    v.resize(size);
    const gpu::Tensor k_rows = k_.Rows(sinks + done, rows);
    w_.device.CopyToHost(k.data(), k_rows.data, size * sizeof(bf16));
    w_.device.CopyToHost(v.data(), v_.Rows(sinks + done, rows).data, size * sizeof(bf16));
    if (codes) {
      code.resize(static_cast<size_t>(rows * codes_.cols));
      w_.device.HashCodes(k_rows, mean, codes_.Rows(0, rows));
      w_.device.CopyToHost(code.data(), codes_.data, code.size() * sizeof(uint16_t));
    }
    w_.device.Record()->Wait();
    w_.link->SendKv(sequence_.hosted, layer_, static_cast<uint64_t>(done),
                    static_cast<uint64_t>(rows), k.data(), v.data(), codes ? code.data() : nullptr);
    done += rows;
  }
}

}  // namespace passel::engine
