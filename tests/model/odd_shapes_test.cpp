// Hugging Face directories of odd shapes, and the same as GGUF ("_gguf"), against transformers in
// float32: tests/fixtures/README.md.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "runtime/base/single_rank.h"
#include "runtime/model/transformer.h"
#include "tests/gpu/device_matrix.h"
#include "tests/model/gguf_twin.h"
#include "tests/model/reference_loop.h"
#include "tests/model/thread_ranks.h"

namespace passel::model {
namespace {

constexpr double kRelativeError = 2e-2;

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

// Decodes along the reference's tokens; returns the tokens it would have chosen itself.
std::vector<int64_t> Compare(ReferenceLoop& loop, const Expected& expected, double& worst) {
  std::vector<int64_t> chosen;
  for (size_t step = 0; step < expected.logits.size(); ++step) {
    const std::vector<float> got =
        step == 0 ? loop.Prefill(0, expected.ids) : loop.DecodeOne(0, expected.greedy[step - 1]);
    const std::vector<float>& exact = expected.logits[step];
    EXPECT_EQ(got.size(), exact.size());
    double squares = 0, reference = 0, largest = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      const double difference = static_cast<double>(got[i]) - static_cast<double>(exact[i]);
      squares += difference * difference;
      reference += static_cast<double>(exact[i]) * static_cast<double>(exact[i]);
      largest = std::max(largest, std::abs(difference));
    }
    const double error = std::sqrt(squares / reference);
    EXPECT_LE(error, kRelativeError) << "step " << step;
    worst = std::max(worst, error);
    chosen.push_back(std::max_element(got.begin(), got.end()) - got.begin());
    // Two logits each off by the largest difference may swap only within twice that.
    std::vector<float> sorted = exact;
    std::sort(sorted.rbegin(), sorted.rend());
    if (static_cast<double>(sorted[0] - sorted[1]) > 2 * largest) {
      EXPECT_EQ(chosen.back(), expected.greedy[step]) << "step " << step;
    } else {
      chosen.back() = -1;  // undecided
    }
  }
  return chosen;
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
  std::vector<int64_t> alone;
  for (const int ranks : {1, 2, 3}) {
    ThreadRanks(ranks).Run([&](Collectives& host) {
      const auto device = gpu::MakeTestDevice({.threads = 1});
      const auto collectives = device->MakeCollectives(std::make_unique<BorrowedCollectives>(host));
      const Transformer transformer(*file, *device, *collectives, nullptr);
      ReferenceLoop loop(*device, transformer, 1, 64);
      double worst = 0;
      const std::vector<int64_t> chosen = Compare(loop, expected, worst);
      if (host.rank() != 0) return;
      std::cout << GetParam() << ", " << ranks << " ranks: relative error " << worst << ", "
                << chosen.size() - static_cast<size_t>(std::count(chosen.begin(), chosen.end(), -1))
                << " of " << chosen.size() << " steps decided\n";
      if (ranks == 1) alone = chosen;
      EXPECT_GE(std::count_if(chosen.begin(), chosen.end(), [](int64_t id) { return id >= 0; }), 8);
      for (size_t i = 0; i < chosen.size(); ++i) {
        if (chosen[i] >= 0 && alone[i] >= 0) {
          EXPECT_EQ(chosen[i], alone[i]) << "step " << i;
        }
      }
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Models, OddShapes,
                         testing::Values("llama3", "shards", "tied", "window", "qwen2",
                                         "qwen2_gguf", "qwen2_window", "qwen3", "qwen3_gguf"),
                         [](const auto& shape) { return std::string(shape.param); });

}  // namespace
}  // namespace passel::model
