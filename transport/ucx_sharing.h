#pragma once

#include <ucp/api/ucp.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "runtime/base/ids.h"
#include "transport/channel.h"
#include "transport/frame_gate.h"
#include "transport/ucx_handles.h"

namespace passel::transport {

// Active messages of a UCX channel. A frame travels whole, or, to a peer on the same machine, as a
// referral: its header and where its pieces lie in memory that the sender shares.
enum UcxMessage : unsigned {
  kWholeFrame = 0,  // header: FrameHeader; data: the payload
  kReferral = 1,    // header: FrameHeader; data: see UcxSharing::Refer
  kOffer = 2,       // header: UcxNotice; data: the key of a region of shared memory
  kTaken = 3,       // header: UcxNotice: the region can be read, so referrals may come
  kFetched = 4,     // header: UcxNotice: a referral's pieces are no longer read
};
struct UcxNotice {
  uint64_t nonce;
  int32_t source;
  uint32_t region;   // of an offer or its answer, from 1
  uint64_t address;  // of an offered region, in its owner's process
  uint64_t number;   // of an offer: bytes; kFetched: the frame's sequence
};
static_assert(sizeof(UcxNotice) == 32);

// Memory that peers read where it lies: the regions of this rank and of the others. One thread.
class UcxSharing {
 public:
  UcxSharing(std::shared_ptr<ucp_context> context, ucp_worker_h worker, FrameGate* gate);
  ~UcxSharing();
  UcxSharing(const UcxSharing&) = delete;
  UcxSharing& operator=(const UcxSharing&) = delete;

  // A region of this rank's, offered to the peers at `with`. Null where UCX has no such memory.
  std::shared_ptr<SharedMemory> Allocate(size_t bytes, const std::map<RankId, ucp_ep_h>& with);
  // Bytes of a referral's data, at most: it goes in one message.
  static constexpr uint64_t kMostReferral = 65536;
  // The data of a referral of `frame`: the number of its parts (u64), a Part each, and behind them
  // what must travel. Empty where `to` reads none of it in place, or too little.
  std::vector<std::byte> Refer(RankId to, const OutgoingFrame& frame) const;
  // The parts of a referral of `from`; empty where it is malformed.
  std::vector<std::span<const std::byte>> Resolve(RankId from,
                                                  std::span<const std::byte> data) const;
  void SendFetched(ucp_ep_h to, uint64_t sequence);
  // Takes what peers have offered; `endpoint_of` null for those that are lost. True if any was.
  template <typename EndpointOf>
  bool TakeOffers(EndpointOf endpoint_of) {
    if (offers_.empty()) return false;
    for (const Offer& offer : std::exchange(offers_, {})) {
      if (ucp_ep_h endpoint = endpoint_of(RankId(offer.notice.source))) Take(endpoint, offer);
    }
    return true;
  }
  // Before the worker goes, when nothing is to be fetched any more: the peers' regions.
  void Close();

 private:
  // region: 0 for what travels.
  struct Part {
    uint32_t region;
    uint32_t bytes;
    uint64_t offset;
  };
  static_assert(sizeof(Part) == 16);
  struct Offer {
    UcxNotice notice;
    std::vector<std::byte> key;
  };
  struct Region;
  struct PeerRegion {
    ucp_rkey_h key;
    std::span<const std::byte> memory;
  };

  static ucs_status_t OnOffer(void* arg, const void* header, size_t header_bytes, void* data,
                              size_t bytes, const ucp_am_recv_param_t* param);
  static ucs_status_t OnTaken(void* arg, const void* header, size_t header_bytes, void* data,
                              size_t bytes, const ucp_am_recv_param_t* param);
  void Take(ucp_ep_h endpoint, const Offer& offer);
  void Send(ucp_ep_h to, UcxMessage what, UcxNotice notice, std::vector<std::byte> data);

  std::shared_ptr<ucp_context> context_;
  ucp_worker_h worker_;
  FrameGate* gate_;
  uint32_t regions_ = 0;  // ever
  std::vector<std::weak_ptr<Region>> own_;
  std::map<RankId, std::map<uint32_t, PeerRegion>> peers_;
  std::vector<Offer> offers_;
};

// The notice in an active message's header, where it is one of a peer of this job.
std::optional<UcxNotice> ReadNotice(const FrameGate& gate, const void* header, size_t header_bytes);

}  // namespace passel::transport
