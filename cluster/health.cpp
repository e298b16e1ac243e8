#include "cluster/health.h"

#include <algorithm>

#include "runtime/base/error.h"

namespace passel::cluster {

HealthTracker::HealthTracker(std::span<const RankId> peers, Duration timeout, Time now)
    : timeout_(timeout) {
  Check(timeout > Duration::zero(), "a failure timeout is positive");
  for (const RankId peer : peers) peers_[peer] = Peer{now, now, {}};
}

void HealthTracker::Heard(RankId peer, Time now) {
  const auto it = peers_.find(peer);
  if (it != peers_.end()) it->second.heard = std::max(it->second.heard, now);
}

void HealthTracker::Asked(RankId peer, uint64_t ticket, Time now) {
  const auto it = peers_.find(peer);
  if (it == peers_.end()) return;
  Check(it->second.open.emplace(ticket, now).second, "a ticket is asked once");
}

void HealthTracker::Answered(RankId peer, uint64_t ticket) {
  const auto it = peers_.find(peer);
  if (it != peers_.end()) it->second.open.erase(ticket);
}

void HealthTracker::Sent(RankId peer, Time now) {
  const auto it = peers_.find(peer);
  if (it != peers_.end()) it->second.sent = std::max(it->second.sent, now);
}

std::vector<RankId> HealthTracker::HeartbeatsDue(Time now) const {
  std::vector<RankId> due;
  for (const auto& [id, peer] : peers_) {
    if (now - peer.sent >= heartbeat_interval()) due.push_back(id);
  }
  return due;
}

HealthTracker::Time HealthTracker::OldestQuestion(const Peer& peer) {
  Time oldest = Time::max();
  for (const auto& [ticket, asked] : peer.open) oldest = std::min(oldest, asked);
  return oldest;
}

std::vector<HealthTracker::Failure> HealthTracker::Overdue(Time now) const {
  std::vector<Failure> failures;
  for (const auto& [id, peer] : peers_) {
    if (now - peer.heard >= timeout_) {
      failures.push_back({id, Reason::kSilent, now - peer.heard});
      continue;
    }
    const Time oldest = OldestQuestion(peer);
    if (oldest <= now && now - oldest >= timeout_) {
      failures.push_back({id, Reason::kHung, now - oldest});
    }
  }
  return failures;
}

HealthTracker::Time HealthTracker::NextDeadline() const {
  Time next = Time::max();
  for (const auto& [id, peer] : peers_) {
    next = std::min({next, peer.sent + heartbeat_interval(), peer.heard + timeout_});
    const Time oldest = OldestQuestion(peer);
    if (oldest != Time::max()) next = std::min(next, oldest + timeout_);
  }
  return next;
}

void HealthTracker::Remove(RankId peer) { peers_.erase(peer); }

}  // namespace passel::cluster
