// A Hugging Face directory: shards and their index, configs, tokenizer and chat template.

#include <vector>

#include "runtime/model/model_file.h"
#include "tests/fuzz/fuzz_file.h"
#include "tests/model/gguf_writer.h"

namespace passel {
namespace {

void UseTokenizer(const TokenizerData& data, const std::string& text) {
  const auto tokenizer = Tokenizer::Make(data);
  tokenizer->Encode(text, true);
  try {
    tokenizer->EncodeMessages(std::vector<ChatMessage>{{"system", "s"}, {"user", text}});
  } catch (const Error& e) {
    if (e.error_class() != ErrorClass::kUsage) throw;
  }
}

}  // namespace
}  // namespace passel

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace passel;
  static const TempPath path;
  static const std::vector<std::string> names = {"config.json",
                                                 "model.safetensors.index.json",
                                                 "model.safetensors",
                                                 "b.safetensors",
                                                 "tokenizer.json",
                                                 "tokenizer_config.json",
                                                 "chat_template.jinja",
                                                 "generation_config.json",
                                                 "special_tokens_map.json"};
  const FuzzDirectory directory(path.str(), names, FuzzParts(data, size, names.size()));
  Survives([&] {
    const auto file = model::ModelFile::Open(path.str());
    std::vector<float> row(static_cast<size_t>(file->config().hidden));
    file->Read({model::WeightKind::kOutputNorm}, 0, 1, 0, file->config().hidden, row.data());
    UseTokenizer(file->tokenizer(), FuzzText(data, size));
  });
  return 0;
}
