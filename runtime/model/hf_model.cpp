#include "runtime/model/hf_model.h"

#include <fmt/format.h>

#include <array>
#include <filesystem>
#include <set>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/model/mapped_model.h"

namespace passel::model {
namespace {

std::string TensorName(WeightId id) {
  switch (id.kind) {
    case WeightKind::kTokenEmbedding:
      return "model.embed_tokens.weight";
    case WeightKind::kOutputNorm:
      return "model.norm.weight";
    case WeightKind::kOutput:
      return "lm_head.weight";
    default:
      break;
  }
  static constexpr std::array kNames = {
      "input_layernorm.weight",  "self_attn.q_proj.weight", "self_attn.k_proj.weight",
      "self_attn.v_proj.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight",
      "mlp.gate_proj.weight",    "mlp.up_proj.weight",      "mlp.down_proj.weight",
      "self_attn.q_proj.bias",   "self_attn.k_proj.bias",   "self_attn.v_proj.bias",
      "self_attn.q_norm.weight", "self_attn.k_norm.weight"};
  const size_t kind = static_cast<size_t>(id.kind) - static_cast<size_t>(WeightKind::kAttnNorm);
  return fmt::format("model.layers.{}.{}", id.layer, kNames[kind]);
}

// The files that hold weights: one, or those that the index names.
std::set<std::string> ShardNames(const std::string& directory) {
  const std::string index = directory + "/model.safetensors.index.json";
  std::error_code error;
  if (!std::filesystem::exists(index, error)) return {"model.safetensors"};
  const nlohmann::json json = ParseJsonFile(index, 16 << 20);
  const JsonObject root(json, index);
  const nlohmann::json* map = root.Find("weight_map");
  if (map == nullptr || !map->is_object() || map->empty()) {
    root.Fail("weight_map", "expected an object of tensor and file names");
  }
  std::set<std::string> names;
  for (const auto& [tensor, file] : map->items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    // A plain name: the index must not lead out of the directory.
    if (name.empty() || std::filesystem::path(name).filename() != name || name == "..") {
      root.Fail("weight_map", fmt::format("\"{}\" is in \"{}\"; expected the name of a file beside "
                                          "it",
                                          Printable(tensor), Printable(name)));
    }
    names.insert(name);
  }
  return names;
}

class HfModel final : public MappedModel {
 public:
  explicit HfModel(const std::string& directory) : directory_(directory) {
    config_ = HfConfig(directory);
    shards_ = OpenShards(directory);
    for (size_t i = 0; i < shards_.size(); ++i) {
      weight_bytes_ += shards_[i].tensor_bytes();
      for (const auto& [tensor, view] : shards_[i].tensors()) {
        if (!tensors_.emplace(tensor, Place{&view, i}).second) {
          Fail(tensor, "is in two files; expected it once");
        }
      }
    }
    std::set<std::string> known;
    for (const ExpectedWeight& e : ExpectedWeights(config_)) known.insert(Bind(e));
    if (config_.tied_embeddings) known.insert("lm_head.weight");  // a copy that some files keep
    for (const auto& [name, place] : tensors_) {
      // Rotary frequencies are derived from the config; old files store them.
      if (!known.contains(name) && !name.ends_with(".rotary_emb.inv_freq")) {
        Fail(name, fmt::format("is not part of a dense {} model of this many layers; expected "
                               "none such",
                               config_.architecture));
      }
    }
  }

 private:
  TokenizerData ReadTokenizer() const override { return HfTokenizer(directory_, config_.vocab); }

  struct Place {
    const Safetensor* tensor;
    size_t shard;
  };

  [[noreturn]] void Fail(const std::string& tensor, const std::string& what) const {
    const auto it = tensors_.find(tensor);
    const std::string& where = it == tensors_.end() ? directory_ : shards_[it->second.shard].path();
    throw Error(ErrorClass::kModel,
                fmt::format("{}: tensor '{}': {}", where, Printable(tensor), what));
  }

  std::string Bind(const ExpectedWeight& e) {
    std::string name = TensorName(e.id);
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) {
      Fail(name, fmt::format("is missing; expected [{}, {}]", e.rows, e.cols));
    }
    const Safetensor& tensor = *it->second.tensor;
    if (!tensor.type) {
      Fail(name, fmt::format("has dtype {}; expected F32, F16 or BF16", tensor.dtype));
    }
    if (tensor.rows != e.rows || tensor.cols != e.cols) {
      Fail(name,
           fmt::format("is [{}, {}]; expected [{}, {}]", tensor.rows, tensor.cols, e.rows, e.cols));
    }
    SetView(e.id, {tensor.data, *tensor.type, tensor.rows, tensor.cols, 0});
    return name;
  }

  std::string directory_;
  std::vector<SafetensorsFile> shards_;
  std::map<std::string, Place> tensors_;
};

}  // namespace

std::vector<SafetensorsFile> OpenShards(const std::string& directory) {
  std::vector<SafetensorsFile> shards;
  for (const std::string& name : ShardNames(directory)) shards.emplace_back(directory + "/" + name);
  return shards;
}

std::unique_ptr<ModelFile> OpenHfModel(const std::string& directory) {
  return std::make_unique<HfModel>(directory);
}

}  // namespace passel::model
