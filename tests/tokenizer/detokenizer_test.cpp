#include <gtest/gtest.h>

#include "runtime/base/random.h"
#include "runtime/base/utf8.h"
#include "tests/tokenizer/test_vocabulary.h"

namespace passel {
namespace {

// Ids are bytes.
class DetokenizerTest : public testing::Test {
 protected:
  std::unique_ptr<Tokenizer> tokenizer_ = Tokenizer::Make(ByteVocabulary({}));

  // The pieces that the bytes come out as, Flush's last.
  std::vector<std::string> Pieces(std::string_view bytes) const {
    Detokenizer detokenizer(*tokenizer_);
    std::vector<std::string> pieces;
    for (const char c : bytes) pieces.push_back(detokenizer.Push(static_cast<uint8_t>(c)));
    pieces.push_back(detokenizer.Flush());
    return pieces;
  }
  static std::string Join(const std::vector<std::string>& pieces) {
    std::string out;
    for (const std::string& p : pieces) out += p;
    return out;
  }
  static bool WellFormed(std::string_view text) {
    while (!text.empty()) {
      const Utf8Step step = NextUtf8(text);
      if (step.kind != Utf8Step::Kind::kValid) return false;
      text.remove_prefix(step.size);
    }
    return true;
  }
};

TEST_F(DetokenizerTest, HoldsBackIncompleteCharacters) {
  using P = std::vector<std::string>;
  EXPECT_EQ(Pieces("a\xc3\xa9"), (P{"a", "", "é", ""}));
  EXPECT_EQ(Pieces("\xf0\x9f\x98\x80!"), (P{"", "", "", "😀", "!", ""}));
  EXPECT_EQ(Pieces("\xf0\x9f"), (P{"", "", "\ufffd"}));
}

TEST_F(DetokenizerTest, ReplacesIllFormedSequences) {
  // As Unicode's recommended practice (and Python's errors="replace") has it.
  EXPECT_EQ(Join(Pieces("a\xff"
                        "b")),
            "a\ufffdb");
  EXPECT_EQ(Join(Pieces("\xc0\x80")), "\ufffd\ufffd");
  EXPECT_EQ(Join(Pieces("\xe2\x82z")), "\ufffdz");
  EXPECT_EQ(Join(Pieces("\xed\xa0\x80")), "\ufffd\ufffd\ufffd");            // a surrogate
  EXPECT_EQ(Join(Pieces("\xf4\x90\x80\x80")), "\ufffd\ufffd\ufffd\ufffd");  // above U+10FFFF
}

TEST_F(DetokenizerTest, EveryCodePointComesThrough) {
  for (char32_t c = 0; c < 0x110000; c += c < 0x3000 ? 1 : 61) {
    if (c >= 0xd800 && c < 0xe000) continue;
    std::string text;
    AppendUtf8(c, text);
    const std::vector<std::string> pieces = Pieces(text);
    ASSERT_EQ(pieces[text.size() - 1], text) << static_cast<uint32_t>(c);
    ASSERT_EQ(Join(pieces), text);
  }
}

TEST_F(DetokenizerTest, AnyBytesGiveWellFormedPieces) {
  Random random(4);
  // Bytes that are likely to meet each other's conditions.
  static constexpr uint8_t kBytes[] = {0x41, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc2, 0xc0,
                                       0xe0, 0xe1, 0xed, 0xef, 0xf0, 0xf1, 0xf4, 0xf5, 0xff};
  for (int trial = 0; trial < 5000; ++trial) {
    std::string bytes(random.Next() % 12, '\0');
    for (char& c : bytes) c = static_cast<char>(kBytes[random.Next() % sizeof(kBytes)]);
    const std::vector<std::string> pieces = Pieces(bytes);
    for (const std::string& piece : pieces) ASSERT_TRUE(WellFormed(piece));
    if (WellFormed(bytes)) {
      ASSERT_EQ(Join(pieces), bytes);
    }
  }
}

TEST_F(DetokenizerTest, SpecialTokensGiveNothing) {
  TokenizerData data = ByteVocabulary({});
  const int32_t end = AddToken(data, "<e>", TokenizerData::TokenType::kSpecial);
  const auto tokenizer = Tokenizer::Make(data);
  Detokenizer detokenizer(*tokenizer);
  EXPECT_EQ(detokenizer.Push('a'), "a");
  EXPECT_EQ(detokenizer.Push(end), "");
  EXPECT_EQ(detokenizer.Flush(), "");
}

}  // namespace
}  // namespace passel
