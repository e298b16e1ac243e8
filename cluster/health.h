#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "runtime/base/ids.h"

namespace passel::cluster {

// Who is alive, by what was heard of whom. Pure logic: the caller says what time it is. A rank has
// failed when nothing at all came from it for `timeout`, or when it left a question unanswered for
// as long though it beats its heart (it hangs).
class HealthTracker {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using Duration = std::chrono::steady_clock::duration;

  // Watches `peers`, all heard of at `now`. Heartbeats go out every timeout / 5.
  HealthTracker(std::span<const RankId> peers, Duration timeout, Time now);

  // Any valid message from `peer` shows that it lives. Unwatched peers are ignored.
  void Heard(RankId peer, Time now);
  // A question was sent that `peer` must answer; `ticket` is unique among its open ones.
  void Asked(RankId peer, uint64_t ticket, Time now);
  // It was answered. Unknown tickets are ignored: an answer may come twice.
  void Answered(RankId peer, uint64_t ticket);
  // Something was sent to `peer`, which stands for a heartbeat.
  void Sent(RankId peer, Time now);

  // Peers that have had nothing from us for a heartbeat interval, rising.
  std::vector<RankId> HeartbeatsDue(Time now) const;
  enum class Reason : uint8_t { kSilent, kHung };
  struct Failure {
    RankId peer;
    Reason reason;
    Duration since;  // the last sign of life, or the oldest open question
  };
  // Peers that have failed by now, rising. They stay failed in each call until removed.
  std::vector<Failure> Overdue(Time now) const;
  // When the next heartbeat is due or the next peer becomes overdue: how long a wait may last.
  Time NextDeadline() const;

  void Remove(RankId peer);
  Duration heartbeat_interval() const { return timeout_ / 5; }

 private:
  struct Peer {
    Time heard;
    Time sent;
    std::map<uint64_t, Time> open;  // ticket → asked at
  };
  static Time OldestQuestion(const Peer& peer);

  Duration timeout_;
  std::map<RankId, Peer> peers_;
};

}  // namespace passel::cluster
