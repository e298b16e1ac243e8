#include "runtime/model/outline.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <memory>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/model/gguf_model.h"
#include "runtime/model/hf_model.h"
#include "runtime/model/json_file.h"
#include "runtime/model/mapped_model.h"

namespace passel::model {
namespace {

// The message of the Error that `f` throws; "".
template <typename F>
std::string ErrorOf(const F& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

int32_t Narrow(int64_t value) {
  return value < 0 || value > std::numeric_limits<int32_t>::max() ? 0 : static_cast<int32_t>(value);
}

// Fills `config` by int_of(name of a size): 0 where there is none.
template <typename IntOf>
void ReadSizes(const IntOf& int_of, std::initializer_list<const char*> names, ModelConfig& config) {
  const auto* name = names.begin();
  for (int32_t* size : {&config.layers, &config.hidden, &config.ffn, &config.heads,
                        &config.kv_heads, &config.head_dim, &config.vocab}) {
    *size = Narrow(int_of(*name++));
  }
  config.context_length = std::max<int64_t>(0, int_of(*name++));
  config.sliding_window = std::max<int64_t>(0, int_of(*name++));
  if (config.kv_heads == 0) config.kv_heads = config.heads;
  if (config.head_dim == 0 && config.heads > 0) config.head_dim = config.hidden / config.heads;
}

template <typename Architectures>
std::string ArchitectureError(const Architectures& served, const std::string& architecture) {
  if (std::ranges::find(served, architecture) != served.end()) return "";
  return fmt::format("\"{}\"; expected {}", Printable(architecture), fmt::join(served, ", "));
}

void ReadGguf(const std::string& path, Outline& out) {
  const GgufFile file = OpenGgufParts(path, /*any_type=*/true);
  const auto string_or = [&](const std::string& key, const std::string& otherwise) {
    std::string value = otherwise;
    ErrorOf([&] { value = file.StringOr(key, otherwise); });
    return value;
  };
  ModelConfig& c = out.config;
  c.architecture = string_or("general.architecture", "");
  const std::string prefix = c.architecture + ".";
  const auto int_of = [&](const char* name) {
    int64_t value = 0;
    ErrorOf([&] { value = file.Int(prefix + name); });
    return value;
  };
  ReadSizes(int_of,
            {"block_count", "embedding_length", "feed_forward_length", "attention.head_count",
             "attention.head_count_kv", "attention.key_length", "vocab_size", "context_length",
             "attention.sliding_window"},
            c);
  ErrorOf([&] { c.rope_theta = file.FloatOr(prefix + "rope.freq_base", c.rope_theta); });
  // As GgufConfig has it.
  const std::string scaling = string_or(prefix + "rope.scaling.type", "linear");
  double factor = 0;
  for (const char* key : {"rope.scale_linear", "rope.scaling.factor"}) {
    ErrorOf([&] { factor = file.FloatOr(prefix + key, factor); });
  }
  if (scaling != "none" && (scaling != "linear" || factor != 0)) {
    c.rope_scaling = RopeScaling{.type = scaling, .factor = factor};
  }
  for (const auto& [name, tensor] : file.tensors()) {
    const auto number = static_cast<uint32_t>(tensor.type);
    const ElementLayout* layout = FindKnownLayout(number);
    Outline::Type& type =
        out.types[layout != nullptr ? std::string(layout->name) : fmt::format("type {}", number)];
    ++type.tensors;
    type.elements += static_cast<uint64_t>(tensor.rows * tensor.cols);
    type.served = FindLayout(number) != nullptr;
    if (name == "token_embd.weight") c.vocab = Narrow(tensor.rows);
  }
  c.tied_embeddings = !file.tensors().contains("output.weight");
  out.weight_bytes = file.tensor_bytes();
  out.architecture_error = ArchitectureError(kGgufArchitectures, c.architecture);
  out.tokenizer_error = ErrorOf([&] { out.tokenizer = GgufTokenizer(file); });
}

void ReadHf(const std::string& directory, Outline& out) {
  const std::string path = directory + "/config.json";
  const nlohmann::json json = ParseJsonFile(path, 1 << 20);
  const JsonObject whole(json, path);
  ModelConfig& c = out.config;
  ErrorOf([&] { c.architecture = whole.StringOr("model_type", ""); });
  // Models of several kinds of input have the text's own config in it.
  const nlohmann::json* text = whole.Find("text_config");
  const JsonObject root(text != nullptr && text->is_object() ? *text : json, path);
  const auto int_of = [&](const char* name) {
    int64_t value = 0;
    ErrorOf([&] { value = root.Int(name); });
    return value;
  };
  ReadSizes(int_of,
            {"num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
             "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
             "sliding_window"},
            c);
  ErrorOf([&] { c.tied_embeddings = root.BoolOr("tie_word_embeddings", false); });
  ErrorOf([&] { ReadHfRope(root, path, c); });
  ErrorOf([&] {
    for (const SafetensorsFile& shard : OpenShards(directory)) {
      out.weight_bytes += shard.tensor_bytes();
      for (const auto& [name, tensor] : shard.tensors()) {
        Outline::Type& type = out.types[tensor.dtype];
        ++type.tensors;
        type.elements += static_cast<uint64_t>(tensor.rows * tensor.cols);
        type.served = tensor.type.has_value();
      }
    }
  });
  out.architecture_error = ArchitectureError(kHfArchitectures, c.architecture);
  out.tokenizer_error =
      ErrorOf([&] { out.tokenizer = HfTokenizer(directory, c.vocab > 0 ? c.vocab : 1 << 26); });
}

}  // namespace

Outline ReadOutline(const std::string& path) {
  Outline out;
  std::unique_ptr<ModelFile> file;
  out.error = ErrorOf([&] { file = ModelFile::Open(path); });
  std::error_code ignored;
  const auto read = std::filesystem::is_directory(path, ignored) ? ReadHf : ReadGguf;
  if (!ErrorOf([&] { read(path, out); }).empty()) throw Error(ErrorClass::kModel, out.error);
  out.rope_error = ErrorOf([&] { ValidateRopeScaling(out.config, path); });
  if (file != nullptr) out.config = file->config();
  return out;
}

}  // namespace passel::model
