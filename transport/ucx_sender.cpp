#include "transport/ucx_sender.h"

#include <utility>

#include "transport/ucx_handles.h"

namespace passel::transport {

UcxSender::UcxSender(ucp_worker_h worker, FrameGate* gate, const UcxSharing* sharing)
    : gate_(gate), sharing_(sharing) {
  SetUcxHandler(worker, kFetched, &UcxSender::OnFetched, this);
}

void UcxSender::Start(UcxPeer& peer, OutgoingFrame frame) {
  auto owned = std::make_unique<Outgoing>();
  Outgoing* out = owned.get();
  outgoing_.emplace(out, std::move(owned));
  out->header = frame.header;
  out->done = std::move(frame.done);
  out->owner = this;
  out->peer = &peer;
  gate_->Stamp(out->header, frame.payload_bytes());
  if (peer.state == PeerState::kLost || peer.failure != UCS_OK || stopped_) {
    return Finish(out, UCS_ERR_CANCELED);
  }
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &UcxSender::OnSent;
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

void UcxSender::OnSent(void* request, ucs_status_t status, void* user_data) {
  ucp_request_free(request);
  auto* out = static_cast<Outgoing*>(user_data);
  out->owner->Sent(out, status);
}

// UCX is through with it; a peer that was referred to its pieces may not be.
void UcxSender::Sent(Outgoing* out, ucs_status_t status) {
  out->sent = true;
  const bool awaited = status == UCS_OK && out->peer->state == PeerState::kConnected && !stopped_ &&
                       referrals_.contains(out->header.sequence);
  if (!awaited) Finish(out, status);
}

ucs_status_t UcxSender::OnFetched(void* arg, const void* header, size_t header_bytes, void*, size_t,
                                  const ucp_am_recv_param_t*) {
  auto* self = static_cast<UcxSender*>(arg);
  const auto notice = ReadNotice(*self->gate_, header, header_bytes);
  const auto at = notice ? self->referrals_.find(notice->number) : self->referrals_.end();
  if (at == self->referrals_.end() || at->second->peer->rank != RankId(notice->source)) {
    self->gate_->CountMalformed();
    return UCS_OK;
  }
  Outgoing* out = at->second;
  self->referrals_.erase(at);
  self->gate_->CountReferred();
  if (out->sent) self->Finish(out, UCS_OK);
  return UCS_OK;
}

void UcxSender::Finish(Outgoing* out, ucs_status_t status) {
  referrals_.erase(out->header.sequence);
  const auto at = outgoing_.find(out);
  if (status == UCS_OK) gate_->CountSent(out->header.payload_bytes);
  out->peer->pending -= kFrameHeaderBytes + out->header.payload_bytes;
  if (out->done) done_.push_back(std::move(out->done));
  outgoing_.erase(at);
}

bool UcxSender::RunDone() {
  if (done_.empty()) return false;
  // They may send, and so add to done_.
  for (const auto& done : std::exchange(done_, {})) done();
  return true;
}

void UcxSender::CancelReferrals(const UcxPeer& peer) {
  std::vector<Outgoing*> never_fetched;
  for (const auto& [sequence, out] : referrals_) {
    if (out->peer == &peer && out->sent) never_fetched.push_back(out);
  }
  for (Outgoing* out : never_fetched) Finish(out, UCS_ERR_CANCELED);
}

void UcxSender::CancelAll() {
  while (!outgoing_.empty()) Finish(outgoing_.begin()->first, UCS_ERR_CANCELED);
}

}  // namespace passel::transport
