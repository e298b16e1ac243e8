#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

#include "gpu/device.h"
#include "runtime/model/transformer.h"

namespace passel::model {

// Drives a Transformer the plain way: all KV on the device (of a model with a sliding window, a
// ring of that many slots), exact attention. One rank's part; every rank calls the same.
class ReferenceLoop {
 public:
  // Up to `sequences` sequences of up to `max_tokens` tokens.
  ReferenceLoop(gpu::Device& device, const Transformer& transformer, int64_t sequences,
                int64_t max_tokens)
      : device_(device),
        transformer_(transformer),
        shape_(transformer.attention_shape()),
        prefill_(transformer.MakeActivations(kChunk, true, 1)),
        decode_(transformer.MakeActivations(sequences, true)) {
    const auto pages_of_layer =
        static_cast<int32_t>((max_tokens + gpu::kKvPageTokens - 1) / gpu::kKvPageTokens);
    const int32_t layers = transformer.config().layers;
    device.CreateKvPool(shape_, pages_of_layer * layers * static_cast<int32_t>(sequences));
    int32_t next = 0;
    pages_.resize(static_cast<size_t>(sequences));
    for (auto& of_sequence : pages_) {
      of_sequence.resize(static_cast<size_t>(layers));
      for (auto& pages : of_sequence) {
        pages.resize(static_cast<size_t>(pages_of_layer));
        std::iota(pages.begin(), pages.end(), next);
        next += pages_of_layer;
      }
    }
    lengths_.assign(static_cast<size_t>(sequences), 0);
    const int64_t kv_cols = int64_t{shape_.kv_heads} * shape_.head_dim;
    for (int i = 0; i < 2 * layers; ++i) {
      kv_.push_back(NewTensor(gpu::DType::kBf16, max_tokens, kv_cols));
    }
    partials_ = {NewTensor(gpu::DType::kF32, sequences, shape_.heads),
                 NewTensor(gpu::DType::kF32, sequences, shape_.heads),
                 NewTensor(gpu::DType::kF32, sequences, int64_t{shape_.heads} * shape_.head_dim)};
  }

  // Causal attention over the prompt in chunks. Returns the logits of its last position.
  std::vector<float> Prefill(size_t sequence, std::span<const int32_t> ids) {
    Activations& a = *prefill_;
    const auto total = static_cast<int64_t>(ids.size());
    for (int64_t start = 0; start < total; start += kChunk) {
      const int64_t n = std::min(kChunk, total - start);
      const auto positions = Iota(start, n);
      transformer_.Embed(a, ids.subspan(static_cast<size_t>(start), static_cast<size_t>(n)));
      transformer_.SetPositions(a, positions);
      for (int32_t l = 0; l < transformer_.config().layers; ++l) {
        transformer_.BeforeAttention(l, a);
        const gpu::Tensor k = kv_[static_cast<size_t>(2 * l)];
        const gpu::Tensor v = kv_[static_cast<size_t>(2 * l + 1)];
        device_.Convert(a.k, k.Rows(start, n));
        device_.Convert(a.v, v.Rows(start, n));
        const int64_t kept = std::min(n, Window());
        device_.StoreKv(pages_[sequence][static_cast<size_t>(l)], Slots(start + n - kept, kept),
                        a.k.Rows(n - kept, kept), a.v.Rows(n - kept, kept));
        device_.CausalAttention(shape_, a.q, k, v, start, transformer_.config().sliding_window,
                                a.attention);
        transformer_.AfterAttention(l, a);
      }
    }
    lengths_[sequence] = total;
    transformer_.Logits(a, a.n - 1, 1);
    return Download(a.logits);
  }

  // One token of each sequence through the KV pool. Returns [sequences.size(), vocab] logits.
  std::vector<float> Decode(std::span<const size_t> sequences, std::span<const int32_t> ids) {
    Activations& a = *decode_;
    transformer_.Embed(a, ids);
    std::vector<int64_t> positions;
    for (const size_t s : sequences) positions.push_back(lengths_[s]);
    const gpu::Partials partials{partials_.max.Rows(0, a.n), partials_.den.Rows(0, a.n),
                                 partials_.num.Rows(0, a.n)};
    transformer_.SetPositions(a, positions);
    transformer_.Between(0, a);
    for (int32_t l = 0; l < transformer_.config().layers; ++l) {
      std::vector<gpu::KvView> views;
      for (size_t i = 0; i < sequences.size(); ++i) {
        const auto& pages = pages_[sequences[i]][static_cast<size_t>(l)];
        const auto row = static_cast<int64_t>(i);
        device_.StoreKv(pages, Slots(positions[i], 1), a.k.Rows(row, 1), a.v.Rows(row, 1));
        views.push_back({pages, std::min(positions[i] + 1, Window())});
      }
      device_.DecodeAttention(a.q, views, partials);
      device_.NormalizePartials(partials, a.attention);
      transformer_.Between(l + 1, a);
    }
    for (const size_t s : sequences) ++lengths_[s];
    transformer_.Logits(a, 0, a.n);
    return Download(a.logits);
  }

  std::vector<float> DecodeOne(size_t sequence, int32_t id) {
    return Decode(std::span(&sequence, 1), std::span(&id, 1));
  }

 private:
  static constexpr int64_t kChunk = 256;

  int64_t Window() const {
    const int64_t window = transformer_.config().sliding_window;
    return window > 0 ? window : std::numeric_limits<int64_t>::max();
  }
  std::vector<int64_t> Slots(int64_t first, int64_t n) const {
    std::vector<int64_t> slots = Iota(first, n);
    for (int64_t& slot : slots) slot %= Window();
    return slots;
  }

  static std::vector<int64_t> Iota(int64_t first, int64_t n) {
    std::vector<int64_t> values(static_cast<size_t>(n));
    std::iota(values.begin(), values.end(), first);
    return values;
  }

  gpu::Tensor NewTensor(gpu::DType type, int64_t rows, int64_t cols) {
    memory_.push_back(device_.Allocate(static_cast<size_t>(rows * cols) * gpu::SizeOf(type)));
    return {memory_.back()->data(), type, rows, cols, cols};
  }

  std::vector<float> Download(const gpu::Tensor& t) {
    std::vector<float> host(static_cast<size_t>(t.rows * t.cols));
    device_.CopyToHost(host.data(), t.data, host.size() * sizeof(float));
    device_.Record()->Wait();
    return host;
  }

  gpu::Device& device_;
  const Transformer& transformer_;
  gpu::AttentionShape shape_;
  std::unique_ptr<Activations> prefill_, decode_;
  std::vector<std::vector<std::vector<int32_t>>> pages_;  // [sequence][layer]
  std::vector<int64_t> lengths_;
  std::vector<gpu::Tensor> kv_;  // K and V of the prompt at hand, by layer
  gpu::Partials partials_;
  std::vector<std::unique_ptr<gpu::Buffer>> memory_;
};

}  // namespace passel::model
