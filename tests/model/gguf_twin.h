#pragma once

#include <string>
#include <vector>

#include "runtime/model/mapped_model.h"
#include "tests/model/gguf_writer.h"

namespace passel::model {

// A qwen model as GGUF, weights in float32, named as that format's writers do. With a tokenizer of
// one token.
inline GgufWriter GgufTwin(const ModelFile& file) {
  const ModelConfig& c = file.config();
  const std::string prefix = c.architecture + ".";
  GgufWriter w;
  w.String("general.architecture", c.architecture);
  const auto number = [&](const char* key, int64_t value) {
    w.Uint32(prefix + key, static_cast<uint32_t>(value));
  };
  number("block_count", c.layers);
  number("embedding_length", c.hidden);
  number("attention.head_count", c.heads);
  number("attention.head_count_kv", c.kv_heads);
  number("attention.key_length", c.head_dim);
  number("attention.value_length", c.head_dim);
  number("feed_forward_length", c.ffn);
  number("context_length", c.context_length);
  w.Float(prefix + "attention.layer_norm_rms_epsilon", c.norm_eps);
  w.Float(prefix + "rope.freq_base", static_cast<float>(c.rope_theta));
  w.String("tokenizer.ggml.model", "gpt2");
  w.String("tokenizer.ggml.pre", "qwen2");
  w.Strings("tokenizer.ggml.tokens", {"a"});
  w.Strings("tokenizer.ggml.merges", {});
  const auto name = [](WeightId id) -> std::string {
    const std::string block = "blk." + std::to_string(id.layer) + ".";
    switch (id.kind) {
      case WeightKind::kTokenEmbedding:
        return "token_embd.weight";
      case WeightKind::kOutputNorm:
        return "output_norm.weight";
      case WeightKind::kOutput:
        return "output.weight";
      case WeightKind::kAttnNorm:
        return block + "attn_norm.weight";
      case WeightKind::kQ:
        return block + "attn_q.weight";
      case WeightKind::kK:
        return block + "attn_k.weight";
      case WeightKind::kV:
        return block + "attn_v.weight";
      case WeightKind::kO:
        return block + "attn_output.weight";
      case WeightKind::kFfnNorm:
        return block + "ffn_norm.weight";
      case WeightKind::kGate:
        return block + "ffn_gate.weight";
      case WeightKind::kUp:
        return block + "ffn_up.weight";
      case WeightKind::kDown:
        return block + "ffn_down.weight";
      case WeightKind::kQBias:
        return block + "attn_q.bias";
      case WeightKind::kKBias:
        return block + "attn_k.bias";
      case WeightKind::kVBias:
        return block + "attn_v.bias";
      case WeightKind::kQNorm:
        return block + "attn_q_norm.weight";
      case WeightKind::kKNorm:
        return block + "attn_k_norm.weight";
    }
    return "";
  };
  for (const ExpectedWeight& e : ExpectedWeights(c)) {
    std::vector<float> values(static_cast<size_t>(e.rows * e.cols));
    file.Read(e.id, 0, e.rows, 0, e.cols, values.data());
    std::vector<uint64_t> dims = {static_cast<uint64_t>(e.cols)};
    if (e.rows > 1) dims.push_back(static_cast<uint64_t>(e.rows));
    w.F32(name(e.id), dims, values);
  }
  return w;
}

}  // namespace passel::model
