// A tokenizer.json, and the tokenizer it makes.

#include "runtime/model/tokenizer_json.h"
#include "tests/fuzz/fuzz_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace passel;
  const FuzzFile input(data, size);
  Survives([&] {
    TokenizerData tokens;
    const model::TokenizerJson json(input.path(), tokens);
    tokens.bos = json.IdOf(json.TemplateBegin());
    tokens.add_bos = tokens.bos >= 0;
    const auto tokenizer = Tokenizer::Make(tokens);
    for (const bool special : {true, false}) {
      for (const int32_t id : tokenizer->Encode(FuzzText(data, size), special)) {
        if (id < 0 || id >= tokenizer->vocab_size()) std::abort();
        tokenizer->TokenBytes(id, true);
      }
    }
  });
  return 0;
}
