// SmolLM2 against Hugging Face transformers in float32: tests/fixtures/README.md.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "runtime/base/single_rank.h"
#include "runtime/model/transformer.h"
#include "tests/gpu/device_matrix.h"
#include "tests/model/reference_loop.h"
#include "tests/model/test_model.h"
#include "tests/model/thread_ranks.h"

namespace passel::model {
namespace {

struct Fixture {
  nlohmann::json prompts;
  int64_t vocab = 0;
  std::vector<float> rows;  // [n, vocab]
};

Fixture ReadFixture() {
  Fixture f;
  std::ifstream text(PASSEL_SOURCE_DIR "/tests/fixtures/smollm2_logits.json");
  const auto json = nlohmann::json::parse(text);
  f.prompts = json["prompts"];
  f.vocab = json["vocab"];
  std::ifstream npy(PASSEL_SOURCE_DIR "/tests/fixtures/smollm2_logits.npy", std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(npy), {});
  uint16_t header = 0;  // NumPy format 1.0: 8 bytes of magic and version, then the header's size
  std::memcpy(&header, bytes.data() + 8, 2);
  const size_t data = 10 + size_t{header};
  f.rows.resize((bytes.size() - data) / sizeof(float));
  std::memcpy(f.rows.data(), bytes.data() + data, f.rows.size() * sizeof(float));
  return f;
}

// The relative errors of the steps that a test compares. Rounding activations to bf16 puts a single
// step anywhere between 0.5e-2 and 5e-2, by chance: the order of additions in a product moves it by
// as much (one step: 1.1e-2 and 4.8e-2 from one CPU, whose compilers rounded differently). What the
// steps have together does not hang on that.
class StepErrors {
 public:
  void Add(double error) {
    EXPECT_LE(error, 8e-2);
    squares_ += error * error;
    ++count_;
  }
  void Check() const {
    ASSERT_GT(count_, 0);
    const double rms = std::sqrt(squares_ / count_);
    EXPECT_LE(rms, 2e-2);
    std::cout << "relative error of " << count_ << " steps: " << rms << "\n";
  }

 private:
  double squares_ = 0;
  int count_ = 0;
};

// What comparing the logits of some steps of a prompt has shown. Relative error: the root mean
// square of the difference, over the whole vocabulary where the fixture has it and else over the 64
// largest logits, divided by the root mean square of the reference's logits over the vocabulary.
class Comparison {
 public:
  Comparison(const Fixture& fixture, const nlohmann::json& prompt, StepErrors& errors)
      : fixture_(fixture), prompt_(prompt), errors_(errors) {}

  void Add(size_t step, const std::vector<float>& logits) {
    ASSERT_EQ(static_cast<int64_t>(logits.size()), fixture_.vocab);
    argmax_.emplace_back(step, std::max_element(logits.begin(), logits.end()) - logits.begin());
    for (const auto& kept : prompt_["steps"]) {
      if (kept["step"] != step) continue;
      double squares = 0;
      size_t count = 0;
      const auto compare = [&](float got, double exact) {
        const double d = std::abs(static_cast<double>(got) - exact);
        squares += d * d;
        largest_ = std::max(largest_, d);
        ++count;
      };
      const int64_t row = kept["row"];
      if (row >= 0) {
        for (int64_t i = 0; i < fixture_.vocab; ++i) {
          compare(
              logits[static_cast<size_t>(i)],
              static_cast<double>(fixture_.rows[static_cast<size_t>(row * fixture_.vocab + i)]));
        }
      } else {
        for (size_t i = 0; i < kept["top_ids"].size(); ++i) {
          compare(logits[kept["top_ids"][i].get<size_t>()], kept["top_logits"][i].get<double>());
        }
      }
      const double error =
          std::sqrt(squares / static_cast<double>(count)) / kept["rms"].get<double>();
      worst_ = std::max(worst_, error);
      SCOPED_TRACE(prompt_["name"].get<std::string>() + " step " + std::to_string(step));
      errors_.Add(error);
    }
  }

  // Two logits each off by the largest difference seen may swap only within twice that.
  void CheckGreedy(size_t min_steps) const {
    size_t decided = 0;
    for (const auto& [step, token] : argmax_) {
      if (prompt_["gaps"][step].get<double>() <= 2 * largest_) continue;
      ++decided;
      EXPECT_EQ(token, prompt_["greedy"][step].get<int64_t>())
          << prompt_["name"] << " step " << step;
    }
    EXPECT_GE(decided, min_steps);
    std::cout << prompt_["name"] << ": relative error " << worst_ << ", largest difference "
              << largest_ << ", " << decided << " of " << argmax_.size() << " steps decided\n";
  }

 private:
  const Fixture& fixture_;
  const nlohmann::json& prompt_;
  std::vector<std::pair<size_t, int64_t>> argmax_;
  StepErrors& errors_;
  double largest_ = 0, worst_ = 0;
};

class SmolLm2 : public testing::Test {
 protected:
  void SetUp() override {
    if (TestModelPath().empty()) GTEST_SKIP() << "SmolLM2's GGUF is absent: see tools/setup.sh";
    file_ = ModelFile::Open(TestModelPath());
    fixture_ = ReadFixture();
    ASSERT_EQ(fixture_.prompts.size(), 3u);
  }
  std::unique_ptr<ModelFile> file_;
  Fixture fixture_;
};

TEST_F(SmolLm2, PrefillAndThirtyTwoDecodedStepsMatchFloat32) {
  for (const bool deterministic : {false, true}) {
    const auto device = gpu::MakeTestDevice({.threads = 2, .deterministic = deterministic});
    SingleRank alone;
    const Transformer transformer(*file_, *device, alone, nullptr);
    ReferenceLoop loop(*device, transformer, 1, 2048);
    StepErrors errors;
    for (const auto& prompt : fixture_.prompts) {
      if (deterministic && prompt["name"] == "long") continue;  // takes seconds, shows nothing more
      const auto ids = prompt["ids"].get<std::vector<int32_t>>();
      const auto greedy = prompt["greedy"].get<std::vector<int32_t>>();
      Comparison comparison(fixture_, prompt, errors);
      comparison.Add(0, loop.Prefill(0, ids));
      for (size_t step = 1; step < greedy.size(); ++step) {
        comparison.Add(step, loop.DecodeOne(0, greedy[step - 1]));
      }
      comparison.CheckGreedy(16);
    }
    errors.Check();
  }
}

TEST_F(SmolLm2, DecodingThePromptMatchesFloat32) {
  const auto device = gpu::MakeTestDevice({.threads = 2});
  SingleRank alone;
  const Transformer transformer(*file_, *device, alone, nullptr);
  ReferenceLoop loop(*device, transformer, 1, 128);
  const auto& prompt = fixture_.prompts[1];
  const auto greedy = prompt["greedy"].get<std::vector<int32_t>>();
  StepErrors errors;
  std::vector<float> logits;
  for (const int32_t id : prompt["ids"].get<std::vector<int32_t>>()) {
    logits = loop.DecodeOne(0, id);
  }
  Comparison comparison(fixture_, prompt, errors);
  comparison.Add(0, logits);
  for (size_t step = 1; step < greedy.size(); ++step) {
    comparison.Add(step, loop.DecodeOne(0, greedy[step - 1]));
  }
  comparison.CheckGreedy(16);
  errors.Check();
}

class SmolLm2Ranks : public SmolLm2, public testing::WithParamInterface<int> {};

TEST_P(SmolLm2Ranks, TensorParallelLogitsMatchFloat32) {
  const auto& prompt = fixture_.prompts[0];
  const auto ids = prompt["ids"].get<std::vector<int32_t>>();
  const auto greedy = prompt["greedy"].get<std::vector<int32_t>>();
  ThreadRanks(GetParam()).Run([&](Collectives& host) {
    const auto device = gpu::MakeTestDevice({.threads = 1});
    const auto collectives = device->MakeCollectives(std::make_unique<BorrowedCollectives>(host));
    const Transformer transformer(*file_, *device, *collectives, nullptr);
    ReferenceLoop loop(*device, transformer, 1, 128);
    StepErrors errors;
    Comparison comparison(fixture_, prompt, errors);
    comparison.Add(0, loop.Prefill(0, ids));
    for (size_t step = 1; step < 8; ++step) {
      comparison.Add(step, loop.DecodeOne(0, greedy[step - 1]));
    }
    comparison.CheckGreedy(4);
    errors.Check();
  });
}

// Four ranks: more than KV heads, so one is held twice.
INSTANTIATE_TEST_SUITE_P(Ranks, SmolLm2Ranks, testing::Values(2, 3, 4));

}  // namespace
}  // namespace passel::model
