#include "cluster/messages.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "tests/cluster/joined.h"

namespace passel::cluster {
namespace {

const WireShape kShape{.layers = 4,
                       .kv_heads = 3,
                       .group = 3,
                       .head_dim = 16,
                       .l = 5,
                       .max_tokens = 4096,
                       .max_entries = 100,
                       .k = 10};
constexpr uint16_t kCode = 1023;  // the largest of 10 bits

// A copy with nothing readable behind it (for ASan), aligned to 16 bytes plus `shift`.
class Copy {
 public:
  explicit Copy(std::span<const std::byte> bytes, size_t shift = 0)
      : memory_(
            static_cast<std::byte*>(::operator new (bytes.size() + shift, std::align_val_t{16}))),
        bytes_(memory_.get() + shift, bytes.size()) {
    if (!bytes.empty()) std::memcpy(bytes_.data(), bytes.data(), bytes.size());
  }
  std::span<const std::byte> get() const { return bytes_; }
  std::span<std::byte> edit() { return bytes_; }

 private:
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{16}); }
  };
  std::unique_ptr<std::byte, Delete> memory_;
  std::span<std::byte> bytes_;
};

// Numbers the elements of all spaces through, so that every place has its own value.
template <typename T>
void Fill(std::span<T> to, uint32_t* next) {
  for (T& x : to) {
    const uint32_t n = (*next)++;
    if constexpr (std::is_same_v<T, bf16>) {
      x = bf16{static_cast<uint16_t>(n)};
    } else if constexpr (std::is_same_v<T, uint16_t>) {
      x = static_cast<uint16_t>(n % (kCode + 1));
    } else {
      x = static_cast<T>(n);
    }
  }
}
template <typename T>
void ExpectFilled(std::span<const T> is, uint32_t* next) {
  std::vector<T> expected(is.size());
  Fill(std::span(expected), next);
  EXPECT_TRUE(is.empty() || std::memcmp(is.data(), expected.data(), is.size_bytes()) == 0);
}

std::vector<QueryEntry> QueryEntries() {
  return {{11, 100, 0, 3, 0, 0}, {12, 4096, 1, 2, 1, 1}, {~uint64_t{0}, 0, 2, 1, 0, 99}};
}
std::vector<PartialEntry> PartialEntries() {
  return {{11, 7, 0, 0, -1, 0}, {12, 4096 * 3, 99, 2, 5, 3}};
}
std::vector<KvEntry> KvEntries() {
  return {{11, 0, 0, 7, 1, 0}, {12, 4095, 2, 1, 0, 0}, {13, 4096, 1, 0, 1, 0}};
}
std::vector<KeyMeanEntry> KeyMeanEntries() { return {{11, 0, 0}, {12, 2, 0}}; }

// Of vectors that begin apart, as they lie on a device.
std::vector<std::byte> QueryPayload() {
  const auto entries = QueryEntries();
  std::vector<std::vector<bf16>> q;
  std::vector<std::vector<uint16_t>> codes;
  std::vector<QuerySource> sources;
  uint32_t n = 1;
  for (const QueryEntry& e : entries) {
    const size_t heads = size_t{e.kv_heads} * kShape.group;
    Fill(std::span(q.emplace_back(heads * kShape.head_dim)), &n);
    codes.emplace_back(e.exact ? 0 : heads * kShape.l);
    Fill(std::span(codes.back()), &n);
    sources.push_back({q.back().data(), e.exact ? nullptr : codes.back().data()});
  }
  Pieces pieces;
  auto out = BuildQuery(kShape, entries, sources, &pieces);
  return Joined(std::move(out), pieces);
}
std::vector<std::byte> PartialPayload() {
  const auto entries = PartialEntries();
  struct Values {
    std::array<float, 3> max, den;
    std::array<bf16, 48> num;
  };
  std::vector<Values> values(entries.size());
  std::vector<const void*> sources;
  uint32_t n = 1;
  for (Values& v : values) {
    Fill(std::span<float>(v.max), &n), Fill(std::span<float>(v.den), &n);
    Fill(std::span<bf16>(v.num), &n);
    sources.push_back(&v);
  }
  Pieces pieces;
  auto out = BuildPartial(kShape, entries, sources, &pieces);
  return Joined(std::move(out), pieces);
}
std::vector<std::byte> KvPayload() {
  std::vector<KvSpace> spaces;
  auto out = BuildKv(kShape, KvEntries(), &spaces);
  uint32_t n = 1;
  for (auto& s : spaces) Fill(s.rows, &n), Fill(s.codes, &n);
  return out;
}
std::vector<std::byte> KeyMeanPayload() {
  std::vector<std::span<float>> spaces;
  auto out = BuildKeyMean(kShape, KeyMeanEntries(), &spaces);
  uint32_t n = 1;
  for (auto& s : spaces) Fill(s, &n);
  return out;
}

// Of a payload in one piece.
auto ParseQueryOf(const WireShape& shape, uint32_t count, std::span<const std::byte> payload,
                  std::string* why) {
  return ParseQuery(shape, count, {&payload, 1}, why);
}
auto ParsePartialOf(const WireShape& shape, uint32_t count, std::span<const std::byte> payload,
                    std::string* why) {
  return ParsePartial(shape, count, {&payload, 1}, why);
}

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
  const auto views = ParseKv(kShape, 3, payload, &why);
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
    ExpectRefused(KvPayload(), 3, ParseKv, e, reason);
  };
  refused({11, 0, 3, 7, 1, 0}, "KV head out of range");
  refused({11, 4090, 0, 7, 1, 0}, "tokens above");
  refused({11, ~uint64_t{0}, 0, 7, 1, 0}, "tokens above");
  refused({11, 0, 0, 0xffffffff, 1, 0}, "tokens above");
  refused({11, 0, 0, 4096, 1, 0}, "data past the payload's end");
  refused({11, 0, 0, 7, 2, 0}, "has_codes is neither 0 nor 1");
  refused({11, 0, 0, 7, 1, 1}, "reserved is not zero");
}

TEST(Messages, KeyMeanFieldsOutOfRange) {
  ExpectRefused(KeyMeanPayload(), 2, ParseKeyMean, KeyMeanEntry{11, 3, 0}, "KV head out of range");
  ExpectRefused(KeyMeanPayload(), 2, ParseKeyMean, KeyMeanEntry{11, 0, 1}, "reserved is not zero");
}

TEST(Messages, CodesWithBitsAboveKAreRefused) {
  std::vector<KvSpace> kv_spaces;
  auto kv = BuildKv(kShape, KvEntries(), &kv_spaces);
  ASSERT_TRUE(ParseKv(kShape, 3, kv, nullptr));
  kv_spaces[0].codes.back() = kCode + 1;
  std::string why;
  EXPECT_FALSE(ParseKv(kShape, 3, kv, &why));
  EXPECT_EQ(why, "entry 0: code out of range");
  WireShape wide = kShape;
  wide.k = 16;
  EXPECT_TRUE(ParseKv(wide, 3, kv, nullptr));
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
  ExpectExactSizeCountAndAlignment(KvPayload(), 3, ParseKv);
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
  EXPECT_FALSE(ParseKv(huge, 1, kv, &why));
  EXPECT_FALSE(ParsePartialOf(huge, 1, PartialPayload(), &why));
  EXPECT_FALSE(ParseKeyMean(huge, 1, KeyMeanPayload(), &why));
}

TEST(Messages, PayloadsAboveTheLimitAreRefused) {
  const WireShape large{
      .layers = 1, .kv_heads = 1, .group = 1, .head_dim = 128, .l = 1, .max_tokens = 1u << 20};
  const KvEntry fits{1, 0, 0, 32767, 0, 0};  // 512 bytes a token
  EXPECT_LE(BuildKv(large, std::span(&fits, 1), nullptr).size(), kMaxPayloadBytes);
  const KvEntry above{1, 0, 0, 32768, 0, 0};
  EXPECT_THROW(BuildKv(large, std::span(&above, 1), nullptr), Error);
  std::vector<std::byte> payload(sizeof(KvEntry) + uint64_t{32768} * 512);
  std::memcpy(payload.data(), &above, sizeof(above));
  std::string why;
  EXPECT_FALSE(ParseKv(large, 1, payload, &why));
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
  Mutate(KvPayload(), 3, sizeof(KvEntry), ParseKv,
         [](std::span<const std::byte> p, const KvView& v) {
           EXPECT_LE(v.entry.first_token + v.entry.count, kShape.max_tokens);
           EXPECT_EQ(v.rows.size(), v.entry.count * 32u);
           for (const uint16_t c : v.codes) EXPECT_LE(c, kCode);
           return Sum(p, v.rows) + Sum(p, v.codes);
         });
  Mutate(KeyMeanPayload(), 2, sizeof(KeyMeanEntry), ParseKeyMean,
         [](std::span<const std::byte> p, const KeyMeanView& v) {
           EXPECT_LT(v.entry.kv_head, kShape.kv_heads);
           return Sum(p, v.mean);
         });
}

}  // namespace
}  // namespace passel::cluster
