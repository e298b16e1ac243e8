#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "gpu/device.h"
#include "runtime/base/collectives.h"
#include "runtime/model/model_file.h"

namespace passel::model {

// What one tensor-parallel rank holds. KV heads are cut into `size` runs of near-equal length; with
// more ranks than KV heads, a KV head is held by several ranks, which then split its query heads.
struct TensorSlice {
  int32_t first_kv_head = 0, kv_heads = 0;
  int32_t first_head = 0, heads = 0;  // query heads, all of kv_heads' groups unless replicated
  int32_t first_ffn = 0, ffn = 0;
  int32_t first_vocab = 0, vocab = 0;
};
// Throws Error{kUsage} where the model cannot be cut into that many ranks.
TensorSlice SliceFor(const ModelConfig& config, int32_t rank, int32_t size);

// The activations of a micro-batch or a prefill chunk: up to `capacity` rows of device memory, of
// which `n` are in use. Every stage leaves its tensors with n rows.
struct Activations {
  int64_t n = 0;
  int64_t capacity = 0;
  int64_t logit_capacity = 0;  // rows of logits, 0: none
  gpu::Tensor hidden;          // [n, hidden] f32, the residual stream
  gpu::Tensor q, k, v;    // [n, heads·head_dim] f32, [n, kv_heads·head_dim] f32 ×2; views of qkv
  gpu::Tensor attention;  // [n, heads·head_dim], activation type: what AfterAttention reads
  gpu::Tensor qkv, normed, projected, gate_up, ffn;
  gpu::Tensor turns;   // [n, head_dim] f32: of the rows' positions, as Device::Rope reads them
  gpu::Tensor logits;  // [count, vocab] f32
  // With several ranks: this rank's [count, slice vocab], and those of all ranks one after another.
  gpu::Tensor own_logits, gathered_logits;
  std::vector<std::unique_ptr<gpu::Buffer>> memory;
  // Of Between, by layer and rows.
  std::map<std::pair<int32_t, int64_t>, std::unique_ptr<gpu::Recording>> recordings;

  // Sets n (≤ capacity) and the rows of all tensors but the logits'.
  void Resize(int64_t rows);
};

// So many layers are loaded, and so many bytes of weights as bf16: those of the embedding and the
// output come before the first layer.
using LoadProgress = std::function<void(int32_t layers, uint64_t bytes)>;

// A llama-family decoder on one device, as one tensor-parallel rank. Layers are two stages, before
// and after attention; whoever attends in between (window, resident KV, host ranks) is not its
// business. Neither stage blocks on anything but the device and the collectives.
class Transformer {
 public:
  // Loads this rank's slice of the weights. `progress`, where set, is called at
  // the beginning, after the embedding and output, and after each layer.
  // `device` and `collectives` must outlive this. Throws Error{kModel} for heads that the device
  // does not serve, Error{kMemory} where its memory does not suffice.
  Transformer(const ModelFile& file, gpu::Device& device, Collectives& collectives,
              const LoadProgress& progress);
  ~Transformer();

  const ModelConfig& config() const;
  const TensorSlice& slice() const;
  gpu::AttentionShape attention_shape() const;  // of the slice

  // `logit_rows`: how many rows Logits may be asked for at once; 0: all `rows`.
  std::unique_ptr<Activations> MakeActivations(int64_t rows, bool with_logits,
                                               int64_t logit_rows = 0) const;

  // hidden = embedding of ids; sets n.
  void Embed(Activations& a, std::span<const int32_t> ids) const;
  // Where the rows stand, for all layers from now on. positions: [n].
  void SetPositions(Activations& a, std::span<const int64_t> positions) const;
  // Norm, QKV (with bias or head norms where the architecture has them), RoPE: fills q, k, v of
  // rows [0, n).
  void BeforeAttention(int32_t layer, Activations& a) const;
  // O-projection of `attention`, residual, norm, MLP, residual.
  void AfterAttention(int32_t layer, Activations& a) const;
  // What of decode lies between the attention of layer − 1 (none: layer = 0) and that of `layer`
  // (none: layer = layers): AfterAttention and BeforeAttention, which a device may issue as one.
  // The activations' tensors are those they were made with.
  void Between(int32_t layer, Activations& a) const;
  // Final norm and logits of rows [first, first + count): writes logits rows [0, count), all of the
  // vocabulary, on every rank, f32.
  void Logits(Activations& a, int64_t first, int64_t count) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace passel::model
