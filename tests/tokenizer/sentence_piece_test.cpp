// SentencePiece's BPE against the references that tests/fixtures/README.md describes, from a
// tokenizer.json of both kinds and from a GGUF file's scores. $PASSEL_SENTENCEPIECE_FIXTURE names
// another directory that the script wrote, of a real model's vocabulary.

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "runtime/base/error.h"
#include "runtime/model/gguf_model.h"
#include "runtime/model/hf_model.h"
#include "runtime/model/mapped_model.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tests/model/gguf_writer.h"

namespace passel {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

std::string Directory() {
  const char* other = std::getenv("PASSEL_SENTENCEPIECE_FIXTURE");
  return other != nullptr ? other : PASSEL_SOURCE_DIR "/tests/fixtures/sentencepiece";
}

json Parsed(const std::string& name) {
  std::ifstream file(Directory() + "/" + name);
  return json::parse(file);
}

struct Line {
  std::string text;
  Ids old_style, new_style, plain, pieces;
};

std::vector<Line> Lines() {
  std::ifstream file(Directory() + "/tokens.jsonl");
  std::vector<Line> lines;
  for (std::string text; std::getline(file, text);) {
    const json entry = json::parse(text);
    Line line{entry["t"], entry["i"], {}, {}, {}};
    line.new_style = entry.value("n", line.old_style);
    line.plain = entry.value("p", line.old_style);
    line.pieces = entry.value("s", line.plain);
    lines.push_back(line);
  }
  return lines;
}

std::unique_ptr<Tokenizer> FromJson(const std::function<void(json&)>& edit = {}) {
  json tokenizer = Parsed("tokenizer.json");
  if (edit) edit(tokenizer);
  const TempPath directory;
  std::filesystem::create_directory(directory.str());
  std::ofstream(directory.str() + "/tokenizer.json") << tokenizer.dump();
  return Tokenizer::Make(model::HfTokenizer(directory.str(), 1 << 20));
}

std::unique_ptr<Tokenizer> FromGguf(const std::function<void(TokenizerData&)>& edit = {}) {
  GgufWriter writer;
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  std::vector<float> scores;
  for (const json& piece : Parsed("pieces.json")) {
    tokens.push_back(piece[0]);
    scores.push_back(piece[1]);
    types.push_back(piece[2]);
  }
  writer.String("tokenizer.ggml.model", "llama");
  writer.Strings("tokenizer.ggml.tokens", tokens);
  writer.Ints("tokenizer.ggml.token_type", types);
  writer.Floats("tokenizer.ggml.scores", scores);
  writer.Uint32("tokenizer.ggml.bos_token_id", 1);
  writer.Uint32("tokenizer.ggml.eos_token_id", 2);
  writer.Uint32("tokenizer.ggml.unknown_token_id", 0);
  const TempPath path(".gguf", writer.Encode());
  TokenizerData data = model::GgufTokenizer(model::GgufFile(path.str()));
  EXPECT_TRUE(data.add_bos);  // what the format leaves unsaid
  data.add_bos = false;
  if (edit) edit(data);
  return Tokenizer::Make(data);
}

void Metaspace(json& tokenizer) {
  tokenizer["normalizer"] = nullptr;
  tokenizer["pre_tokenizer"] = {{"type", "Metaspace"},
                                {"replacement", "\u2581"},
                                {"prepend_scheme", "first"},
                                {"split", false}};
}

TEST(SentencePiece, IdsAreTheReferencesWithANormaliser) {
  const auto tokenizer = FromJson();
  const std::vector<Line> lines = Lines();
  ASSERT_GE(lines.size(), 2000u);
  for (const Line& line : lines) {
    EXPECT_EQ(tokenizer->Encode(line.text, true), line.old_style) << json(line.text);
    EXPECT_EQ(tokenizer->Encode(line.text, false), line.plain) << json(line.text);
  }
}

TEST(SentencePiece, IdsAreTheReferencesWithMetaspace) {
  const auto tokenizer = FromJson(Metaspace);
  for (const Line& line : Lines()) {
    EXPECT_EQ(tokenizer->Encode(line.text, true), line.new_style) << json(line.text);
  }
}

TEST(SentencePiece, IdsAreTheReferencesFromScores) {
  const auto tokenizer = FromGguf();
  for (const Line& line : Lines()) {
    const Ids ids = tokenizer->Encode(line.text, false);
    EXPECT_EQ(ids, line.pieces) << json(line.text);
    std::string back, expected(line.text.empty() ? 0 : 1, ' ');
    expected += line.text;
    for (const int32_t id : ids) back += tokenizer->TokenBytes(id, true);
    // A "▁" of the text cannot be told from a space.
    for (size_t at; (at = expected.find("\u2581")) != std::string::npos;) {
      expected.replace(at, 3, 1, ' ');
    }
    EXPECT_EQ(back, expected);
  }
}

TEST(SentencePiece, ByteFallbackAndInvalidUtf8) {
  const auto tokenizer = FromGguf();
  const auto bytes = [&](std::string_view text) {
    std::string out;
    for (const int32_t id : tokenizer->Encode(text, false)) out += tokenizer->TokenBytes(id, false);
    return out;
  };
  EXPECT_EQ(bytes("\U0001f9ff"), " \U0001f9ff");  // in four byte tokens
  EXPECT_EQ(bytes("a\xff\xc3"), " a\xff\xc3");
  EXPECT_EQ(tokenizer->Encode("", false), Ids{});
}

TEST(SentencePiece, UnknownTokenWhereAByteIsMissing) {
  const auto without_bytes = [](bool fuse) {
    return FromGguf([fuse](TokenizerData& data) {
      for (TokenizerData::TokenType& type : data.types) {
        if (type == TokenizerData::TokenType::kByte) type = TokenizerData::TokenType::kAdded;
      }
      data.fuse_unknown = fuse;
      data.spaces = {};
    });
  };
  const std::string unknown = "\U0001f9ff\U0001f9ff";
  EXPECT_EQ(without_bytes(true)->Encode(unknown, false), Ids{0});
  EXPECT_EQ(without_bytes(false)->Encode(unknown, false), (Ids{0, 0}));
}

TEST(SentencePiece, SplitWordsEndTokensAtSpaces) {
  const auto whole = FromJson(Metaspace);
  const auto split = FromJson([](json& tokenizer) {
    Metaspace(tokenizer);
    tokenizer["pre_tokenizer"]["split"] = true;
  });
  const Ids one = whole->Encode("a        b", true), many = split->Encode("a        b", true);
  EXPECT_LT(one.size(), many.size());
  EXPECT_EQ(many.size(), 9u);  // ▁a, seven ▁, ▁b
}

TEST(SentencePiece, RefusesWhatItWouldEncodeOtherwise) {
  const auto refused = [](const std::function<void(json&)>& edit, const std::string& part) {
    try {
      FromJson(edit);
      FAIL() << "expected an error about " << part;
    } catch (const Error& e) {
      EXPECT_EQ(e.error_class(), ErrorClass::kModel);
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  refused([](json& t) { t["normalizer"] = {{"type", "NFKC"}}; }, "normalizer");
  refused([](json& t) { t["normalizer"] = nullptr; }, "normalizer");
  refused([](json& t) { t["pre_tokenizer"] = {{"type", "Whitespace"}}; }, "pre_tokenizer");
  refused([](json& t) { t["model"]["unk_token"] = "no token"; }, "unk_token");
  refused([](json& t) { t["model"]["merges"].push_back("no merge"); }, "merge");
  EXPECT_THROW(FromGguf([](TokenizerData& d) { d.scores[9] = std::nanf(""); }), Error);
  EXPECT_THROW(FromGguf([](TokenizerData& d) { d.scores.pop_back(); }), Error);
  EXPECT_THROW(FromGguf([](TokenizerData& d) { d.tokens.back().assign(600, 'x'); }), Error);
  EXPECT_THROW(FromGguf([](TokenizerData& d) {
                 for (size_t i = 0; i < d.tokens.size(); ++i) {
                   if (d.types[i] == TokenizerData::TokenType::kByte) d.tokens[i] = "<0xZZ>";
                 }
               }),
               Error);
}

}  // namespace
}  // namespace passel
