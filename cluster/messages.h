#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/bf16.h"
#include "runtime/base/ids.h"

namespace passel::cluster {

// Payloads of the hot frames. Each is an array of fixed-size entries (FrameHeader::count of them),
// padded to 16 bytes, then their data back to back, in entry order. All little-endian. The sizes
// follow from the entries and from what both sides know of the model; Parse… checks every field
// against that before anything is touched and returns nullopt with the reason in `why`.

// What both sides of the wire know.
struct WireShape {
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t group = 1;
  uint32_t head_dim = 0;
  uint32_t l = 0;           // codes of a vector
  uint64_t max_tokens = 0;  // of one request (context limit)
  uint32_t max_entries = 65536;
};

// kQuery. Data of an entry: q: [kv_heads·group, head_dim] bf16, as K and V are, then, unless exact,
// codes: [kv_heads·group, l] u16, padded to 16 bytes.
struct QueryEntry {
  uint64_t request;
  uint64_t offloaded_tokens;
  uint32_t first_kv_head;
  uint32_t kv_heads;
  uint32_t exact;  // 0 or 1
  uint32_t row;    // of the micro-batch; comes back in the partial
};
static_assert(sizeof(QueryEntry) == 32);

// kPartial. Data of an entry: max: [group] f32, den: [group] f32, num: [group, head_dim] bf16,
// padded to 16 bytes.
struct PartialEntry {
  uint64_t request;
  uint64_t sampled_tokens;  // summed over the group's query heads
  uint32_t row;
  uint32_t kv_head;
  int32_t segment;  // −1: this host's segments, merged
  uint32_t status;  // 0, or host::Status of a query that could not be answered
};
static_assert(sizeof(PartialEntry) == 32);

// kKv. Data of an entry: rows: [count, 2, head_dim] bf16 (K then V), then, where has_codes, codes:
// [count, l] u16, padded to 16 bytes. FrameHeader::layer is the layer of all entries.
struct KvEntry {
  uint64_t request;
  uint64_t first_token;  // offloaded tokens, from 0
  uint32_t kv_head;
  uint32_t count;
  uint32_t has_codes;  // 0 or 1
  uint32_t reserved;   // zero
};
static_assert(sizeof(KvEntry) == 32);

// kKeyMean. Data of an entry: mean: [head_dim] f32, padded to 16 bytes.
struct KeyMeanEntry {
  uint64_t request;
  uint32_t kv_head;
  uint32_t reserved;  // zero
};
static_assert(sizeof(KeyMeanEntry) == 16);

// kReadKv. No data. The rows of a frame's entries fit one reply.
struct ReadKvEntry {
  uint64_t request;
  uint64_t first_token;  // offloaded tokens, from 0; all in one segment
  uint32_t kv_head;
  uint32_t count;     // at least 1
  uint64_t reserved;  // zero
};
static_assert(sizeof(ReadKvEntry) == 32);

// kKvRows, the entries in the order of the question. Data of an entry: rows: [count, 2, head_dim]
// bf16 (K then V); none where `status` says that they could not be read.
struct KvRowsEntry {
  uint64_t request;
  uint64_t first_token;
  uint32_t kv_head;
  uint32_t count;     // as asked, also without rows
  uint32_t status;    // 0, or host::Status
  uint32_t reserved;  // zero
};
static_assert(sizeof(KvRowsEntry) == 32);

// Largest payload of any hot frame; senders split above it, receivers drop.
inline constexpr uint64_t kMaxPayloadBytes = 16u << 20;
inline constexpr uint64_t kMaxControlBytes = 1u << 20;

struct QueryView {
  QueryEntry entry;
  std::span<const bf16> q;
  std::span<const uint16_t> codes;  // empty where exact; may be out of range
};
struct PartialView {
  PartialEntry entry;
  std::span<const float> max, den;
  std::span<const bf16> num;
};
struct KvView {
  KvEntry entry;
  std::span<const bf16> rows;
  std::span<const uint16_t> codes;  // empty where not has_codes; may be out of range
};
struct KeyMeanView {
  KeyMeanEntry entry;
  std::span<const float> mean;
};
struct KvRowsView {
  KvRowsEntry entry;
  std::span<const bf16> rows;  // empty where entry.status is not 0
};

// A payload in one piece must be aligned to 16 bytes. The views' arrays are those of the payload,
// which may lie in pieces one behind the other, an array in one of them; what the sender writes to
// them later changes what is read, but nothing that was checked: codes are not. `why` may be null.
// A count of zero with an empty payload is valid.
using PayloadPieces = std::span<const std::span<const std::byte>>;
std::optional<std::vector<QueryView>> ParseQuery(const WireShape& shape, uint32_t count,
                                                 PayloadPieces payload, std::string* why);
std::optional<std::vector<PartialView>> ParsePartial(const WireShape& shape, uint32_t count,
                                                     PayloadPieces payload, std::string* why);
std::optional<std::vector<KvView>> ParseKv(const WireShape& shape, uint32_t count,
                                           PayloadPieces payload, std::string* why);
std::optional<std::vector<KeyMeanView>> ParseKeyMean(const WireShape& shape, uint32_t count,
                                                     std::span<const std::byte> payload,
                                                     std::string* why);
std::optional<std::vector<ReadKvEntry>> ParseReadKv(const WireShape& shape, uint32_t count,
                                                    PayloadPieces payload, std::string* why);
std::optional<std::vector<KvRowsView>> ParseKvRows(const WireShape& shape, uint32_t count,
                                                   PayloadPieces payload, std::string* why);

// What is large or travels every layer is sent from where it lies: the entries, which come back,
// and behind them `pieces`, whose memory is the sources' (one an entry). Entries that the peer's
// parser would refuse are a bug and throw, as is a payload above kMaxPayloadBytes. `used`: memory
// that may be used again, a former payload or none.
using Pieces = std::vector<std::span<const std::byte>>;
struct QuerySource {
  const bf16* q;
  const uint16_t* codes;  // not read where exact
};
std::vector<std::byte> BuildQuery(const WireShape& shape, std::span<const QueryEntry> entries,
                                  std::span<const QuerySource> sources, Pieces* pieces,
                                  std::vector<std::byte> used = {});
// sources: max, den and num of an entry, one behind the other as they travel.
std::vector<std::byte> BuildPartial(const WireShape& shape, std::span<const PartialEntry> entries,
                                    std::span<const void* const> sources, Pieces* pieces,
                                    std::vector<std::byte> used = {});

struct KvSource {
  const bf16* rows;
  const uint16_t* codes;  // not read where not has_codes
};
std::vector<std::byte> BuildKv(const WireShape& shape, std::span<const KvEntry> entries,
                               std::span<const KvSource> sources, Pieces* pieces,
                               std::vector<std::byte> used = {});

// sources: rows of an entry, not read where its status is not 0.
std::vector<std::byte> BuildKvRows(const WireShape& shape, std::span<const KvRowsEntry> entries,
                                   std::span<const bf16* const> sources, Pieces* pieces,
                                   std::vector<std::byte> used = {});

// Throws, too, where the rows would not fit one reply.
std::vector<std::byte> BuildReadKv(const WireShape& shape, std::span<const ReadKvEntry> entries);

// A payload with its entries written and its data spaces ready to be filled through the (mutable)
// spans that come back, in entry order; otherwise as above. `spaces` may be null.
std::vector<std::byte> BuildKeyMean(const WireShape& shape, std::span<const KeyMeanEntry> entries,
                                    std::vector<std::span<float>>* spaces);

}  // namespace passel::cluster
