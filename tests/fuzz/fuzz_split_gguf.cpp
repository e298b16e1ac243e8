// A GGUF model in two files.

#include <vector>

#include "runtime/model/model_file.h"
#include "tests/fuzz/fuzz_file.h"
#include "tests/model/gguf_writer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace passel;
  static const TempPath path;
  static const std::vector<std::string> names = {"m-00001-of-00002.gguf", "m-00002-of-00002.gguf"};
  const FuzzDirectory directory(path.str(), names, FuzzParts(data, size, names.size()));
  Survives([&] {
    const auto file = model::ModelFile::Open(path.str() + "/" + names[0]);
    std::vector<float> row(static_cast<size_t>(file->config().hidden));
    file->Read({model::WeightKind::kOutputNorm}, 0, 1, 0, file->config().hidden, row.data());
  });
  return 0;
}
