#include "transport/frame_gate.h"

#include "runtime/base/error.h"

namespace passel::transport {
namespace {

// Control frames and heartbeats belong to no epoch: they carry its change.
bool BoundToEpoch(FrameType type) {
  return type != FrameType::kControl && type != FrameType::kHeartbeat;
}

}  // namespace

void FrameGate::Stamp(FrameHeader& header, uint64_t payload_bytes) {
  header.magic = kFrameMagic;
  header.version = kProtocolVersion;
  header.nonce = nonce_;
  header.epoch = epoch_;
  header.source = self_.value;
  header.payload_bytes = payload_bytes;
  header.sequence = ++sequence_;
  SealFrameHeader(header);
}

std::optional<FrameHeader> FrameGate::Admit(std::span<const std::byte> header_bytes,
                                            uint64_t payload_bytes) {
  const auto drop = [](uint64_t& counter) {
    ++counter;
    return std::nullopt;
  };
  const auto header = ParseFrameHeader(header_bytes, nullptr);
  if (!header) return drop(stats_.dropped_malformed);
  if (header->nonce != nonce_) return drop(stats_.dropped_nonce);
  if (!peers_.contains(RankId(header->source)) || header->payload_bytes != payload_bytes ||
      payload_bytes > MaxPayloadBytes(header->type)) {
    return drop(stats_.dropped_malformed);
  }
  if (header->epoch != epoch_ && BoundToEpoch(header->type)) return drop(stats_.dropped_epoch);
  return header;
}

void FrameGate::CountDelivered(const FrameHeader& header) {
  ++stats_.frames_received;
  stats_.bytes_received += kFrameHeaderBytes + header.payload_bytes;
}

void FrameGate::CountSent(uint64_t payload_bytes) {
  ++stats_.frames_sent;
  stats_.bytes_sent += kFrameHeaderBytes + payload_bytes;
}

void CheckOutgoing(const OutgoingFrame& frame) {
  Check(frame.payload_bytes() <= MaxPayloadBytes(frame.header.type),
        "frame payload above the limit of its type: split it");
}

}  // namespace passel::transport
