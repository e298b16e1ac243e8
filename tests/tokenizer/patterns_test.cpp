// Token ids with the patterns that cut text into words, by their names as GGUF has them and as the
// steps of a tokenizer.json, against the reference that tests/fixtures/README.md describes.

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"
#include "runtime/model/hf_model.h"
#include "runtime/tokenizer/pre_tokenizer.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tests/model/tiny_model.h"

namespace passel {
namespace {

using nlohmann::json;

std::unique_ptr<Tokenizer> FromFile(const json& tokenizer) {
  const TempPath directory;
  std::filesystem::create_directory(directory.str());
  std::ofstream(directory.str() + "/tokenizer.json") << tokenizer.dump();
  return Tokenizer::Make(model::HfTokenizer(directory.str(), 1 << 20));
}

std::unique_ptr<Tokenizer> FromJson(const json& header, const json& cut) {
  json vocab = json::object();
  for (const json& token : header["vocab"]) vocab[token.get<std::string>()] = vocab.size();
  return FromFile({{"normalizer", cut["normalizer"]},
                   {"pre_tokenizer", cut["pre_tokenizer"]},
                   {"model",
                    {{"type", "BPE"},
                     {"ignore_merges", cut["ignore_merges"]},
                     {"vocab", vocab},
                     {"merges", header["merges"]}}}});
}

std::unique_ptr<Tokenizer> ByName(const json& header, const std::string& name) {
  TokenizerData data;
  data.pre_tokenizer = name;
  data.nfc = name == "qwen2";
  data.tokens = header["vocab"].get<std::vector<std::string>>();
  data.types.assign(data.tokens.size(), TokenizerData::TokenType::kNormal);
  for (const json& merge : header["merges"]) {
    data.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  return Tokenizer::Make(data);
}

// A Split that removes, inverted: what lies between the matches is left out. The ids are Hugging
// Face's tokenizers' (0.23).
TEST(Patterns, WhatIsRemovedIsLeftOut) {
  json tokenizer = TinyModel::Tokenizer();
  tokenizer.erase("post_processor");  // no BOS
  json& split = tokenizer["pre_tokenizer"]["pretokenizers"][0];
  split["pattern"]["Regex"] = "[ab]+";
  const auto encode = [&] { return FromFile(tokenizer)->Encode("cabcabc", true); };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(encode(), (Ids{4, 5, 4, 5, 4}));
  split["behavior"] = "Removed";
  EXPECT_THROW(encode(), Error);
  split["invert"] = true;
  EXPECT_EQ(encode(), (Ids{5, 5}));
  split["behavior"] = "Isolated";
  EXPECT_THROW(encode(), Error);
}

// llama.cpp's spelling of tekken's pattern, whose groups repeat for every letter, gives the words
// that the model's own gives, however long.
TEST(Patterns, LongWordsOfRepeatedGroups) {
  const PreTokenizer groups({{R"([^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|)"
                              R"([^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|)"
                              R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}});
  const PreTokenizer tekken(PreTokenizer::Patterns("tekken"));
  std::string han;
  for (int i = 0; i < 400'000; ++i) han += "\xe6\xbc\xa2";
  for (const std::string& word : {std::string(1'000'000, 'A'), std::string(1'000'000, 'a'), han}) {
    const std::string text = "Two words " + word + " and Two";
    std::vector<std::string_view> words, expected;
    groups.Split(text, words);
    tekken.Split(text, expected);
    EXPECT_TRUE(words == expected);
    EXPECT_EQ(words.size(), 5u);
  }
}

TEST(Patterns, IdsAreTheReferences) {
  std::ifstream file(PASSEL_SOURCE_DIR "/tests/fixtures/patterns.jsonl");
  std::string text;
  std::getline(file, text);
  const json header = json::parse(text);
  std::map<std::string, std::vector<std::unique_ptr<Tokenizer>>> tokenizers;
  for (const auto& [name, cut] : header["cuts"].items()) {
    tokenizers[name].push_back(FromJson(header, cut));
    EXPECT_EQ(tokenizers[name][0]->pre_tokenizer(), name);
    if (name != "own") tokenizers[name].push_back(ByName(header, name));
  }
  EXPECT_EQ(tokenizers.size(), 6u);
  int lines = 0;
  for (; std::getline(file, text); ++lines) {
    const json line = json::parse(text);
    for (const auto& [name, same] : tokenizers) {
      const auto expected = line[line.contains(name) ? name : "gpt-2"].get<std::vector<int32_t>>();
      for (const auto& tokenizer : same) {
        EXPECT_EQ(tokenizer->Encode(line["t"].get<std::string>(), true), expected)
            << name << ": " << line["t"];
      }
    }
  }
  EXPECT_EQ(lines, 700);
}

}  // namespace
}  // namespace passel
