#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

namespace passel {

// Where SmolLM2's GGUF lies: $PASSEL_TEST_MODEL, or where tools/setup.sh puts it. "" if absent.
inline std::string TestModelPath() {
  const char* path = std::getenv("PASSEL_TEST_MODEL");
  const std::string file =
      path != nullptr ? path : PASSEL_SOURCE_DIR "/.deps/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  return std::filesystem::exists(file) ? file : "";
}

}  // namespace passel
