// A whole GGUF model: container, metadata, tensors, tokenizer.

#include <vector>

#include "runtime/model/model_file.h"
#include "tests/fuzz/fuzz_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace passel;
  const FuzzFile input(data, size);
  Survives([&] {
    const auto file = model::ModelFile::Open(input.path());
    std::vector<float> row(static_cast<size_t>(file->config().hidden));
    file->Read({model::WeightKind::kTokenEmbedding}, 0, 1, 0, file->config().hidden, row.data());
    Tokenizer::Make(file->tokenizer())->Encode(FuzzText(data, size), true);
  });
  return 0;
}
