// Writes one well-formed input or two for each fuzz target into DIRECTORY/<target>.

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "tests/model/tiny_model.h"

namespace {

using nlohmann::json;
using passel::TinyModel;

constexpr const char* kChatMl =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}";

// Files as one input: see FuzzParts.
std::string Parts(const std::vector<std::string>& parts) {
  passel::Bytes bytes;
  for (const std::string& part : parts) {
    bytes.Put(static_cast<uint32_t>(part.size())).Raw(part);
  }
  return bytes.str();
}

// Half `number` of a GGUF model: the first has the metadata and every other tensor.
std::string Part(uint32_t number) {
  const passel::GgufWriter whole = TinyModel::Gguf(false);
  passel::GgufWriter part;
  if (number == 0) part.values = whole.values;
  part.Uint32("split.no", number);
  part.Uint32("split.count", 2);
  part.Uint32("split.tensors.count", static_cast<uint32_t>(whole.tensors.size()));
  for (size_t i = number; i < whole.tensors.size(); i += 2) {
    std::vector<float> zeros(whole.tensors[i].data.size() / sizeof(float));
    part.F32(whole.tensors[i].name, whole.tensors[i].dims, zeros);
  }
  return part.Encode();
}

// The shard with the embedding, or the one with all else, and their index.
std::string Shard(bool embedding) {
  json header = json::object();
  uint64_t at = 0;
  for (const TinyModel::Weight& w : TinyModel::Weights()) {
    if ((w.hf == "model.embed_tokens.weight") != embedding) continue;
    const uint64_t end = at + 2 * w.rows * w.cols;
    const auto shape = w.rows == 1 ? json{w.cols} : json{w.rows, w.cols};
    header[w.hf] = {{"dtype", "F16"}, {"shape", shape}, {"data_offsets", {at, end}}};
    at = end;
  }
  return passel::Bytes().Text(header.dump()).Raw(std::string(at, '\0')).str();
}
std::string Index() {
  return json{{"weight_map",
               {{"model.embed_tokens.weight", "model.safetensors"},
                {"model.norm.weight", "b.safetensors"}}}}
      .dump();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fputs("usage: make_fuzz_corpus DIRECTORY\n", stderr);
    return 2;
  }
  const std::filesystem::path root = argv[1];
  const auto write = [&](const char* target, const char* name, const std::string& bytes) {
    std::filesystem::create_directories(root / target);
    std::ofstream(root / target / name, std::ios::binary) << bytes;
  };
  write("gguf", "byte_level", TinyModel::Gguf(false).Encode());
  write("gguf", "sentence_piece", TinyModel::Gguf(true).Encode());
  for (const char* architecture : {"qwen2", "qwen3"}) {
    write("gguf", architecture, TinyModel::Gguf(false, architecture).Encode());
    write("config_json", architecture, TinyModel::QwenConfig(architecture).dump());
  }
  const std::string weights = passel::Bytes().Text(TinyModel::SafetensorsHeader().dump()).str() +
                              TinyModel::SafetensorsData();
  write("safetensors", "model", weights);
  write("config_json", "config", TinyModel::Config().dump());
  write("tokenizer_json", "byte_level", TinyModel::Tokenizer().dump());
  write("tokenizer_json", "sentence_piece", TinyModel::SentencePieceTokenizer().dump());
  write("split_gguf", "halves", Parts({Part(0), Part(1)}));
  const std::string config = TinyModel::Config().dump();
  const nlohmann::json tokenizer_config = {{"bos_token", {{"content", "<s>"}}},
                                           {"eos_token", "</s>"},
                                           {"add_bos_token", true},
                                           {"chat_template", kChatMl}};
  const std::string generation = nlohmann::json{{"eos_token_id", {2, 3}}}.dump();
  write("hf_model", "one_file",
        Parts({config, "", weights, "", TinyModel::Tokenizer().dump(), tokenizer_config.dump(), "",
               generation, ""}));
  write("hf_model", "two_files",
        Parts({config, Index(), Shard(true), Shard(false),
               TinyModel::SentencePieceTokenizer().dump(), "", kChatMl, "",
               nlohmann::json{{"bos_token", {{"content", "<s>"}}}, {"eos_token", "</s>"}}.dump()}));
  return 0;
}
