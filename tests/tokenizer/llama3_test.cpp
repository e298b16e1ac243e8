// Token ids of Llama 3, against the reference that tests/fixtures/README.md describes.

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "runtime/model/hf_model.h"
#include "runtime/tokenizer/byte_alphabet.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tests/model/gguf_writer.h"

namespace passel {
namespace {

using nlohmann::json;

std::string FromBase64(std::string_view text) {
  static constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  for (const char c : text.substr(0, text.find('='))) {
    bits = bits << 6 | static_cast<uint32_t>(kDigits.find(c));
    if ((count += 6) >= 8) bytes.push_back(static_cast<char>(bits >> (count -= 8) & 0xff));
  }
  return bytes;
}

// The special tokens, whose ids follow those of the vocabulary.
std::vector<std::string> SpecialTokenTexts() {
  std::vector<std::string> texts = {"<|begin_of_text|>",
                                    "<|end_of_text|>",
                                    "<|reserved_special_token_0|>",
                                    "<|reserved_special_token_1|>",
                                    "<|finetune_right_pad_id|>",
                                    "<|reserved_special_token_2|>",
                                    "<|start_header_id|>",
                                    "<|end_header_id|>",
                                    "<|eom_id|>",
                                    "<|eot_id|>",
                                    "<|python_tag|>"};
  for (int i = 3; texts.size() < 256; ++i) {
    texts.push_back("<|reserved_special_token_" + std::to_string(i) + "|>");
  }
  return texts;
}

// The tokenizer.json that Llama 3 is published with, made of its list of tokens in rank order: two
// tokens merge wherever their union is a token, those of the lowest rank first.
json TokenizerJson(const std::vector<std::string>& ranked) {
  const ByteAlphabet alphabet;
  const auto in_alphabet = [&](std::string_view bytes) {
    std::string out;
    for (const char c : bytes) out += alphabet.Character(static_cast<uint8_t>(c));
    return out;
  };
  const std::unordered_set<std::string_view> tokens(ranked.begin(), ranked.end());
  json vocabulary = json::object(), merges = json::array(), added = json::array();
  for (size_t rank = 0; rank < ranked.size(); ++rank) {
    const std::string_view token = ranked[rank];
    vocabulary[in_alphabet(token)] = rank;
    for (size_t cut = 1; cut < token.size(); ++cut) {
      const std::string_view left = token.substr(0, cut), right = token.substr(cut);
      if (tokens.count(left) != 0 && tokens.count(right) != 0) {
        merges.push_back(in_alphabet(left) + " " + in_alphabet(right));
      }
    }
  }
  for (const std::string& text : SpecialTokenTexts()) {
    added.push_back({{"id", ranked.size() + added.size()}, {"content", text}, {"special", true}});
  }
  const char* pattern = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
                        R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  return {{"added_tokens", added},
          {"pre_tokenizer",
           {{"type", "Sequence"},
            {"pretokenizers",
             {{{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}},
              {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}}},
          {"model",
           {{"type", "BPE"}, {"ignore_merges", true}, {"vocab", vocabulary}, {"merges", merges}}}};
}

class Llama3Tokenizer : public testing::Test {
 protected:
  void SetUp() override {
    const std::string path = PASSEL_SOURCE_DIR "/.deps/models/Llama-3.tokenizer.model";
    std::ifstream file(path);
    if (!file) GTEST_SKIP() << "Llama 3's vocabulary is not here; tools/setup.sh fetches it";
    std::vector<std::string> ranked;
    for (std::string line; std::getline(file, line);) {
      const size_t space = line.find(' ');
      ASSERT_EQ(line.substr(space + 1), std::to_string(ranked.size()));
      ranked.push_back(FromBase64(line.substr(0, space)));
    }
    ASSERT_EQ(ranked.size(), 128000u);
    const TempPath directory;
    std::filesystem::create_directory(directory.str());
    std::ofstream(directory.str() + "/tokenizer.json") << TokenizerJson(ranked).dump();
    data_ = model::HfTokenizer(directory.str(), 128256);
  }

  static void ExpectTheReferencesIds(const Tokenizer& tokenizer) {
    std::ifstream file(PASSEL_SOURCE_DIR "/tests/fixtures/llama3_tokens.jsonl");
    int count = 0;
    for (std::string line; std::getline(file, line); ++count) {
      const json entry = json::parse(line);
      const std::string text = entry["t"];
      const auto ids = tokenizer.Encode(text, entry.value("s", true));
      EXPECT_EQ(ids, entry["i"].get<std::vector<int32_t>>()) << entry["t"];
      std::string back;
      for (const int32_t id : ids) back += tokenizer.TokenBytes(id, true);
      EXPECT_EQ(back, text);
    }
    EXPECT_GE(count, 2000);
  }

  TokenizerData data_;
};

// One test: reading the tokenizer takes longer than all the rest.
TEST_F(Llama3Tokenizer, IdsAreTheReferences) {
  ASSERT_EQ(data_.tokens.size(), 128256u);
  const auto tokenizer = Tokenizer::Make(data_);
  ExpectTheReferencesIds(*tokenizer);
  int alone = 0;
  for (int32_t id = 0; id < tokenizer->vocab_size(); ++id) {
    const std::string bytes = tokenizer->TokenBytes(id, true);
    ASSERT_FALSE(bytes.empty()) << id;
    alone += tokenizer->Encode(bytes, true) == std::vector<int32_t>{id};
  }
  EXPECT_GE(alone, 125000);  // the others are parts of characters, or several words of the pattern
  // As GGUF files have it: the pattern by its name.
  EXPECT_EQ(tokenizer->pre_tokenizer(), "llama-bpe");
  data_.patterns.clear();
  data_.ignore_merges = false;
  data_.pre_tokenizer = "llama-bpe";
  ExpectTheReferencesIds(*Tokenizer::Make(data_));
}

}  // namespace
}  // namespace passel
