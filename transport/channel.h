#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/ids.h"
#include "transport/frame.h"

namespace passel::transport {

// A frame on its way out. The memory of its payload stays valid until `done` runs (once, on the
// owner thread, also when the send was cancelled because the peer is gone).
struct OutgoingFrame {
  // The channel fills magic, version, nonce, epoch, source, sequence and payload_bytes.
  FrameHeader header;
  std::span<const std::byte> payload;
  std::function<void()> done = {};
  // More of the payload, behind it, in this order: sent from where it lies.
  std::vector<std::span<const std::byte>> pieces = {};

  // Of all pieces.
  uint64_t payload_bytes() const;

  // A frame that owns its payload.
  static OutgoingFrame Own(FrameHeader header, std::vector<std::byte> payload);
};

// Memory of this process that peers on the same machine read where it lies. May outlive the
// channel; released by its thread, or later.
class SharedMemory {
 public:
  virtual ~SharedMemory() = default;
  virtual std::span<std::byte> bytes() const = 0;
};

// The payload of a frame that has come. Its pieces may lie in a peer's memory, where they are read
// without a copy and may change at any time.
class IncomingPayload {
 public:
  virtual ~IncomingPayload() = default;
  // One behind the other.
  virtual std::span<const std::span<const std::byte>> pieces() const = 0;
  // In one piece, aligned to 16 bytes, that nobody else writes to: a copy where it must be.
  virtual std::span<const std::byte> whole() = 0;
  operator std::span<const std::byte>() { return whole(); }
  // Called before the others, keeps the pieces where they are until what it returns is released,
  // from any thread, before the channel closes; its sender's `done` waits for that, and for the
  // owner's next Progress.
  virtual std::shared_ptr<const void> Keep() = 0;
};

enum class PeerState { kConnected, kLost };

// Counters since the start; frames that were dropped never reached the handler. Bytes are those of
// headers and payloads.
struct ChannelStats {
  uint64_t frames_sent = 0, bytes_sent = 0;
  uint64_t frames_referred = 0;  // of those sent: whose pieces the peer fetched from shared memory
  uint64_t frames_received = 0, bytes_received = 0;
  uint64_t dropped_malformed = 0;  // magic, version, check, size, type or source
  uint64_t dropped_nonce = 0;
  uint64_t dropped_epoch = 0;
  uint64_t dropped_overflow = 0;  // more large frames announced than the receiver keeps track of
};

// Sends and receives frames between the ranks of one job. One thread owns a channel: it alone calls
// everything but Post. Handlers run inside Progress, on that thread; they must not throw.
class Channel {
 public:
  // The payload is valid during the call only.
  using FrameHandler = std::function<void(const FrameHeader&, IncomingPayload&)>;
  using PeerHandler = std::function<void(RankId peer, const std::string& reason)>;

  virtual ~Channel() = default;

  virtual RankId self() const = 0;
  virtual void SetFrameHandler(FrameHandler handler) = 0;
  // Called once per peer that is found lost by the transport itself (not by heartbeats).
  virtual void SetPeerLostHandler(PeerHandler handler) = 0;

  // Starts a send and returns (`done` runs in a later Progress); order to one peer is kept for
  // small frames, not between those and large ones or ones with pieces in shared memory. A frame to
  // a lost peer is discarded (its `done` still runs).
  virtual void Send(RankId to, OutgoingFrame frame) = 0;
  // Send, from any thread: queued, and the owner thread woken from Wait.
  virtual void Post(RankId to, OutgoingFrame frame) = 0;

  // `bytes` bytes for the pieces of frames to `readers`: those on this machine fetch them from
  // there themselves, in parallel; until they say that they can, and to all others, frames travel
  // as ever. Null where the transport has no such memory.
  virtual std::shared_ptr<SharedMemory> ShareMemory(size_t bytes,
                                                    std::span<const RankId> readers) = 0;

  // Advances communication without blocking; true if anything happened.
  virtual bool Progress() = 0;
  // Blocks until there is something to progress, a Post, a Wake, or the timeout.
  virtual void Wait(std::chrono::milliseconds timeout) = 0;
  // Ends a Wait, from any thread.
  virtual void Wake() = 0;

  // Bytes handed to Send or Post for this peer and not yet completed; for flow control.
  virtual uint64_t PendingBytes(RankId to) const = 0;
  // Frames of other epochs are dropped from here on. Control frames and heartbeats pass, since they
  // carry the change of epoch; their handlers see header.epoch.
  virtual void SetEpoch(uint32_t epoch) = 0;
  // Drops the connection at once; pending sends complete as cancelled and frames of that peer are
  // no longer delivered. The peer-lost handler is not called for it.
  virtual void ClosePeer(RankId peer) = 0;
  virtual PeerState peer_state(RankId peer) const = 0;
  virtual const ChannelStats& stats() const = 0;
  // What carries the bytes, for people: "shared memory", "tcp (net0)", …
  virtual std::string Describe(RankId peer) const = 0;

  // Flushes what is pending (bounded by `timeout`) and closes. Must be called before destruction.
  virtual void Close(std::chrono::milliseconds timeout) = 0;
};

}  // namespace passel::transport
