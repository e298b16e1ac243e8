// Added tokens that take in white space, count as whole words only, or are normalised, against the
// reference that tests/fixtures/README.md describes. $PASSEL_ADDED_TOKENS_FIXTURE names another
// file that the script wrote.

#include <gtest/gtest.h>

#include <cstdlib>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"
#include "runtime/model/hf_model.h"
#include "runtime/tokenizer/special_tokens.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tests/model/gguf_writer.h"
#include "tests/tokenizer/test_vocabulary.h"

namespace passel {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

std::unique_ptr<Tokenizer> FromJson(const json& tokenizer) {
  const TempPath directory;
  std::filesystem::create_directory(directory.str());
  std::ofstream(directory.str() + "/tokenizer.json") << tokenizer.dump();
  return Tokenizer::Make(model::HfTokenizer(directory.str(), 1 << 20));
}

TEST(AddedTokens, IdsAreTheReferences) {
  const char* other = std::getenv("PASSEL_ADDED_TOKENS_FIXTURE");
  std::ifstream file(other != nullptr ? other
                                      : PASSEL_SOURCE_DIR "/tests/fixtures/added_tokens.json");
  std::unique_ptr<Tokenizer> tokenizer;
  std::string name;
  int cases = 0, lines = 0;
  for (std::string text; std::getline(file, text);) {
    const json entry = json::parse(text);
    if (entry.contains("tokenizer")) {
      tokenizer = FromJson(entry["tokenizer"]);
      name = entry["name"];
      ++cases;
      continue;
    }
    ++lines;
    const std::string t = entry["t"];
    const Ids ids = entry["i"], plain = entry.value("p", ids);
    ASSERT_EQ(tokenizer->Encode(t, true), ids) << name << ": " << entry["t"];
    ASSERT_EQ(tokenizer->Encode(t, false), plain) << name << ": " << entry["t"];
  }
  EXPECT_EQ(cases, 5);
  EXPECT_GE(lines, 1400);
}

TEST(AddedTokens, InIllFormedText) {
  TokenizerData data = ByteVocabulary({});
  const int32_t word = AddToken(data, "[W]", TokenizerData::TokenType::kAdded);
  const int32_t left = AddToken(data, "[L]", TokenizerData::TokenType::kAdded);
  data.added[word].single_word = true;
  data.added[left] = {.lstrip = true, .rstrip = true};
  const auto tokenizer = Tokenizer::Make(data);
  // Bytes that are no character are neither letters nor space.
  EXPECT_EQ(tokenizer->Encode("\xc3[W]\xff", true), (Ids{0xc3, word, 0xff}));
  EXPECT_EQ(tokenizer->Encode("\xc3\xa9[W]", true), (Ids{0xc3, 0xa9, '[', 'W', ']'}));
  EXPECT_EQ(tokenizer->Encode("\x80\xa0 [L] \xe3\x80", true), (Ids{0x80, 0xa0, left, 0xe3, 0x80}));
}

// Seconds of the processor that it takes to find the tokens in a text.
double Seconds(const TokenizerData& data, const std::string& text, size_t tokens) {
  const SpecialTokens special = SpecialTokens::InText(data);
  const std::clock_t start = std::clock();
  const std::vector<SpecialTokens::Match> matches = special.Split(text, true);
  const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  EXPECT_EQ(matches.size(), tokens);
  return seconds;
}

// Some tenths of a second; minutes where each place was compared with each token, hours where each
// token looked for the end of the white space anew.
TEST(AddedTokens, AreFoundInTimeLinearInTheText) {
  constexpr size_t kSize = 1'000'000;
  TokenizerData many = ByteVocabulary({});
  for (int i = 0; i < 50'000; ++i) {
    AddToken(many, "<<" + std::to_string(i) + ">", TokenizerData::TokenType::kSpecial);
  }
  EXPECT_LT(Seconds(many, std::string(kSize, '<'), 1), 20);
  TokenizerData spaces = ByteVocabulary({});
  const int32_t tab = AddToken(spaces, "\t", TokenizerData::TokenType::kAdded);
  spaces.added[tab] = {.lstrip = true, .rstrip = true};
  EXPECT_LT(Seconds(spaces, std::string(kSize, '\t'), kSize), 20);
  EXPECT_LT(Seconds(spaces, std::string(kSize, ' ') + "\t" + std::string(kSize, ' '), 1), 20);
  // The longest that there may be, which each place begins but for the last byte.
  TokenizerData longest = ByteVocabulary({});
  AddToken(longest, std::string(511, 'a') + "b", TokenizerData::TokenType::kAdded);
  EXPECT_LT(Seconds(longest, std::string(kSize / 5, 'a'), 1), 20);
  AddToken(longest, std::string(512, 'a') + "b", TokenizerData::TokenType::kAdded);
  EXPECT_THROW(SpecialTokens::InText(longest), Error);
}

}  // namespace
}  // namespace passel
