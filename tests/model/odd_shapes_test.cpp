// Hugging Face directories of odd shapes, and the same as GGUF ("_gguf"), against transformers in
// float32: tests/fixtures/README.md.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "runtime/base/single_rank.h"
#include "runtime/model/transformer.h"
#include "tests/gpu/device_matrix.h"
#include "tests/model/gguf_twin.h"
#include "tests/model/reference_loop.h"
#include "tests/model/thread_ranks.h"

namespace passel::model {
namespace {

// Of all steps together; how much one rounding of bf16 moves a single step's logits depends on the
// token.
constexpr double kRelativeError = 2e-2, kOfOneStep = 3e-2;
// One logit may be off by this many times the root mean square of the error that is allowed.
constexpr double kPeak = 4;

struct Expected {
  explicit Expected(const std::string& directory) {
    std::ifstream file(directory + "/logits.json");
    const auto json = nlohmann::json::parse(file);
    ids = json["ids"].get<std::vector<int32_t>>();
    greedy = json["greedy"].get<std::vector<int32_t>>();
    logits = json["logits"].get<std::vector<std::vector<float>>>();
  }
  std::vector<int32_t> ids, greedy;
  std::vector<std::vector<float>> logits;  // of each step
};

double Squares(const std::vector<float>& values) {
  double squares = 0;
  for (const float x : values) squares += static_cast<double>(x) * static_cast<double>(x);
  return squares;
}

// Decodes along the reference's tokens, and holds the logits to its own. Where its two best are
// further apart than two logits may move, the token must be the same, whatever the number of ranks.
// Returns how many steps that decides.
int Compare(ReferenceLoop& loop, const Expected& expected, double& error) {
  int decided = 0;
  double off = 0, all = 0;
  for (size_t step = 0; step < expected.logits.size(); ++step) {
    SCOPED_TRACE(step);
    const std::vector<float> got =
        step == 0 ? loop.Prefill(0, expected.ids) : loop.DecodeOne(0, expected.greedy[step - 1]);
    const std::vector<float>& exact = expected.logits[step];
    EXPECT_EQ(got.size(), exact.size());
    if (got.size() != exact.size()) return decided;
    const double squares = Squares(exact);
    const double bound =
        kPeak * kRelativeError * std::sqrt(squares / static_cast<double>(exact.size()));
    std::vector<float> difference;
    std::transform(got.begin(), got.end(), exact.begin(), std::back_inserter(difference),
                   [](float a, float b) { return a - b; });
    EXPECT_LE(std::sqrt(Squares(difference) / squares), kOfOneStep);
    off += Squares(difference);
    all += squares;
    for (const float d : difference) EXPECT_LE(std::abs(d), bound);
    std::vector<float> sorted = exact;
    std::sort(sorted.rbegin(), sorted.rend());
    if (static_cast<double>(sorted[0] - sorted[1]) > 2 * bound) {
      EXPECT_EQ(std::max_element(got.begin(), got.end()) - got.begin(), expected.greedy[step]);
      ++decided;
    }
  }
  error = std::sqrt(off / all);
  EXPECT_LE(error, kRelativeError);
  return decided;
}

class OddShapes : public testing::TestWithParam<const char*> {};

TEST_P(OddShapes, LogitsMatchFloat32OnOneTwoAndThreeRanks) {
  std::string directory = std::string(PASSEL_SOURCE_DIR "/tests/fixtures/odd_shapes/") + GetParam();
  const bool as_gguf = directory.ends_with("_gguf");
  if (as_gguf) directory.resize(directory.size() - 5);
  const Expected expected(directory);
  ASSERT_EQ(expected.logits.size(), 12u);
  auto file = ModelFile::Open(directory);
  const TempPath twin(".gguf");
  if (as_gguf) {
    std::ofstream(twin.str(), std::ios::binary) << GgufTwin(*file).Encode();
    file = ModelFile::Open(twin.str());
  }
  for (const int ranks : {1, 2, 3}) {
    ThreadRanks(ranks).Run([&](Collectives& host) {
      const auto device = gpu::MakeTestDevice({.threads = 1});
      const auto collectives = device->MakeCollectives(std::make_unique<BorrowedCollectives>(host));
      const Transformer transformer(*file, *device, *collectives, nullptr);
      ReferenceLoop loop(*device, transformer, 1, 64);
      double error = 0;
      const int decided = Compare(loop, expected, error);
      EXPECT_GE(decided, 6);
      if (host.rank() != 0) return;
      std::cout << GetParam() << ", " << ranks << " ranks: relative error " << error << ", "
                << decided << " of " << expected.logits.size() << " steps decided\n";
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Models, OddShapes,
                         testing::Values("llama3", "shards", "tied", "window", "qwen2",
                                         "qwen2_gguf", "qwen2_window", "qwen3", "qwen3_gguf"),
                         [](const auto& shape) { return std::string(shape.param); });

}  // namespace
}  // namespace passel::model
