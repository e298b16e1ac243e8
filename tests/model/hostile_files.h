#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/printable.h"
#include "runtime/base/random.h"
#include "runtime/model/model_file.h"
#include "tests/model/allocations.h"
#include "tests/model/tiny_model.h"

namespace passel::model {

struct Tally {
  int files = 0, opened = 0, refused = 0;
  double slowest_s = 0;
  int64_t most_bytes = 0;  // allocated at a time
};

// What reading a model may take: a constant, and for each byte of its files, as far as they are
// read, what the most wasteful content takes: empty strings in GGUF, empty objects in JSON.
struct Allowance {
  explicit Allowance(const std::string& path) {
    const auto read = [](const std::filesystem::path& file, int64_t most) -> int64_t {
      if (!std::filesystem::is_regular_file(file)) return 0;
      return std::min<int64_t>(static_cast<int64_t>(std::filesystem::file_size(file)), most);
    };
    int64_t sum = 0;
    if (std::filesystem::is_directory(path)) {
      for (const auto& entry : std::filesystem::directory_iterator(path)) {
        sum += read(entry.path(), 128 << 20);
      }
      bytes += 48 * sum;
    } else {
      sum = read(path, 64 << 20);
      bytes += 16 * sum;
    }
    seconds += 1e-6 * static_cast<double>(sum);
  }
  int64_t bytes = 1 << 20;  // allocated at a time
  double seconds = 5;       // of the processor: a sanitizer's, on a busy machine
};

// The most memory that the process has had since the last call; 0 where the system or a sanitizer,
// which keeps what was freed, does not let it be told.
inline int64_t PeakResidentBytes() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return 0;
#else
  int64_t kib = 0;
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word == "VmHWM:") status >> kib;
  }
  std::ofstream("/proc/self/clear_refs") << "5";
  return kib << 10;
#endif
}

// Opens a model and makes its tokenizer, as every command does. An Error must be about the model
// and name the file or what in it is wrong; what opens must also tokenize. Returns the error's
// message, "" for a model that opened.
inline std::string Try(const std::string& path, const std::string& what, Tally& tally) {
  const Allowance allowance(path);
  const int64_t before = AllocatedBytes();
  ResetPeak();
  PeakResidentBytes();
  const int64_t resident_before = PeakResidentBytes();
  const std::clock_t start = std::clock();
  ++tally.files;
  std::string message;
  try {
    const auto file = ModelFile::Open(path);
    std::vector<float> row(static_cast<size_t>(file->config().hidden));
    file->Read({WeightKind::kDown, file->config().layers - 1}, 0, 1, 0, 1, row.data());
    RopeInverseFrequencies(file->config());
    Tokenizer::Make(file->tokenizer())->Encode("abc a<s>\xff", true);
    ++tally.opened;
  } catch (const Error& e) {
    ++tally.refused;
    message = e.what();
    EXPECT_EQ(e.error_class(), ErrorClass::kModel) << what << ": " << message;
    EXPECT_TRUE(message.starts_with(path) || message.starts_with("tokenizer: "))
        << what << ": " << message;
    EXPECT_LT(message.size(), 1024u) << what;
    EXPECT_EQ(Printable(message, message.size()), message) << what;
  } catch (const std::exception& e) {
    ADD_FAILURE() << what << ": not an Error: " << e.what();
  }
  const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  const int64_t bytes = PeakAllocatedBytes() - before;
  tally.slowest_s = std::max(tally.slowest_s, seconds);
  tally.most_bytes = std::max(tally.most_bytes, bytes);
  EXPECT_LT(seconds, allowance.seconds) << what;
  EXPECT_LE(bytes, allowance.bytes) << what;
  // Beside what operator new gave out: what was read of the files, and what PCRE2 and others took.
  const int64_t resident = PeakResidentBytes() - resident_before;
  EXPECT_LE(resident, allowance.bytes + (int64_t{64} << 20)) << what;
  return message;
}

inline void Report(const char* name, const Tally& tally) {
  std::cout << name << ": " << tally.files << " files, " << tally.opened << " opened, "
            << tally.refused << " refused, the slowest in " << tally.slowest_s << " s, at most "
            << tally.most_bytes << " bytes allocated\n";
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

// A Hugging Face directory whose files are rewritten as the test goes.
class HostileDirectory {
 public:
  HostileDirectory() {
    std::filesystem::create_directory(path_.str());
    Restore();
  }
  void Restore() const {
    Write("config.json", TinyModel::Config().dump());
    WriteWeights("llama");
    Write("tokenizer.json", TinyModel::Tokenizer().dump());
  }
  void Write(const std::string& name, const std::string& content) const {
    WriteFile(path_.str() + "/" + name, content);
  }
  void WriteWeights(const std::string& architecture) const {
    Write("model.safetensors",
          Bytes().Text(TinyModel::SafetensorsHeader(architecture).dump()).str() +
              TinyModel::SafetensorsData(architecture));
  }
  void Remove(const std::string& name) const { std::filesystem::remove(path_.str() + "/" + name); }
  static std::string Safetensors(const std::string& header) {
    return Bytes().Text(header).str() + TinyModel::SafetensorsData();
  }
  const std::string& path() const { return path_.str(); }

 private:
  TempPath path_;
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
