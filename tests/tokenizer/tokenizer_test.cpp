#include "runtime/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "runtime/tokenizer/bpe.h"
#include "runtime/tokenizer/pre_tokenizer.h"
#include "tests/tokenizer/test_vocabulary.h"

namespace passel {
namespace {

using Type = TokenizerData::TokenType;

std::vector<std::string> Words(const std::string& pre_tokenizer, std::string_view text) {
  std::vector<std::string_view> views;
  PreTokenizer(PreTokenizer::Patterns(pre_tokenizer)).Split(text, views);
  return {views.begin(), views.end()};
}

void ExpectModelError(const TokenizerData& data, const std::string& part) {
  try {
    Tokenizer::Make(data);
    FAIL() << "expected an error about " << part;
  } catch (const Error& e) {
    EXPECT_EQ(e.error_class(), ErrorClass::kModel);
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(PreTokenizer, CutsAsTheNamedModelsDo) {
  using W = std::vector<std::string>;
  EXPECT_EQ(Words("gpt-2", "it's 123  x\n"), (W{"it", "'s", " 123", " ", " x", "\n"}));
  EXPECT_EQ(Words("smollm", "it's 123  x\n"), (W{"it", "'s", " ", "1", "2", "3", " ", " x", "\n"}));
  EXPECT_EQ(Words("llama-bpe", "IT'S 12345 x(y)\n\n z"),
            (W{"IT", "'S", " ", "123", "45", " x", "(y", ")\n\n", " z"}));
  EXPECT_EQ(Words("qwen2", "a 12"), (W{"a", " ", "1", "2"}));
  // U+180E is no white space, U+3000 is.
  EXPECT_EQ(Words("gpt-2", "a\u180e\u3000"), (W{"a", "\u180e", "\u3000"}));
}

TEST(PreTokenizer, RefusesUnknownNamesAndBadPatterns) {
  EXPECT_THROW(PreTokenizer::Patterns("no-such"), Error);
  EXPECT_THROW(PreTokenizer({{"("}}), Error);
}

TEST(PreTokenizer, KeepsWhatAPatternLeavesOut) {
  std::vector<std::string_view> words;
  PreTokenizer({{"[a-z]+|x*"}}).Split("12ab34", words);
  EXPECT_EQ(words, (std::vector<std::string_view>{"12", "ab", "34"}));
}

// The definition: of all adjacent pairs the one of lowest rank, leftmost first, again and again.
void MergeSlowly(const MergeTable& table, std::vector<int32_t>& symbols) {
  for (;;) {
    int32_t best_rank = INT32_MAX, id = -1;
    size_t best = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto merge = table.Find(symbols[i], symbols[i + 1]);
      if (merge && merge->rank < best_rank) {
        best_rank = merge->rank;
        best = i;
        id = merge->id;
      }
    }
    if (id < 0) return;
    symbols[best] = id;
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

TEST(MergeTable, MatchesTheDefinition) {
  Random random(3);
  const auto below = [&](uint64_t n) { return static_cast<int32_t>(random.Next() % n); };
  for (int trial = 0; trial < 300; ++trial) {
    MergeTable table;
    // Later merges may build on the results of earlier ones.
    for (int32_t m = 0; m < 25; ++m) {
      table.Add(below(4 + static_cast<uint64_t>(m)), below(4 + static_cast<uint64_t>(m)),
                {m, 4 + m});
    }
    std::vector<int32_t> symbols(random.Next() % 60);
    for (int32_t& s : symbols) s = below(4);
    std::vector<int32_t> expected = symbols;
    MergeSlowly(table, expected);
    table.Apply(symbols);
    ASSERT_EQ(symbols, expected) << "trial " << trial;
  }
}

TEST(Tokenizer, TakesSpecialTokensOnlyWhereAllowed) {
  TokenizerData data = ByteVocabulary({});
  const int32_t end = AddToken(data, "<e>", Type::kSpecial);
  const int32_t end_long = AddToken(data, "<e>x", Type::kSpecial);
  const int32_t added = AddToken(data, "[a]", Type::kAdded);
  const auto tokenizer = Tokenizer::Make(data);
  EXPECT_EQ(tokenizer->Encode("a<e>[a]<e>x<e", true),
            (std::vector<int32_t>{'a', end, added, end_long, '<', 'e'}));
  EXPECT_EQ(tokenizer->Encode("<e>[a]", false), (std::vector<int32_t>{'<', 'e', '>', added}));
  EXPECT_EQ(tokenizer->TokenBytes(end, false), "");
  EXPECT_EQ(tokenizer->TokenBytes(end, true), "<e>");
  EXPECT_EQ(tokenizer->TokenBytes(added, false), "[a]");
  EXPECT_EQ(tokenizer->TokenBytes(-1, true), "");
  EXPECT_EQ(tokenizer->TokenBytes(tokenizer->vocab_size(), true), "");
}

TEST(Tokenizer, EncodesAnyBytesWithoutLoss) {
  const auto tokenizer =
      Tokenizer::Make(ByteVocabulary({{"\xc3", "\xa9"}, {"t", "h"}, {"th", "e"}, {" ", "the"}}));
  EXPECT_EQ(tokenizer->Encode("\xc3\xa9 the\xc3", true), (std::vector<int32_t>{256, 259, 0xc3}));
  // Ill-formed bytes are never merged with each other: E2 82 lacks its third byte.
  EXPECT_EQ(tokenizer->Encode("a\xe2\x82z\xff", true),
            (std::vector<int32_t>{'a', 0xe2, 0x82, 'z', 0xff}));
  Random random(9);
  for (int trial = 0; trial < 500; ++trial) {
    std::string text(random.Next() % 40, '\0');
    for (char& c : text) c = static_cast<char>(random.Next() % (trial % 2 == 0 ? 256 : 128));
    std::string back;
    for (const int32_t id : tokenizer->Encode(text, true)) back += tokenizer->TokenBytes(id, true);
    ASSERT_EQ(back, text);
  }
}

TEST(Tokenizer, TakesWholeWordsWhereTheModelIgnoresMerges) {
  TokenizerData data = ByteVocabulary({{"a", "b"}});
  const int32_t word = AddToken(data, "abc", Type::kNormal);  // no merge leads to it
  EXPECT_EQ(Tokenizer::Make(data)->Encode("abc", true), (std::vector<int32_t>{256, 'c'}));
  data.pre_tokenizer = "llama-bpe";
  EXPECT_EQ(Tokenizer::Make(data)->Encode("abc", true), (std::vector<int32_t>{word}));
}

TEST(Tokenizer, AddsBosWhereAsked) {
  TokenizerData data = ByteVocabulary({});
  data.bos = AddToken(data, "<s>", Type::kSpecial);
  EXPECT_EQ(Tokenizer::Make(data)->Encode("a", true), (std::vector<int32_t>{'a'}));
  data.add_bos = true;
  EXPECT_EQ(Tokenizer::Make(data)->Encode("a", true), (std::vector<int32_t>{data.bos, 'a'}));
}

TEST(Tokenizer, RefusesDataItCannotServe) {
  TokenizerData data = ByteVocabulary({});
  data.merges = {"a zz"};
  ExpectModelError(data, "merge 0");
  data.merges = {"ab"};
  ExpectModelError(data, "space between");
  data.merges.clear();
  data.pre_tokenizer = "unheard-of";
  ExpectModelError(data, "unheard-of");
  data.pre_tokenizer = "gpt-2";
  data.stop = {256};
  ExpectModelError(data, "stop id");
  data.stop.clear();
  data.add_bos = true;
  ExpectModelError(data, "bos");
  data.add_bos = false;
  data.types.pop_back();
  ExpectModelError(data, "token types");
  ExpectModelError(TokenizerData{}, "no tokenizer");
}

TEST(Tokenizer, NormalisesToNfcWhereTheModelDoes) {
  TokenizerData data = ByteVocabulary({{"\xc3", "\xa9"}});  // é, composed
  const std::string composed = "\u00e9", apart = "e\u0301";
  EXPECT_EQ(Tokenizer::Make(data)->Encode(apart, true).size(), 3u);
  data.nfc = true;
  const auto tokenizer = Tokenizer::Make(data);
  EXPECT_EQ(tokenizer->Encode(apart, true), (std::vector<int32_t>{256}));
  EXPECT_EQ(tokenizer->Encode(composed, true), (std::vector<int32_t>{256}));
  // Hangul composes by rule; an invalid byte ends what can compose.
  EXPECT_EQ(tokenizer->Encode("\u1112\u1161\u11ab", true), tokenizer->Encode("\ud55c", true));
  EXPECT_EQ(tokenizer->Encode("e\xff\u0301", true).size(), 4u);
}

}  // namespace
}  // namespace passel
