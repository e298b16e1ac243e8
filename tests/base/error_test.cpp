#include "runtime/base/error.h"

#include <gtest/gtest.h>

#include <string>
#include <unordered_set>

#include "runtime/base/ids.h"
#include "runtime/base/printable.h"

namespace passel {
namespace {

TEST(Error, CarriesItsMessageAndExitCode) {
  const Error error(ErrorClass::kModel, "m.gguf: tensor 3: type 99 is unknown");
  EXPECT_STREQ(error.what(), "m.gguf: tensor 3: type 99 is unknown");
  EXPECT_EQ(error.error_class(), ErrorClass::kModel);
  EXPECT_EQ(error.exit_code(), 3);
}

// The exit codes are a contract with scripts.
TEST(Error, ExitCodesAreFixed) {
  EXPECT_EQ(Error(ErrorClass::kBug, "").exit_code(), 1);
  EXPECT_EQ(Error(ErrorClass::kUsage, "").exit_code(), 2);
  EXPECT_EQ(Error(ErrorClass::kModel, "").exit_code(), 3);
  EXPECT_EQ(Error(ErrorClass::kIo, "").exit_code(), 4);
  EXPECT_EQ(Error(ErrorClass::kCluster, "").exit_code(), 5);
  EXPECT_EQ(Error(ErrorClass::kMemory, "").exit_code(), 6);
}

TEST(Check, PassesWhatHolds) { EXPECT_NO_THROW(Check(true, "holds")); }

TEST(Check, NamesWhatAndWhere) {
  try {
    Check(false, "layer in range");
    FAIL() << "no exception";
  } catch (const Error& error) {
    EXPECT_EQ(error.error_class(), ErrorClass::kBug);
    const std::string message = error.what();
    EXPECT_NE(message.find("layer in range"), std::string::npos) << message;
    EXPECT_NE(message.find("error_test.cpp"), std::string::npos) << message;
  }
}

TEST(StrongId, ComparesAndHashesByValue) {
  EXPECT_EQ(RankId(3), RankId(3));
  EXPECT_LT(RankId(2), RankId(3));
  EXPECT_EQ(RequestId().value, 0u);
  const std::unordered_set<RequestId> seen{RequestId(1), RequestId(2), RequestId(1)};
  EXPECT_EQ(seen.size(), 2u);
  static_assert(!std::is_convertible_v<int32_t, RankId>);
  static_assert(!std::is_convertible_v<RankId, RequestId>);
}

TEST(Error, CutsLongMessagesInTheMiddle) {
  std::string message = "file: field: is \"";
  for (int i = 0; i < 5000; ++i) message += "é";
  message += "\"; expected less";
  const std::string what = Error(ErrorClass::kModel, message).what();
  EXPECT_LT(what.size(), 1024u);
  EXPECT_TRUE(what.starts_with("file: field: is \"é"));
  EXPECT_TRUE(what.ends_with("é\"; expected less"));
  EXPECT_NE(what.find("é […] é"), std::string::npos);
  const std::string kept(1000, 'x');
  EXPECT_EQ(Error(ErrorClass::kModel, kept).what(), kept);
}

TEST(Error, IsOnePrintableLine) {
  EXPECT_STREQ(Error(ErrorClass::kModel, "a\nb\r\xff \u00e9\u202e").what(),
               "a\\nb\\x0d\\xff \u00e9\\xe2\\x80\\xae");
}

TEST(Printable, EscapesAndCuts) {
  EXPECT_EQ(Printable("plain \u4e2d\U0001f600 \\ \""), "plain \u4e2d\U0001f600 \\ \"");
  EXPECT_EQ(Printable(std::string_view("\0\x1b[0m\x7f\u0085", 8)), "\\x00\\x1b[0m\\x7f\\xc2\\x85");
  EXPECT_EQ(Printable("\xe2\x82 \xc0\xed\xa0\x80"), "\\xe2\\x82 \\xc0\\xed\\xa0\\x80");
  EXPECT_EQ(Printable("\u2028\ufeff"), "\\xe2\\x80\\xa8\\xef\\xbb\\xbf");
  EXPECT_EQ(Printable("abcdef", 6), "abcdef");
  EXPECT_EQ(Printable("abcdef", 5), "abcde\u2026");
  EXPECT_EQ(Printable("ab\u00e9", 3), "ab\u2026");  // not half a character
  EXPECT_EQ(Printable(std::string(1 << 20, '\n')).size(), 80u * 2 + 3);
  EXPECT_EQ(Printable(""), "");
}

}  // namespace
}  // namespace passel
