// Token ids of a real model, against the reference that tests/fixtures/README.md describes.

#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/model/model_file.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tests/model/test_model.h"

namespace passel {
namespace {

class SmolLm2Tokenizer : public testing::Test {
 protected:
  void SetUp() override {
    const std::string path = TestModelPath();
    if (path.empty()) GTEST_SKIP() << "SmolLM2's GGUF is not here; tools/setup.sh fetches it";
    tokenizer_ = Tokenizer::Make(model::ModelFile::Open(path)->tokenizer());
  }
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(SmolLm2Tokenizer, IdsAreTheReferences) {
  std::ifstream file(PASSEL_SOURCE_DIR "/tests/fixtures/smollm2_tokens.jsonl");
  ASSERT_TRUE(file.is_open());
  int count = 0, round_trips = 0;
  for (std::string line; std::getline(file, line); ++count) {
    const nlohmann::json entry = nlohmann::json::parse(line);
    const auto text = entry["t"].get<std::string>();
    const auto ids = tokenizer_->Encode(text, entry.value("s", true));
    EXPECT_EQ(ids, entry["i"].get<std::vector<int32_t>>()) << entry["t"];
    std::string back;
    for (const int32_t id : ids) back += tokenizer_->TokenBytes(id, true);
    round_trips += back == text;
  }
  EXPECT_GE(count, 2000);
  // The vocabulary lacks a few control bytes; all other texts come back as they were.
  EXPECT_GE(round_trips, count * 95 / 100);
}

TEST_F(SmolLm2Tokenizer, ChatTemplateAndStops) {
  const std::vector<ChatMessage> messages = {{"user", "Hi"}};
  const std::vector<int32_t> ids =
      tokenizer_->Encode(tokenizer_->ApplyChatTemplate(messages), true);
  // <|im_start|> "system" "\n" …
  ASSERT_GE(ids.size(), 3u);
  EXPECT_EQ((std::vector<int32_t>{ids[0], ids[1], ids[2]}), (std::vector<int32_t>{1, 9690, 198}));
  const auto stop = tokenizer_->stop_ids();
  EXPECT_EQ((std::vector<int32_t>{stop.begin(), stop.end()}), (std::vector<int32_t>{2}));
}

// Far above what it takes, and far below what a merge loop quadratic in a word's length would.
TEST_F(SmolLm2Tokenizer, LongTextsAreFast) {
  std::string prose;
  while (prose.size() < 40000) prose += "The lighthouse keeper wrote 42 lines that evening. ";
  const std::string word(200000, 'a');
  const auto start = std::chrono::steady_clock::now();
  EXPECT_GT(tokenizer_->Encode(prose, true).size(), 4000u);
  const auto middle = std::chrono::steady_clock::now();
  EXPECT_GT(tokenizer_->Encode(word, true).size(), 4000u);
  const auto end = std::chrono::steady_clock::now();
  const auto ms = [](auto d) { return std::chrono::duration<double, std::milli>(d).count(); };
  RecordProperty("prose_ms", std::to_string(ms(middle - start)));
  RecordProperty("word_ms", std::to_string(ms(end - middle)));
  EXPECT_LT(ms(end - start), 5000);
}

}  // namespace
}  // namespace passel
