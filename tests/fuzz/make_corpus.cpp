// Writes one well-formed input or two for each fuzz target into DIRECTORY/<target>.

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "tests/model/tiny_model.h"

int main(int argc, char** argv) {
  using passel::TinyModel;
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
  write("safetensors", "model",
        passel::Bytes().Text(TinyModel::SafetensorsHeader().dump()).str() +
            TinyModel::SafetensorsData());
  write("config_json", "config", TinyModel::Config().dump());
  write("tokenizer_json", "byte_level", TinyModel::Tokenizer().dump());
  write("tokenizer_json", "sentence_piece", TinyModel::SentencePieceTokenizer().dump());
  return 0;
}
