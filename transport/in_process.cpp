#include "transport/in_process.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <iterator>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/base/error.h"
#include "runtime/base/random.h"
#include "transport/frame_gate.h"
#include "transport/post_queue.h"

namespace passel::transport {
namespace {

using Bytes = std::vector<std::byte>;

// Something on its way to a rank: a frame, or the news that the sender has closed.
struct Parcel {
  int32_t from = -1;  // −1: injected
  uint64_t due = 0;   // Progress call of the receiver from which on it may be taken
  bool closes = false;
  Bytes header, payload;
};

}  // namespace

struct InProcessNetwork::State {
  // One direction between two ranks.
  struct Link {
    Random random{0};
    uint64_t last_due = 0;  // of frames that keep order
    bool open = true;
  };
  struct Node {
    std::vector<Parcel> inbox;                          // in order of arrival
    std::vector<std::pair<int32_t, std::string>> lost;  // peers to report, and why
    uint64_t ticks = 0;
    bool silent = false, taken = false, wake = false;
    std::condition_variable changed;
  };

  std::mutex mutex;
  FaultPlan faults;
  uint64_t nonce;
  std::vector<std::unique_ptr<Node>> nodes;
  std::vector<Link> links;  // [from, to]

  Link& At(int32_t from, int32_t to) {
    return links[static_cast<size_t>(from) * nodes.size() + static_cast<size_t>(to)];
  }
  // All below: `mutex` is held.
  void Transmit(int32_t from, int32_t to, Bytes header, Bytes payload);
  void Enqueue(int32_t to, Parcel parcel);
  void Break(int32_t one, int32_t other, const std::string& reason);
  void BreakHalf(int32_t node, int32_t peer, const std::string& reason);
};

namespace {

void FlipBits(Bytes& bytes, size_t first, size_t size, uint64_t count, Random& random) {
  for (uint64_t i = 0; i < count && size > 0; ++i) {
    bytes[first + random.Next() % size] ^= std::byte(1u << (random.Next() % 8));
  }
}

}  // namespace

void InProcessNetwork::State::Transmit(int32_t from, int32_t to, Bytes header, Bytes payload) {
  Link& link = At(from, to);
  if (!link.open || nodes[static_cast<size_t>(from)]->silent) return;
  // Every number is drawn for every frame, so that one fault does not shift the others.
  Random& random = link.random;
  const auto happens = [&](double probability) { return random.Uniform() < probability; };
  const bool delay = happens(faults.delay), reorder = happens(faults.reorder);
  const bool drop = happens(faults.drop), duplicate = happens(faults.duplicate);
  const bool bad_header = happens(faults.corrupt_header);
  const bool bad_payload = happens(faults.corrupt_payload), cut_short = happens(faults.truncate);
  const uint64_t by = 1 + random.Next() % std::max<uint64_t>(faults.max_delay, 1);
  Random details(random.Next());
  if (drop) return;
  if (bad_header) {
    // Distinct bits of one byte: the check finds any change of a single byte.
    const size_t at = details.Next() % header.size();
    const auto mask = static_cast<uint8_t>(1 + details.Next() % 7);
    header[at] ^= std::byte(static_cast<uint8_t>(mask << (details.Next() % 6)));
  }
  if (bad_payload) FlipBits(payload, 0, payload.size(), 1 + details.Next() % 8, details);
  if (cut_short && !payload.empty()) payload.resize(details.Next() % payload.size());

  const uint64_t now = nodes[static_cast<size_t>(to)]->ticks;
  Parcel parcel{from, now, false, std::move(header), std::move(payload)};
  if (reorder) {
    parcel.due = now + by;
  } else {
    link.last_due = std::max(link.last_due, delay ? now + by : now);
    parcel.due = link.last_due;
  }
  if (duplicate) Enqueue(to, parcel);
  Enqueue(to, std::move(parcel));
}

void InProcessNetwork::State::Enqueue(int32_t to, Parcel parcel) {
  Node& node = *nodes[static_cast<size_t>(to)];
  if (node.silent) return;
  node.inbox.push_back(std::move(parcel));
  node.changed.notify_all();
}

void InProcessNetwork::State::BreakHalf(int32_t node, int32_t peer, const std::string& reason) {
  Link& link = At(node, peer);
  if (!link.open) return;
  link.open = false;
  Node& at = *nodes[static_cast<size_t>(node)];
  std::erase_if(at.inbox, [&](const Parcel& p) { return p.from == peer; });
  at.lost.emplace_back(peer, reason);
  at.changed.notify_all();
}

void InProcessNetwork::State::Break(int32_t one, int32_t other, const std::string& reason) {
  BreakHalf(one, other, reason);
  if (!nodes[static_cast<size_t>(one)]->silent) BreakHalf(other, one, reason);
}

namespace {

class Delivered final : public IncomingPayload {
 public:
  explicit Delivered(Bytes bytes)
      : bytes_(std::make_shared<const Bytes>(std::move(bytes))), piece_(*bytes_) {}
  std::span<const std::span<const std::byte>> pieces() const override { return {&piece_, 1}; }
  std::span<const std::byte> whole() override { return piece_; }
  std::shared_ptr<const void> Keep() override { return bytes_; }

 private:
  std::shared_ptr<const Bytes> bytes_;
  std::span<const std::byte> piece_;
};

class InProcessChannel final : public Channel {
 public:
  InProcessChannel(RankId self, std::shared_ptr<InProcessNetwork::State> state)
      : self_(self),
        state_(std::move(state)),
        node_(*state_->nodes[static_cast<size_t>(self.value)]),
        gate_(self),
        peers_(state_->nodes.size()) {
    gate_.set_nonce(state_->nonce);
    for (size_t i = 0; i < peers_.size(); ++i) {
      const RankId rank(static_cast<int32_t>(i));
      if (rank != self_) gate_.AddPeer(rank);
    }
  }
  ~InProcessChannel() override {
    assert(closed_ || std::uncaught_exceptions() > 0);
    if (!closed_) Close(std::chrono::milliseconds(0));
  }

  RankId self() const override { return self_; }
  void SetFrameHandler(FrameHandler handler) override { on_frame_ = std::move(handler); }
  void SetPeerLostHandler(PeerHandler handler) override { on_lost_ = std::move(handler); }
  void SetEpoch(uint32_t epoch) override { gate_.set_epoch(epoch); }
  std::shared_ptr<SharedMemory> ShareMemory(size_t, std::span<const RankId>) override {
    return nullptr;
  }
  const ChannelStats& stats() const override { return gate_.stats(); }
  PeerState peer_state(RankId rank) const override { return At(rank).state; }
  uint64_t PendingBytes(RankId rank) const override { return At(rank).pending; }
  std::string Describe(RankId rank) const override {
    return At(rank).state == PeerState::kLost ? "closed" : "in process";
  }

  void Send(RankId to, OutgoingFrame frame) override {
    CheckOutgoing(frame);
    At(to).pending += kFrameHeaderBytes + frame.payload_bytes();
    Start(to, std::move(frame));
  }
  void Post(RankId to, OutgoingFrame frame) override {
    CheckOutgoing(frame);
    At(to).pending += kFrameHeaderBytes + frame.payload_bytes();
    posts_.Push(to, std::move(frame));
    Wake();
  }
  void Wake() override {
    const std::lock_guard lock(state_->mutex);
    node_.wake = true;
    node_.changed.notify_all();
  }
  bool Progress() override;
  void Wait(std::chrono::milliseconds timeout) override;
  void ClosePeer(RankId rank) override;
  void Close(std::chrono::milliseconds timeout) override;

 private:
  struct Peer {
    PeerState state = PeerState::kConnected;
    std::atomic<uint64_t> pending{0};
  };
  // A send that has ended, and whose done has not run yet.
  struct Ended {
    Peer* peer;
    uint64_t bytes;
    std::function<void()> done;
  };

  Peer& At(RankId rank) const {
    const auto i = static_cast<size_t>(rank.value);
    Check(rank.value >= 0 && i < peers_.size() && rank != self_,
          "no connection to rank " + std::to_string(rank.value));
    return peers_[i];
  }
  void Start(RankId to, OutgoingFrame frame);
  bool RunDone();
  void Lose(RankId rank, const std::string& reason);

  RankId self_;
  std::shared_ptr<InProcessNetwork::State> state_;
  InProcessNetwork::State::Node& node_;
  FrameGate gate_;
  mutable std::vector<Peer> peers_;  // by rank
  FrameHandler on_frame_;
  PeerHandler on_lost_;
  PostQueue posts_;
  std::vector<Ended> ended_;
  bool closed_ = false;
};

void InProcessChannel::Start(RankId to, OutgoingFrame frame) {
  Peer& peer = At(to);
  const uint64_t bytes = frame.payload_bytes();
  gate_.Stamp(frame.header, bytes);
  if (peer.state == PeerState::kConnected) {
    const auto header = std::as_bytes(std::span(&frame.header, 1));
    Bytes whole(frame.payload.begin(), frame.payload.end());
    for (const auto& piece : frame.pieces) whole.insert(whole.end(), piece.begin(), piece.end());
    const std::lock_guard lock(state_->mutex);
    state_->Transmit(self_.value, to.value, Bytes(header.begin(), header.end()), std::move(whole));
    gate_.CountSent(bytes);
  }
  ended_.push_back({&peer, kFrameHeaderBytes + bytes, std::move(frame.done)});
}

bool InProcessChannel::RunDone() {
  if (ended_.empty()) return false;
  for (const Ended& e : std::exchange(ended_, {})) {
    e.peer->pending -= e.bytes;
    if (e.done) e.done();
  }
  return true;
}

bool InProcessChannel::Progress() {
  Check(!closed_, "Progress after Close");
  bool any = false;
  for (auto& [to, frame] : posts_.TakeAll()) {
    Start(to, std::move(frame));
    any = true;
  }
  std::vector<Parcel> taken;
  std::vector<std::pair<int32_t, std::string>> lost;
  {
    const std::lock_guard lock(state_->mutex);
    any |= std::exchange(node_.wake, false);
    const uint64_t now = ++node_.ticks;
    const auto waits = [&](const Parcel& p) { return p.due > now; };
    const auto first_due = std::stable_partition(node_.inbox.begin(), node_.inbox.end(), waits);
    std::move(first_due, node_.inbox.end(), std::back_inserter(taken));
    node_.inbox.erase(first_due, node_.inbox.end());
    lost.swap(node_.lost);
  }
  for (Parcel& parcel : taken) {
    any = true;
    if (parcel.closes) {
      lost.emplace_back(parcel.from, "closed by the peer");
      continue;
    }
    const auto header = gate_.Admit(parcel.header, parcel.payload.size());
    if (!header) continue;
    gate_.CountDelivered(*header);
    Delivered payload(std::move(parcel.payload));
    if (on_frame_) on_frame_(*header, payload);
  }
  any |= RunDone();
  for (const auto& [rank, reason] : lost) {
    any = true;
    Lose(RankId(rank), reason);
  }
  return any;
}

void InProcessChannel::Lose(RankId rank, const std::string& reason) {
  Peer& peer = At(rank);
  if (peer.state == PeerState::kLost) return;
  peer.state = PeerState::kLost;
  gate_.RemovePeer(rank);
  if (on_lost_) on_lost_(rank, reason);
}

void InProcessChannel::Wait(std::chrono::milliseconds timeout) {
  if (!ended_.empty() || !posts_.empty()) return;
  std::unique_lock lock(state_->mutex);
  // A delayed frame counts: only Progress calls bring it nearer.
  node_.changed.wait_for(lock, timeout,
                         [&] { return node_.wake || !node_.inbox.empty() || !node_.lost.empty(); });
}

void InProcessChannel::ClosePeer(RankId rank) {
  Peer& peer = At(rank);
  if (peer.state == PeerState::kLost) return;
  peer.state = PeerState::kLost;
  gate_.RemovePeer(rank);
  const std::lock_guard lock(state_->mutex);
  state_->Break(self_.value, rank.value, "connection reset by the peer");
}

void InProcessChannel::Close(std::chrono::milliseconds) {
  if (closed_) return;
  for (auto& [to, frame] : posts_.TakeAll()) Start(to, std::move(frame));
  {
    const std::lock_guard lock(state_->mutex);
    for (size_t i = 0; i < peers_.size(); ++i) {
      const auto to = static_cast<int32_t>(i);
      if (to == self_.value) continue;
      auto& link = state_->At(self_.value, to);
      if (link.open && !node_.silent) {
        state_->Enqueue(to, {self_.value, link.last_due, true, {}, {}});
      }
      link.open = false;
      peers_[i].state = PeerState::kLost;
    }
    node_.inbox.clear();
  }
  while (RunDone()) {
  }
  closed_ = true;
}

}  // namespace

InProcessNetwork::InProcessNetwork(uint32_t ranks, uint64_t nonce, const FaultPlan& faults)
    : state_(std::make_shared<State>()) {
  state_->faults = faults;
  state_->nonce = nonce;
  for (uint32_t i = 0; i < ranks; ++i) state_->nodes.push_back(std::make_unique<State::Node>());
  state_->links.resize(uint64_t{ranks} * ranks);
  Random seeds(faults.seed);
  for (State::Link& link : state_->links) link.random = Random(seeds.Next());
}

InProcessNetwork::~InProcessNetwork() = default;

std::unique_ptr<Channel> InProcessNetwork::MakeChannel(RankId rank) {
  Check(rank.value >= 0 && static_cast<size_t>(rank.value) < state_->nodes.size(), "unknown rank");
  const std::lock_guard lock(state_->mutex);
  Check(!std::exchange(state_->nodes[static_cast<size_t>(rank.value)]->taken, true),
        "MakeChannel twice for a rank");
  return std::make_unique<InProcessChannel>(rank, state_);
}

void InProcessNetwork::Cut(RankId rank) {
  const std::lock_guard lock(state_->mutex);
  for (size_t i = 0; i < state_->nodes.size(); ++i) {
    const auto peer = static_cast<int32_t>(i);
    if (peer == rank.value) continue;
    state_->BreakHalf(rank.value, peer, "cut");
    state_->BreakHalf(peer, rank.value, "cut");
  }
}

void InProcessNetwork::Silence(RankId rank) {
  const std::lock_guard lock(state_->mutex);
  State::Node& node = *state_->nodes[static_cast<size_t>(rank.value)];
  node.silent = true;
  node.inbox.clear();
}

void InProcessNetwork::Inject(RankId to, std::span<const std::byte> header,
                              std::span<const std::byte> payload) {
  const std::lock_guard lock(state_->mutex);
  state_->Enqueue(to.value, {-1, 0, false, Bytes(header.begin(), header.end()),
                             Bytes(payload.begin(), payload.end())});
}

}  // namespace passel::transport
