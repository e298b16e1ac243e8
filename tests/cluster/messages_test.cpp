// Payloads of hot frames, as they are built and read.

#include "cluster/messages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "runtime/base/random.h"
#include "tests/cluster/payloads.h"

namespace passel::cluster {
namespace {

TEST(Messages, QueryRoundTrip) {
  const auto payload = QueryPayload();
  std::string why;
  const auto views = ParseQueryOf(kShape, 3, payload, &why);
  ASSERT_TRUE(views) << why;
  ASSERT_EQ(views->size(), 3u);
  uint32_t n = 1;
  for (size_t i = 0; i < 3; ++i) {
    const QueryView& v = (*views)[i];
    const QueryEntry e = QueryEntries()[i];
    EXPECT_EQ(std::memcmp(&v.entry, &e, sizeof(e)), 0);
    EXPECT_EQ(v.q.size(), e.kv_heads * 3u * 16u);
    EXPECT_EQ(v.codes.size(), e.exact ? 0u : e.kv_heads * 3u * 5u);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(v.q.data()) % 16, 0u);
    ExpectFilled(v.q, &n);
    ExpectFilled(v.codes, &n);
  }
  // 3 entries; 9, 6 and 3 query heads; the codes padded to 16 bytes, none where exact.
  EXPECT_EQ(payload.size(), 3u * 32 + (9 + 6 + 3) * 32 + 96 + 0 + 32);
}

TEST(Messages, PartialRoundTrip) {
  const auto payload = PartialPayload();
  std::string why;
  const auto views = ParsePartialOf(kShape, 2, payload, &why);
  ASSERT_TRUE(views) << why;
  ASSERT_EQ(views->size(), 2u);
  uint32_t n = 1;
  for (size_t i = 0; i < 2; ++i) {
    const PartialView& v = (*views)[i];
    const PartialEntry e = PartialEntries()[i];
    EXPECT_EQ(std::memcmp(&v.entry, &e, sizeof(e)), 0);
    EXPECT_EQ(v.max.size(), 3u);
    EXPECT_EQ(v.num.size(), 48u);
    ExpectFilled(v.max, &n);
    ExpectFilled(v.den, &n);
    ExpectFilled(v.num, &n);
  }
  EXPECT_EQ(payload.size(), 2u * 32 + 2 * 128);  // 12 + 12 + 96 bytes, padded
}

TEST(Messages, KvRoundTrip) {
  const auto payload = KvPayload();
  std::string why;
  const auto views = ParseKvOf(kShape, 3, payload, &why);
  ASSERT_TRUE(views) << why;
  ASSERT_EQ(views->size(), 3u);
  uint32_t n = 1;
  for (size_t i = 0; i < 3; ++i) {
    const KvView& v = (*views)[i];
    const KvEntry e = KvEntries()[i];
    EXPECT_EQ(std::memcmp(&v.entry, &e, sizeof(e)), 0);
    EXPECT_EQ(v.rows.size(), e.count * 32u);
    EXPECT_EQ(v.codes.size(), e.has_codes ? e.count * 5u : 0u);
    ExpectFilled(v.rows, &n);
    ExpectFilled(v.codes, &n);
  }
  EXPECT_EQ(payload.size(), 3u * 32 + 7 * 64 + 80 + 64);
}

TEST(Messages, ReadKvRoundTrip) {
  const auto payload = ReadKvPayload();
  std::string why;
  const auto entries = ParseReadKvOf(kShape, 3, payload, &why);
  ASSERT_TRUE(entries) << why;
  ASSERT_EQ(entries->size(), 3u);
  const auto want = ReadKvEntries();
  EXPECT_EQ(std::memcmp(entries->data(), want.data(), 3 * sizeof(ReadKvEntry)), 0);
  EXPECT_EQ(payload.size(), 3u * 32);
}

TEST(Messages, KvRowsRoundTrip) {
  const auto payload = KvRowsPayload();
  std::string why;
  const auto views = ParseKvRowsOf(kShape, 3, payload, &why);
  ASSERT_TRUE(views) << why;
  ASSERT_EQ(views->size(), 3u);
  uint32_t n = 1;
  for (size_t i = 0; i < 3; ++i) {
    const KvRowsView& v = (*views)[i];
    const KvRowsEntry e = KvRowsEntries()[i];
    EXPECT_EQ(std::memcmp(&v.entry, &e, sizeof(e)), 0);
    EXPECT_EQ(v.rows.size(), e.status ? 0u : e.count * 32u);
    ExpectFilled(v.rows, &n);
  }
  EXPECT_EQ(payload.size(), 3u * 32 + 8 * 64);
}

TEST(Messages, KeyMeanRoundTrip) {
  const auto payload = KeyMeanPayload();
  std::string why;
  const auto views = ParseKeyMean(kShape, 2, payload, &why);
  ASSERT_TRUE(views) << why;
  ASSERT_EQ(views->size(), 2u);
  uint32_t n = 1;
  for (const KeyMeanView& v : *views) ExpectFilled(v.mean, &n);
  EXPECT_EQ((*views)[1].entry.kv_head, 2u);
  EXPECT_EQ(payload.size(), 2u * 16 + 2 * 64);
}

TEST(Messages, NoEntriesIsAnEmptyPayload) {
  Pieces pieces;
  EXPECT_TRUE(BuildQuery(kShape, {}, {}, &pieces).empty());
  EXPECT_TRUE(pieces.empty());
  EXPECT_TRUE(ParseQueryOf(kShape, 0, {}, nullptr));
  EXPECT_FALSE(ParseQueryOf(kShape, 1, {}, nullptr));
}

template <typename T>
bool Same(std::span<const T> a, std::span<const T> b) {
  return std::ranges::equal(std::as_bytes(a), std::as_bytes(b));
}
bool SameData(const QueryView& a, const QueryView& b) {
  return Same(a.q, b.q) && Same(a.codes, b.codes);
}
bool SameData(const PartialView& a, const PartialView& b) {
  return Same(a.max, b.max) && Same(a.den, b.den) && Same(a.num, b.num);
}
bool SameData(const KvRowsView& a, const KvRowsView& b) { return Same(a.rows, b.rows); }

// A payload cut anywhere, empty pieces among them: read as if it were whole where no array is cut,
// else refused.
template <typename View, typename Parse, typename ParseOf>
void ExpectPiecesAsWhole(const std::vector<std::byte>& payload, uint32_t count, Parse parse,
                         ParseOf parse_of) {
  const auto whole = parse_of(kShape, count, payload, nullptr);
  ASSERT_TRUE(whole);
  Random random(12);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 5000; ++round) {
    // In memory of their own, so that nothing beyond a piece is readable.
    std::vector<std::vector<std::byte>> memory;
    for (size_t at = 0; at < payload.size();) {
      size_t size = random.Next() % (payload.size() + 1);
      if (random.Next() % 4 != 0) size = size / 16 * 16;
      size = std::min(size, payload.size() - at);
      memory.emplace_back(payload.begin() + static_cast<ptrdiff_t>(at),
                          payload.begin() + static_cast<ptrdiff_t>(at + size));
      at += size;
    }
    const std::vector<std::span<const std::byte>> pieces(memory.begin(), memory.end());
    std::string why;
    const auto views = parse(kShape, count, pieces, &why);
    if (!views) {
      ++refused;
      ASSERT_NE(why.find("an array in pieces"), std::string::npos) << why;
      continue;
    }
    ++accepted;
    ASSERT_EQ(views->size(), whole->size());
    for (size_t i = 0; i < views->size(); ++i) {
      ASSERT_EQ(std::memcmp(&(*views)[i].entry, &(*whole)[i].entry, sizeof(View::entry)), 0);
      ASSERT_TRUE(SameData((*views)[i], (*whole)[i]));
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(refused, 100);
}
TEST(Messages, PiecesAreReadWhereTheyLie) {
  ExpectPiecesAsWhole<QueryView>(QueryPayload(), 3, ParseQuery, ParseQueryOf);
  ExpectPiecesAsWhole<PartialView>(PartialPayload(), 2, ParsePartial, ParsePartialOf);
  ExpectPiecesAsWhole<KvRowsView>(KvRowsPayload(), 3, ParseKvRows, ParseKvRowsOf);
}

}  // namespace
}  // namespace passel::cluster
