// A config.json, in a directory of its own: a link to the input.

#include <filesystem>

#include "runtime/model/hf_model.h"
#include "runtime/model/mapped_model.h"
#include "tests/fuzz/fuzz_file.h"
#include "tests/model/gguf_writer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace passel;
  static const TempPath directory;
  std::filesystem::create_directory(directory.str());
  const std::string link = directory.str() + "/config.json";
  const FuzzFile input(data, size);
  std::filesystem::remove(link);
  std::filesystem::create_symlink(input.path(), link);
  Survives([&] { model::RopeInverseFrequencies(model::HfConfig(directory.str())); });
  return 0;
}
