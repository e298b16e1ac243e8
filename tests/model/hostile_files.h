#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/base/random.h"
#include "runtime/model/model_file.h"

namespace passel::model {

struct Tally {
  int files = 0, opened = 0, refused = 0;
  double slowest_s = 0;
};

// Opens a model and makes its tokenizer, as every command does. An Error must be about the model
// and name the file or what in it is wrong; what opens must also tokenize.
inline void Try(const std::string& path, const std::string& what, Tally& tally) {
  const auto start = std::chrono::steady_clock::now();
  ++tally.files;
  try {
    const auto file = ModelFile::Open(path);
    std::vector<float> row(static_cast<size_t>(file->config().hidden));
    file->Read({WeightKind::kDown, file->config().layers - 1}, 0, 1, 0, 1, row.data());
    RopeInverseFrequencies(file->config());
    Tokenizer::Make(file->tokenizer())->Encode("abc a<s>\xff", true);
    ++tally.opened;
  } catch (const Error& e) {
    ++tally.refused;
    const std::string message = e.what();
    EXPECT_EQ(e.error_class(), ErrorClass::kModel) << what << ": " << message;
    EXPECT_TRUE(message.starts_with(path) || message.starts_with("tokenizer: "))
        << what << ": " << message;
    EXPECT_LT(message.size(), 1024u) << what;
    EXPECT_EQ(Printable(message, message.size()), message) << what;
  } catch (const std::exception& e) {
    ADD_FAILURE() << what << ": not an Error: " << e.what();
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  tally.slowest_s = std::max(tally.slowest_s, took.count());
  EXPECT_LT(took.count(), 20) << what;
}

inline void Report(const char* name, const Tally& tally) {
  std::cout << name << ": " << tally.files << " files, " << tally.opened << " opened, "
            << tally.refused << " refused, the slowest in " << tally.slowest_s << " s\n";
}

inline void WriteFile(const std::string& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << content;
  file.close();
  ASSERT_TRUE(file.good()) << path;
}

// Twenty thousand files are written: to memory, where the machine has a directory there with room.
class HostileFiles : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::error_code error;
    const auto space = std::filesystem::space("/dev/shm", error);
    if (!error && space.available > (uint64_t{1} << 30)) ::setenv("TMPDIR", "/dev/shm", 0);
  }
};

// `bytes` with a few of the first `within` changed, lost or added.
inline std::string Damage(std::string bytes, size_t within, Random& random) {
  const auto below = [&](size_t n) {
    return static_cast<size_t>(random.Uniform() * static_cast<double>(n)) % n;
  };
  const size_t count = 1 + below(3);
  for (size_t i = 0; i < count; ++i) {
    const size_t at = below(std::min(within, bytes.size()));
    switch (below(5)) {
      case 0:
        bytes[at] = static_cast<char>(below(256));
        break;
      case 1:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 2:
        bytes.erase(at, 1 + below(9));
        break;
      case 3:
        bytes.insert(at, std::string(1 + below(9), static_cast<char>(below(256))));
        break;
      default:
        bytes.resize(std::max<size_t>(at, 1));
    }
    if (bytes.empty()) return "x";
  }
  return bytes;
}

}  // namespace passel::model
