#include "runtime/model/gguf_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "runtime/model/mapped_model.h"

namespace passel::model {
namespace {

std::string TensorName(WeightId id) {
  switch (id.kind) {
    case WeightKind::kTokenEmbedding:
      return "token_embd.weight";
    case WeightKind::kOutputNorm:
      return "output_norm.weight";
    case WeightKind::kOutput:
      return "output.weight";
    default:
      break;
  }
  static constexpr std::array kNames = {"attn_norm", "attn_q",   "attn_k", "attn_v",  "attn_output",
                                        "ffn_norm",  "ffn_gate", "ffn_up", "ffn_down"};
  const size_t kind = static_cast<size_t>(id.kind) - static_cast<size_t>(WeightKind::kAttnNorm);
  return fmt::format("blk.{}.{}.weight", id.layer, kNames[kind]);
}

class GgufModel final : public MappedModel {
 public:
  explicit GgufModel(const std::string& path) : file_(path) {
    config_ = GgufConfig(file_);
    tokenizer_ = GgufTokenizer(file_);
    if (tokenizer_.tokens.size() > static_cast<size_t>(config_.vocab)) {
      file_.Fail("tokenizer.ggml.tokens", fmt::format("has {} tokens; expected at most the {} rows "
                                                      "of the embedding",
                                                      tokenizer_.tokens.size(), config_.vocab));
    }
    const std::vector<ExpectedWeight> expected = ExpectedWeights(config_);
    for (const ExpectedWeight& e : expected) Bind(e);
    // A tensor that goes unread would silently change the model (biases, adapters, experts).
    if (const size_t known = expected.size() + (config_.rope_factors.empty() ? 0 : 1);
        file_.tensors().size() != known) {
      RefuseUnknown(expected);
    }
    weight_bytes_ = file_.tensor_bytes();
  }

 private:
  void Bind(const ExpectedWeight& e) {
    const std::string name = TensorName(e.id);
    const auto it = file_.tensors().find(name);
    const std::string field = fmt::format("tensor '{}'", name);
    if (it == file_.tensors().end()) {
      file_.Fail(field, fmt::format("is missing; expected [{}, {}]", e.rows, e.cols));
    }
    const GgufTensor& tensor = it->second;
    if (tensor.rows != e.rows || tensor.cols != e.cols) {
      file_.Fail(field, fmt::format("is [{}, {}]; expected [{}, {}]", tensor.rows, tensor.cols,
                                    e.rows, e.cols));
    }
    const bool rotated = e.id.kind == WeightKind::kQ || e.id.kind == WeightKind::kK;
    SetView(e.id,
            {tensor.data, tensor.type, tensor.rows, tensor.cols, rotated ? config_.head_dim : 0});
  }

  void RefuseUnknown(const std::vector<ExpectedWeight>& expected) const {
    std::vector<std::string> names = {"rope_freqs.weight"};
    for (const ExpectedWeight& e : expected) names.push_back(TensorName(e.id));
    std::sort(names.begin(), names.end());
    for (const auto& [name, tensor] : file_.tensors()) {
      if (!std::binary_search(names.begin(), names.end(), name)) {
        file_.Fail(fmt::format("tensor '{}'", name),
                   "is not part of a dense llama model of this many layers; expected none such");
      }
    }
  }

  GgufFile file_;
};

}  // namespace

std::unique_ptr<ModelFile> OpenGgufModel(const std::string& path) {
  return std::make_unique<GgufModel>(path);
}

}  // namespace passel::model
