// SentencePiece's BPE against the references that tests/fixtures/README.md describes, from a
// tokenizer.json of both kinds and from a GGUF file's scores: of a small vocabulary that is here,
// and of Mistral 7B's.

#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "runtime/model/gguf_model.h"
#include "runtime/model/hf_model.h"
#include "runtime/model/mapped_model.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tests/model/gguf_writer.h"
#include "tests/tokenizer/sentence_piece_model.h"

namespace passel {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

constexpr const char* kFixtures = PASSEL_SOURCE_DIR "/tests/fixtures/";

struct Line {
  std::string text;
  Ids old_style, new_style, plain, pieces;
};

std::vector<Line> Lines(const std::string& path) {
  std::ifstream file(path);
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

json Parsed(const std::string& name) {
  std::ifstream file(kFixtures + name);
  return json::parse(file);
}

std::vector<SentencePiece> SmallPieces() {
  std::vector<SentencePiece> pieces;
  for (const json& piece : Parsed("sentencepiece/pieces.json")) {
    pieces.push_back({piece[0], piece[1], piece[2]});
  }
  return pieces;
}

std::unique_ptr<Tokenizer> FromJson(json tokenizer, const std::function<void(json&)>& edit = {}) {
  if (edit) edit(tokenizer);
  const TempPath directory;
  std::filesystem::create_directory(directory.str());
  std::ofstream(directory.str() + "/tokenizer.json") << tokenizer.dump();
  return Tokenizer::Make(model::HfTokenizer(directory.str(), 1 << 20));
}
std::unique_ptr<Tokenizer> FromJson(const std::function<void(json&)>& edit = {}) {
  return FromJson(Parsed("sentencepiece/tokenizer.json"), edit);
}

std::unique_ptr<Tokenizer> FromGguf(const std::vector<SentencePiece>& pieces,
                                    const std::function<void(TokenizerData&)>& edit = {}) {
  GgufWriter writer;
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  std::vector<float> scores;
  for (const SentencePiece& piece : pieces) {
    tokens.push_back(piece.text);
    scores.push_back(piece.score);
    types.push_back(piece.type);
  }
  writer.String("tokenizer.ggml.model", "llama");
  writer.Strings("tokenizer.ggml.tokens", tokens);
  writer.Ints("tokenizer.ggml.token_type", types);
  writer.Floats("tokenizer.ggml.scores", scores);
  const TempPath path(".gguf", writer.Encode());
  TokenizerData data = model::GgufTokenizer(model::GgufFile(path.str()));
  EXPECT_TRUE(data.add_bos);  // what the format leaves unsaid
  data.add_bos = false;
  if (edit) edit(data);
  return Tokenizer::Make(data);
}
std::unique_ptr<Tokenizer> FromGguf(const std::function<void(TokenizerData&)>& edit = {}) {
  return FromGguf(SmallPieces(), edit);
}

void Metaspace(json& tokenizer) {
  tokenizer["normalizer"] = nullptr;
  tokenizer["pre_tokenizer"] = {{"type", "Metaspace"},
                                {"replacement", "\u2581"},
                                {"prepend_scheme", "first"},
                                {"split", false}};
}

// The parameter: whether it is Mistral's vocabulary.
class SentencePieceIds : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (!GetParam()) {
      pieces_ = SmallPieces();
      tokenizer_ = Parsed("sentencepiece/tokenizer.json");
      lines_ = Lines(std::string(kFixtures) + "sentencepiece/tokens.jsonl");
    } else {
      pieces_ = ReadSentencePieces(PASSEL_SOURCE_DIR "/.deps/models/Mistral-7B.tokenizer.model");
      if (pieces_.empty())
        GTEST_SKIP() << "Mistral's vocabulary is not here; tools/setup.sh fetches it";
      ASSERT_EQ(pieces_.size(), 32000u);
      tokenizer_ = SentencePieceJson(pieces_);
      lines_ = Lines(std::string(kFixtures) + "mistral_tokens.jsonl");
    }
    ASSERT_GE(lines_.size(), 2000u);
  }

  std::vector<SentencePiece> pieces_;
  json tokenizer_;
  std::vector<Line> lines_;
};

TEST_P(SentencePieceIds, AreTheReferencesWithANormaliser) {
  const auto tokenizer = FromJson(tokenizer_);
  for (const Line& line : lines_) {
    EXPECT_EQ(tokenizer->Encode(line.text, true), line.old_style) << json(line.text);
    EXPECT_EQ(tokenizer->Encode(line.text, false), line.plain) << json(line.text);
  }
}

TEST_P(SentencePieceIds, AreTheReferencesWithMetaspace) {
  const auto tokenizer = FromJson(tokenizer_, Metaspace);
  for (const Line& line : lines_) {
    EXPECT_EQ(tokenizer->Encode(line.text, true), line.new_style) << json(line.text);
  }
}

TEST_P(SentencePieceIds, AreTheReferencesFromScores) {
  const auto tokenizer = FromGguf(pieces_);
  for (const Line& line : lines_) {
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

INSTANTIATE_TEST_SUITE_P(, SentencePieceIds, testing::Bool(),
                         [](const auto& p) { return std::string(p.param ? "Mistral" : "Small"); });

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

// The text of messages is one: what stands behind the bos that the template writes is not first.
TEST(SentencePiece, TextBehindBosIsNotFirst) {
  for (const bool writes_bos : {false, true}) {
    json parsed = Parsed("sentencepiece/tokenizer.json");
    Metaspace(parsed);
    const TempPath directory;
    std::filesystem::create_directory(directory.str());
    std::ofstream(directory.str() + "/tokenizer.json") << parsed.dump();
    std::ofstream(directory.str() + "/tokenizer_config.json") << json{
        {"bos_token", "<s>"},
        {"chat_template",
         std::string(writes_bos ? "{{ bos_token }}" : "") +
             "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
             "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
             "{{ '<|im_start|>assistant\\n' }}{% endif %}"}};
    const auto made = Tokenizer::Make(model::HfTokenizer(directory.str(), 1 << 20));
    const Ids ids = made->EncodeMessages(std::vector<ChatMessage>{{"user", "a"}});
    std::string text;
    for (const int32_t id : ids) text += made->TokenBytes(id, true);
    EXPECT_EQ(text, std::string(writes_bos ? "<s>" : " ") +
                        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
  }
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

// All stretches of a text: some MB of tokens, most of which two others make in hundreds of ways.
TEST(SentencePiece, RefusesTokensThatSplitInTooManyWays) {
  Random random(5);
  std::string text;
  for (int i = 0; i < 250; ++i) text.push_back(static_cast<char>('a' + random.Next() % 26));
  std::set<std::string> stretches;
  for (size_t size = 1; size <= text.size(); ++size) {
    for (size_t at = 0; at + size <= text.size(); ++at) stretches.insert(text.substr(at, size));
  }
  TokenizerData data;
  data.kind = TokenizerData::Kind::kSentencePieceBpe;
  data.tokens.assign(stretches.begin(), stretches.end());
  data.types.assign(data.tokens.size(), TokenizerData::TokenType::kNormal);
  data.scores.assign(data.tokens.size(), 0);
  try {
    Tokenizer::Make(data);
    FAIL() << "expected an error";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("in more than 2097152 ways"), std::string::npos)
        << e.what();
  }
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
