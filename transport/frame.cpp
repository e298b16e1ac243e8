#include "transport/frame.h"

#include <array>
#include <bit>
#include <cstddef>
#include <cstring>

namespace passel::transport {
namespace {

static_assert(std::endian::native == std::endian::little, "headers are little-endian in memory");
static_assert(offsetof(FrameHeader, check) == kFrameHeaderBytes - sizeof(uint32_t));

// FNV-1a, 32 bits: every step is a bijection of the state, so that a change of any one byte is
// always found.
uint32_t CheckOf(std::span<const std::byte> bytes) {
  uint32_t h = 0x811c9dc5u;
  for (const std::byte b : bytes.first(offsetof(FrameHeader, check))) {
    h = (h ^ static_cast<uint32_t>(b)) * 0x01000193u;
  }
  return h;
}

bool IsKnown(FrameType type) {
  switch (type) {
    case FrameType::kQuery:
    case FrameType::kPartial:
    case FrameType::kKv:
    case FrameType::kKeyMean:
    case FrameType::kControl:
    case FrameType::kHeartbeat:
    case FrameType::kReadKv:
    case FrameType::kKvRows:
      return true;
  }
  return false;
}

// Questions that may take several frames, and their replies.
bool HasParts(FrameType type) {
  return type == FrameType::kQuery || type == FrameType::kPartial || type == FrameType::kReadKv ||
         type == FrameType::kKvRows;
}

}  // namespace

void SealFrameHeader(FrameHeader& header) {
  header.check = CheckOf(std::as_bytes(std::span(&header, 1)));
}

std::optional<FrameHeader> ParseFrameHeader(std::span<const std::byte> bytes,
                                            std::string_view* reason) {
  const auto refuse = [&](std::string_view why) {
    if (reason != nullptr) *reason = why;
    return std::nullopt;
  };
  if (bytes.size() != kFrameHeaderBytes) return refuse("header of a wrong size");
  FrameHeader header;
  std::memcpy(&header, bytes.data(), kFrameHeaderBytes);
  if (header.magic != kFrameMagic) return refuse("wrong magic");
  if (header.version != kProtocolVersion) return refuse("wrong protocol version");
  if (header.check != CheckOf(bytes)) return refuse("wrong check sum");
  if (!IsKnown(header.type)) return refuse("unknown frame type");
  if (header.part != 0 && !HasParts(header.type)) return refuse("a part of what has no parts");
  return header;
}

uint64_t MaxPayloadBytes(FrameType type) {
  switch (type) {
    case FrameType::kControl:
      return 1u << 20;
    case FrameType::kHeartbeat:
      return 0;
    case FrameType::kQuery:
    case FrameType::kPartial:
    case FrameType::kKv:
    case FrameType::kKeyMean:
    case FrameType::kReadKv:
    case FrameType::kKvRows:
      break;
  }
  return 16u << 20;
}

}  // namespace passel::transport
