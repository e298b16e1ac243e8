#pragma once

#include <ucp/api/ucp.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "transport/buffer_pool.h"
#include "transport/channel.h"
#include "transport/frame_gate.h"
#include "transport/ucx_sharing.h"

namespace passel::transport {

// The receiving half of a UCX channel. UCX's callbacks only note what arrived; user code runs in
// Deliver, outside them, so it may send, close peers and throw. A header is judged before anything
// is allocated for its payload. One thread.
class UcxReceiver {
 public:
  UcxReceiver(ucp_worker_h worker, FrameGate* gate, const UcxSharing* sharing,
              uint64_t max_receive_bytes);
  UcxReceiver(const UcxReceiver&) = delete;
  UcxReceiver& operator=(const UcxReceiver&) = delete;

  // Starts receiving announced large frames, as far as memory allows; true if any was.
  bool StartReceives();
  // Referrals whose pieces are no longer read: their sources and sequences.
  using Fetched = std::vector<std::pair<RankId, uint64_t>>;
  Fetched TakeFetched();
  // Hands what has arrived to `handler`; true if anything was.
  bool Deliver(const Channel::FrameHandler& handler);
  bool has_frames() const { return !ready_.empty(); }
  // Drops what was not delivered and all that still comes. Receives in flight go on until the
  // worker is destroyed; then, not before, may this object be.
  void Stop();

 private:
  // A frame that may be delivered. Its payload lies in `buffer`, in memory of UCX's (`held`), or in
  // what a referral holds and shared memory.
  struct Frame {
    FrameHeader header;
    BufferPool::Buffer buffer;
    void* held = nullptr;
    std::vector<std::byte> referral;
    std::vector<std::span<const std::byte>> pieces;  // of the payload
  };
  class Delivered;
  // Frames that were kept beyond their delivery, on their way back; from any thread.
  struct Returned {
    std::mutex mutex;
    std::list<Frame> frames;
    std::atomic<bool> any{false};
  };
  // A frame that the sender announced, until its receive has ended.
  struct LargeFrame {
    Frame frame;
    void* descriptor = nullptr;  // until the receive starts
    UcxReceiver* owner = nullptr;
  };

  static ucs_status_t OnMessage(void* arg, const void* header, size_t header_bytes, void* data,
                                size_t bytes, const ucp_am_recv_param_t* param);
  static ucs_status_t OnReferral(void* arg, const void* header, size_t header_bytes, void* data,
                                 size_t bytes, const ucp_am_recv_param_t* param);
  static void OnReceived(void* request, ucs_status_t status, size_t bytes, void* user_data);
  ucs_status_t Arrived(const FrameHeader& header, void* data, uint64_t flags);
  void Finish(LargeFrame* large, ucs_status_t status);
  void Recycle(Frame& frame);

  // False where the referral is not taken.
  bool TakeReferral(std::span<const std::byte> header, const FrameHeader& parsed,
                    std::span<const std::byte> referral);

  ucp_worker_h worker_;
  FrameGate* gate_;
  const UcxSharing* sharing_;
  BufferPool pool_;
  std::deque<Frame> ready_;
  std::deque<std::unique_ptr<LargeFrame>> announced_;
  std::vector<std::unique_ptr<LargeFrame>> receiving_;
  Fetched fetched_;
  const std::shared_ptr<Returned> returned_ = std::make_shared<Returned>();
  bool stopped_ = false;
};

}  // namespace passel::transport
