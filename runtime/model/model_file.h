#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/base/bf16.h"
#include "runtime/tokenizer/tokenizer.h"

namespace passel::model {

struct RopeScaling {  // "llama3" or "linear"
  std::string type;
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;
  int64_t original_context = 8192;
};

// Architecture of a decoder-only transformer of the llama family.
struct ModelConfig {
  std::string architecture;  // "llama", "mistral", "qwen2", "qwen3"
  int32_t layers = 0;
  int32_t hidden = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t ffn = 0;
  int32_t vocab = 0;
  float norm_eps = 1e-5f;
  double rope_theta = 10000;
  std::optional<RopeScaling> rope_scaling;
  // GGUF's form of llama3 scaling: head_dim/2 divisors of the inverse frequencies; empty: none.
  std::vector<float> rope_factors;
  bool tied_embeddings = false;
  int64_t context_length = 0;
  int64_t sliding_window = 0;  // 0: none
  bool qkv_bias = false;       // q, k, v += a bias (qwen2)
  bool qk_norm = false;        // each head of q and k is normalised before RoPE (qwen3)
};

// head_dim/2 inverse frequencies, scaling applied.
std::vector<float> RopeInverseFrequencies(const ModelConfig& config);

enum class WeightKind {
  kTokenEmbedding,  // [vocab, hidden]
  kOutputNorm,      // [1, hidden]
  kOutput,          // [vocab, hidden]; the embedding where tied
  kAttnNorm,        // [1, hidden]
  kQ,               // [heads·head_dim, hidden]
  kK,               // [kv_heads·head_dim, hidden]
  kV,               // [kv_heads·head_dim, hidden]
  kO,               // [hidden, heads·head_dim]
  kFfnNorm,         // [1, hidden]
  kGate,            // [ffn, hidden]
  kUp,              // [ffn, hidden]
  kDown,            // [hidden, ffn]
  kQBias,           // [1, heads·head_dim], with qkv_bias
  kKBias,           // [1, kv_heads·head_dim]
  kVBias,           // [1, kv_heads·head_dim]
  kQNorm,           // [1, head_dim], with qk_norm
  kKNorm,           // [1, head_dim]
};
struct WeightId {
  WeightKind kind;
  int32_t layer = 0;  // where the kind has one
};

// A model on disk, memory-mapped. Everything in it was checked against the file's size on opening;
// Q and K rows come in Hugging Face's order (rotate-half RoPE), whatever the file has. Thread-safe.
class ModelFile {
 public:
  // `path`: a .gguf file or a Hugging Face directory. Throws Error{kModel}.
  static std::unique_ptr<ModelFile> Open(const std::string& path);
  virtual ~ModelFile() = default;

  virtual const ModelConfig& config() const = 0;
  // Rows [row, row + rows), columns [col, col + cols) of a weight, converted; out: [rows, cols].
  virtual void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
                    bf16* out) const = 0;
  virtual void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
                    float* out) const = 0;
  // Says that a weight has been read: what of it lies in this process's memory may go. It can be
  // read again, at the cost of the first time.
  virtual void Release(WeightId) const {}
  // Read when it is first asked for. Throws Error{kModel} where it is malformed or not served.
  virtual const TokenizerData& tokenizer() const = 0;
  // Bytes of all weights in the file.
  virtual uint64_t weight_bytes() const = 0;
};

}  // namespace passel::model
