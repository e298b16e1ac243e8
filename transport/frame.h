#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace passel::transport {

inline constexpr uint32_t kFrameMagic = 0x4c535350;  // "PSSL"
inline constexpr uint16_t kProtocolVersion = 3;

// What the payload is; `cluster/messages.h` defines the payloads.
enum class FrameType : uint16_t {
  kQuery = 1,      // model → host: queries and codes of a micro-batch, one layer
  kPartial = 2,    // host → model: partial results
  kKv = 3,         // model → host: K and V rows and codes of tokens
  kKeyMean = 4,    // model → host: the centring vectors μ of a request and layer
  kControl = 5,    // either way: Protobuf
  kHeartbeat = 6,  // either way: no payload
  kReadKv = 7,     // model → host: asks for K and V of tokens, one layer
  kKvRows = 8,     // host → model: those
};

// Fixed size, little-endian, the same for every frame.
struct FrameHeader {
  uint32_t magic = kFrameMagic;
  uint16_t version = kProtocolVersion;
  FrameType type{};
  uint64_t nonce = 0;   // of the job; frames of another job are dropped
  uint32_t epoch = 0;   // of the shard map
  int32_t source = -1;  // sending rank
  uint16_t layer = 0;
  uint16_t micro_batch = 0;
  uint32_t count = 0;  // entries in the payload
  // Decode step of the sender, where it matters; of a read of K and V its number. A reply carries
  // it back.
  uint64_t step = 0;
  uint64_t payload_bytes = 0;
  uint64_t sequence = 0;  // per sender, rising
  uint32_t part = 0;      // of what is asked in several frames; its reply carries it back
  uint32_t check = 0;     // FNV-1a of the 60 bytes before
};
inline constexpr size_t kFrameHeaderBytes = 64;
static_assert(sizeof(FrameHeader) == kFrameHeaderBytes);

// Largest payload of a frame of this type: senders must split above it, receivers drop.
uint64_t MaxPayloadBytes(FrameType type);

// Sets `check`; the header is then ready to be sent as its bytes.
void SealFrameHeader(FrameHeader& header);
// Reads and checks magic, version, check, type and part; nullopt for anything else, with the
// reason. Does not judge nonce, epoch, source or payload size: the channel does.
std::optional<FrameHeader> ParseFrameHeader(std::span<const std::byte> bytes,
                                            std::string_view* reason);

}  // namespace passel::transport
