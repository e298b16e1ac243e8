#include "transport/ucx_receiver.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "runtime/base/error.h"
#include "transport/ucx_handles.h"

namespace passel::transport {
namespace {

constexpr uint64_t kKeepBytes = 64u << 20;
// Announced frames cost a descriptor each, and those referred to what says where they lie; honest
// senders bound their bytes in flight far below.
constexpr size_t kMaxAnnounced = 4096;

bool IsAligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

class UcxReceiver::Delivered final : public IncomingPayload {
 public:
  Delivered(UcxReceiver* receiver, Frame* frame) : receiver_(receiver), frame_(frame) {
    if (!frame->referral.empty()) return;
    const auto* data = frame->held != nullptr ? static_cast<const std::byte*>(frame->held)
                                              : frame->buffer.data.get();
    frame->pieces.assign(1, {data, frame->header.payload_bytes});
  }
  std::span<const std::span<const std::byte>> pieces() const override { return frame_->pieces; }
  std::span<const std::byte> whole() override {
    // A single piece may be shared memory, too.
    if (!frame_->referral.empty() && frame_->buffer.data == nullptr) Copy();
    return frame_->pieces.front();
  }
  std::shared_ptr<const void> Keep() override {
    struct Kept {
      std::shared_ptr<Returned> returned;
      std::list<Frame> frame{1};  // a node, so that to return it takes no memory
      ~Kept() {
        const std::lock_guard lock(returned->mutex);
        returned->frames.splice(returned->frames.end(), frame);
        returned->any.store(true, std::memory_order_release);
      }
    };
    // UCX's memory is released by its own thread.
    if (frame_->held != nullptr) {
      Copy();
      ucp_am_data_release(receiver_->worker_, std::exchange(frame_->held, nullptr));
    }
    auto kept = std::make_shared<Kept>();
    kept->returned = receiver_->returned_;
    kept->frame.front() = std::move(*frame_);
    frame_ = &kept->frame.front();
    return kept;
  }

 private:
  void Copy() {
    frame_->buffer = receiver_->pool_.Acquire(frame_->header.payload_bytes);
    std::byte* to = frame_->buffer.data.get();
    for (const auto& piece : frame_->pieces) to = std::copy(piece.begin(), piece.end(), to);
    frame_->pieces.assign(1, {frame_->buffer.data.get(), frame_->header.payload_bytes});
  }

  UcxReceiver* receiver_;
  Frame* frame_;
};

UcxReceiver::UcxReceiver(ucp_worker_h worker, FrameGate* gate, const UcxSharing* sharing,
                         uint64_t max_receive_bytes)
    : worker_(worker),
      gate_(gate),
      sharing_(sharing),
      pool_(std::max(max_receive_bytes, MaxPayloadBytes(FrameType::kKv)), kKeepBytes) {
  SetUcxHandler(worker_, kWholeFrame, &UcxReceiver::OnMessage, this);
  SetUcxHandler(worker_, kReferral, &UcxReceiver::OnReferral, this);
}

ucs_status_t UcxReceiver::OnMessage(void* arg, const void* header, size_t header_bytes, void* data,
                                    size_t bytes, const ucp_am_recv_param_t* param) {
  auto* self = static_cast<UcxReceiver*>(arg);
  // UCS_OK drops the message; a rendezvous sender then sees its send completed.
  if (self->stopped_) return UCS_OK;
  const auto admitted =
      self->gate_->Admit({static_cast<const std::byte*>(header), header_bytes}, bytes);
  if (!admitted) return UCS_OK;
  try {
    return self->Arrived(*admitted, data, param->recv_attr);
  } catch (const std::bad_alloc&) {
    self->gate_->CountOverflow();
    return UCS_OK;
  }
}

ucs_status_t UcxReceiver::Arrived(const FrameHeader& header, void* data, uint64_t flags) {
  if ((flags & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
    if (announced_.size() >= kMaxAnnounced) {
      gate_->CountOverflow();
      return UCS_ERR_NO_RESOURCE;
    }
    auto large = std::make_unique<LargeFrame>();
    large->frame.header = header;
    large->descriptor = data;
    large->owner = this;
    announced_.push_back(std::move(large));
    return UCS_INPROGRESS;
  }
  if (header.payload_bytes == 0) {
    ready_.push_back({header, {}, nullptr, {}, {}});
    return UCS_OK;
  }
  if ((flags & UCP_AM_RECV_ATTR_FLAG_DATA) != 0 && IsAligned(data)) {
    ready_.push_back({header, {}, data, {}, {}});
    return UCS_INPROGRESS;
  }
  Frame frame{header, pool_.Acquire(header.payload_bytes), nullptr, {}, {}};
  std::memcpy(frame.buffer.data.get(), data, header.payload_bytes);
  ready_.push_back(std::move(frame));
  return UCS_OK;
}

ucs_status_t UcxReceiver::OnReferral(void* arg, const void* header_data, size_t header_bytes,
                                     void* data, size_t bytes, const ucp_am_recv_param_t* param) {
  auto* self = static_cast<UcxReceiver*>(arg);
  const std::span header(static_cast<const std::byte*>(header_data), header_bytes);
  const bool whole = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  const auto parsed = ParseFrameHeader(header, nullptr);
  if (!parsed || !whole) {
    self->gate_->CountMalformed();
    return UCS_OK;
  }
  try {
    const RankId source(parsed->source);
    const bool known = parsed->nonce == self->gate_->nonce() && self->gate_->Knows(source);
    const std::span body(static_cast<const std::byte*>(data), bytes);
    if (!self->TakeReferral(header, *parsed, body) && known) {
      // Its sender waits for this, as for the end of any send.
      self->fetched_.emplace_back(source, parsed->sequence);
    }
  } catch (const std::bad_alloc&) {
    self->gate_->CountOverflow();
  }
  return UCS_OK;
}

bool UcxReceiver::TakeReferral(std::span<const std::byte> header, const FrameHeader& parsed,
                               std::span<const std::byte> referral) {
  if (stopped_) return false;
  const auto admitted = gate_->Admit(header, parsed.payload_bytes);
  if (!admitted) return false;
  if (ready_.size() >= kMaxAnnounced) {
    gate_->CountOverflow();
    return false;
  }
  Frame frame{*admitted, {}, nullptr, {}, {}};
  if (referral.size() <= UcxSharing::kMostReferral) {
    frame.referral.assign(referral.begin(), referral.end());
    frame.pieces = sharing_->Resolve(RankId(admitted->source), frame.referral);
  }
  uint64_t payload = 0;
  for (const auto& piece : frame.pieces) payload += piece.size();
  if (payload == 0 || payload != admitted->payload_bytes) {
    gate_->CountMalformed();
    return false;
  }
  ready_.push_back(std::move(frame));
  return true;
}

bool UcxReceiver::StartReceives() {
  bool any = false;
  while (!announced_.empty()) {
    LargeFrame* large = announced_.front().get();
    large->frame.buffer = pool_.TryAcquire(large->frame.header.payload_bytes);
    if (large->frame.buffer.data == nullptr) break;
    receiving_.push_back(std::move(announced_.front()));
    announced_.pop_front();
    any = true;

    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.recv_am = &UcxReceiver::OnReceived;
    param.user_data = large;
    void* const descriptor = std::exchange(large->descriptor, nullptr);
    const ucs_status_ptr_t request =
        ucp_am_recv_data_nbx(worker_, descriptor, large->frame.buffer.data.get(),
                             large->frame.header.payload_bytes, &param);
    if (!UCS_PTR_IS_PTR(request)) Finish(large, UCS_PTR_STATUS(request));
  }
  return any;
}

void UcxReceiver::OnReceived(void* request, ucs_status_t status, size_t, void* user_data) {
  ucp_request_free(request);
  auto* large = static_cast<LargeFrame*>(user_data);
  large->owner->Finish(large, status);
}

void UcxReceiver::Finish(LargeFrame* large, ucs_status_t status) {
  const auto at = std::find_if(receiving_.begin(), receiving_.end(),
                               [&](const auto& p) { return p.get() == large; });
  Check(at != receiving_.end(), "a receive that was not under way has ended");
  const std::unique_ptr<LargeFrame> owner = std::move(*at);
  receiving_.erase(at);
  if (status == UCS_OK && !stopped_) {
    ready_.push_back(std::move(owner->frame));
  } else {
    Recycle(owner->frame);
  }
}

void UcxReceiver::Recycle(Frame& frame) {
  if (frame.held != nullptr) ucp_am_data_release(worker_, frame.held);
  pool_.Release(std::move(frame.buffer));
  if (frame.referral.empty()) return;
  fetched_.emplace_back(RankId(frame.header.source), frame.header.sequence);
}

UcxReceiver::Fetched UcxReceiver::TakeFetched() {
  if (returned_->any.load(std::memory_order_acquire)) {
    std::list<Frame> frames;
    {
      const std::lock_guard lock(returned_->mutex);
      frames.swap(returned_->frames);
      returned_->any.store(false, std::memory_order_release);
    }
    for (Frame& frame : frames) Recycle(frame);
  }
  return std::exchange(fetched_, {});
}

bool UcxReceiver::Deliver(const Channel::FrameHandler& handler) {
  bool any = false;
  while (!ready_.empty()) {
    any = true;
    // Recycled also where the handler throws.
    struct Loan {
      UcxReceiver* receiver;
      Frame frame;
      ~Loan() { receiver->Recycle(frame); }
    } loan{this, std::move(ready_.front())};
    ready_.pop_front();
    const FrameHeader header = loan.frame.header;
    // Judged again: its peer may have been closed or the epoch changed since it arrived.
    if (!gate_->Admit(std::as_bytes(std::span(&header, 1)), header.payload_bytes)) continue;
    gate_->CountDelivered(header);
    Delivered payload(this, &loan.frame);
    if (handler) handler(header, payload);
  }
  return any;
}

void UcxReceiver::Stop() {
  stopped_ = true;
  for (Frame& frame : ready_) Recycle(frame);
  ready_.clear();
  for (const auto& large : announced_) ucp_am_data_release(worker_, large->descriptor);
  announced_.clear();
}

}  // namespace passel::transport
