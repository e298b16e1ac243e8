#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "runtime/base/ids.h"
#include "transport/channel.h"

namespace passel::transport {

// What goes wrong on every link, as probabilities per frame. Time is counted in Progress calls of
// the receiver, so that single-threaded runs repeat exactly.
struct FaultPlan {
  uint64_t seed = 1;
  uint32_t max_delay = 16;     // Progress calls
  double delay = 0;            // comes later; order on the link is kept
  double reorder = 0;          // comes later; frames sent after it may overtake it
  double drop = 0;             // never comes
  double duplicate = 0;        // comes twice
  double corrupt_header = 0;   // 1–3 flipped bits in one byte of the header
  double corrupt_payload = 0;  // 1–8 flipped bits; no check covers payloads
  double truncate = 0;         // the payload loses bytes at its end
};

// The ranks of one job inside this process, for tests: channels that stamp, judge and copy frames
// by the same code as the UCX ones. The faults of a link depend on the seed, the link and the
// number of frames sent on it, not on timing. Thread-safe.
class InProcessNetwork {
 public:
  InProcessNetwork(uint32_t ranks, uint64_t nonce, const FaultPlan& faults = {});
  ~InProcessNetwork();

  // The channel of a rank, connected to all others. Once per rank.
  std::unique_ptr<Channel> MakeChannel(RankId rank);

  // kill -9: all links of the rank break at once, what is under way is lost, both ends notice.
  void Cut(RankId rank);
  // SIGSTOP, or a cable pulled: from now on nothing reaches or leaves the rank, nobody is told.
  void Silence(RankId rank);
  // Puts raw bytes into a rank's receive path, as a hostile peer could.
  void Inject(RankId to, std::span<const std::byte> header, std::span<const std::byte> payload);

  struct State;  // private to in_process.cpp

 private:
  std::shared_ptr<State> state_;
};

}  // namespace passel::transport
