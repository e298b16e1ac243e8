#include "runtime/model/gguf_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "runtime/base/printable.h"
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
  static constexpr std::array kNames = {
      "attn_norm.weight",   "attn_q.weight",     "attn_k.weight",   "attn_v.weight",
      "attn_output.weight", "ffn_norm.weight",   "ffn_gate.weight", "ffn_up.weight",
      "ffn_down.weight",    "attn_q.bias",       "attn_k.bias",     "attn_v.bias",
      "attn_q_norm.weight", "attn_k_norm.weight"};
  const size_t kind = static_cast<size_t>(id.kind) - static_cast<size_t>(WeightKind::kAttnNorm);
  return fmt::format("blk.{}.{}", id.layer, kNames[kind]);
}

class GgufModel final : public MappedModel {
 public:
  explicit GgufModel(const std::string& path) : file_(OpenGgufParts(path)) {
    config_ = GgufConfig(file_);
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
  TokenizerData ReadTokenizer() const override {
    TokenizerData data = GgufTokenizer(file_);
    if (data.tokens.size() > static_cast<size_t>(config_.vocab)) {
      file_.Fail("tokenizer.ggml.tokens", fmt::format("has {} tokens; expected at most the {} rows "
                                                      "of the embedding",
                                                      data.tokens.size(), config_.vocab));
    }
    return data;
  }

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
    // Writers interleave the rows of llama's Q and K; other architectures' lie as in Hugging Face's
    // files.
    const bool rotated = config_.architecture == "llama" &&
                         (e.id.kind == WeightKind::kQ || e.id.kind == WeightKind::kK);
    SetView(e.id,
            {tensor.data, tensor.type, tensor.rows, tensor.cols, rotated ? config_.head_dim : 0});
  }

  void RefuseUnknown(const std::vector<ExpectedWeight>& expected) const {
    std::vector<std::string> names = {"rope_freqs.weight"};
    for (const ExpectedWeight& e : expected) names.push_back(TensorName(e.id));
    std::sort(names.begin(), names.end());
    for (const auto& [name, tensor] : file_.tensors()) {
      if (!std::binary_search(names.begin(), names.end(), name)) {
        file_.Fail(fmt::format("tensor '{}'", Printable(name)),
                   fmt::format("is not part of a dense {} model of this many layers; expected none "
                               "such",
                               config_.architecture));
      }
    }
  }

  GgufFile file_;
};

}  // namespace

// The files of a split model are NAME-00001-of-0000N.gguf.
GgufFile OpenGgufParts(const std::string& path, bool any_type) {
  GgufFile first(path, any_type);
  const int64_t count = first.IntOr("split.count", 1);
  if (count < 0 || count > 99999) {
    first.Fail("split.count", fmt::format("is {}; expected 1 to 99999", count));
  }
  if (count <= 1) return first;
  if (const int64_t number = first.Int("split.no"); number != 0) {
    first.Fail("split.no", fmt::format("is {}: this is not the first of the model's {} files; "
                                       "expected that one, -00001-of-{:05}.gguf",
                                       number, count, count));
  }
  const auto suffix = [&](int64_t i) { return fmt::format("-{:05}-of-{:05}.gguf", i + 1, count); };
  if (!path.ends_with(suffix(0))) {
    first.Fail("file name", fmt::format("is not what the first of {} files is called; expected it "
                                        "to end in {}",
                                        count, suffix(0)));
  }
  const std::string stem = path.substr(0, path.size() - suffix(0).size());
  for (int64_t i = 1; i < count; ++i) {
    GgufFile part(stem + suffix(i), any_type);
    if (part.Int("split.no") != i || part.Int("split.count") != count) {
      part.Fail("split.no, split.count",
                fmt::format("is {} of {}; expected {} of {}", part.Int("split.no"),
                            part.Int("split.count"), i, count));
    }
    first.Append(std::move(part));
  }
  const auto total = static_cast<int64_t>(first.tensors().size());
  if (const int64_t expected = first.IntOr("split.tensors.count", total); expected != total) {
    first.Fail("split.tensors.count",
               fmt::format("is {}; expected the {} tensors of all files", expected, total));
  }
  return first;
}

std::unique_ptr<ModelFile> OpenGgufModel(const std::string& path) {
  return std::make_unique<GgufModel>(path);
}

}  // namespace passel::model
