// A safetensors file: every tensor must lie within it.

#include "runtime/model/safetensors.h"
#include "tests/fuzz/fuzz_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace passel;
  const FuzzFile input(data, size);
  Survives([&] {
    const model::SafetensorsFile file(input.path());
    uint64_t sum = 0;
    for (const auto& [name, tensor] : file.tensors()) {
      if (tensor.rows * tensor.cols > 0) sum += tensor.data[0];
    }
    if (sum > uint64_t{255} * size) std::abort();
  });
  return 0;
}
