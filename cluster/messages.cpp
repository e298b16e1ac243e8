#include "cluster/messages.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "runtime/base/checked_math.h"
#include "runtime/base/error.h"

namespace passel::cluster {
namespace {

static_assert(std::endian::native == std::endian::little, "payloads are little-endian in memory");

constexpr uint64_t kAlign = 16;

// Bytes of the (at most three) arrays that make up an entry's data, in wire order.
using Parts = std::array<uint64_t, 3>;

// Product of sizes, nullopt where 64 bits do not hold it.
template <typename... Rest>
std::optional<uint64_t> Product(uint64_t first, Rest... rest) {
  std::optional<uint64_t> r = first;
  ((r = r ? CheckedMul(*r, static_cast<uint64_t>(rest)) : r), ...);
  return r;
}

std::optional<Parts> AsParts(std::optional<uint64_t> a, std::optional<uint64_t> b,
                             std::optional<uint64_t> c) {
  if (!a || !b || !c) return std::nullopt;
  return Parts{*a, *b, *c};
}

std::optional<Parts> PartsOf(const WireShape& s, const QueryEntry& e) {
  return AsParts(Product(e.kv_heads, s.group, s.head_dim, sizeof(bf16)),
                 e.exact ? 0 : Product(e.kv_heads, s.group, s.l, sizeof(uint16_t)), 0);
}
std::optional<Parts> PartsOf(const WireShape& s, const PartialEntry&) {
  const auto scalar = Product(s.group, sizeof(float));
  return AsParts(scalar, scalar, Product(s.group, s.head_dim, sizeof(bf16)));
}
std::optional<Parts> PartsOf(const WireShape& s, const KvEntry& e) {
  return AsParts(Product(e.count, 2, s.head_dim, sizeof(bf16)),
                 e.has_codes ? Product(e.count, s.l, sizeof(uint16_t)) : 0, 0);
}
std::optional<Parts> PartsOf(const WireShape& s, const KeyMeanEntry&) {
  return AsParts(Product(s.head_dim, sizeof(float)), 0, 0);
}
std::optional<Parts> PartsOf(const WireShape&, const ReadKvEntry&) { return Parts{}; }
std::optional<Parts> PartsOf(const WireShape& s, const KvRowsEntry& e) {
  return AsParts(e.status == 0 ? Product(e.count, 2, s.head_dim, sizeof(bf16)) : 0, 0, 0);
}

// What is wrong with an entry; null where nothing is.
const char* Fault(const WireShape& s, const QueryEntry& e) {
  if (e.kv_heads == 0) return "kv_heads is zero";
  if (uint64_t{e.first_kv_head} + e.kv_heads > s.kv_heads) return "KV heads out of range";
  if (e.exact > 1) return "exact is neither 0 nor 1";
  if (e.offloaded_tokens > s.max_tokens) return "offloaded_tokens above the context limit";
  if (e.row >= s.max_entries) return "row out of range";
  return nullptr;
}
const char* Fault(const WireShape& s, const PartialEntry& e) {
  if (e.kv_head >= s.kv_heads) return "KV head out of range";
  if (e.row >= s.max_entries) return "row out of range";
  if (e.segment < -1) return "segment out of range";
  const auto most = CheckedMul(s.max_tokens, s.group);
  if (most && e.sampled_tokens > *most) return "sampled_tokens above the context limit";
  return nullptr;
}
// Of tokens of a KV head; for the entries that name such.
template <typename Entry>
const char* TokensFault(const WireShape& s, const Entry& e) {
  if (e.kv_head >= s.kv_heads) return "KV head out of range";
  if (e.reserved != 0) return "reserved is not zero";
  const auto end = CheckedAdd(e.first_token, e.count);
  if (!end || *end > s.max_tokens) return "tokens above the context limit";
  return nullptr;
}
const char* Fault(const WireShape& s, const KvEntry& e) {
  if (e.has_codes > 1) return "has_codes is neither 0 nor 1";
  return TokensFault(s, e);
}
const char* Fault(const WireShape& s, const ReadKvEntry& e) {
  return e.count == 0 ? "count is zero" : TokensFault(s, e);
}
const char* Fault(const WireShape& s, const KvRowsEntry& e) {
  return e.count == 0 ? "count is zero" : TokensFault(s, e);
}
const char* Fault(const WireShape& s, const KeyMeanEntry& e) {
  if (e.kv_head >= s.kv_heads) return "KV head out of range";
  if (e.reserved != 0) return "reserved is not zero";
  return nullptr;
}

template <typename T>
bool Reject(std::string* why, T&& reason) {
  if (why != nullptr) *why = std::forward<T>(reason);
  return false;
}

// Reads pieces one behind the other.
class Reader {
 public:
  explicit Reader(PayloadPieces pieces) : pieces_(pieces) {
    for (const auto& piece : pieces) left_ += piece.size();
  }
  uint64_t left() const { return left_; }
  // The next `bytes` bytes, of which there are as many: copied, where `to` is set.
  void Copy(std::byte* to, uint64_t bytes) {
    left_ -= bytes;
    while (bytes > 0) {
      const auto here = Next().first(std::min<uint64_t>(bytes, Next().size()));
      if (to != nullptr) to = std::copy(here.begin(), here.end(), to);
      at_ += here.size();
      bytes -= here.size();
    }
  }
  // The next array where it lies; false where it lies in several pieces or is not aligned.
  template <typename T>
  bool Take(uint64_t bytes, std::span<const T>* out) {
    *out = {};
    if (bytes == 0) return true;
    const auto here = Next();
    if (here.size() < bytes || reinterpret_cast<uintptr_t>(here.data()) % alignof(T) != 0) {
      return false;
    }
    *out = {reinterpret_cast<const T*>(here.data()), bytes / sizeof(T)};
    at_ += bytes;
    left_ -= bytes;
    return true;
  }

 private:
  // What is left of the first piece that is not used up.
  std::span<const std::byte> Next() {
    while (at_ == pieces_.front().size()) {
      pieces_ = pieces_.subspan(1);
      at_ = 0;
    }
    return pieces_.front().subspan(at_);
  }

  PayloadPieces pieces_;
  uint64_t at_ = 0;  // in the first
  uint64_t left_ = 0;
};

// The array of `bytes` bytes at `offset`, which moves past it.
template <typename T>
std::span<T> Take(std::byte* base, uint64_t& offset, uint64_t bytes) {
  const std::span<T> out(reinterpret_cast<T*>(base + offset), bytes / sizeof(T));
  offset += bytes;
  return out;
}

// Where entry `i`'s data ends if it starts at `offset`; nullopt where 64 bits do not hold it.
std::optional<uint64_t> EndOf(const Parts& parts, uint64_t offset) {
  std::optional<uint64_t> end = offset;
  for (const uint64_t p : parts) end = end ? CheckedAdd(*end, p) : end;
  if (end) end = CheckedAdd(*end, kAlign - 1);
  if (end) *end = *end / kAlign * kAlign;
  return end;
}

// Checks everything but the arrays and calls visit(entry, parts, reader) for each entry, which
// takes the arrays of its data and returns what is wrong with them, or null. Nothing is visited
// past the payload's end; what was visited counts only when the whole payload fits, which the
// result says.
template <typename Entry, typename Visit>
bool Walk(const WireShape& shape, uint32_t count, PayloadPieces payload, std::string* why,
          Visit visit) {
  Reader reader(payload);
  const uint64_t size = reader.left();
  if (count > shape.max_entries) return Reject(why, "too many entries");
  if (size > kMaxPayloadBytes) return Reject(why, "payload above the limit");
  if (payload.size() == 1 && reinterpret_cast<uintptr_t>(payload[0].data()) % kAlign != 0) {
    return Reject(why, "payload not aligned");
  }
  const uint64_t entry_bytes = uint64_t{count} * sizeof(Entry);
  uint64_t offset = RoundUp(entry_bytes, kAlign);
  if (offset > size) return Reject(why, "payload ends inside the entries");
  std::vector<Entry> entries(count);
  reader.Copy(reinterpret_cast<std::byte*>(entries.data()), entry_bytes);
  reader.Copy(nullptr, offset - entry_bytes);
  for (uint32_t i = 0; i < count; ++i) {
    const auto refuse = [&](const char* reason) {
      return Reject(why, "entry " + std::to_string(i) + ": " + reason);
    };
    if (const char* fault = Fault(shape, entries[i])) return refuse(fault);
    const auto parts = PartsOf(shape, entries[i]);
    const auto end = parts ? EndOf(*parts, offset) : std::nullopt;
    if (!end || *end > size) return refuse("data past the payload's end");
    if (const char* fault = visit(entries[i], *parts, reader)) return refuse(fault);
    reader.Copy(nullptr, reader.left() - (size - *end));
    offset = *end;
  }
  if (offset != size) return Reject(why, "payload longer than its entries say");
  return true;
}
constexpr const char* kInPieces = "an array in pieces";

// Checks the entries and calls visit(i, parts, offset, end) with where the data of each begins and
// ends, padding included; returns where the last ends.
template <typename Entry, typename Visit>
uint64_t PlaceAll(const WireShape& shape, std::span<const Entry> entries, Visit visit) {
  Check(entries.size() <= shape.max_entries, "payload with too many entries");
  uint64_t offset = RoundUp(entries.size_bytes(), kAlign);
  for (size_t i = 0; i < entries.size(); ++i) {
    const char* fault = Fault(shape, entries[i]);
    Check(fault == nullptr, fault != nullptr ? fault : "");
    const auto parts = PartsOf(shape, entries[i]);
    const auto end = parts ? EndOf(*parts, offset) : std::nullopt;
    Check(end && *end <= kMaxPayloadBytes, "payload above the limit: split it");
    visit(i, *parts, offset, *end);
    offset = *end;
  }
  Check(offset <= kMaxPayloadBytes, "payload above the limit: split it");
  return offset;
}

// Whether the rows that `entries` ask for fit a reply.
bool FitOneReply(const WireShape& shape, std::span<const ReadKvEntry> entries) {
  std::optional<uint64_t> end = RoundUp(entries.size() * sizeof(KvRowsEntry), kAlign);
  for (const ReadKvEntry& e : entries) {
    const KvRowsEntry reply{e.request, e.first_token, e.kv_head, e.count, 0, 0};
    const auto parts = PartsOf(shape, reply);
    end = parts ? EndOf(*parts, *end) : std::nullopt;
    if (!end || *end > kMaxPayloadBytes) return false;
  }
  return true;
}

template <typename Entry>
void CopyEntries(std::span<const Entry> entries, std::vector<std::byte>& to) {
  const auto bytes = std::as_bytes(entries);
  std::copy(bytes.begin(), bytes.end(), to.begin());
}

// Entries in memory of their own, and pieces: `from(i, parts, add)` calls add(data, bytes) for the
// data of an entry.
template <typename Entry, typename From>
std::vector<std::byte> BuildPieces(const WireShape& shape, std::span<const Entry> entries,
                                   Pieces* pieces, std::vector<std::byte> used, From from) {
  static constexpr std::array<std::byte, kAlign> kPadding{};
  pieces->clear();
  pieces->reserve(entries.size() * (Parts().size() + 1));
  PlaceAll(shape, entries, [&](size_t i, const Parts& parts, uint64_t offset, uint64_t end) {
    const auto add = [&](const void* data, uint64_t bytes) {
      if (bytes > 0) pieces->emplace_back(static_cast<const std::byte*>(data), bytes);
      offset += bytes;
    };
    from(i, parts, add);
    add(kPadding.data(), end - offset);
  });
  used.resize(RoundUp(entries.size_bytes(), kAlign));
  CopyEntries(entries, used);
  return used;
}

// All in one piece: `place(base, parts, offset)` for the data of each entry.
template <typename Entry, typename Place>
std::vector<std::byte> BuildWhole(const WireShape& shape, std::span<const Entry> entries,
                                  Place place) {
  std::vector<std::byte> out(
      PlaceAll(shape, entries, [](size_t, const Parts&, uint64_t, uint64_t) {}));
  CopyEntries(entries, out);
  PlaceAll(shape, entries, [&](size_t, const Parts& parts, uint64_t offset, uint64_t) {
    place(out.data(), parts, offset);
  });
  return out;
}

}  // namespace

std::optional<std::vector<QueryView>> ParseQuery(const WireShape& shape, uint32_t count,
                                                 PayloadPieces payload, std::string* why) {
  std::vector<QueryView> views;
  views.reserve(std::min(count, shape.max_entries));
  const auto visit = [&](const QueryEntry& e, const Parts& p, Reader& reader) {
    QueryView& v = views.emplace_back(QueryView{e, {}, {}});
    return reader.Take(p[0], &v.q) && reader.Take(p[1], &v.codes) ? nullptr : kInPieces;
  };
  if (!Walk<QueryEntry>(shape, count, payload, why, visit)) return std::nullopt;
  return views;
}

std::optional<std::vector<PartialView>> ParsePartial(const WireShape& shape, uint32_t count,
                                                     PayloadPieces payload, std::string* why) {
  std::vector<PartialView> views;
  views.reserve(std::min(count, shape.max_entries));
  const auto visit = [&](const PartialEntry& e, const Parts& p, Reader& reader) {
    PartialView& v = views.emplace_back(PartialView{e, {}, {}, {}});
    const bool taken =
        reader.Take(p[0], &v.max) && reader.Take(p[1], &v.den) && reader.Take(p[2], &v.num);
    return taken ? nullptr : kInPieces;
  };
  if (!Walk<PartialEntry>(shape, count, payload, why, visit)) return std::nullopt;
  return views;
}

std::optional<std::vector<KvView>> ParseKv(const WireShape& shape, uint32_t count,
                                           PayloadPieces payload, std::string* why) {
  std::vector<KvView> views;
  views.reserve(std::min(count, shape.max_entries));
  const auto visit = [&](const KvEntry& e, const Parts& p, Reader& reader) {
    KvView& v = views.emplace_back(KvView{e, {}, {}});
    return reader.Take(p[0], &v.rows) && reader.Take(p[1], &v.codes) ? nullptr : kInPieces;
  };
  if (!Walk<KvEntry>(shape, count, payload, why, visit)) return std::nullopt;
  return views;
}

std::optional<std::vector<KeyMeanView>> ParseKeyMean(const WireShape& shape, uint32_t count,
                                                     std::span<const std::byte> payload,
                                                     std::string* why) {
  std::vector<KeyMeanView> views;
  views.reserve(std::min(count, shape.max_entries));
  const auto visit = [&](const KeyMeanEntry& e, const Parts& p, Reader& reader) {
    KeyMeanView& v = views.emplace_back(KeyMeanView{e, {}});
    return reader.Take(p[0], &v.mean) ? nullptr : kInPieces;
  };
  if (!Walk<KeyMeanEntry>(shape, count, {&payload, 1}, why, visit)) return std::nullopt;
  return views;
}

std::optional<std::vector<ReadKvEntry>> ParseReadKv(const WireShape& shape, uint32_t count,
                                                    PayloadPieces payload, std::string* why) {
  std::vector<ReadKvEntry> entries;
  entries.reserve(std::min(count, shape.max_entries));
  const auto visit = [&](const ReadKvEntry& e, const Parts&, Reader&) -> const char* {
    entries.push_back(e);
    return nullptr;
  };
  if (!Walk<ReadKvEntry>(shape, count, payload, why, visit)) return std::nullopt;
  if (!FitOneReply(shape, entries)) {
    Reject(why, "more rows than a reply holds");
    return std::nullopt;
  }
  return entries;
}

std::optional<std::vector<KvRowsView>> ParseKvRows(const WireShape& shape, uint32_t count,
                                                   PayloadPieces payload, std::string* why) {
  std::vector<KvRowsView> views;
  views.reserve(std::min(count, shape.max_entries));
  const auto visit = [&](const KvRowsEntry& e, const Parts& p, Reader& reader) {
    KvRowsView& v = views.emplace_back(KvRowsView{e, {}});
    return reader.Take(p[0], &v.rows) ? nullptr : kInPieces;
  };
  if (!Walk<KvRowsEntry>(shape, count, payload, why, visit)) return std::nullopt;
  return views;
}

std::vector<std::byte> BuildQuery(const WireShape& shape, std::span<const QueryEntry> entries,
                                  std::span<const QuerySource> sources, Pieces* pieces,
                                  std::vector<std::byte> used) {
  Check(sources.size() == entries.size(), "a query with other sources than entries");
  return BuildPieces(shape, entries, pieces, std::move(used),
                     [&](size_t i, const Parts& parts, auto add) {
                       add(sources[i].q, parts[0]);
                       add(sources[i].codes, parts[1]);
                     });
}

std::vector<std::byte> BuildPartial(const WireShape& shape, std::span<const PartialEntry> entries,
                                    std::span<const void* const> sources, Pieces* pieces,
                                    std::vector<std::byte> used) {
  Check(sources.size() == entries.size(), "partials with other sources than entries");
  return BuildPieces(shape, entries, pieces, std::move(used),
                     [&](size_t i, const Parts& parts, auto add) {
                       add(sources[i], parts[0] + parts[1] + parts[2]);
                     });
}

std::vector<std::byte> BuildKv(const WireShape& shape, std::span<const KvEntry> entries,
                               std::span<const KvSource> sources, Pieces* pieces,
                               std::vector<std::byte> used) {
  Check(sources.size() == entries.size(), "K, V with other sources than entries");
  return BuildPieces(shape, entries, pieces, std::move(used),
                     [&](size_t i, const Parts& parts, auto add) {
                       add(sources[i].rows, parts[0]);
                       add(sources[i].codes, parts[1]);
                     });
}

std::vector<std::byte> BuildKvRows(const WireShape& shape, std::span<const KvRowsEntry> entries,
                                   std::span<const bf16* const> sources, Pieces* pieces,
                                   std::vector<std::byte> used) {
  Check(sources.size() == entries.size(), "K, V with other sources than entries");
  return BuildPieces(shape, entries, pieces, std::move(used),
                     [&](size_t i, const Parts& parts, auto add) { add(sources[i], parts[0]); });
}

std::vector<std::byte> BuildReadKv(const WireShape& shape, std::span<const ReadKvEntry> entries) {
  Check(FitOneReply(shape, entries), "a read of more rows than a reply holds: split it");
  return BuildWhole(shape, entries, [](std::byte*, const Parts&, uint64_t) {});
}

std::vector<std::byte> BuildKeyMean(const WireShape& shape, std::span<const KeyMeanEntry> entries,
                                    std::vector<std::span<float>>* spaces) {
  if (spaces != nullptr) spaces->clear();
  return BuildWhole(shape, entries, [&](std::byte* base, const Parts& p, uint64_t at) {
    if (spaces != nullptr) spaces->push_back(Take<float>(base, at, p[0]));
  });
}

}  // namespace passel::cluster
