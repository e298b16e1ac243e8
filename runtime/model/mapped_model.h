#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/model/element_type.h"
#include "runtime/model/model_file.h"

namespace passel::model {

// A weight as it lies in a mapped file: [rows, cols] row-major, rows of whole blocks.
struct WeightView {
  const uint8_t* data = nullptr;
  ElementType type = ElementType::kF32;
  int64_t rows = 0, cols = 0;
  // Not 0: within each head of that many rows, the file interleaves the two halves that rotate-half
  // RoPE pairs (file row 2i + p is Hugging Face's row p·head_dim/2 + i).
  int32_t interleaved_head_dim = 0;
};

// The name and shape that a config calls for.
struct ExpectedWeight {
  WeightId id;
  int64_t rows, cols;
};
// Every weight of the architecture; kOutput only where not tied.
std::vector<ExpectedWeight> ExpectedWeights(const ModelConfig& config);

// Refuses what the transformer cannot serve: sizes out of range, heads that do not divide. Called
// before anything is derived from a config. Throws Error{kModel}: "where: field: …".
void ValidateConfig(const ModelConfig& config, const std::string& where);
// The part of it that is about RoPE scaling.
void ValidateRopeScaling(const ModelConfig& config, const std::string& where);

// Name of a weight's kind and layer, for messages: "layer 3 q".
std::string WeightName(WeightId id);

// A ModelFile over views of mapped memory, which the derived class keeps alive.
class MappedModel : public ModelFile {
 public:
  const ModelConfig& config() const override { return config_; }
  void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            bf16* out) const override;
  void Read(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols,
            float* out) const override;
  void Release(WeightId id) const override;
  const TokenizerData& tokenizer() const override;
  uint64_t weight_bytes() const override { return weight_bytes_; }

 protected:
  void SetView(WeightId id, const WeightView& view);
  // Called when the tokenizer is first asked for. Throws Error{kModel}.
  virtual TokenizerData ReadTokenizer() const = 0;

  ModelConfig config_;
  uint64_t weight_bytes_ = 0;

 private:
  size_t IndexOf(WeightId id) const;
  const WeightView& ViewOf(WeightId id) const;
  template <typename Out>
  void ReadAs(WeightId id, int64_t row, int64_t rows, int64_t col, int64_t cols, Out* out) const;

  std::vector<WeightView> views_;
  mutable std::mutex mutex_;  // guards tokenizer_
  mutable std::optional<TokenizerData> tokenizer_;
};

}  // namespace passel::model
