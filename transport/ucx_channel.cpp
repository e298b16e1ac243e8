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
#include <utility>

#include "runtime/base/error.h"
#include "transport/frame_gate.h"
#include "transport/post_queue.h"
#include "transport/ucx_handles.h"
#include "transport/ucx_receiver.h"
#include "transport/ucx_sender.h"
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
                                                options.max_receive_bytes)),
        sender_(std::make_unique<UcxSender>(worker_.get(), &gate_, sharing_.get())) {
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
  static void OnPeerError(void* arg, ucp_ep_h endpoint, ucs_status_t status);

  UcxPeer& At(RankId rank) const {
    const auto at = peers_.find(rank);
    Check(at != peers_.end(), "no connection to rank " + std::to_string(rank.value));
    return *at->second;
  }
  bool SendFetched();
  void Drop(UcxPeer& peer);
  void CloseEndpoint(UcxPeer& peer, uint32_t flags);
  bool ProgressWorker();
  static bool FreeEnded(std::vector<void*>& requests);
  void ProgressUntil(const std::function<bool()>& ended, Clock::time_point deadline);
  bool ReportLost();
  bool has_work() const {
    return any_failure_ || sender_->any_done() || !posts_.empty() || receiver_->has_frames();
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
  std::unique_ptr<UcxSender> sender_;
  int worker_fd_ = -1;
  std::map<RankId, std::unique_ptr<UcxPeer>> peers_;  // fixed once connected
  std::vector<void*> closings_;                       // requests of endpoints that are closing
  bool any_failure_ = false;
  bool closed_ = false;
};

void Impl::Connect(const std::map<RankId, std::vector<std::byte>>& addresses, uint64_t nonce) {
  Check(peers_.empty() && !closed_, "Connect called twice or after Close");
  gate_.set_nonce(nonce);
  for (const auto& [rank, address] : addresses) {
    if (rank == self_) continue;
    auto peer = std::make_unique<UcxPeer>();
    peer->rank = rank;
    peer->any_failure = &any_failure_;
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
  UcxPeer& peer = At(to);
  peer.pending += kFrameHeaderBytes + frame.payload_bytes();
  sender_->Start(peer, std::move(frame));
}

void Impl::Post(RankId to, OutgoingFrame frame) {
  CheckOutgoing(frame);
  At(to).pending += kFrameHeaderBytes + frame.payload_bytes();
  posts_.Push(to, std::move(frame));
  wake_.Set();
}

void Impl::OnPeerError(void* arg, ucp_ep_h, ucs_status_t status) {
  auto* peer = static_cast<UcxPeer*>(arg);
  if (peer->state == PeerState::kLost || peer->failure != UCS_OK) return;
  peer->failure = status;
  *peer->any_failure = true;
}

bool Impl::Progress() {
  Check(!closed_, "Progress after Close");
  bool any = wake_.Clear();
  for (auto& [to, frame] : posts_.TakeAll()) {
    sender_->Start(At(to), std::move(frame));
    any = true;
  }
  any |= ProgressWorker();
  any |= sharing_->TakeOffers([this](RankId rank) { return At(rank).endpoint; });
  any |= receiver_->StartReceives();
  any |= receiver_->Deliver(on_frame_);
  any |= SendFetched();
  any |= FreeEnded(closings_);
  any |= sender_->RunDone();
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

void Impl::Drop(UcxPeer& peer) {
  peer.state = PeerState::kLost;
  peer.failure = UCS_OK;
  gate_.RemovePeer(peer.rank);
  sender_->CancelReferrals(peer);
  if (peer.endpoint != nullptr) CloseEndpoint(peer, UCP_EP_CLOSE_FLAG_FORCE);
}

void Impl::ClosePeer(RankId rank) {
  UcxPeer& peer = At(rank);
  if (peer.state != PeerState::kLost) Drop(peer);
}

void Impl::CloseEndpoint(UcxPeer& peer, uint32_t flags) {
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
  const UcxPeer& peer = At(rank);
  return peer.endpoint == nullptr ? "closed" : DescribeUcxEndpoint(peer.endpoint);
}

void Impl::Close(std::chrono::milliseconds timeout) {
  if (closed_) return;
  const Clock::time_point deadline = Clock::now() + timeout;
  for (auto& [to, frame] : posts_.TakeAll()) sender_->Start(At(to), std::move(frame));
  receiver_->Stop();
  SendFetched();

  // A flush does not wait for large frames that their receivers have yet to fetch; we do.
  ProgressUntil([this] { return sender_->empty(); }, deadline);
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
    return flushed() && closings_.empty() && sender_->empty();
  };
  ProgressUntil(ended, Clock::now() + kForcedClose);

  closed_ = true;
  sender_->Stop();
  sharing_->Close();
  worker_.reset();
  // UCX is gone; whatever it did not complete ends here.
  receiver_.reset();
  sender_->CancelAll();
  while (sender_->RunDone()) {
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
