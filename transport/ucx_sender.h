#pragma once

#include <ucp/api/ucp.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "transport/channel.h"
#include "transport/frame_gate.h"
#include "transport/ucx_sharing.h"

namespace passel::transport {

// The other end of a connection, of a UCX channel.
struct UcxPeer {
  RankId rank;
  ucp_ep_h endpoint = nullptr;
  PeerState state = PeerState::kConnected;
  ucs_status_t failure = UCS_OK;  // that UCX reported and the channel has not acted upon
  bool* any_failure = nullptr;    // of all peers
  std::atomic<uint64_t> pending{0};
};

// The sending half of a UCX channel: the frames under way. Those whose pieces lie in shared memory
// travel as referrals where the peer reads that. One thread; peers outlive it.
class UcxSender {
 public:
  UcxSender(ucp_worker_h worker, FrameGate* gate, const UcxSharing* sharing);
  UcxSender(const UcxSender&) = delete;
  UcxSender& operator=(const UcxSender&) = delete;

  // Starts a send, whose bytes count as pending at `peer` already; of a peer that is gone, ends it.
  void Start(UcxPeer& peer, OutgoingFrame frame);
  // Runs `done` of the sends that have ended; true if there were any.
  bool RunDone();
  bool any_done() const { return !done_.empty(); }
  // No sends under way.
  bool empty() const { return outgoing_.empty(); }
  // Ends those that UCX is through with and that `peer`, which is lost, will not fetch.
  void CancelReferrals(const UcxPeer& peer);
  // Nothing is sent from here on, and nothing awaited.
  void Stop() { stopped_ = true; }
  // Ends all, once the worker is gone.
  void CancelAll();

 private:
  // A frame under way. UCX needs the header's and the payload's memory until it completes.
  struct Outgoing {
    FrameHeader header;
    std::function<void()> done;
    UcxSender* owner = nullptr;
    UcxPeer* peer = nullptr;
    std::vector<ucp_dt_iov_t> pieces;  // where there are several
    std::vector<std::byte> referral;   // where the peer fetches some of them
    bool sent = false;
  };

  static void OnSent(void* request, ucs_status_t status, void* user_data);
  static ucs_status_t OnFetched(void* arg, const void* header, size_t header_bytes, void* data,
                                size_t bytes, const ucp_am_recv_param_t* param);
  void Sent(Outgoing* out, ucs_status_t status);
  void Finish(Outgoing* out, ucs_status_t status);

  FrameGate* gate_;
  const UcxSharing* sharing_;
  std::unordered_map<Outgoing*, std::unique_ptr<Outgoing>> outgoing_;
  std::unordered_map<uint64_t, Outgoing*> referrals_;  // of those, by sequence, until fetched
  std::vector<std::function<void()>> done_;            // of sends that ended
  bool stopped_ = false;
};

}  // namespace passel::transport
