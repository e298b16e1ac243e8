// Payloads that no honest sender would build.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cluster/messages.h"
#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "tests/cluster/payloads.h"

namespace passel::cluster {
namespace {

// Each field of an entry out of its range: refused, and for the stated reason.
template <typename Entry, typename Parse>
void ExpectRefused(std::vector<std::byte> payload, uint32_t count, Parse parse, Entry bad,
                   const std::string& reason) {
  std::memcpy(payload.data(), &bad, sizeof(bad));
  std::string why;
  EXPECT_FALSE(parse(kShape, count, payload, &why)) << reason;
  EXPECT_NE(why.find(reason), std::string::npos) << "says '" << why << "', not '" << reason << "'";
  EXPECT_FALSE(parse(kShape, count, payload, nullptr));
}

TEST(Messages, QueryFieldsOutOfRange) {
  const auto refused = [](QueryEntry e, const std::string& reason) {
    ExpectRefused(QueryPayload(), 3, ParseQueryOf, e, reason);
  };
  refused({11, 100, 0, 0, 0, 0}, "kv_heads is zero");
  refused({11, 100, 1, 3, 0, 0}, "KV heads out of range");
  refused({11, 100, 0xffffffff, 3, 0, 0}, "KV heads out of range");
  refused({11, 100, 3, 0xffffffff, 0, 0}, "KV heads out of range");
  refused({11, 100, 0, 3, 2, 0}, "exact is neither 0 nor 1");
  refused({11, 4097, 0, 3, 0, 0}, "offloaded_tokens above");
  refused({11, 100, 0, 3, 0, 100}, "row out of range");
  refused({11, 100, 0, 2, 0, 0}, "");  // shorter data: everything behind it is misplaced
}

TEST(Messages, PartialFieldsOutOfRange) {
  const auto refused = [](PartialEntry e, const std::string& reason) {
    ExpectRefused(PartialPayload(), 2, ParsePartialOf, e, reason);
  };
  refused({11, 4096 * 3 + 1, 0, 0, -1, 0}, "sampled_tokens above");
  refused({11, 7, 100, 0, -1, 0}, "row out of range");
  refused({11, 7, 0, 3, -1, 0}, "KV head out of range");
  refused({11, 7, 0, 0, -2, 0}, "segment out of range");
}

TEST(Messages, KvFieldsOutOfRange) {
  const auto refused = [](KvEntry e, const std::string& reason) {
    ExpectRefused(KvPayload(), 3, ParseKvOf, e, reason);
  };
  refused({11, 0, 3, 7, 1, 0}, "KV head out of range");
  refused({11, 4090, 0, 7, 1, 0}, "tokens above");
  refused({11, ~uint64_t{0}, 0, 7, 1, 0}, "tokens above");
  refused({11, 0, 0, 0xffffffff, 1, 0}, "tokens above");
  refused({11, 0, 0, 4096, 1, 0}, "data past the payload's end");
  refused({11, 0, 0, 7, 2, 0}, "has_codes is neither 0 nor 1");
  refused({11, 0, 0, 7, 1, 1}, "reserved is not zero");
}

TEST(Messages, ReadKvFieldsOutOfRange) {
  const auto refused = [](ReadKvEntry e, const std::string& reason) {
    ExpectRefused(ReadKvPayload(), 3, ParseReadKvOf, e, reason);
  };
  refused({11, 0, 3, 7, 0}, "KV head out of range");
  refused({11, 4090, 0, 7, 0}, "tokens above");
  refused({11, ~uint64_t{0}, 0, 7, 0}, "tokens above");
  refused({11, 0, 0, 0xffffffff, 0}, "tokens above");
  refused({11, 0, 0, 0, 0}, "count is zero");
  refused({11, 0, 0, 7, 1}, "reserved is not zero");
  refused({11, 0, 0, 7, uint64_t{1} << 63}, "reserved is not zero");
}

TEST(Messages, KvRowsFieldsOutOfRange) {
  const auto refused = [](KvRowsEntry e, const std::string& reason) {
    ExpectRefused(KvRowsPayload(), 3, ParseKvRowsOf, e, reason);
  };
  refused({11, 0, 3, 7, 0, 0}, "KV head out of range");
  refused({11, 4090, 0, 7, 0, 0}, "tokens above");
  refused({11, ~uint64_t{0}, 0, 7, 0, 0}, "tokens above");
  refused({11, 0, 0, 0xffffffff, 0, 0}, "tokens above");
  refused({11, 0, 0, 4096, 0, 0}, "data past the payload's end");
  refused({11, 0, 0, 0, 0, 0}, "count is zero");
  refused({11, 0, 0, 7, 0, 1}, "reserved is not zero");
  refused({11, 0, 0, 7, 1, 0}, "payload longer");  // no rows where they could not be read
}

// A question whose answer would pass the limit, to the byte.
TEST(Messages, AReadMustFitItsReply) {
  const WireShape large{
      .layers = 1, .kv_heads = 1, .group = 1, .head_dim = 128, .l = 1, .max_tokens = 1u << 20};
  constexpr uint64_t kMost = kMaxPayloadBytes / 512 - 1;  // 512 bytes a token, beside the entries
  for (const uint32_t entries : {1u, 2u, 16u}) {
    for (const uint64_t tokens : {kMost, kMost + 1}) {
      std::vector<ReadKvEntry> ask(entries, ReadKvEntry{1, 0, 0, 1, 0});
      ask.back().count = static_cast<uint32_t>(tokens - entries + 1);
      const auto bytes = std::as_bytes(std::span(ask));
      std::string why;
      EXPECT_EQ(ParseReadKvOf(large, entries, bytes, &why).has_value(), tokens == kMost);
      if (tokens == kMost) {
        EXPECT_EQ(BuildReadKv(large, ask).size(), bytes.size());
        continue;
      }
      EXPECT_EQ(why, "more rows than a reply holds");
      EXPECT_THROW(BuildReadKv(large, ask), Error);
    }
  }
  // Sums that 64 bits do not hold.
  WireShape huge = large;
  huge.head_dim = std::numeric_limits<uint32_t>::max();
  huge.max_tokens = std::numeric_limits<uint64_t>::max();
  const std::vector<ReadKvEntry> ask(64, ReadKvEntry{1, 0, 0, 0xffffffff, 0});
  EXPECT_FALSE(ParseReadKvOf(huge, 64, std::as_bytes(std::span(ask)), nullptr));
}

TEST(Messages, KeyMeanFieldsOutOfRange) {
  ExpectRefused(KeyMeanPayload(), 2, ParseKeyMean, KeyMeanEntry{11, 3, 0}, "KV head out of range");
  ExpectRefused(KeyMeanPayload(), 2, ParseKeyMean, KeyMeanEntry{11, 0, 1}, "reserved is not zero");
}

template <typename Parse>
void ExpectExactSizeCountAndAlignment(const std::vector<std::byte>& payload, uint32_t count,
                                      Parse parse) {
  std::string why;
  EXPECT_TRUE(parse(kShape, count, Copy(payload).get(), &why)) << why;
  for (size_t n = 0; n < payload.size(); ++n) {
    const Copy shorter(std::span<const std::byte>(payload.data(), n));
    ASSERT_FALSE(parse(kShape, count, shorter.get(), &why)) << n << " of " << payload.size();
  }
  auto longer = payload;
  for (int extra = 1; extra <= 32; ++extra) {
    longer.emplace_back();
    ASSERT_FALSE(parse(kShape, count, Copy(longer).get(), &why)) << extra;
  }
  for (const uint32_t wrong : {count - 1, count + 1, 100u, 101u, 0x80000000u, 0xffffffffu}) {
    EXPECT_FALSE(parse(kShape, wrong, Copy(payload).get(), &why)) << wrong;
  }
  for (size_t shift = 1; shift < 16; ++shift) {
    EXPECT_FALSE(parse(kShape, count, Copy(payload, shift).get(), &why)) << shift;
    EXPECT_EQ(why, "payload not aligned");
  }
}

TEST(Messages, SizeCountAndAlignmentMustBeExact) {
  ExpectExactSizeCountAndAlignment(QueryPayload(), 3, ParseQueryOf);
  ExpectExactSizeCountAndAlignment(PartialPayload(), 2, ParsePartialOf);
  ExpectExactSizeCountAndAlignment(KvPayload(), 3, ParseKvOf);
  ExpectExactSizeCountAndAlignment(ReadKvPayload(), 3, ParseReadKvOf);
  ExpectExactSizeCountAndAlignment(KvRowsPayload(), 3, ParseKvRowsOf);
  ExpectExactSizeCountAndAlignment(KeyMeanPayload(), 2, ParseKeyMean);
}

TEST(Messages, SizesThatDoNotFit64BitsAreRefused) {
  constexpr uint32_t kMax = std::numeric_limits<uint32_t>::max();
  WireShape huge{.layers = kMax,
                 .kv_heads = kMax,
                 .group = kMax,
                 .head_dim = kMax,
                 .l = kMax,
                 .max_tokens = std::numeric_limits<uint64_t>::max()};
  auto query = QueryPayload();
  const QueryEntry bad_query{1, 1, 0, kMax, 0, 0};
  std::memcpy(query.data(), &bad_query, sizeof(bad_query));
  std::string why;
  EXPECT_FALSE(ParseQueryOf(huge, 1, query, &why));
  EXPECT_EQ(why, "entry 0: data past the payload's end");
  auto kv = KvPayload();
  const KvEntry bad_kv{1, 0, 0, kMax, 1, 0};
  std::memcpy(kv.data(), &bad_kv, sizeof(bad_kv));
  EXPECT_FALSE(ParseKvOf(huge, 1, kv, &why));
  auto rows = KvRowsPayload();
  const KvRowsEntry bad_rows{1, 0, 0, kMax, 0, 0};
  std::memcpy(rows.data(), &bad_rows, sizeof(bad_rows));
  EXPECT_FALSE(ParseKvRowsOf(huge, 1, rows, &why));
  EXPECT_FALSE(ParsePartialOf(huge, 1, PartialPayload(), &why));
  EXPECT_FALSE(ParseKeyMean(huge, 1, KeyMeanPayload(), &why));
}

TEST(Messages, PayloadsAboveTheLimitAreRefused) {
  const WireShape large{
      .layers = 1, .kv_heads = 1, .group = 1, .head_dim = 128, .l = 1, .max_tokens = 1u << 20};
  const KvEntry fits{1, 0, 0, 32767, 0, 0};  // 512 bytes a token
  const std::vector<bf16> rows(size_t{32768} * 256);
  const KvSource source{rows.data(), nullptr};
  Pieces pieces;
  const auto entries = BuildKv(large, {&fits, 1}, {&source, 1}, &pieces);
  EXPECT_LE(Joined(entries, pieces).size(), kMaxPayloadBytes);
  const KvEntry above{1, 0, 0, 32768, 0, 0};
  EXPECT_THROW(BuildKv(large, {&above, 1}, {&source, 1}, &pieces), Error);
  std::vector<std::byte> payload(sizeof(KvEntry) + uint64_t{32768} * 512);
  std::memcpy(payload.data(), &above, sizeof(above));
  std::string why;
  EXPECT_FALSE(ParseKvOf(large, 1, payload, &why));
  EXPECT_EQ(why, "payload above the limit");
}

TEST(Messages, BuildingWhatWouldBeRefusedIsABug) {
  const QueryEntry query{1, 4097, 0, 1, 0, 0};
  Pieces pieces;
  const std::vector<bf16> q(64);
  const QuerySource source{q.data(), nullptr};
  EXPECT_THROW(BuildQuery(kShape, {&query, 1}, {&source, 1}, &pieces), Error);
  const PartialEntry partial{1, 0, 0, 3, 0, 0};
  const void* const values = q.data();
  EXPECT_THROW(BuildPartial(kShape, {&partial, 1}, {&values, 1}, &pieces), Error);
  const QueryEntry valid{1, 100, 0, 1, 1, 0};
  EXPECT_THROW(BuildQuery(kShape, {&valid, 1}, {}, &pieces), Error);
  const KvRowsEntry rows{1, 4096, 0, 1, 0, 0};
  const bf16* const q_data = q.data();
  EXPECT_THROW(BuildKvRows(kShape, {&rows, 1}, {&q_data, 1}, &pieces), Error);
  const ReadKvEntry read{1, 0, 0, 0, 0};
  EXPECT_THROW(BuildReadKv(kShape, {&read, 1}), Error);
  const std::vector<KeyMeanEntry> many(101, KeyMeanEntry{1, 0, 0});
  EXPECT_THROW(BuildKeyMean(kShape, many, nullptr), Error);
}

// All of a view's memory lies inside the payload; reads every byte of it (for ASan).
template <typename T>
uint64_t Sum(std::span<const std::byte> payload, std::span<const T> part) {
  if (part.empty()) return 0;
  const auto bytes = std::as_bytes(part);
  EXPECT_GE(bytes.data(), payload.data());
  EXPECT_LE(bytes.data() + bytes.size(), payload.data() + payload.size());
  uint64_t sum = 0;
  for (const std::byte b : bytes) sum += static_cast<uint64_t>(b);
  return sum;
}

template <typename Parse, typename Touch>
void Mutate(const std::vector<std::byte>& valid, uint32_t count, size_t entry_bytes, Parse parse,
            Touch touch) {
  Random random(99);
  int accepted = 0, refused = 0;
  volatile uint64_t sink = 0;
  for (int round = 0; round < 25000; ++round) {
    std::vector<std::byte> bytes = valid;
    if (random.Next() % 4 == 0) bytes.resize(random.Next() % (valid.size() + 64));
    Copy copy(bytes);
    // Mostly in the entries, where it hurts.
    const size_t reach =
        random.Next() % 4 == 0 ? bytes.size() : std::min(bytes.size(), count * entry_bytes);
    const uint64_t edits = random.Next() % 4;
    for (uint64_t e = 0; e < edits && reach > 0; ++e) {
      std::byte& at = copy.edit()[random.Next() % reach];
      if (random.Next() % 2 == 0) {
        at ^= std::byte(static_cast<uint8_t>(1u << (random.Next() % 8)));
      } else {
        at = std::byte(static_cast<uint8_t>(random.Next()));
      }
    }
    const uint32_t n = random.Next() % 8 == 0 ? static_cast<uint32_t>(random.Next() % 6) : count;
    std::string why;
    const auto views = parse(kShape, n, copy.get(), &why);
    if (!views) {
      ++refused;
      ASSERT_FALSE(why.empty());
      continue;
    }
    ++accepted;
    ASSERT_EQ(views->size(), n);
    for (const auto& view : *views) sink = sink + touch(copy.get(), view);
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 1000);
}

TEST(Messages, MutatedPayloadsNeverReachOutside) {
  Mutate(QueryPayload(), 3, sizeof(QueryEntry), ParseQueryOf,
         [](std::span<const std::byte> p, const QueryView& v) {
           EXPECT_LE(v.entry.first_kv_head + v.entry.kv_heads, kShape.kv_heads);
           return Sum(p, v.q) + Sum(p, v.codes);
         });
  Mutate(PartialPayload(), 2, sizeof(PartialEntry), ParsePartialOf,
         [](std::span<const std::byte> p, const PartialView& v) {
           EXPECT_LT(v.entry.kv_head, kShape.kv_heads);
           return Sum(p, v.max) + Sum(p, v.den) + Sum(p, v.num);
         });
  Mutate(KvPayload(), 3, sizeof(KvEntry), ParseKvOf,
         [](std::span<const std::byte> p, const KvView& v) {
           EXPECT_LE(v.entry.first_token + v.entry.count, kShape.max_tokens);
           EXPECT_EQ(v.rows.size(), v.entry.count * 32u);
           return Sum(p, v.rows) + Sum(p, v.codes);
         });
  Mutate(ReadKvPayload(), 3, sizeof(ReadKvEntry), ParseReadKvOf,
         [](std::span<const std::byte>, const ReadKvEntry& e) {
           EXPECT_LT(e.kv_head, kShape.kv_heads);
           EXPECT_LE(e.first_token + e.count, kShape.max_tokens);
           return uint64_t{0};
         });
  Mutate(KvRowsPayload(), 3, sizeof(KvRowsEntry), ParseKvRowsOf,
         [](std::span<const std::byte> p, const KvRowsView& v) {
           EXPECT_LE(v.entry.first_token + v.entry.count, kShape.max_tokens);
           EXPECT_EQ(v.rows.size(), v.entry.status ? 0u : v.entry.count * 32u);
           return Sum(p, v.rows);
         });
  Mutate(KeyMeanPayload(), 2, sizeof(KeyMeanEntry), ParseKeyMean,
         [](std::span<const std::byte> p, const KeyMeanView& v) {
           EXPECT_LT(v.entry.kv_head, kShape.kv_heads);
           return Sum(p, v.mean);
         });
}

}  // namespace
}  // namespace passel::cluster
