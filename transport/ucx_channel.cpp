#include "transport/ucx_channel.h"

#include <poll.h>
#include <ucp/api/ucp.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <exception>
#include <thread>
#include <unordered_map>
#include <utility>

#include "runtime/base/error.h"
#include "transport/frame_gate.h"
#include "transport/post_queue.h"
#include "transport/ucx_handles.h"
#include "transport/ucx_receiver.h"
#include "transport/ucx_sharing.h"
#include "transport/wake_event.h"

namespace passel::transport {
namespace {

using Clock = std::chrono::steady_clock;

// Polls between two looks at the clock.
constexpr int kSpins = 32;
constexpr int kProgressBatch = 16;
constexpr auto kForcedClose = std::chrono::milliseconds(100);

class Impl final : public UcxChannel {
 public:
  explicit Impl(const UcxOptions& options)
      : self_(options.self),
        gate_(options.self),
        context_(MakeUcxContext()),
        worker_(MakeUcxWorker(context_.get())),
        sharing_(std::make_unique<UcxSharing>(context_, worker_.get(), &gate_)),
        receiver_(std::make_unique<UcxReceiver>(worker_.get(), &gate_, sharing_.get(),
                                                options.max_receive_bytes)) {
    SetUcxHandler(worker_.get(), kFetched, &Impl::OnFetched, this);
    CheckUcx(ucp_worker_get_efd(worker_.get(), &worker_fd_), "ucp_worker_get_efd");
  }

  ~Impl() override {
    // An unwinding stack may have skipped Close; its error matters more than ours.
    assert(closed_ || std::uncaught_exceptions() > 0);
    if (!closed_) Close(std::chrono::milliseconds(0));
  }

  RankId self() const override { return self_; }
  void SetFrameHandler(FrameHandler handler) override { on_frame_ = std::move(handler); }
  void SetPeerLostHandler(PeerHandler handler) override { on_lost_ = std::move(handler); }
  void SetEpoch(uint32_t epoch) override { gate_.set_epoch(epoch); }
  const ChannelStats& stats() const override { return gate_.stats(); }
  PeerState peer_state(RankId rank) const override { return At(rank).state; }
  uint64_t PendingBytes(RankId rank) const override { return At(rank).pending; }
  void Wake() override { wake_.Set(); }
  void SetSpin(std::chrono::microseconds spin) override { spin_ = spin; }

  std::vector<std::byte> address() const override {
    ucp_address_t* address = nullptr;
    size_t bytes = 0;
    CheckUcx(ucp_worker_get_address(worker_.get(), &address, &bytes), "ucp_worker_get_address");
    const auto* begin = reinterpret_cast<const std::byte*>(address);
    std::vector<std::byte> out(begin, begin + bytes);
    ucp_worker_release_address(worker_.get(), address);
    return out;
  }

  void Connect(const std::map<RankId, std::vector<std::byte>>& addresses, uint64_t nonce) override;
  void Send(RankId to, OutgoingFrame frame) override;
  void Post(RankId to, OutgoingFrame frame) override;
  std::shared_ptr<SharedMemory> ShareMemory(size_t bytes, std::span<const RankId> readers) override;
  bool Progress() override;
  void Wait(std::chrono::milliseconds timeout) override;
  void ClosePeer(RankId peer) override;
  std::string Describe(RankId peer) const override;
  void Close(std::chrono::milliseconds timeout) override;

 private:
  struct Peer {
    RankId rank;
    Impl* owner = nullptr;
    ucp_ep_h endpoint = nullptr;
    PeerState state = PeerState::kConnected;
    ucs_status_t failure = UCS_OK;  // that UCX reported and we have not acted upon
    std::atomic<uint64_t> pending{0};
  };
  // A frame under way. UCX needs the header's and the payload's memory until it completes.
  struct Outgoing {
    FrameHeader header;
    std::function<void()> done;
    Peer* peer = nullptr;
    std::vector<ucp_dt_iov_t> pieces;  // where there are several
    std::vector<std::byte> referral;   // where the peer fetches some of them
    bool sent = false;
  };

  static void OnSent(void* request, ucs_status_t status, void* user_data);
  static ucs_status_t OnFetched(void* arg, const void* header, size_t header_bytes, void* data,
                                size_t bytes, const ucp_am_recv_param_t* param);
  static void OnPeerError(void* arg, ucp_ep_h endpoint, ucs_status_t status);

  Peer& At(RankId rank) const {
    const auto at = peers_.find(rank);
    Check(at != peers_.end(), "no connection to rank " + std::to_string(rank.value));
    return *at->second;
  }
  static uint64_t WireBytes(uint64_t payload_bytes) { return kFrameHeaderBytes + payload_bytes; }
  void Start(Peer& peer, OutgoingFrame frame);
  void Sent(Outgoing* out, ucs_status_t status);
  void Finish(Outgoing* out, ucs_status_t status);
  bool SendFetched();
  void Drop(Peer& peer);
  void CloseEndpoint(Peer& peer, uint32_t flags);
  bool ProgressWorker();
  static bool FreeEnded(std::vector<void*>& requests);
  void ProgressUntil(const std::function<bool()>& ended, Clock::time_point deadline);
  bool RunDone();
  bool ReportLost();
  bool has_work() const {
    return any_failure_ || !done_.empty() || !posts_.empty() || receiver_->has_frames();
  }

  RankId self_;
  std::chrono::microseconds spin_{20};
  FrameGate gate_;
  FrameHandler on_frame_;
  PeerHandler on_lost_;
  WakeEvent wake_;
  PostQueue posts_;
  std::shared_ptr<ucp_context> context_;  // shared memory keeps it
  UcxWorker worker_;
  std::unique_ptr<UcxSharing> sharing_;
  std::unique_ptr<UcxReceiver> receiver_;
  int worker_fd_ = -1;
  std::map<RankId, std::unique_ptr<Peer>> peers_;  // fixed once connected
  std::unordered_map<Outgoing*, std::unique_ptr<Outgoing>> outgoing_;
  std::unordered_map<uint64_t, Outgoing*> referrals_;  // of those, by sequence, until fetched
  std::vector<std::function<void()>> done_;            // of sends that ended
  std::vector<void*> closings_;                        // requests of endpoints that are closing
  bool any_failure_ = false;
  bool closed_ = false;
};

void Impl::Connect(const std::map<RankId, std::vector<std::byte>>& addresses, uint64_t nonce) {
  Check(peers_.empty() && !closed_, "Connect called twice or after Close");
  gate_.set_nonce(nonce);
  for (const auto& [rank, address] : addresses) {
    if (rank == self_) continue;
    auto peer = std::make_unique<Peer>();
    peer->rank = rank;
    peer->owner = this;
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(address.data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = &Impl::OnPeerError;
    params.err_handler.arg = peer.get();
    const ucs_status_t status = ucp_ep_create(worker_.get(), &params, &peer->endpoint);
    CheckUcx(status, "ucp_ep_create to rank " + std::to_string(rank.value));
    gate_.AddPeer(rank);
    peers_.emplace(rank, std::move(peer));
  }
}

void Impl::Send(RankId to, OutgoingFrame frame) {
  CheckOutgoing(frame);
  Peer& peer = At(to);
  peer.pending += WireBytes(frame.payload_bytes());
  Start(peer, std::move(frame));
}

void Impl::Post(RankId to, OutgoingFrame frame) {
  CheckOutgoing(frame);
  At(to).pending += WireBytes(frame.payload_bytes());
  posts_.Push(to, std::move(frame));
  wake_.Set();
}

void Impl::Start(Peer& peer, OutgoingFrame frame) {
  auto owned = std::make_unique<Outgoing>();
  Outgoing* out = owned.get();
  outgoing_.emplace(out, std::move(owned));
  out->header = frame.header;
  out->done = std::move(frame.done);
  out->peer = &peer;
  gate_.Stamp(out->header, frame.payload_bytes());
  if (peer.state == PeerState::kLost || peer.failure != UCS_OK || closed_) {
    return Finish(out, UCS_ERR_CANCELED);
  }
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &Impl::OnSent;
  param.user_data = out;
  const void* payload = frame.payload.data();
  size_t count = frame.payload.size();
  UcxMessage message = kWholeFrame;
  out->referral = sharing_->Refer(peer.rank, frame);
  if (!out->referral.empty()) {
    message = kReferral;
    payload = out->referral.data();
    count = out->referral.size();
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_AM_SEND_FLAG_EAGER;  // whatever the user says of rendezvous
    referrals_.emplace(out->header.sequence, out);
  } else if (!frame.pieces.empty()) {
    const auto add = [out](std::span<const std::byte> piece) {
      // UCX does not write to what it sends.
      out->pieces.push_back({const_cast<std::byte*>(piece.data()), piece.size()});
    };
    add(frame.payload);
    for (const auto& piece : frame.pieces) add(piece);
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE;
    param.datatype = ucp_dt_make_iov();
    payload = out->pieces.data();
    count = out->pieces.size();
  }
  const ucs_status_ptr_t request = ucp_am_send_nbx(peer.endpoint, message, &out->header,
                                                   kFrameHeaderBytes, payload, count, &param);
  if (!UCS_PTR_IS_PTR(request)) Sent(out, UCS_PTR_STATUS(request));
}

void Impl::OnSent(void* request, ucs_status_t status, void* user_data) {
  ucp_request_free(request);
  auto* out = static_cast<Outgoing*>(user_data);
  out->peer->owner->Sent(out, status);
}

// UCX is through with it; a peer that was referred to its pieces may not be.
void Impl::Sent(Outgoing* out, ucs_status_t status) {
  out->sent = true;
  const bool awaited = status == UCS_OK && out->peer->state == PeerState::kConnected && !closed_ &&
                       referrals_.contains(out->header.sequence);
  if (!awaited) Finish(out, status);
}

ucs_status_t Impl::OnFetched(void* arg, const void* header, size_t header_bytes, void*, size_t,
                             const ucp_am_recv_param_t*) {
  auto* self = static_cast<Impl*>(arg);
  const auto notice = ReadNotice(self->gate_, header, header_bytes);
  const auto at = notice ? self->referrals_.find(notice->number) : self->referrals_.end();
  if (at == self->referrals_.end() || at->second->peer->rank != RankId(notice->source)) {
    self->gate_.CountMalformed();
    return UCS_OK;
  }
  Outgoing* out = at->second;
  self->referrals_.erase(at);
  self->gate_.CountReferred();
  if (out->sent) self->Finish(out, UCS_OK);
  return UCS_OK;
}

void Impl::Finish(Outgoing* out, ucs_status_t status) {
  referrals_.erase(out->header.sequence);
  const auto at = outgoing_.find(out);
  if (status == UCS_OK) gate_.CountSent(out->header.payload_bytes);
  out->peer->pending -= WireBytes(out->header.payload_bytes);
  if (out->done) done_.push_back(std::move(out->done));
  outgoing_.erase(at);
}

void Impl::OnPeerError(void* arg, ucp_ep_h, ucs_status_t status) {
  auto* peer = static_cast<Peer*>(arg);
  if (peer->state == PeerState::kLost || peer->failure != UCS_OK) return;
  peer->failure = status;
  peer->owner->any_failure_ = true;
}

bool Impl::Progress() {
  Check(!closed_, "Progress after Close");
  bool any = wake_.Clear();
  for (auto& [to, frame] : posts_.TakeAll()) {
    Start(At(to), std::move(frame));
    any = true;
  }
  any |= ProgressWorker();
  any |= sharing_->TakeOffers([this](RankId rank) { return At(rank).endpoint; });
  any |= receiver_->StartReceives();
  any |= receiver_->Deliver(on_frame_);
  any |= SendFetched();
  any |= FreeEnded(closings_);
  any |= RunDone();
  any |= ReportLost();
  return any;
}

std::shared_ptr<SharedMemory> Impl::ShareMemory(size_t bytes, std::span<const RankId> readers) {
  Check(!closed_, "ShareMemory after Close");
  std::map<RankId, ucp_ep_h> endpoints;
  for (const RankId rank : readers) {
    if (At(rank).endpoint != nullptr) endpoints.emplace(rank, At(rank).endpoint);
  }
  return sharing_->Allocate(bytes, endpoints);
}

bool Impl::SendFetched() {
  const auto fetched = receiver_->TakeFetched();
  for (const auto& [rank, sequence] : fetched) {
    const auto peer = peers_.find(rank);
    if (peer == peers_.end() || peer->second->endpoint == nullptr) continue;
    sharing_->SendFetched(peer->second->endpoint, sequence);
  }
  return !fetched.empty();
}

bool Impl::ProgressWorker() {
  int n = 0;
  while (n < kProgressBatch && ucp_worker_progress(worker_.get()) != 0) ++n;
  return n > 0;
}

bool Impl::RunDone() {
  if (done_.empty()) return false;
  // They may send, and so add to done_.
  for (const auto& done : std::exchange(done_, {})) done();
  return true;
}

bool Impl::ReportLost() {
  if (!any_failure_) return false;
  any_failure_ = false;
  for (auto& [rank, peer] : peers_) {
    if (peer->failure == UCS_OK) continue;
    const std::string reason = ucs_status_string(std::exchange(peer->failure, UCS_OK));
    Drop(*peer);
    if (on_lost_) on_lost_(rank, reason);
  }
  return true;
}

void Impl::Drop(Peer& peer) {
  peer.state = PeerState::kLost;
  peer.failure = UCS_OK;
  gate_.RemovePeer(peer.rank);
  std::vector<Outgoing*> never_fetched;
  for (const auto& [sequence, out] : referrals_) {
    if (out->peer == &peer && out->sent) never_fetched.push_back(out);
  }
  for (Outgoing* out : never_fetched) Finish(out, UCS_ERR_CANCELED);
  if (peer.endpoint != nullptr) CloseEndpoint(peer, UCP_EP_CLOSE_FLAG_FORCE);
}

void Impl::ClosePeer(RankId rank) {
  Peer& peer = At(rank);
  if (peer.state != PeerState::kLost) Drop(peer);
}

void Impl::CloseEndpoint(Peer& peer, uint32_t flags) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = flags;
  const ucs_status_ptr_t request = ucp_ep_close_nbx(std::exchange(peer.endpoint, nullptr), &param);
  if (UCS_PTR_IS_PTR(request)) closings_.push_back(request);
}

bool Impl::FreeEnded(std::vector<void*>& requests) {
  return std::erase_if(requests, [](void* request) {
           if (ucp_request_check_status(request) == UCS_INPROGRESS) return false;
           ucp_request_free(request);
           return true;
         }) > 0;
}

void Impl::ProgressUntil(const std::function<bool()>& ended, Clock::time_point deadline) {
  while (!ended() && Clock::now() < deadline) {
    if (!ProgressWorker()) std::this_thread::sleep_for(std::chrono::microseconds(50));
    SendFetched();
    if (!std::exchange(any_failure_, false)) continue;
    for (auto& [rank, peer] : peers_) {
      if (peer->failure != UCS_OK) Drop(*peer);
    }
  }
}

void Impl::Wait(std::chrono::milliseconds timeout) {
  const Clock::time_point asleep = Clock::now() + std::min<Clock::duration>(spin_, timeout);
  do {
    for (int i = 0; i < kSpins; ++i) {
      if (has_work() || wake_.is_set() || ucp_worker_progress(worker_.get()) != 0) return;
    }
  } while (Clock::now() < asleep);
  const ucs_status_t status = ucp_worker_arm(worker_.get());
  if (status == UCS_ERR_BUSY) return;
  CheckUcx(status, "ucp_worker_arm");
  if (!wake_.FallAsleep()) return;
  pollfd fds[] = {{worker_fd_, POLLIN, 0}, {wake_.fd(), POLLIN, 0}};
  const int ms = static_cast<int>(std::min<int64_t>(timeout.count(), 1 << 30));
  const int ready = poll(fds, 2, ms);
  const int error = errno;
  wake_.Awake(ready > 0 && fds[1].revents != 0);
  if (ready < 0 && error != EINTR) {
    throw Error(ErrorClass::kCluster, std::string("poll failed: ") + std::strerror(error));
  }
}

std::string Impl::Describe(RankId rank) const {
  const Peer& peer = At(rank);
  return peer.endpoint == nullptr ? "closed" : DescribeUcxEndpoint(peer.endpoint);
}

void Impl::Close(std::chrono::milliseconds timeout) {
  if (closed_) return;
  const Clock::time_point deadline = Clock::now() + timeout;
  for (auto& [to, frame] : posts_.TakeAll()) Start(At(to), std::move(frame));
  receiver_->Stop();
  SendFetched();

  // A flush does not wait for large frames that their receivers have yet to fetch; we do.
  ProgressUntil([this] { return outgoing_.empty(); }, deadline);
  std::vector<void*> flushes;
  for (auto& [rank, peer] : peers_) {
    if (peer->endpoint == nullptr || peer->failure != UCS_OK) continue;
    ucp_request_param_t param{};
    const ucs_status_ptr_t request = ucp_ep_flush_nbx(peer->endpoint, &param);
    if (UCS_PTR_IS_PTR(request)) flushes.push_back(request);
  }
  const auto flushed = [&] {
    FreeEnded(flushes);
    return flushes.empty();
  };
  ProgressUntil(flushed, deadline);
  for (auto& [rank, peer] : peers_) Drop(*peer);
  // A forced close ends what is still under way, flushes too; it takes well under a millisecond.
  const auto ended = [&] {
    FreeEnded(closings_);
    return flushed() && closings_.empty() && outgoing_.empty();
  };
  ProgressUntil(ended, Clock::now() + kForcedClose);

  closed_ = true;
  sharing_->Close();
  worker_.reset();
  // UCX is gone; whatever it did not complete ends here.
  receiver_.reset();
  while (!outgoing_.empty()) Finish(outgoing_.begin()->first, UCS_ERR_CANCELED);
  while (RunDone()) {
  }
  sharing_.reset();
  context_.reset();
}

}  // namespace

std::unique_ptr<UcxChannel> MakeUcxChannel(const UcxOptions& options) {
  SetUcxDefaults();
  return std::make_unique<Impl>(options);
}

}  // namespace passel::transport
