#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cluster/messages.h"
#include "tests/cluster/joined.h"

// Valid payloads of each kind, for tests to read and to spoil.
namespace passel::cluster {

inline const WireShape kShape{.layers = 4,
                              .kv_heads = 3,
                              .group = 3,
                              .head_dim = 16,
                              .l = 5,
                              .max_tokens = 4096,
                              .max_entries = 100};
inline constexpr uint16_t kCode = 1023;  // the largest of 10 bits

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

inline std::vector<QueryEntry> QueryEntries() {
  return {{11, 100, 0, 3, 0, 0}, {12, 4096, 1, 2, 1, 1}, {~uint64_t{0}, 0, 2, 1, 0, 99}};
}
inline std::vector<PartialEntry> PartialEntries() {
  return {{11, 7, 0, 0, -1, 0}, {12, 4096 * 3, 99, 2, 5, 3}};
}
inline std::vector<KvEntry> KvEntries() {
  return {{11, 0, 0, 7, 1, 0}, {12, 4095, 2, 1, 0, 0}, {13, 4096, 1, 0, 1, 0}};
}
inline std::vector<ReadKvEntry> ReadKvEntries() {
  return {{11, 0, 0, 7, 0}, {12, 4095, 2, 1, 0}, {~uint64_t{0}, 0, 1, 4096, 0}};
}
inline std::vector<KvRowsEntry> KvRowsEntries() {
  return {{11, 0, 0, 7, 0, 0}, {12, 4095, 2, 1, 0, 0}, {13, 0, 1, 4096, 3, 0}};
}
inline std::vector<KeyMeanEntry> KeyMeanEntries() { return {{11, 0, 0}, {12, 2, 0}}; }

// Of vectors that begin apart, as they lie on a device.
inline std::vector<std::byte> QueryPayload() {
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
inline std::vector<std::byte> PartialPayload() {
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
inline std::vector<std::byte> KvPayload() {
  const auto entries = KvEntries();
  std::vector<std::vector<bf16>> rows;
  std::vector<std::vector<uint16_t>> codes;
  std::vector<KvSource> sources;
  uint32_t n = 1;
  for (const KvEntry& e : entries) {
    Fill(std::span(rows.emplace_back(size_t{e.count} * 2 * kShape.head_dim)), &n);
    codes.emplace_back(e.has_codes ? size_t{e.count} * kShape.l : 0);
    Fill(std::span(codes.back()), &n);
    sources.push_back({rows.back().data(), e.has_codes ? codes.back().data() : nullptr});
  }
  Pieces pieces;
  auto out = BuildKv(kShape, entries, sources, &pieces);
  return Joined(std::move(out), pieces);
}
inline std::vector<std::byte> ReadKvPayload() { return BuildReadKv(kShape, ReadKvEntries()); }
inline std::vector<std::byte> KvRowsPayload() {
  const auto entries = KvRowsEntries();
  std::vector<std::vector<bf16>> rows;
  std::vector<const bf16*> sources;
  uint32_t n = 1;
  for (const KvRowsEntry& e : entries) {
    Fill(std::span(rows.emplace_back(e.status ? 0 : size_t{e.count} * 2 * kShape.head_dim)), &n);
    sources.push_back(e.status ? nullptr : rows.back().data());
  }
  Pieces pieces;
  auto out = BuildKvRows(kShape, entries, sources, &pieces);
  return Joined(std::move(out), pieces);
}
inline std::vector<std::byte> KeyMeanPayload() {
  std::vector<std::span<float>> spaces;
  auto out = BuildKeyMean(kShape, KeyMeanEntries(), &spaces);
  uint32_t n = 1;
  for (auto& s : spaces) Fill(s, &n);
  return out;
}

// Of a payload in one piece.
inline auto ParseQueryOf(const WireShape& shape, uint32_t count, std::span<const std::byte> payload,
                         std::string* why) {
  return ParseQuery(shape, count, {&payload, 1}, why);
}
inline auto ParsePartialOf(const WireShape& shape, uint32_t count,
                           std::span<const std::byte> payload, std::string* why) {
  return ParsePartial(shape, count, {&payload, 1}, why);
}
inline auto ParseKvOf(const WireShape& shape, uint32_t count, std::span<const std::byte> payload,
                      std::string* why) {
  return ParseKv(shape, count, {&payload, 1}, why);
}
inline auto ParseReadKvOf(const WireShape& shape, uint32_t count,
                          std::span<const std::byte> payload, std::string* why) {
  return ParseReadKv(shape, count, {&payload, 1}, why);
}
inline auto ParseKvRowsOf(const WireShape& shape, uint32_t count,
                          std::span<const std::byte> payload, std::string* why) {
  return ParseKvRows(shape, count, {&payload, 1}, why);
}

}  // namespace passel::cluster
