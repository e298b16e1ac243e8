#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_set>

#include "runtime/base/ids.h"
#include "transport/channel.h"
#include "transport/frame.h"

namespace passel::transport {

// What every channel does to frames whatever carries them: stamps outgoing headers and judges
// incoming ones. Pure logic; one thread.
class FrameGate {
 public:
  explicit FrameGate(RankId self) : self_(self) {}

  RankId self() const { return self_; }
  uint64_t nonce() const { return nonce_; }
  void set_nonce(uint64_t nonce) { nonce_ = nonce; }
  void set_epoch(uint32_t epoch) { epoch_ = epoch; }
  void AddPeer(RankId peer) { peers_.insert(peer); }
  // Frames of this rank are dropped from here on.
  void RemovePeer(RankId peer) { peers_.erase(peer); }
  bool Knows(RankId peer) const { return peers_.contains(peer); }

  // Fills what the channel fills of an outgoing header, and seals it.
  void Stamp(FrameHeader& header, uint64_t payload_bytes);
  // The header, if a frame of these header bytes and this payload size may be delivered; else
  // counts why not. Nothing of the payload needs to be there yet.
  std::optional<FrameHeader> Admit(std::span<const std::byte> header_bytes, uint64_t payload_bytes);
  void CountDelivered(const FrameHeader& header);
  void CountSent(uint64_t payload_bytes);
  void CountReferred() { ++stats_.frames_referred; }
  void CountMalformed() { ++stats_.dropped_malformed; }
  void CountOverflow() { ++stats_.dropped_overflow; }

  const ChannelStats& stats() const { return stats_; }

 private:
  RankId self_;
  uint64_t nonce_ = 0;
  uint32_t epoch_ = 0;
  uint64_t sequence_ = 0;
  std::unordered_set<RankId> peers_;
  ChannelStats stats_;
};

// Throws Error{kBug} for a frame that receivers would drop for its type or size.
void CheckOutgoing(const OutgoingFrame& frame);

}  // namespace passel::transport
