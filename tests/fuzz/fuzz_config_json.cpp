// A config.json, in a directory of its own: a link to the input.

#include "runtime/model/hf_model.h"
#include "runtime/model/mapped_model.h"
#include "tests/fuzz/fuzz_file.h"
#include "tests/model/gguf_writer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace passel;
  static const TempPath path;
  const FuzzDirectory directory(path.str(), {"config.json"}, {{data, size}});
  Survives([&] { model::RopeInverseFrequencies(model::HfConfig(path.str())); });
  return 0;
}
